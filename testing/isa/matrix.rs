//! Products of matrices: MFMA of gfx9, WMMA of gfx11 and gfx12. The lanes of a wave hold the elements:
//!
//! ```text
//! n = columns of the result, g = lane / n (its group), j = element within the lane's registers
//!              A: row lane % n, k        B: column lane % n, k    C, D: column lane % n, row of register r
//! MFMA 16x16   j + per * g               the same                 4 g + r
//! MFMA 32x32   j + per * g               the same                 8 (r / 4) + 4 g + r % 4
//! WMMA gfx11   j, both halves alike      the same                 2 r + g
//! WMMA gfx12   j + 8 g                   the same                 8 g + r
//! ```
//! Sums are taken in f64 and rounded once; in which order the hardware sums is not documented. gfx90a takes subnormal f16
//! and bf16 for zero, and gives no subnormal f32 (rocBLAS's documentation, "MI200 (gfx90a) Considerations").

use crate::context::{Context, Kind};
use crate::float::{BF16, E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ, F16, Narrow, flush};
use crate::handlers::Handler;
use crate::instruction::{Operand, Operation};
use crate::wave::{Step, Value};

struct Shape {
    columns: usize,
    depth: usize,
    formats: [Narrow; 2],
}

fn shape(mnemonic: &str, fnuz: bool) -> Option<Shape> {
    let rest = mnemonic.strip_prefix("v_mfma_f32_").or_else(|| mnemonic.strip_prefix("v_wmma_f32_"))?;
    let rest = rest.strip_suffix("_1k").unwrap_or(rest);
    let (size, depth) =
        rest.strip_prefix("16x16x").map(|depth| (16, depth)).or_else(|| Some((32, rest.strip_prefix("32x32x")?)))?;
    let digits = depth.find(|character: char| !character.is_ascii_digit())?;
    let (depth, kind) = depth.split_at(digits);
    let (three, two) = if fnuz { (E4M3_FNUZ, E5M2_FNUZ) } else { (E4M3, E5M2) };
    let formats = match kind.trim_start_matches('_') {
        "f16" => [F16; 2],
        "bf16" => [BF16; 2],
        "fp8_fp8" => [three; 2],
        "bf8_bf8" => [two; 2],
        "fp8_bf8" => [three, two],
        "bf8_fp8" => [two, three],
        _ => return None,
    };
    Some(Shape { columns: size, depth: depth.parse().ok()?, formats })
}

pub fn find(mnemonic: &str) -> Option<Handler> {
    let shape = shape(mnemonic, false)?;
    let known: &[(usize, usize)] =
        if mnemonic.starts_with("v_wmma") { &[(16, 16)] } else { &[(16, 16), (16, 32), (32, 8), (32, 16)] };
    known.contains(&(shape.columns, shape.depth)).then_some(multiply as Handler)
}

fn multiply(c: &mut Context, i: &Operation) -> Step {
    let modifiers = &i.modifiers;
    if modifiers.op_sel != 0 || modifiers.neg_lo != 0 || modifiers.neg_hi != 0 || modifiers.clamp {
        return Err("modifiers of matrix products are not known here".into());
    }
    if i.mnemonic.starts_with("v_wmma") && c.wave.exec != c.wave.all_lanes() {
        return Err("WMMA with lanes missing from EXEC".into());
    }
    let shape = shape(&i.mnemonic, c.target.fnuz).ok_or("a shape that is not known here")?;
    let is_wmma = i.mnemonic.starts_with("v_wmma");
    let replicated = is_wmma && c.target.generation == 11;
    let (columns, width) = (shape.columns, c.wave.width);
    let groups = width / columns;
    let per_lane = if replicated { shape.depth } else { shape.depth / groups };
    let flushes = c.target.name == "gfx90a";
    let mut matrices = Vec::new();
    for (index, format) in shape.formats.iter().enumerate() {
        let bits = 1 + format.exponent_bits + format.mantissa_bits;
        let per_register = 32 / bits as usize;
        let mut matrix = vec![vec![0f64; shape.depth]; columns];
        for register in 0..per_lane / per_register {
            let value = c.plain(Context::operand(i, index + 1)?, register as u16, Kind::B32)?;
            if value.undefined & c.wave.all_lanes() != 0 {
                return Err("a matrix has lanes that are undefined".into());
            }
            for lane in 0..width {
                for part in 0..per_register {
                    let group = if replicated { 0 } else { lane / columns };
                    let k = group * per_lane + register * per_register + part;
                    let code = value.lanes[lane] >> (bits as usize * part) & ((1u64 << bits) - 1) as u32;
                    let zero = flushes && code >> format.mantissa_bits & ((1 << format.exponent_bits) - 1) == 0;
                    matrix[lane % columns][k] = if zero { 0.0 } else { format.widen(code) };
                }
            }
        }
        matrices.push(matrix);
    }
    let Operand::Vector(destination) = Context::operand(i, 0)?.operand else { return Err("no vector register".into()) };
    let addend = Context::operand(i, 3)?;
    let mut results = Vec::new();
    for register in 0..columns * columns / width {
        let constant = !matches!(addend.operand, Operand::Vector(_));
        let mut value = c.plain(addend, if constant { 0 } else { register as u16 }, Kind::B32)?;
        for lane in 0..width {
            let group = lane / columns;
            let row = match (is_wmma, columns, c.target.generation) {
                (true, _, 11) => 2 * register + group,
                (true, ..) => 8 * group + register,
                (false, 16, _) => 4 * group + register,
                (false, ..) => 8 * (register / 4) + 4 * group + register % 4,
            };
            let (a, b) = (&matrices[0][row], &matrices[1][lane % columns]);
            let sum = a.iter().zip(b).fold(f64::from(f32::from_bits(value.lanes[lane])), |sum, (x, y)| sum + x * y);
            let sum = if flushes { flush(sum as f32) } else { sum as f32 };
            value.lanes[lane] = sum.to_bits();
        }
        results.push(value);
    }
    for (register, value) in results.iter().enumerate() {
        let value: &Value = value;
        c.wave.set_vector(destination + register as u16, value, c.wave.all_lanes())?;
    }
    Ok(())
}

//! Products of matrices: A and B are put into registers by the layouts of the manuals, and the result is compared with the
//! product taken row by column. Small integers: exact in every format.

use super::{assemble, run_block};
use crate::float::{BF16, E4M3, E4M3_FNUZ, F16, Narrow};

/// Where an element lies: the lane, and its place among the lane's.
type Place = fn(row: usize, k: usize) -> (usize, usize);

struct Case {
    arch: &'static str,
    instruction: &'static str,
    columns: usize,
    depth: usize,
    format: Narrow,
    /// Of A; of B the same with column for row.
    place: Place,
    /// Of the result: the lane and the register.
    result: fn(row: usize, column: usize) -> (usize, usize),
    loads: [&'static str; 3],
    /// Powers of two that the elements of A and B are multiplied by.
    units: [f64; 2],
}

const ONES: [f64; 2] = [1.0; 2];

fn element(row: usize, k: usize, salt: usize) -> f64 {
    ((row * 7 + k * 5 + salt) % 9) as f64 - 4.0
}

fn check(case: &Case) {
    let (width, bits) = (
        if case.arch.starts_with("gfx9") { 64 } else { 32 },
        1 + case.format.exponent_bits + case.format.mantissa_bits,
    );
    let replicated = case.arch == "gfx1100";
    let per_lane = if replicated { case.depth } else { case.depth * case.columns / width };
    let words = per_lane * bits as usize / 32;
    let outputs = case.columns * case.columns / width;
    let pack = |salt: usize, unit: f64| {
        let mut registers = vec![0u32; width * words];
        for row in 0..case.columns {
            for k in 0..case.depth {
                let (lane, at) = (case.place)(row, k);
                let bit = at * bits as usize;
                let code = case.format.narrow(element(row, k, salt) * unit) << (bit % 32);
                registers[lane * words + bit / 32] |= code;
                if replicated {
                    registers[(lane + 16) * words + bit / 32] |= code;
                }
            }
        }
        registers
    };
    let [arguments, load, store] = case.loads;
    let (wait, wait_all) = if case.arch == "gfx1201" {
        ("s_wait_kmcnt 0x0", "s_wait_loadcnt 0x0")
    } else {
        ("s_waitcnt lgkmcnt(0)", "s_waitcnt vmcnt(0)")
    };
    let mut text = format!("{arguments} s[4:7], s[0:1], 0x0\n {arguments} s[8:11], s[0:1], 0x10\n {wait}\n");
    for (first, base) in [(20, 4), (40, 6)] {
        text += &format!("v_mul_u32_u24 v1, {}, v0\n", 4 * words);
        for word in 0..words {
            text += &format!("{load} v{}, v1, s[{base}:{}] offset:{}\n", first + word, base + 1, 4 * word);
        }
    }
    text += &format!("{wait_all}\n");
    // C is the row's number times 100, whatever it is: here the register's.
    for register in 0..outputs {
        text += &format!("v_mov_b32 v{}, 2.0\n", 60 + register);
    }
    let range = |first: usize, count: usize| format!("v[{first}:{}]", first + count - 1);
    text += &format!(
        "{} {}, {}, {}, {}\n",
        case.instruction,
        range(80, outputs),
        range(20, words),
        range(40, words),
        range(60, outputs)
    );
    text += &format!("v_mul_u32_u24 v1, {}, v0\n", 4 * outputs);
    for register in 0..outputs {
        text += &format!("{store} v1, v{}, s[8:9] offset:{}\n", 80 + register, 4 * register);
    }
    text += "s_endpgm\n";
    let mut buffers = [pack(0, case.units[0]), pack(3, case.units[1]), vec![0; width * outputs]];
    run_block(&assemble(case.arch, &text), width as u32, &mut buffers).unwrap();
    for row in 0..case.columns {
        for column in 0..case.columns {
            let (lane, register) = (case.result)(row, column);
            let got = f32::from_bits(buffers[2][lane * outputs + register]);
            let sum: f64 = (0..case.depth).map(|k| element(row, k, 0) * element(column, k, 3)).sum();
            // gfx90a takes subnormals for zero.
            let seen = case.arch != "gfx90a" || case.units == ONES;
            let wanted = if seen { sum * case.units[0] * case.units[1] } else { 0.0 };
            assert_eq!(f64::from(got), wanted + 2.0, "{}: {} row {row}, column {column}", case.arch, case.instruction);
        }
    }
}

const GFX9: [&str; 3] = ["s_load_dwordx4", "global_load_dword", "global_store_dword"];
const NEWER: [&str; 3] = ["s_load_b128", "global_load_b32", "global_store_b32"];

#[test]
fn mfma() {
    let result: fn(usize, usize) -> (usize, usize) = |row, column| (16 * (row / 4) + column, row % 4);
    let by_four: Place = |row, k| (16 * (k / 4) + row, k % 4);
    let by_eight: Place = |row, k| (16 * (k / 8) + row, k % 8);
    for (arch, instruction, depth, format, place) in [
        ("gfx90a", "v_mfma_f32_16x16x16bf16_1k", 16, BF16, by_four),
        ("gfx90a", "v_mfma_f32_16x16x16f16", 16, F16, by_four),
        ("gfx942", "v_mfma_f32_16x16x16_bf16", 16, BF16, by_four),
        ("gfx942", "v_mfma_f32_16x16x32_fp8_fp8", 32, E4M3_FNUZ, by_eight),
    ] {
        check(&Case { arch, instruction, columns: 16, depth, format, place, result, loads: GFX9, units: ONES });
    }
    for arch in ["gfx90a", "gfx942"] {
        let instruction = if arch == "gfx90a" { "v_mfma_f32_16x16x16f16" } else { "v_mfma_f32_16x16x16_f16" };
        for units in [[2f64.powi(-24), 2f64.powi(13)], [2f64.powi(13), 2f64.powi(-24)]] {
            let format = F16;
            check(&Case {
                arch,
                instruction,
                columns: 16,
                depth: 16,
                format,
                place: by_four,
                result,
                loads: GFX9,
                units,
            });
        }
    }
    check(&Case {
        arch: "gfx942",
        instruction: "v_mfma_f32_32x32x8_f16",
        columns: 32,
        depth: 8,
        format: F16,
        place: |row, k| (32 * (k / 4) + row, k % 4),
        result: |row, column| (32 * (row / 4 % 2) + column, 4 * (row / 8) + row % 4),
        loads: GFX9,
        units: ONES,
    });
}

#[test]
fn wmma() {
    for (instruction, format) in [("v_wmma_f32_16x16x16_bf16", BF16), ("v_wmma_f32_16x16x16_f16", F16)] {
        check(&Case {
            arch: "gfx1100",
            instruction,
            columns: 16,
            depth: 16,
            format,
            place: |row, k| (row, k),
            result: |row, column| (16 * (row % 2) + column, row / 2),
            loads: NEWER,
            units: ONES,
        });
    }
    for (instruction, format) in
        [("v_wmma_f32_16x16x16_bf16", BF16), ("v_wmma_f32_16x16x16_f16", F16), ("v_wmma_f32_16x16x16_fp8_fp8", E4M3)]
    {
        check(&Case {
            arch: "gfx1201",
            instruction,
            columns: 16,
            depth: 16,
            format,
            place: |row, k| (16 * (k / 8) + row, k % 8),
            result: |row, column| (16 * (row / 8) + column, row % 8),
            loads: NEWER,
            units: ONES,
        });
    }
}

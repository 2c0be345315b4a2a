//! Operations of one lane, against the host's arithmetic.

use super::{ALL, Cases, Random, words};
use crate::float;

fn f(bits: u32) -> f32 {
    f32::from_bits(bits)
}

impl Cases {
    /// Operations with one result, on every architecture that has them.
    fn word(&mut self, archs: &[&'static str], code: &str, expected: impl Fn(u32, u32, u32) -> u32 + Copy + 'static) {
        for arch in archs {
            self.add(arch, code, &words(128), move |[a, b, c]| [expected(a, b, c), 0]);
        }
    }
}

const GFX9: [&str; 2] = ["gfx90a", "gfx942"];
const NEWER: [&str; 2] = ["gfx1100", "gfx1201"];

#[test]
fn integers_and_bits() {
    let mut cases = Cases::default();
    cases.word(&GFX9, "v_add_u32 v10, v1, v2", |a, b, _| a.wrapping_add(b));
    cases.word(&NEWER, "v_sub_nc_u32 v10, v1, v2", |a, b, _| a.wrapping_sub(b));
    cases.word(&ALL, "v_lshlrev_b32 v10, v1, v2", |a, b, _| b.wrapping_shl(a));
    cases.word(&ALL, "v_ashrrev_i32 v10, 7, v2", |_, b, _| (b as i32 >> 7) as u32);
    cases.word(&ALL, "v_mul_hi_u32 v10, v1, v2", |a, b, _| ((u64::from(a) * u64::from(b)) >> 32) as u32);
    cases.word(&ALL, "v_mul_lo_u32 v10, v1, -3", |a, _, _| a.wrapping_mul(3).wrapping_neg());
    cases.word(&ALL, "v_bfe_u32 v10, v1, 5, 12", |a, _, _| a >> 5 & 0xfff);
    cases.word(&ALL, "v_bfe_i32 v10, v1, 28, 4", |a, _, _| (a as i32 >> 28) as u32);
    cases.word(&ALL, "v_bfi_b32 v10, v1, v2, v3", |a, b, c| (a & b) | (!a & c));
    cases.word(&ALL, "v_alignbit_b32 v10, v1, v2, 9", |a, b, _| ((u64::from(a) << 32 | u64::from(b)) >> 9) as u32);
    cases.word(&ALL, "v_mad_u32_u24 v10, v1, v2, v3", |a, b, c| {
        (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff).wrapping_add(c)
    });
    cases.word(&ALL, "v_lshl_or_b32 v10, v1, 3, v3", |a, _, c| a << 3 | c);
    // Bytes 0 to 3 are the second source's, 4 to 7 the first's; 12 is zero.
    cases.word(&ALL, "s_mov_b32 s8, 0x0c060104\n v_perm_b32 v10, v1, v2, s8", |a, b, _| {
        a.to_le_bytes()[0] as u32 | (b.to_le_bytes()[1] as u32) << 8 | (a.to_le_bytes()[2] as u32) << 16
    });
    cases.word(
        &GFX9,
        "v_and_b32_sdwa v10, v1, v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_2 src1_sel:WORD_1",
        |a, b, _| (a >> 16 & 0xff) & (b >> 16),
    );
    cases.word(
        &GFX9,
        "v_or_b32_sdwa v10, v1, v2 dst_sel:WORD_1 dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:DWORD",
        |a, b, _| (a | b) << 16,
    );
    cases.word(
        &GFX9,
        "v_and_b32_sdwa v10, sext(v1), v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_0 src1_sel:DWORD",
        |a, b, _| a as i16 as u32 & b,
    );
    cases.check();
}

#[test]
fn carries_and_wide_numbers() {
    let mut cases = Cases::default();
    let wide = |a: u32, b: u32| u64::from(a) | u64::from(b) << 32;
    let split = |x: u64| [x as u32, (x >> 32) as u32];
    let inputs = words(128);
    for arch in GFX9 {
        cases.add(
            arch,
            "v_add_co_u32 v10, vcc, v1, v2\n v_addc_co_u32 v11, vcc, v3, v3, vcc",
            &inputs,
            move |[a, b, c]| split(wide(a, c).wrapping_add(wide(b, c))),
        );
        cases.add(
            arch,
            "v_mov_b32 v23, 0\n v_mad_u64_u32 v[10:11], s[8:9], v1, v2, v[22:23]",
            &inputs,
            move |[a, b, c]| split((u64::from(a) * u64::from(b)).wrapping_add(c.into())),
        );
    }
    for arch in NEWER {
        cases.add(
            arch,
            "v_sub_co_u32 v10, vcc_lo, v1, v2\n v_sub_co_ci_u32 v11, vcc_lo, v3, v1, vcc_lo",
            &inputs,
            move |[a, b, c]| split(wide(a, c).wrapping_sub(wide(b, a))),
        );
        cases.add(
            arch,
            "v_mov_b32 v12, v1\n v_mov_b32 v13, v2\n v_ashrrev_i64 v[10:11], v3, v[12:13]",
            &inputs,
            move |[a, b, c]| split((wide(a, b) as i64 >> (c & 63)) as u64),
        );
    }
    cases.add(
        "gfx942",
        "v_mov_b32 v12, v1\n v_mov_b32 v13, v2\n v_lshl_add_u64 v[10:11], v[12:13], 2, v[12:13]",
        &inputs,
        move |[a, b, _]| split(wide(a, b).wrapping_mul(5)),
    );
    // Scalars: the first lane's numbers.
    for arch in ALL {
        let (mul, add, addc) = match arch {
            "gfx1201" => ("s_mul_hi_u32", "s_add_co_u32", "s_add_co_ci_u32"),
            _ => ("s_mul_hi_u32", "s_add_u32", "s_addc_u32"),
        };
        let code = format!(
            "v_readfirstlane_b32 s8, v1\n v_readfirstlane_b32 s9, v2\n v_readfirstlane_b32 s10, v3\n\
             {mul} s11, s8, s9\n {add} s12, s9, s10\n {addc} s12, s11, 0\n v_mov_b32 v10, s11\n v_mov_b32 v11, s12"
        );
        for input in words(40) {
            cases.add(arch, &code, &[input; 8], move |[a, b, c]| {
                let high = ((u64::from(a) * u64::from(b)) >> 32) as u32;
                [high, high.wrapping_add(u32::from(b.checked_add(c).is_none()))]
            });
        }
    }
    cases.check();
}

#[test]
fn floats() {
    let mut cases = Cases::default();
    cases.word(&ALL, "v_add_f32 v10, v1, v2", |a, b, _| (f(a) + f(b)).to_bits());
    cases.word(&ALL, "v_mul_f32_e64 v10, -v1, |v2|", |a, b, _| (-f(a) * f(b).abs()).to_bits());
    cases.word(&ALL, "v_mul_f32_e64 v10, v1, v2 mul:2", |a, b, _| (f(a) * f(b) * 2.0).to_bits());
    cases.word(&ALL, "v_add_f32_e64 v10, v1, 1.0 clamp", |a, _, _| {
        let x = f(a) + 1.0;
        if x.is_nan() { 0 } else { x.clamp(0.0, 1.0).to_bits() }
    });
    cases.word(&ALL, "v_fma_f32 v10, v1, v2, -v3", |a, b, c| {
        // f64 holds the product; the sum is rounded twice, to odd first.
        let (product, addend) = (f64::from(f(a)) * f64::from(f(b)), -f64::from(f(c)));
        if f(a).is_nan() || f(b).is_nan() || f(c).is_nan() {
            return f32::NAN.to_bits();
        }
        let sum = product + addend;
        let back = sum - product;
        let error = (product - (sum - back)) + (addend - back);
        let odd = if sum.is_finite() && error != 0.0 && sum.to_bits() & 1 == 0 {
            if (error > 0.0) == (sum > 0.0) {
                f64::from_bits(sum.to_bits() + 1)
            } else {
                f64::from_bits(sum.to_bits() - 1)
            }
        } else {
            sum
        };
        (odd as f32).to_bits()
    });
    cases.word(&ALL, "v_cvt_f16_f32 v10, v1", |a, _, _| {
        let code = float::F16.narrow(f(a).into());
        if f(a).is_nan() { (a >> 16 & 0x8000) | 0x7e00 | (a >> 13 & 0x3ff) } else { code }
    });
    cases.word(&ALL, "v_cvt_u32_f32 v10, v1", |a, _, _| {
        let x = f64::from(f(a)).trunc();
        if x.is_nan() || x <= 0.0 {
            0
        } else if x >= 4294967295.0 {
            u32::MAX
        } else {
            x as u32
        }
    });
    cases.word(&ALL, "v_exp_f32 v10, v1", |a, _, _| {
        let x = f(a);
        if x.is_nan() {
            a
        } else if x < -126.0 {
            0
        } else {
            (f64::from(x).exp2() as f32).to_bits()
        }
    });
    cases.word(
        &["gfx1100"],
        "v_dual_mul_f32 v10, v1, v2 :: v_dual_add_f32 v11, v2, v3\n v_sub_f32 v10, v10, v11\n v_mov_b32 v11, 0",
        |a, b, c| (f(a) * f(b) - (f(b) + f(c))).to_bits(),
    );
    // Each half reads what was there before the other wrote.
    cases.word(
        &["gfx1201"],
        "v_mov_b32 v10, v1\n v_mov_b32 v13, v2\n v_dual_mov_b32 v10, v13 :: v_dual_mov_b32 v13, v10\n v_sub_nc_u32 v10, v10, v13",
        |a, b, _| b.wrapping_sub(a),
    );
    cases.check();
}

#[test]
fn packed_and_mixed() {
    let mut cases = Cases::default();
    let pair = |a: u32, b: u32, op: fn(f64, f64) -> f64, swap: bool| {
        let of = |word: u32, half: u32| float::F16.widen(word >> (16 * half) & 0xffff);
        (0..2).fold(0, |result, half| {
            let other = if swap { 0 } else { half };
            result | float::F16.narrow(op(of(a, half), of(b, other))) << (16 * half)
        })
    };
    // Finite f16 alone: what a NaN's bits become is not compared by halves.
    let inputs: Vec<[u32; 3]> = words(128).into_iter().map(|row| row.map(|word| word & 0xbbff_bbff)).collect();
    for arch in ALL {
        cases.add(arch, "v_pk_mul_f16 v10, v1, v2", &inputs, move |[a, b, _]| [pair(a, b, |x, y| x * y, false), 0]);
        cases.add(arch, "v_pk_add_f16 v10, v1, v2 op_sel_hi:[1,0]", &inputs, move |[a, b, _]| {
            [pair(a, b, |x, y| x + y, true), 0]
        });
    }
    for arch in ["gfx942", "gfx1201"] {
        cases.add(arch, "v_fma_mix_f32 v10, v1, v2, v3 op_sel:[1,0,0] op_sel_hi:[1,1,0]", &inputs, move |[a, b, c]| {
            let x = float::F16.widen(a >> 16) as f32;
            [x.mul_add(float::F16.widen(b & 0xffff) as f32, f(c)).to_bits(), 0]
        });
    }
    cases.add(
        "gfx942",
        "v_mov_b32 v12, v1\n v_mov_b32 v13, v2\n v_pk_fma_f32 v[10:11], v[12:13], v[12:13], v[12:13] op_sel:[0,1,0] op_sel_hi:[1,0,0] neg_lo:[0,0,1]",
        &words(128),
        move |[a, b, _]| [f(a).mul_add(f(b), -f(a)).to_bits(), f(b).mul_add(f(a), f(a)).to_bits()],
    );
    cases.check();
}

/// The sequence that compilers make of a division, whose result must be the correctly rounded quotient: that is what the
/// steps v_div_scale, v_div_fmas and v_div_fixup are for.
#[test]
fn divisions_are_correctly_rounded() {
    let mut cases = Cases::default();
    let mut random = Random(42);
    let mut inputs = words(256);
    // Quotients and operands among the subnormals, and near the largest.
    for at in 0..1024u32 {
        let exponents = [at % 32 * 8, 255 - at / 32 * 8];
        let mut one = |exponent: u32| (random.word() & 0x807f_ffff) | exponent.min(254) << 23;
        inputs.push([one(exponents[0]), one(exponents[1]), 0]);
    }
    for arch in ALL {
        let (vcc, pair) = if arch.starts_with("gfx9") { ("vcc", "s[8:9]") } else { ("vcc_lo", "s8") };
        let code = format!(
            "v_div_scale_f32 v5, {pair}, v2, v2, v1\n v_div_scale_f32 v7, {vcc}, v1, v2, v1\n v_rcp_f32 v8, v5\n\
             v_fma_f32 v9, -v5, v8, 1.0\n v_fma_f32 v8, v9, v8, v8\n v_mul_f32 v9, v7, v8\n v_fma_f32 v12, -v5, v9, v7\n\
             v_fma_f32 v9, v12, v8, v9\n v_fma_f32 v5, -v5, v9, v7\n v_div_fmas_f32 v5, v5, v8, v9\n\
             v_div_fixup_f32 v10, v5, v2, v1"
        );
        cases.add(arch, &code, &inputs, move |[a, b, _]| [(f(a) / f(b)).to_bits(), 0]);
    }
    cases.check();
}

#[test]
fn divisions_of_f64_are_correctly_rounded() {
    let mut cases = Cases::default();
    let mut random = Random(7);
    let mut inputs = Vec::new();
    for at in 0..512u32 {
        let exponents = [at % 32 * 64 + 3, 2040 - at / 32 * 120];
        let mut one = |exponent: u32| (random.word() & 0x800f_ffff) | exponent.min(2046) << 20;
        inputs.push([one(exponents[0]), one(exponents[1]), at]);
    }
    for arch in ["gfx942", "gfx1100"] {
        let (vcc, pair) = if arch.starts_with("gfx9") { ("vcc", "s[8:9]") } else { ("vcc_lo", "s8") };
        let code = format!(
            "v_mov_b32 v12, v3\n v_mov_b32 v13, v1\n v_mov_b32 v14, v3\n v_mov_b32 v15, v2\n\
             v_div_scale_f64 v[30:31], {pair}, v[14:15], v[14:15], v[12:13]\n v_rcp_f64 v[32:33], v[30:31]\n\
             v_fma_f64 v[34:35], -v[30:31], v[32:33], 1.0\n v_fma_f64 v[32:33], v[32:33], v[34:35], v[32:33]\n\
             v_fma_f64 v[34:35], -v[30:31], v[32:33], 1.0\n v_fma_f64 v[32:33], v[32:33], v[34:35], v[32:33]\n\
             v_div_scale_f64 v[34:35], {vcc}, v[12:13], v[14:15], v[12:13]\n v_mul_f64 v[36:37], v[34:35], v[32:33]\n\
             v_fma_f64 v[30:31], -v[30:31], v[36:37], v[34:35]\n v_div_fmas_f64 v[30:31], v[30:31], v[32:33], v[36:37]\n\
             v_div_fixup_f64 v[10:11], v[30:31], v[14:15], v[12:13]"
        );
        cases.add(arch, &code, &inputs, move |[a, b, c]| {
            let of = |high: u32| f64::from_bits(u64::from(high) << 32 | u64::from(c));
            let quotient = (of(a) / of(b)).to_bits();
            [quotient as u32, (quotient >> 32) as u32]
        });
    }
    cases.check();
}

#[test]
fn fp8_rounds_to_even_and_does_not_saturate() {
    let mut cases = Cases::default();
    // FNUZ on gfx942: 240 is the largest, 0x80 NaN. OCP on gfx1201: 448, 0x7f.
    let known: [(f32, u32, u32); 9] = [
        (1.0, 0x40, 0x38),
        (-2.0, 0xc8, 0xc0),
        (240.0, 0x7f, 0x77),
        (248.0, 0x80, 0x78),
        (448.0, 0x80, 0x7e),
        (466.0, 0x80, 0x7f),
        (1.0625, 0x40, 0x38),
        (1.1875, 0x42, 0x3a),
        (f32::NAN, 0x80, 0x7f),
    ];
    let inputs: Vec<[u32; 3]> = known.iter().map(|case| [case.0.to_bits(), 0x4080_0000, 0]).collect();
    for (arch, fnuz) in [("gfx942", true), ("gfx1201", false)] {
        let four = if fnuz { 0x50 } else { 0x48 };
        let code = "v_cvt_pk_fp8_f32 v10, v1, v2\n v_cvt_pk_fp8_f32 v10, v2, v1 op_sel:[0,0,1]\n v_mov_b32 v11, 0";
        cases.add(arch, code, &inputs, move |[x, ..]| {
            let case = known.iter().find(|case| case.0.to_bits() == x).expect("one of these");
            let wanted = if fnuz { case.1 } else { case.2 };
            [wanted | four << 8 | four << 16 | wanted << 24, 0]
        });
        // And back: all codes.
        let codes: Vec<[u32; 3]> = (0..128).map(|at| [at | (255 - at) << 16 | (at + 64) << 24, 0, 0]).collect();
        let code = if fnuz {
            "v_cvt_pk_f32_fp8_sdwa v[10:11], v1 src0_sel:WORD_1"
        } else {
            "v_cvt_pk_f32_fp8_e64 v[10:11], v1 op_sel:[1,0]"
        };
        cases.add(arch, code, &codes, move |[word, ..]| {
            [16, 24].map(|shift| {
                let code = word >> shift & 0xff;
                let (exponent, mantissa) = ((code >> 3 & 15) as i32, (code & 7) as f32);
                let bias = if fnuz { 8 } else { 7 };
                let is_nan = if fnuz { code == 0x80 } else { code & 0x7f == 0x7f };
                let value = if exponent == 0 {
                    mantissa / 8.0 * 2f32.powi(1 - bias)
                } else {
                    (1.0 + mantissa / 8.0) * 2f32.powi(exponent - bias)
                };
                let value = if code >> 7 == 1 { -value } else { value };
                if is_nan { f32::NAN.to_bits() } else { value.to_bits() }
            })
        });
    }
    cases.check();
}

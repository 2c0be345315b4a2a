//! What goes between lanes, by the manuals' descriptions.

use super::{ALL, over_lanes};

/// Lane numbers times a factor, and where each lane shall look.
fn check(arch: &str, code: &str, look: impl Fn(usize) -> u32, expected: impl Fn(usize) -> u32) {
    let width = if arch.starts_with("gfx9") { 64 } else { 32 };
    let inputs: Vec<[u32; 3]> =
        (0..width).map(|lane| [lane as u32 * 100 + 7, look(lane), 5000 + lane as u32]).collect();
    for (lane, got) in over_lanes(arch, code, &inputs).into_iter().enumerate() {
        assert_eq!(got[0], expected(lane), "{arch}: {code}, lane {lane}");
    }
}

fn value(lane: usize) -> u32 {
    lane as u32 * 100 + 7
}

#[test]
fn the_crossbar() {
    for arch in ALL {
        let width = if arch.starts_with("gfx9") { 64 } else { 32 };
        let wait = if arch == "gfx1201" { "s_wait_dscnt 0x0" } else { "s_waitcnt lgkmcnt(0)" };
        let other = move |lane: usize| (lane * 5 + 3) % width;
        check(
            arch,
            &format!("ds_bpermute_b32 v10, v2, v1\n {wait}"),
            |lane| 4 * other(lane) as u32,
            |lane| value(other(lane)),
        );
        check(
            arch,
            &format!("ds_permute_b32 v10, v2, v1\n {wait}"),
            |lane| 4 * (lane ^ 9) as u32,
            |lane| value(lane ^ 9),
        );
        for (pattern, from) in [
            (0x401f, (|lane| lane ^ 16) as fn(usize) -> usize),
            (0x041f, |lane| lane ^ 1),
            (0x7c1f, |lane| lane ^ 31),
            (0x0078, |lane| lane & !7 | 3),
            (0x80b1, |lane| lane & !3 | [1, 0, 3, 2][lane & 3]),
            (0x1c2e, |lane| lane & !31 | ((lane & 14 | 1) ^ 7)),
        ] {
            let code = format!("ds_swizzle_b32 v10, v1 offset:{pattern:#x}\n {wait}");
            check(arch, &code, |_| 0, |lane| value(from(lane)));
        }
    }
}

#[test]
fn dpp() {
    for arch in ALL {
        check(
            arch,
            "v_mov_b32_dpp v10, v1 quad_perm:[3,1,0,2] row_mask:0xf bank_mask:0xf",
            |_| 0,
            |lane| value(lane & !3 | [3, 1, 0, 2][lane & 3]),
        );
        // Lanes without a source keep the destination, or get zero if bound_ctrl is set.
        check(
            arch,
            "v_mov_b32_dpp v10, v1 row_shr:3 row_mask:0xf bank_mask:0xf",
            |_| 0,
            |lane| {
                if lane % 16 < 3 { 0 } else { value(lane - 3) }
            },
        );
        check(
            arch,
            "v_mov_b32 v10, v3\n v_mov_b32_dpp v10, v1 row_shl:1 row_mask:0x1 bank_mask:0xf",
            |_| 0,
            |lane| {
                if lane >= 16 || lane == 15 { 5000 + lane as u32 } else { value(lane + 1) }
            },
        );
        check(
            arch,
            "v_add_u32_dpp v10, v1, v3 row_ror:4 row_mask:0xf bank_mask:0xf".replace("v_add_u32", add(arch)).as_str(),
            |_| 0,
            |lane| value(lane & !15 | ((lane + 12) % 16)) + 5000 + lane as u32,
        );
        check(arch, "v_mov_b32_dpp v10, v1 row_mirror row_mask:0xf bank_mask:0xf", |_| 0, |lane| value(lane ^ 15));
    }
    check(
        "gfx942",
        "v_mov_b32_dpp v10, v1 row_bcast:15 row_mask:0xa bank_mask:0xf",
        |_| 0,
        |lane| {
            if lane / 16 % 2 == 1 { value(lane / 16 * 16 - 1) } else { 0 }
        },
    );
    check("gfx1100", "v_mov_b32_dpp v10, v1 row_xmask:5 row_mask:0xf bank_mask:0xf", |_| 0, |lane| value(lane ^ 5));
    check("gfx1201", "v_mov_b32_dpp v10, v1 dpp8:[7,6,5,4,3,2,1,0]", |_| 0, |lane| value(lane ^ 7));
}

fn add(arch: &str) -> &'static str {
    if arch.starts_with("gfx9") { "v_add_u32" } else { "v_add_nc_u32" }
}

#[test]
fn masks_and_scalars() {
    for arch in ["gfx90a", "gfx942"] {
        // Lanes whose number is a multiple of three, counted below each.
        let code = "v_mul_hi_u32 v12, v0, 0x55555556\n v_mul_lo_u32 v12, v12, 3\n v_cmp_eq_u32 vcc, v12, v0\n\
                    v_mbcnt_lo_u32_b32 v10, vcc_lo, 0\n v_mbcnt_hi_u32_b32 v10, vcc_hi, v10";
        let code =
            code.replace("0x55555556", "v13").replace("v_mul_hi_u32", "v_mov_b32 v13, 0x55555556\n v_mul_hi_u32");
        check(arch, &code, |_| 0, |lane| lane.div_ceil(3) as u32);
        // A branch by EXEC: odd lanes add, even lanes do not.
        let code = "v_and_b32 v12, 1, v0\n v_mov_b32 v10, v1\n v_cmp_ne_u32 vcc, 0, v12\n s_and_saveexec_b64 s[8:9], vcc\n\
                    s_cbranch_execz .Lskip\n v_add_u32 v10, 1, v10\n .Lskip:\n s_or_b64 exec, exec, s[8:9]";
        check(arch, code, |_| 0, |lane| value(lane) + lane as u32 % 2);
    }
    for arch in ["gfx1100", "gfx1201"] {
        let code = "v_cmp_lt_u32 vcc_lo, 9, v0\n v_mbcnt_lo_u32_b32 v10, vcc_lo, 0";
        check(arch, code, |_| 0, |lane| lane.saturating_sub(10) as u32);
        let code = "v_mov_b32 v10, v1\n s_mov_b32 s8, exec_lo\n v_cmpx_gt_u32 11, v0\n v_add_nc_u32 v10, 1, v10\n s_mov_b32 exec_lo, s8";
        check(arch, code, |_| 0, |lane| value(lane) + u32::from(lane < 11));
    }
    for arch in ALL {
        check(arch, "v_readlane_b32 s8, v1, 17\n v_mov_b32 v10, s8", |_| 0, |_| value(17));
        check(
            arch,
            "s_movk_i32 s8, -2\n v_mov_b32 v10, v1\n v_writelane_b32 v10, s8, 4",
            |_| 0,
            |lane| {
                if lane == 4 { (-2i32) as u32 } else { value(lane) }
            },
        );
        let mask = if arch.starts_with("gfx9") {
            ("s_mov_b64 vcc, 0xf0", "vcc")
        } else {
            ("s_mov_b32 vcc_lo, 0xf0", "vcc_lo")
        };
        check(
            arch,
            &format!("{}\n v_cndmask_b32 v10, v1, v3, {}", mask.0, mask.1),
            |_| 0,
            |lane| {
                if (4..8).contains(&lane) { 5000 + lane as u32 } else { value(lane) }
            },
        );
    }
}

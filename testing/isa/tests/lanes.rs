//! What goes between lanes, by the manuals' descriptions.

use super::{ALL, Cases};

/// Lane numbers times a factor, and where each lane shall look.
fn check(
    cases: &mut Cases,
    arch: &'static str,
    code: &str,
    look: impl Fn(usize) -> u32,
    expected: impl Fn(usize) -> u32 + 'static,
) {
    let width = if arch.starts_with("gfx9") { 64 } else { 32 };
    let inputs: Vec<[u32; 3]> = (0..width).map(move |lane| [value(lane), look(lane), 5000 + lane as u32]).collect();
    cases.add(arch, code, &inputs, move |[_, _, lane]| [expected(lane as usize - 5000), 0]);
}

fn value(lane: usize) -> u32 {
    lane as u32 * 100 + 7
}

#[test]
fn the_crossbar() {
    let mut cases = Cases::default();
    for arch in ALL {
        let width = if arch.starts_with("gfx9") { 64 } else { 32 };
        let wait = if arch == "gfx1201" { "s_wait_dscnt 0x0" } else { "s_waitcnt lgkmcnt(0)" };
        let other = move |lane: usize| (lane * 5 + 3) % width;
        check(
            &mut cases,
            arch,
            &format!("ds_bpermute_b32 v10, v2, v1\n {wait}"),
            move |lane| 4 * other(lane) as u32,
            move |lane| value(other(lane)),
        );
        check(
            &mut cases,
            arch,
            &format!("ds_permute_b32 v10, v2, v1\n {wait}"),
            move |lane| 4 * (lane ^ 9) as u32,
            move |lane| value(lane ^ 9),
        );
        for (pattern, from) in [
            (0x401f, (move |lane| lane ^ 16) as fn(usize) -> usize),
            (0x041f, move |lane| lane ^ 1),
            (0x7c1f, move |lane| lane ^ 31),
            (0x0078, move |lane| lane & !7 | 3),
            (0x80b1, move |lane| lane & !3 | [1, 0, 3, 2][lane & 3]),
            (0x1c2e, move |lane| lane & !31 | ((lane & 14 | 1) ^ 7)),
        ] {
            let code = format!("ds_swizzle_b32 v10, v1 offset:{pattern:#x}\n {wait}");
            check(&mut cases, arch, &code, |_| 0, move |lane| value(from(lane)));
        }
    }
    cases.check();
}

#[test]
fn dpp() {
    let mut cases = Cases::default();
    for arch in ALL {
        check(
            &mut cases,
            arch,
            "v_mov_b32_dpp v10, v1 quad_perm:[3,1,0,2] row_mask:0xf bank_mask:0xf",
            |_| 0,
            move |lane| value(lane & !3 | [3, 1, 0, 2][lane & 3]),
        );
        // Lanes without a source keep the destination, or get zero if bound_ctrl is set.
        check(
            &mut cases,
            arch,
            "v_mov_b32_dpp v10, v1 row_shr:3 row_mask:0xf bank_mask:0xf",
            |_| 0,
            move |lane| {
                if lane % 16 < 3 { 0 } else { value(lane - 3) }
            },
        );
        check(
            &mut cases,
            arch,
            "v_mov_b32 v10, v3\n v_mov_b32_dpp v10, v1 row_shl:1 row_mask:0x1 bank_mask:0xf",
            |_| 0,
            move |lane| {
                if lane >= 16 || lane == 15 { 5000 + lane as u32 } else { value(lane + 1) }
            },
        );
        check(
            &mut cases,
            arch,
            "v_add_u32_dpp v10, v1, v3 row_ror:4 row_mask:0xf bank_mask:0xf".replace("v_add_u32", add(arch)).as_str(),
            |_| 0,
            move |lane| value(lane & !15 | ((lane + 12) % 16)) + 5000 + lane as u32,
        );
        check(
            &mut cases,
            arch,
            "v_mov_b32_dpp v10, v1 row_mirror row_mask:0xf bank_mask:0xf",
            |_| 0,
            move |lane| value(lane ^ 15),
        );
    }
    check(
        &mut cases,
        "gfx942",
        "v_mov_b32_dpp v10, v1 row_bcast:15 row_mask:0xa bank_mask:0xf",
        |_| 0,
        move |lane| {
            if lane / 16 % 2 == 1 { value(lane / 16 * 16 - 1) } else { 0 }
        },
    );
    check(
        &mut cases,
        "gfx1100",
        "v_mov_b32_dpp v10, v1 row_xmask:5 row_mask:0xf bank_mask:0xf",
        |_| 0,
        move |lane| value(lane ^ 5),
    );
    check(&mut cases, "gfx1201", "v_mov_b32_dpp v10, v1 dpp8:[7,6,5,4,3,2,1,0]", |_| 0, move |lane| value(lane ^ 7));
    cases.check();
}

fn add(arch: &str) -> &'static str {
    if arch.starts_with("gfx9") { "v_add_u32" } else { "v_add_nc_u32" }
}

#[test]
fn masks_and_scalars() {
    let mut cases = Cases::default();
    for arch in ["gfx90a", "gfx942"] {
        // Lanes whose number is a multiple of three, counted below each.
        let code = "v_mul_hi_u32 v12, v0, 0x55555556\n v_mul_lo_u32 v12, v12, 3\n v_cmp_eq_u32 vcc, v12, v0\n\
                    v_mbcnt_lo_u32_b32 v10, vcc_lo, 0\n v_mbcnt_hi_u32_b32 v10, vcc_hi, v10";
        let code =
            code.replace("0x55555556", "v13").replace("v_mul_hi_u32", "v_mov_b32 v13, 0x55555556\n v_mul_hi_u32");
        check(&mut cases, arch, &code, |_| 0, move |lane| lane.div_ceil(3) as u32);
        // A branch by EXEC: odd lanes add, even lanes do not.
        let code = "v_and_b32 v12, 1, v0\n v_mov_b32 v10, v1\n v_cmp_ne_u32 vcc, 0, v12\n s_and_saveexec_b64 s[8:9], vcc\n\
                    s_cbranch_execz .Lskip\n v_add_u32 v10, 1, v10\n .Lskip:\n s_or_b64 exec, exec, s[8:9]";
        check(&mut cases, arch, code, |_| 0, move |lane| value(lane) + lane as u32 % 2);
    }
    for arch in ["gfx1100", "gfx1201"] {
        let code = "v_cmp_lt_u32 vcc_lo, 9, v0\n v_mbcnt_lo_u32_b32 v10, vcc_lo, 0";
        check(&mut cases, arch, code, |_| 0, move |lane| lane.saturating_sub(10) as u32);
        let code = "v_mov_b32 v10, v1\n s_mov_b32 s8, exec_lo\n v_cmpx_gt_u32 11, v0\n v_add_nc_u32 v10, 1, v10\n s_mov_b32 exec_lo, s8";
        check(&mut cases, arch, code, |_| 0, move |lane| value(lane) + u32::from(lane < 11));
    }
    for arch in ALL {
        check(&mut cases, arch, "v_readlane_b32 s8, v1, 17\n v_mov_b32 v10, s8", |_| 0, |_| value(17));
        check(
            &mut cases,
            arch,
            "s_movk_i32 s8, -2\n v_mov_b32 v10, v1\n v_writelane_b32 v10, s8, 4",
            |_| 0,
            move |lane| {
                if lane == 4 { (-2i32) as u32 } else { value(lane) }
            },
        );
        let mask = if arch.starts_with("gfx9") {
            ("s_mov_b64 vcc, 0xf0", "vcc")
        } else {
            ("s_mov_b32 vcc_lo, 0xf0", "vcc_lo")
        };
        check(
            &mut cases,
            arch,
            &format!("{}\n v_cndmask_b32 v10, v1, v3, {}", mask.0, mask.1),
            |_| 0,
            move |lane| {
                if (4..8).contains(&lane) { 5000 + lane as u32 } else { value(lane) }
            },
        );
    }
    cases.check();
}

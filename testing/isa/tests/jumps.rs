//! Branches too far for 16 bits, as LLVM's branch relaxation writes them: the address of what follows, plus a distance.

use super::{ALL, assemble, run_block};

/// Adds the distance to a label that lies ahead or behind.
fn far(arch: &str, label: &str) -> String {
    let (add, carry) =
        if arch == "gfx1201" { ("s_add_co_u32", "s_add_co_ci_u32") } else { ("s_add_u32", "s_addc_u32") };
    format!(
        "s_getpc_b64 s[8:9]\n .Lpost_{label}:\n {add} s8, s8, (.L{label}-.Lpost_{label})&4294967295\n\
         {carry} s9, s9, (.L{label}-.Lpost_{label})>>32\n s_setpc_b64 s[8:9]\n"
    )
}

/// v10 of a lane is the sum of what the blocks it goes through add, stored to the first buffer.
fn program(arch: &str) -> String {
    let (load, wait, store) = match arch {
        "gfx90a" | "gfx942" => ("s_load_dwordx2", "s_waitcnt lgkmcnt(0)", "global_store_dword"),
        "gfx1201" => ("s_load_b64", "s_wait_kmcnt 0x0", "global_store_b32"),
        _ => ("s_load_b64", "s_waitcnt lgkmcnt(0)", "global_store_b32"),
    };
    // Padding of 8 bytes an instruction: the distance is more than 128 KiB, which a branch cannot do.
    let padding = ".rept 20000\n v_add3_u32 v10, v10, v10, 1\n .endr\n";
    format!(
        "{load} s[4:5], s[0:1], 0x0\n v_lshlrev_b32 v1, 2, v0\n v_mov_b32 v10, 0\n s_mov_b32 s7, 0\n\
         .Lloop:\n {ahead}{padding}\
         .Lout:\n v_or_b32 v10, 0x100, v10\n {wait}\n {store} v1, v10, s[4:5]\n s_endpgm\n{padding}\
         .Lahead:\n s_add_i32 s7, s7, 1\n v_xor_b32 v10, s7, v10\n s_cmp_lt_i32 s7, 3\n s_cbranch_scc0 .Lend\n {back}\
         .Lend:\n {out}",
        ahead = far(arch, "ahead"),
        back = far(arch, "loop").replace("post_loop", "post_back"),
        out = far(arch, "out"),
    )
}

#[test]
fn ahead_and_behind() {
    for arch in ALL {
        let program = assemble(arch, &program(arch));
        let mut buffers = [vec![0; 64], vec![0; 64]];
        run_block(&program, 64, &mut buffers).unwrap_or_else(|why| panic!("{arch}: {why}"));
        // Three times through the loop: 1 ^ 2 ^ 3, then the bit of the way out; never through the padding.
        assert_eq!(buffers[0], [0x100; 64], "{arch}");
    }
}

#[test]
fn the_address_is_the_next_instruction_s() {
    let text = "s_load_dwordx2 s[4:5], s[0:1], 0x0\n s_getpc_b64 s[8:9]\n s_getpc_b64 s[10:11]\n s_sub_u32 s10, s10, s8\n\
                s_subb_u32 s11, s11, s9\n v_mov_b32 v2, s10\n v_mov_b32 v3, s11\n v_lshlrev_b32 v1, 3, v0\n\
                s_waitcnt lgkmcnt(0)\n global_store_dwordx2 v1, v[2:3], s[4:5]\n s_endpgm";
    let mut buffers = [vec![7; 128]];
    run_block(&assemble("gfx942", text), 64, &mut buffers).unwrap();
    assert_eq!(buffers[0], [4, 0].repeat(64));
}

#[test]
fn jumps_that_lead_nowhere() {
    let jump = |distance: &str, high: &str| {
        format!(
            "s_getpc_b64 s[8:9]\n s_add_u32 s8, s8, {distance}\n s_addc_u32 s9, s9, {high}\n s_setpc_b64 s[8:9]\n s_endpgm"
        )
    };
    let run = |text: &str| run_block(&assemble("gfx942", text), 64, &mut [vec![0; 64]]);
    // s_add_u32 with a literal has 8 bytes, the others 4: s_endpgm is 12 or 16 bytes on.
    run(&jump("0x10", "0").replace("0x10", "12")).unwrap();
    for (text, wanted) in [
        (jump("14", "0"), "no instruction begins at"),
        (jump("0x400", "0"), "no instruction begins at"),
        (jump("0x10000", "0"), "no instruction begins at"),
        (jump("12", "1"), "no instruction begins at"),
        (jump("-64", "-1"), "no instruction begins at"),
        (jump("12", "0").replace("s_addc_u32 s9, s9, 0", "s_mov_b32 s9, s20"), "the address of a jump is undefined"),
    ] {
        let error = run(&text).unwrap_err();
        assert!(error.contains(wanted) && error.contains("s_setpc_b64"), "{text}: {error}");
    }
    // Into the middle of an instruction: its literal.
    let middle = "s_getpc_b64 s[8:9]\n s_add_u32 s8, s8, 16\n s_addc_u32 s9, s9, 0\n s_setpc_b64 s[8:9]\n s_mov_b32 s4, 0x12345\n s_endpgm";
    let error = run(middle).unwrap_err();
    assert!(error.contains("no instruction begins at"), "{error}");
    run(&middle.replace("s8, 16", "s8, 12")).unwrap();
}

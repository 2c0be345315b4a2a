//! Mistakes that must be seen, each beside the same program without it.

use super::{assemble, run_block};

/// The program ends well over 64 words, and with the change it is a fault that says this.
fn seen(arch: &str, threads: u32, text: &str, change: (&str, &str), wanted: &str) {
    run_block(&assemble(arch, text), threads, &mut [vec![1; 64], vec![1; 64]]).unwrap();
    assert!(text.contains(change.0));
    let changed = text.replacen(change.0, change.1, 1);
    let error = run_block(&assemble(arch, &changed), threads, &mut [vec![1; 64], vec![1; 64]]).unwrap_err();
    assert!(error.contains(wanted), "{error}");
}

const COPY: &str = "s_load_dwordx4 s[4:7], s[0:1], 0x0\n v_lshlrev_b32 v1, 2, v0\n s_waitcnt lgkmcnt(0)\n\
                    global_load_dword v2, v1, s[4:5]\n s_waitcnt vmcnt(0)\n v_add_u32 v2, 1, v2\n\
                    global_store_dword v1, v2, s[6:7]\n s_endpgm";

#[test]
fn accesses_out_of_bounds() {
    seen("gfx942", 64, COPY, ("s[6:7]\n s_endpgm", "s[6:7] offset:4\n s_endpgm"), "a store of 4 bytes");
    seen("gfx942", 64, COPY, ("s[4:5]\n s_wait", "s[4:5] offset:-4\n s_wait"), "which is in no allocation");
    let shared = "v_lshlrev_b32 v1, 2, v0\n ds_write_b32 v1, v0\n s_endpgm";
    seen("gfx942", 64, shared, ("v1, v0\n s_endpgm", "v1, v0 offset:772\n s_endpgm"), "the block has 1024");
    seen("gfx942", 64, shared, ("v1, v0\n s_endpgm", "v1, v0 offset:2\n s_endpgm"), "no multiple of 4");
}

#[test]
fn missing_waits() {
    seen("gfx942", 64, COPY, ("s_waitcnt vmcnt(0)", "s_nop 0"), "v2 is read before");
    seen("gfx942", 64, COPY, ("s_waitcnt lgkmcnt(0)", "s_nop 0"), "s4 is read before");
    seen("gfx942", 64, COPY, ("s_waitcnt vmcnt(0)", "s_waitcnt vmcnt(1)"), "v2 is read before");
    // A load over what is used: written too early.
    let text = COPY.replace("s_waitcnt vmcnt(0)\n v_add_u32 v2, 1, v2", "s_waitcnt vmcnt(0)\n v_mov_b32 v2, 1");
    seen("gfx942", 64, &text, ("s_waitcnt vmcnt(0)", "s_nop 0"), "v2 is written before");
    let newer = "s_load_b128 s[4:7], s[0:1], 0x0\n v_lshlrev_b32 v1, 2, v0\n s_wait_kmcnt 0x0\n\
                 global_load_b32 v2, v1, s[4:5]\n s_wait_loadcnt 0x0\n global_store_b32 v1, v2, s[6:7]\n s_endpgm";
    seen("gfx1201", 32, newer, ("s_wait_kmcnt 0x0", "s_wait_dscnt 0x0"), "s4 is read before");
    seen("gfx1201", 32, newer, ("s_wait_loadcnt 0x0", "s_wait_storecnt 0x0"), "v2 is read before");
}

#[test]
fn undefined_values() {
    seen("gfx942", 64, COPY, ("v1, v2, s[6:7]", "v1, v3, s[6:7]"), "stores what is undefined");
    seen("gfx942", 64, COPY, ("v2, v1, s[4:5]", "v2, v4, s[4:5]"), "an address is undefined");
    // Moving and computing is allowed, deciding is not.
    let branch = "s_mov_b32 s4, 3\n s_add_u32 s5, s4, s4\n s_cmp_eq_u32 s5, 6\n s_cbranch_scc1 .Lend\n s_nop 0\n .Lend:\n s_endpgm";
    seen("gfx942", 64, branch, ("s_mov_b32 s4, 3", "s_mov_b32 s4, s20"), "SCC is undefined");
    let exec = "v_cmp_eq_u32 vcc, 5, v0\n s_and_saveexec_b64 s[4:5], vcc\n s_endpgm";
    seen("gfx942", 64, exec, ("5, v0", "5, v7"), "EXEC gets lanes that are undefined");
    // A mask's undefined bits do not matter where the other operand has zeros.
    let mask =
        "s_mov_b32 s4, s20\n s_and_b32 s5, s4, 0\n s_cmp_eq_u32 s5, 0\n s_cbranch_scc1 .Lend\n .Lend:\n s_endpgm";
    seen("gfx942", 64, mask, ("s_and_b32 s5, s4, 0", "s_and_b32 s5, s4, 4"), "SCC is undefined");
    // Shared memory starts undefined.
    let shared = "s_load_dwordx2 s[4:5], s[0:1], 0x0\n v_lshlrev_b32 v1, 2, v0\n ds_write_b32 v1, v0\n\
                  ds_read_b32 v2, v1\n s_waitcnt lgkmcnt(0)\n global_store_dword v1, v2, s[4:5]\n s_endpgm";
    seen("gfx942", 64, shared, ("ds_write_b32 v1, v0\n", ""), "stores what is undefined");
    // A lane outside EXEC has nothing for another.
    let lanes = "s_load_dwordx2 s[4:5], s[0:1], 0x0\n v_lshlrev_b32 v1, 2, v0\n v_xor_b32 v2, 4, v1\n s_mov_b64 exec, 0xf\n\
                 ds_bpermute_b32 v3, v2, v0\n s_waitcnt lgkmcnt(0)\n global_store_dword v1, v3, s[4:5]\n s_endpgm";
    seen("gfx942", 64, lanes, ("s_mov_b64 exec, 0xf", "s_mov_b64 exec, 0x7"), "stores what is undefined");
}

#[test]
fn barriers() {
    // Two waves; the second leaves before the barrier.
    let text = "v_cmp_gt_u32 vcc, 200, v0\n s_and_saveexec_b64 s[4:5], vcc\n s_cbranch_execz .Lend\n s_barrier\n .Lend:\n s_endpgm";
    seen("gfx942", 128, text, ("200, v0", "64, v0"), "wave 0 waits at a barrier");
    // Some lanes of a wave do.
    seen("gfx942", 128, text, ("200, v0", "100, v0"), "a barrier with lanes 0xfffffffff of");
    // A store to shared memory that may still be on its way.
    let text = "v_lshlrev_b32 v1, 2, v0\n ds_write_b32 v1, v0\n s_waitcnt lgkmcnt(0)\n s_barrier\n s_endpgm";
    seen("gfx942", 128, text, ("s_waitcnt lgkmcnt(0)", "s_nop 0"), "before stores to shared memory");
    let newer = "s_barrier_signal -1\n s_barrier_wait -1\n s_endpgm";
    seen("gfx1201", 64, newer, ("s_barrier_signal -1", "s_nop 0"), "not signalled");
}

#[test]
fn unknown_instructions_are_named() {
    seen("gfx942", 64, COPY, ("v_add_u32 v2, 1, v2", "v_sad_u8 v2, v2, v2, v2"), "`v_sad_u8 v2, v2, v2, v2`");
    seen("gfx942", 64, COPY, ("s_endpgm", "s_getreg_b32 s4, hwreg(HW_REG_MODE)\n s_endpgm"), "s_getreg_b32");
    // Not reached, not a fault.
    let text = COPY.replace("s_endpgm", "s_endpgm\n v_sad_u8 v2, v2, v2, v2");
    run_block(&assemble("gfx942", &text), 64, &mut [vec![1; 64], vec![1; 64]]).unwrap();
}

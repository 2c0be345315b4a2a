//! Memory: device, private, shared; atomics.

use super::{Cases, assemble, run_block, run_in, words};
use crate::launch::Order;

#[test]
fn bytes_halves_and_private_memory() {
    let mut cases = Cases::default();
    // Through the second buffer's place of each lane: write the word, read parts of it.
    let code = "global_store_dword v6, v1, s[6:7]\n s_waitcnt vmcnt(0)\n global_load_sbyte v10, v6, s[6:7] offset:1\n\
                global_load_ushort v11, v6, s[6:7] offset:2\n s_waitcnt vmcnt(0)";
    cases.add("gfx942", code, &words(64), |[a, ..]| [(a >> 8) as i8 as u32, a >> 16]);
    let code = "global_store_b32 v6, v1, s[6:7]\n s_waitcnt_vscnt null, 0x0\n v_mov_b32 v10, v2\n\
                global_load_d16_hi_b16 v10, v6, s[6:7]\n s_waitcnt vmcnt(0)";
    cases.add("gfx1100", code, &words(32), |[a, b, _]| [b & 0xffff | a << 16, 0]);
    // A lane's own.
    let code = "scratch_store_dword off, v1, off offset:4\n scratch_store_dword off, v2, off offset:8\n\
                s_waitcnt vmcnt(0)\n v_mov_b32 v12, 4\n scratch_load_dwordx2 v[10:11], v12, off\n s_waitcnt vmcnt(0)";
    cases.add("gfx942", code, &words(64), |[a, b, _]| [a, b]);
    cases.check();
}

#[test]
fn shared_memory_between_waves() {
    // All is set to 9; then each thread writes its number, and reads that of thread ^ 64 twice, after a barrier.
    let text = "s_load_dwordx2 s[4:5], s[0:1], 0x0\n v_lshlrev_b32 v1, 2, v0\n v_mov_b32 v3, 9\n ds_write_b32 v1, v3 offset:16\n\
                s_waitcnt lgkmcnt(0)\n s_barrier\n ds_write_b32 v1, v0 offset:16\n v_xor_b32 v2, 64, v0\n\
                v_lshlrev_b32 v2, 2, v2\n s_waitcnt lgkmcnt(0)\n s_barrier ; the second\n\
                ds_read2_b32 v[4:5], v2 offset0:4 offset1:4\n s_waitcnt lgkmcnt(0)\n v_add_u32 v4, v4, v5\n\
                global_store_dword v1, v4, s[4:5]\n s_endpgm";
    let program = assemble("gfx942", text);
    for order in [Order::Forward, Order::Reverse, Order::Shuffled(5)] {
        let mut buffers = [vec![0; 128]];
        run_in(&program, [1, 1, 1], 128, &mut buffers, order).unwrap();
        let wanted: Vec<u32> = (0..128).map(|thread| 2 * (thread ^ 64)).collect();
        assert_eq!(buffers[0], wanted);
    }
    // Without the barrier it is a race, in every order.
    let program = assemble("gfx942", &text.replace("s_barrier ; the second", "s_nop 0"));
    for order in [Order::Forward, Order::Reverse, Order::Shuffled(5)] {
        let error = run_in(&program, [1, 1, 1], 128, &mut [vec![0; 128]], order).unwrap_err();
        assert!(error.contains("race"), "{error}");
    }
}

#[test]
fn atomics_of_all_blocks_add_up() {
    let text = "s_load_b64 s[4:5], s[0:1], 0x0\n v_mov_b32 v1, 0\n v_mov_b32 v2, 3\n s_wait_kmcnt 0x0\n\
                global_atomic_add_u32 v1, v2, s[4:5] scope:SCOPE_DEV\n\
                global_atomic_max_i32 v1, v0, s[4:5] offset:4 scope:SCOPE_DEV\n\
                global_atomic_or_b32 v3, v1, v2, s[4:5] offset:8 th:TH_ATOMIC_RETURN scope:SCOPE_DEV\n\
                s_wait_loadcnt 0x0\n v_cmp_eq_u32 vcc_lo, 3, v3\n s_and_b32 exec_lo, exec_lo, vcc_lo\n\
                global_atomic_add_u32 v1, v2, s[4:5] offset:12 scope:SCOPE_DEV\n s_endpgm";
    let mut buffers = [vec![0; 4]];
    run_in(&assemble("gfx1201", text), [3, 2, 1], 40, &mut buffers, Order::Forward).unwrap();
    // Of all that set the bits one found none.
    assert_eq!(buffers[0], [3 * 240, 39, 3, 3 * 239]);
}

#[test]
fn arguments_and_block_indices() {
    let text = "s_load_dwordx2 s[4:5], s[0:1], 0x8\n v_lshlrev_b32 v1, 2, v0\n s_lshl_b32 s3, s2, 6\n\
                v_add_u32 v2, s3, v0\n v_lshlrev_b32 v1, 2, v2\n s_waitcnt lgkmcnt(0)\n\
                global_store_dword v1, v2, s[4:5]\n s_endpgm";
    let mut buffers = [vec![7; 1], vec![0; 192]];
    run_in(&assemble("gfx90a", text), [3, 1, 1], 64, &mut buffers, Order::Reverse).unwrap();
    assert_eq!(buffers[1], (0..192).collect::<Vec<u32>>());
    // A store to the arguments themselves is refused.
    let text = "v_mov_b32 v1, 0\n global_store_dword v1, v0, s[0:1]\n s_endpgm";
    assert!(run_block(&assemble("gfx90a", text), 1, &mut [vec![0]]).unwrap_err().contains("no allocation"));
}

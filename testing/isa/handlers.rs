//! Which function does an operation, by its mnemonic.

use crate::context::Context;
use crate::instruction::Operation;
use crate::wave::Step;
use crate::{compare, matrix, memory_ops, scalar, shared_ops, vector, vector_float, vector_special};

pub type Handler = fn(&mut Context, &Operation) -> Step;

/// Operations without any effect in this model: hints, and waits for hazards that it does not have.
pub fn is_idle(mnemonic: &str) -> bool {
    matches!(
        mnemonic,
        "s_nop"
            | "v_nop"
            | "s_clause"
            | "s_delay_alu"
            | "s_waitcnt_depctr"
            | "s_wait_alu"
            | "s_set_inst_prefetch_distance"
            | "s_sleep"
            | "s_setprio"
            | "s_sendmsg"
            | "s_icache_inv"
            | "s_code_end"
            | "s_version"
            | "s_waitcnt_expcnt"
            | "s_wait_expcnt"
            | "s_wait_samplecnt"
            | "s_wait_bvhcnt"
            | "buffer_inv"
            | "buffer_wbl2"
            | "buffer_gl0_inv"
            | "buffer_gl1_inv"
            | "buffer_wbinvl1"
            | "buffer_wbinvl1_vol"
            | "global_inv"
            | "global_wb"
            | "global_wbinv"
            // launch.rs does these.
            | "s_endpgm"
            | "s_barrier"
            | "s_barrier_signal"
            | "s_barrier_wait"
    )
}

fn idle(_: &mut Context, _: &Operation) -> Step {
    Ok(())
}

pub fn find(mnemonic: &str) -> Option<Handler> {
    if is_idle(mnemonic) || scalar::is_branch(mnemonic) {
        return Some(idle);
    }
    scalar::find(mnemonic)
        .or_else(|| vector::find(mnemonic))
        .or_else(|| vector_float::find(mnemonic))
        .or_else(|| vector_special::find(mnemonic))
        .or_else(|| compare::find(mnemonic))
        .or_else(|| memory_ops::find(mnemonic))
        .or_else(|| shared_ops::find(mnemonic))
        .or_else(|| matrix::find(mnemonic))
}

/// What a family of operations reads off its mnemonic.
pub fn detail(mnemonic: &str) -> Result<u32, String> {
    let detail = if mnemonic.starts_with("v_cmp") {
        compare::detail(mnemonic)
    } else if mnemonic.starts_with("v_mfma") || mnemonic.starts_with("v_wmma") {
        Some(0)
    } else {
        memory_ops::detail(mnemonic).or_else(|| shared_ops::detail(mnemonic)).or(Some(0))
    };
    detail.ok_or_else(|| "an instruction that is not known here".into())
}

//! [`MergeStates`], specified.

use super::*;

pub(in crate::cpu) fn merge_states<T: Element>(op: MergeStates<'_, CpuBackend, T>) {
    let mut lse_out = op.lse;
    for token in 0..op.num_tokens {
        for head in 0..op.num_heads {
            let state = token * op.num_heads + head;
            let merge = Merge::new(op.a_lse[state], op.b_lse[state]);
            let row = op.strides.index(token, head);
            for at in row..row + op.head_dim {
                op.output[at] = match merge {
                    Merge::Neither => T::default(),
                    Merge::OnlyA { .. } => op.a[at],
                    Merge::OnlyB { .. } => op.b[at],
                    Merge::Both { weight_a, weight_b, .. } => {
                        T::from_f32(weighted_mean(op.a[at].to_f32(), weight_a, op.b[at].to_f32(), weight_b))
                    }
                };
            }
            if let Some(lse_out) = lse_out.as_deref_mut() {
                lse_out[state] = merge.lse();
            }
        }
    }
}

/// How to merge two states, from their LSEs alone.
#[derive(Clone, Copy)]
pub(in crate::cpu) enum Merge {
    /// Neither has keys: zeros.
    Neither,
    /// Only `a` has keys: its row is the result. Nothing of `b`, which may hold NaN, is read.
    OnlyA { lse: f32 },
    /// Only `b` has keys.
    OnlyB { lse: f32 },
    /// Both have: their mean by weights that sum to 1.
    Both { weight_a: f32, weight_b: f32, lse: f32 },
}

impl Merge {
    pub(in crate::cpu) fn new(a: f32, b: f32) -> Merge {
        match (a.is_infinite(), b.is_infinite()) {
            (true, true) => Merge::Neither,
            (false, true) => Merge::OnlyA { lse: a },
            (true, false) => Merge::OnlyB { lse: b },
            (false, false) => {
                let max = a.max(b);
                let (exp_a, exp_b) = ((a - max).exp(), (b - max).exp());
                let sum = exp_a + exp_b;
                Merge::Both { weight_a: exp_a / sum, weight_b: exp_b / sum, lse: max + sum.ln() }
            }
        }
    }

    pub(in crate::cpu) fn lse(&self) -> f32 {
        match *self {
            Merge::Neither => f32::NEG_INFINITY,
            Merge::OnlyA { lse } | Merge::OnlyB { lse } | Merge::Both { lse, .. } => lse,
        }
    }
}

/// One channel of the weighted mean.
#[inline(always)]
pub(in crate::cpu) fn weighted_mean(a: f32, weight_a: f32, b: f32, weight_b: f32) -> f32 {
    a * weight_a + b * weight_b
}

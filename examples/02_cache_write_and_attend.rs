//! The two operations of every decode step, over plain slices: write new keys and values into the
//! paged cache, then attend over it. This is all an engine that owns its memory needs.
//!
//!     cargo run --example 02_cache_write_and_attend

use quantkv::args::{AttentionParams, CacheWrite, LayerMut, LayerRef, PagedAttention, RowStrides};
use quantkv::layout::Half;
use quantkv::scale::{ScaleRef, ScaleStrides};
use quantkv::{Backend, CacheSpec, CpuBackend, Faults, KvFormat, Result};

fn main() -> Result<()> {
    let cpu = CpuBackend::new();
    // 2 KV heads of 64 channels, blocks of 16 tokens, 8 blocks; 4 query heads share the 2 KV heads.
    let shape = CacheSpec::new(2, 64, 16, KvFormat::Fp8E4M3)?.shape(8)?;
    let (kv_rows, rows) = (RowStrides::contiguous(2, 64), RowStrides::contiguous(4, 64));
    let mut k = vec![0u8; shape.buffer_bytes(Half::K)];
    let mut v = vec![0u8; shape.buffer_bytes(Half::V)];
    let scale = ScaleRef { values: &[0.5][..], strides: ScaleStrides::default() }; // one for the tensor

    // Three tokens of one sequence, in the first slots of block 5. Equal keys attend equally.
    let key = vec![1.0f32; 3 * 128];
    let value: Vec<f32> = [1.0, 2.0, 6.0].into_iter().flat_map(|x| [x; 128]).collect();
    cpu.cache_write(CacheWrite {
        shape,
        cache: LayerMut { k: &mut k, v: &mut v, k_dynamic: None, v_dynamic: None },
        key: &key,
        key_strides: kv_rows,
        value: &value,
        value_strides: kv_rows,
        slot_mapping: &[5 * 16, 5 * 16 + 1, 5 * 16 + 2],
        k_scale: scale.shorten(),
        v_scale: scale.shorten(),
    })?;

    // The newest token asks. Its sequence has 3 tokens, all of them in block 5.
    let query = vec![0.25f32; 256];
    let (mut output, mut lse) = (vec![0.0f32; 256], vec![0.0; 4]);
    let mut workspace = vec![0.0; cpu.attention_workspace_len(&shape, 4, 1)];
    cpu.paged_attention(PagedAttention {
        shape,
        cache: LayerRef { k: &k, v: &v, k_dynamic: None, v_dynamic: None },
        k_scale: scale.shorten(),
        v_scale: scale.shorten(),
        params: AttentionParams::new(1.0 / 8.0),
        num_heads: 4,
        num_tokens: 1,
        max_query_len: Some(1),
        query: &query,
        query_strides: rows,
        query_starts: &[0, 1],
        seq_lens: &[3],
        block_tables: &[5],
        block_table_stride: 1,
        alibi_slopes: None,
        sinks: None,
        output: &mut output,
        output_strides: rows,
        lse: Some(&mut lse),
        workspace: &mut workspace,
        plan_is_ready: false,
    })?;

    // Slots and block ids are checked by the kernels; what they skipped is asked for when it suits.
    assert_eq!(cpu.faults()?, Faults::NONE);
    // The mean of 1, 2 and 6; every score is 64 * 0.25 / 8 = 2, so LSE is 2 + ln 3.
    assert!(output.iter().all(|x| (x - 3.0).abs() < 1e-5), "{output:?}");
    assert!(lse.iter().all(|x| (x - 2.0 - 3f32.ln()).abs() < 1e-5), "{lse:?}");
    println!("attended on {}: every output is {}, LSE {}", cpu.isa(), output[0], lse[0]);
    Ok(())
}

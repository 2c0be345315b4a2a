//! Whole steps on CUDA, a cache write and attention after it: recorded in graphs, with plans that layers share, by
//! several threads.
#![cfg(feature = "cuda")]

#[path = "../testing/devices.rs"]
mod devices;
#[path = "../testing/oracle/mod.rs"]
mod oracle;

use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use devices::Device;
use half::{bf16, f16};
use oracle::run::{download, upload};
use oracle::strategy::Rng;
use quantkv::args::{
    AttentionParams, BlockPair, CacheWrite, CopyBlocks, LayerMut, LayerRef, PagedAttention, RowStrides,
};
use quantkv::cuda::{AttentionKernel, CudaBackend, CudaBuffer};
use quantkv::layout::Half;
use quantkv::raw::cuda::{self as raw, BlockMemory, CopyPlan, Launch};
use quantkv::raw::{Pointers, PtrMut, PtrRef};
use quantkv::scale::{ScaleRef, ScaleStrides};
use quantkv::{Backend, CacheShape, CacheSpec, Element, Error, Faults, KvFormat};

/// The device under test, if there is one.
fn cuda() -> Option<Arc<CudaBackend>> {
    match devices::cuda()? {
        Device::Cuda(cuda) => Some(cuda),
        _ => None,
    }
}

macro_rules! cuda_or_skip {
    () => {
        match cuda() {
            Some(cuda) => cuda,
            None => return,
        }
    };
}

/// One layer of 2 heads of 64 channels, E4M3, and what a step needs: two sequences decode, a third has a
/// chunk of its prompt.
struct Step<T> {
    shape: CacheShape,
    k: CudaBuffer<u8>,
    v: CudaBuffer<u8>,
    scale: CudaBuffer<f32>,
    rows: CudaBuffer<T>,
    slots: CudaBuffer<i64>,
    query: CudaBuffer<T>,
    starts: CudaBuffer<i32>,
    lens: CudaBuffer<i32>,
    tables: CudaBuffer<i32>,
    output: CudaBuffer<T>,
    workspace: CudaBuffer<f32>,
}

const SEQS: usize = 3;
/// First query row of each sequence.
const STARTS: [i32; SEQS + 1] = [0, 1, 2, 40];
const TOKENS: usize = 40;
const BLOCKS: usize = 12;
const TABLE: usize = 4;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;

impl<T: Element> Step<T> {
    fn new(cuda: &CudaBackend) -> Self {
        let spec = CacheSpec::new(KV_HEADS, DIM, 16, KvFormat::Fp8E4M3).unwrap();
        let shape = spec.shape(BLOCKS).unwrap();
        let mut rng = Rng::new(40);
        // Any codes but NaN.
        let mut codes = |half| -> Vec<u8> { (0..shape.buffer_bytes(half)).map(|_| rng.bits() as u8 & 0xbf).collect() };
        let (k, v) = (upload(cuda, &codes(Half::K)), upload(cuda, &codes(Half::V)));
        let floats = cuda.attention_workspace_len(&shape, HEADS, TOKENS);
        Step {
            shape,
            k,
            v,
            scale: upload(cuda, &[0.05]),
            rows: cuda.zeros("rows", SEQS * KV_HEADS * DIM).unwrap(),
            slots: upload(cuda, &[0; SEQS]),
            query: cuda.zeros("query", TOKENS * HEADS * DIM).unwrap(),
            starts: upload(cuda, &STARTS),
            lens: upload(cuda, &[0; SEQS]),
            tables: upload(cuda, &[0; SEQS * TABLE]),
            output: upload(cuda, &Self::no_output()),
            workspace: upload(cuda, &vec![f32::NAN; floats]),
        }
    }

    /// What the output holds before: no result.
    fn no_output() -> Vec<T> {
        vec![T::from_f32(-1000.0); TOKENS * HEADS * DIM]
    }

    /// What changes from step to step.
    fn load(&mut self, cuda: &CudaBackend, seed: u64) {
        let mut rng = Rng::new(seed);
        let mut floats = |len| -> Vec<T> { (0..len).map(|_| T::from_f32(rng.normal())).collect() };
        cuda.upload(&floats(SEQS * KV_HEADS * DIM), &mut self.rows).unwrap();
        cuda.upload(&floats(TOKENS * HEADS * DIM), &mut self.query).unwrap();
        cuda.upload(&[0.01 + 0.02 * seed as f32], &mut self.scale).unwrap();
        let lens: Vec<i32> = (0..SEQS).map(|_| 1 + rng.below(TABLE * 16) as i32).collect();
        // Sequences share no block that is written: sequence s has blocks of s modulo SEQS.
        let tables: Vec<i32> =
            (0..SEQS * TABLE).map(|at| (at / TABLE + SEQS * rng.below(BLOCKS / SEQS)) as i32).collect();
        let slots: Vec<i64> = (0..SEQS)
            .map(|s| {
                let last = lens[s] as usize - 1;
                i64::from(tables[s * TABLE + last / 16]) * 16 + (last % 16) as i64
            })
            .collect();
        cuda.upload(&lens, &mut self.lens).unwrap();
        cuda.upload(&tables, &mut self.tables).unwrap();
        cuda.upload(&slots, &mut self.slots).unwrap();
    }

    fn write(&mut self, cuda: &CudaBackend) -> quantkv::Result<()> {
        let rows = RowStrides::contiguous(KV_HEADS, DIM);
        let scale = || ScaleRef { values: self.scale.view(), strides: ScaleStrides::default() };
        cuda.cache_write::<T>(CacheWrite {
            shape: self.shape,
            cache: LayerMut { k: self.k.view_mut(), v: self.v.view_mut(), k_dynamic: None, v_dynamic: None },
            key: self.rows.view(),
            key_strides: rows,
            value: self.rows.view(),
            value_strides: rows,
            slot_mapping: self.slots.view(),
            k_scale: scale(),
            v_scale: scale(),
        })
    }

    fn attend(&mut self, cuda: &CudaBackend, plan_is_ready: bool) -> quantkv::Result<()> {
        let workspace = self.workspace.len();
        self.attend_in(cuda, plan_is_ready, 0..workspace)
    }

    fn attend_in(&mut self, cuda: &CudaBackend, ready: bool, part: std::ops::Range<usize>) -> quantkv::Result<()> {
        let rows = RowStrides::contiguous(HEADS, DIM);
        let scale = || ScaleRef { values: self.scale.view(), strides: ScaleStrides::default() };
        cuda.paged_attention::<T>(PagedAttention {
            shape: self.shape,
            cache: LayerRef { k: self.k.view(), v: self.v.view(), k_dynamic: None, v_dynamic: None },
            k_scale: scale(),
            v_scale: scale(),
            params: AttentionParams::new(0.125),
            num_heads: HEADS,
            num_tokens: TOKENS,
            max_query_len: None,
            query: self.query.view(),
            query_strides: rows,
            query_starts: self.starts.view(),
            seq_lens: self.lens.view(),
            block_tables: self.tables.view(),
            block_table_stride: TABLE,
            alibi_slopes: None,
            sinks: None,
            output: self.output.view_mut(),
            output_strides: rows,
            lse: None,
            workspace: self.workspace.view_mut().slice_mut(part)?,
            plan_is_ready: ready,
        })
    }

    /// The layer's blocks as the raw storey has them.
    fn pointers(&mut self) -> LayerMut<'static, Pointers> {
        let bytes = |buffer: &CudaBuffer<u8>| PtrMut::new(buffer.device_ptr() as *mut u8, buffer.len());
        LayerMut { k: bytes(&self.k), v: bytes(&self.v), k_dynamic: None, v_dynamic: None }
    }

    /// Cache and output, by their bits.
    fn state(&self, cuda: &CudaBackend) -> (Vec<u8>, Vec<u8>, Vec<u32>) {
        let output = download(cuda, &self.output, self.output.len());
        let (k, v) = (download(cuda, &self.k, self.k.len()), download(cuda, &self.v, self.v.len()));
        (k, v, output.into_iter().map(|x| x.to_f32().to_bits()).collect())
    }
}

/// A decode step with a copy-on-write before it, recorded once and replayed with other tables, slots,
/// lengths, scales and pairs, gives the bits of the same calls made one by one.
#[test]
fn a_graph_replays_with_what_its_buffers_hold() {
    let cuda = cuda_or_skip!();
    replay_a_graph::<f32>(&cuda);
    replay_a_graph::<bf16>(&cuda);
}

fn replay_a_graph<T: Element>(cuda: &CudaBackend) {
    let (mut eager, mut captured) = (Step::<T>::new(cuda), Step::<T>::new(cuda));
    let memories = raw::block_memories(&eager.shape, &[captured.pointers()]).unwrap();
    // The list as bytes: `BlockMemory` is three 64-bit numbers.
    let words: Vec<i64> = memories
        .iter()
        .flat_map(|memory| [memory.base as i64, memory.block_stride_bytes, memory.block_bytes])
        .collect();
    let words = upload(cuda, &words);
    let mut pairs = upload(cuda, &[-1i64, -1]);
    let mut faults = upload(cuda, &[0i32]);
    let plan = CopyPlan {
        memories: PtrRef::new(words.device_ptr() as *const BlockMemory, memories.len()),
        pairs: PtrRef::new(pairs.device_ptr() as *const i64, 2),
        num_blocks: BLOCKS,
        max_block_bytes: memories.iter().map(|memory| memory.block_bytes as usize).max().unwrap(),
    };
    let launch =
        Launch { stream: cuda.stream().cu_stream().cast(), faults: faults.view_mut().device_ptr() as *mut u32 };
    let stream = cuda.stream();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    // SAFETY: the lists and what they describe live until the end of this test, which uses nothing else of them.
    unsafe { raw::copy_blocks(plan, launch) }.unwrap();
    captured.write(cuda).unwrap();
    captured.attend(cuda, false).unwrap();
    // What touches host memory is refused, and the capture goes on.
    let refused = |result: quantkv::Result<()>| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::InCapture { .. }), "{error:?}");
    };
    refused(cuda.upload(&[0], &mut eager.lens));
    refused(cuda.download(&eager.lens, &mut [0]));
    refused(cuda.faults().map(|_| ()));
    let layer = LayerMut { k: eager.k.view_mut(), v: eager.v.view_mut(), k_dynamic: None, v_dynamic: None };
    refused(cuda.copy_blocks(CopyBlocks { shape: eager.shape, layers: &mut [layer], pairs: &[BlockPair::new(0, 1)] }));
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("a graph");
    assert_eq!(captured.state(cuda), eager.state(cuda), "recording runs nothing");
    for seed in 1..6 {
        let (src, dst) = (seed as u32, (seed as u32 + 5) % BLOCKS as u32);
        eager.load(cuda, seed);
        captured.load(cuda, seed);
        cuda.upload(&[i64::from(src), i64::from(dst)], &mut pairs).unwrap();
        graph.launch().unwrap();
        let layer = LayerMut { k: eager.k.view_mut(), v: eager.v.view_mut(), k_dynamic: None, v_dynamic: None };
        let pairs = &[BlockPair::new(src, dst)];
        cuda.copy_blocks(CopyBlocks { shape: eager.shape, layers: &mut [layer], pairs }).unwrap();
        eager.write(cuda).unwrap();
        eager.attend(cuda, false).unwrap();
        let (got, want) = (captured.state(cuda), eager.state(cuda));
        assert!(want.2.iter().all(|&bits| f32::from_bits(bits).is_finite() && bits != (-1000f32).to_bits()));
        assert!(got == want, "replay {seed} differs from the calls one by one");
        assert_eq!((cuda.faults().unwrap(), download(cuda, &faults, 1)[0]), (Faults::NONE, 0));
    }
    // Bad data in a replay sets the fault and harms nothing.
    let before = captured.state(cuda);
    cuda.upload(&[i64::MAX; SEQS], &mut captured.slots).unwrap();
    cuda.upload(&[i32::MAX; SEQS * TABLE], &mut captured.tables).unwrap();
    cuda.upload(&[i64::MIN, 3], &mut pairs).unwrap();
    graph.launch().unwrap();
    let after = captured.state(cuda);
    assert!((&before.0, &before.1) == (&after.0, &after.1), "the cache has changed");
    assert_eq!(cuda.faults().unwrap(), Faults::SLOT_OUT_OF_RANGE | Faults::BLOCK_OUT_OF_RANGE);
    assert_eq!(download(cuda, &faults, 1)[0], Faults::BLOCK_OUT_OF_RANGE.bits() as i32);
    assert!(after.2.iter().all(|&bits| bits == 0), "no key is left: zeros");
}

/// Layers of a step share a plan; a wrong one may give wrong numbers, never a wrong access (which is
/// for compute-sanitizer and AddressSanitizer to see) or a hang.
#[test]
fn plans_are_shared_and_not_trusted() {
    let cuda = cuda_or_skip!();
    share_plans::<f32>(&cuda);
    share_plans::<f16>(&cuda);
    share_plans::<bf16>(&cuda);
}

fn share_plans<T: Element>(cuda: &CudaBackend) {
    let kernels = [AttentionKernel::Auto, AttentionKernel::Portable].map(|kernel| cuda.with_attention_kernel(kernel));
    for cuda in &kernels {
        let mut step = Step::<T>::new(cuda);
        step.load(cuda, 3);
        step.write(cuda).unwrap();
        step.attend(cuda, false).unwrap();
        let first = step.state(cuda);
        cuda.upload(&Step::<T>::no_output(), &mut step.output).unwrap();
        step.attend(cuda, true).unwrap();
        assert!(step.state(cuda) == first, "{:?}", cuda.attention_kernel());
        let mut rng = Rng::new(77);
        for round in 0..if devices::emulated() { 20 } else { 200 } {
            // Small numbers look more like a plan than any bits do.
            let words: Vec<f32> = (0..step.workspace.len())
                .map(|_| f32::from_bits(if round % 2 == 0 { rng.bits() as u32 } else { rng.below(9) as u32 }))
                .collect();
            cuda.upload(&words, &mut step.workspace).unwrap();
            step.attend(cuda, true).unwrap();
            let (k, v, _) = step.state(cuda);
            assert!((&k, &v) == (&first.0, &first.1), "the cache has changed");
        }
        // And the step after it is right.
        step.attend(cuda, false).unwrap();
        assert!(step.state(cuda) == first, "{:?}", cuda.attention_kernel());
    }
}

/// Long sequences are cut into pieces, which hand their states on through the workspace. After a call it is as the plan
/// had left it, whatever the queries were, and the next call finds nothing of the one before.
#[test]
fn a_call_leaves_its_plan_as_it_was() {
    let cuda = &*cuda_or_skip!();
    // One query, and 32 query rows a KV head, for which sm_90 has another kernel.
    leaves_its_plan_as_it_was(cuda, (KV_HEADS, HEADS), DIM, 1);
    leaves_its_plan_as_it_was(cuda, (3, 24), 128, 4);
    // 64 rows, on all multiprocessors: what products under way are not waited for differs once in a while, on hardware.
    if !devices::emulated() {
        leaves_its_plan_as_it_was(cuda, (40, 320), 128, 8);
    }
}

fn leaves_its_plan_as_it_was(cuda: &CudaBackend, (kv_heads, heads): (usize, usize), dim: usize, queries_each: usize) {
    const LENS: [i32; 3] = [1024, 300, 2000];
    let shape = CacheSpec::new(kv_heads, dim, 16, KvFormat::Fp8E4M3).unwrap().shape(BLOCKS).unwrap();
    let mut rng = Rng::new(8);
    let mut codes = |half| -> Vec<u8> { (0..shape.buffer_bytes(half)).map(|_| rng.bits() as u8 & 0xbf).collect() };
    let (k, v) = (upload(cuda, &codes(Half::K)), upload(cuda, &codes(Half::V)));
    let stride = 2048 / 16;
    let tables: Vec<i32> = (0..LENS.len() * stride).map(|_| rng.below(BLOCKS) as i32).collect();
    let (tables, lens, scale) = (upload(cuda, &tables), upload(cuda, &LENS), upload(cuda, &[0.05]));
    let num_tokens = LENS.len() * queries_each;
    let starts = upload(cuda, &[0, 1, 2, 3].map(|i| i * queries_each as i32));
    let floats = cuda.attention_workspace_len(&shape, heads, num_tokens);
    let mut workspace = upload(cuda, &vec![f32::NAN; floats]);
    let queries: [CudaBuffer<bf16>; 2] = std::array::from_fn(|_| {
        upload(cuda, &(0..num_tokens * heads * dim).map(|_| bf16::from_f32(rng.normal())).collect::<Vec<_>>())
    });
    let call = |query: &CudaBuffer<bf16>, workspace: &mut CudaBuffer<f32>, plan_is_ready| {
        let mut output = upload(cuda, &vec![bf16::from_f32(-1000.0); num_tokens * heads * dim]);
        let rows = RowStrides::contiguous(heads, dim);
        let scale = || ScaleRef { values: scale.view(), strides: ScaleStrides::default() };
        cuda.paged_attention::<bf16>(PagedAttention {
            shape,
            cache: LayerRef { k: k.view(), v: v.view(), k_dynamic: None, v_dynamic: None },
            k_scale: scale(),
            v_scale: scale(),
            params: AttentionParams::new(0.125),
            num_heads: heads,
            num_tokens,
            max_query_len: Some(queries_each),
            query: query.view(),
            query_strides: rows,
            query_starts: starts.view(),
            seq_lens: lens.view(),
            block_tables: tables.view(),
            block_table_stride: stride,
            alibi_slopes: None,
            sinks: None,
            output: output.view_mut(),
            output_strides: rows,
            lse: None,
            workspace: workspace.view_mut(),
            plan_is_ready,
        })
        .unwrap();
        let bits = |floats: Vec<f32>| floats.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let output = download(cuda, &output, output.len()).into_iter().map(|x| x.to_f32()).collect();
        (bits(output), bits(download(cuda, workspace, floats)))
    };
    let first = [0, 1].map(|i: usize| call(&queries[i], &mut workspace, false));
    assert_eq!(cuda.faults().unwrap(), Faults::NONE);
    assert!(first[0].0 != first[1].0 && first[0].1 == first[1].1, "outputs differ, and nothing of them is left");
    for i in 0..if devices::emulated() { 3 } else { 300 } {
        assert!(call(&queries[i % 2], &mut workspace, true) == first[i % 2], "call {i}");
    }

    // A worker that has lost its share (a WorkerStart without units: csrc/ops/paged_attention.h) is waited for in vain.
    // That ends, and shows.
    let mut words = first[0].1.clone();
    let groups = (num_tokens * 32).next_multiple_of(256) / 4;
    let start_of = |worker: usize| groups + 8 * worker;
    let lost = (0..16).find(|&w| words[start_of(w)] > 0 && words[start_of(w) + 5] as i32 >= 0).expect("a second piece");
    words[start_of(lost)] = 0;
    let words: Vec<f32> = words.into_iter().map(f32::from_bits).collect();
    cuda.upload(&words, &mut workspace).unwrap();
    let (output, _) = call(&queries[0], &mut workspace, true);
    assert_eq!(cuda.faults().unwrap(), Faults::NOT_THE_PLAN);
    let (alone, right) = (bf16::from_f32(-1000.0).to_f32().to_bits(), &first[0].0);
    assert!(output.contains(&alone) && output.iter().zip(right).all(|(got, want)| *got == alone || got == want));
    assert!(call(&queries[0], &mut workspace, false) == first[0], "a new plan");
    assert_eq!(cuda.faults().unwrap(), Faults::NONE);
}

#[test]
fn workspaces_are_checked() {
    let cuda = cuda_or_skip!();
    let mut step = Step::<f32>::new(&cuda);
    step.load(&cuda, 1);
    let floats = step.workspace.len();
    step.attend_in(&cuda, false, 0..floats).unwrap();
    // What f32 rows need may be less than the most that rows of any type do; and a call may get by with less
    // than the query promises for its sizes.
    for part in 0..8 {
        let got = 64 * part;
        let error = step.attend_in(&cuda, false, 0..got).unwrap_err();
        let Error::BufferTooSmall { what: "attention workspace", needed, got: said } = error else {
            panic!("{error:?}")
        };
        assert!(said == got && got < needed && needed <= floats, "{got}, {needed} of {floats}");
        step.attend_in(&cuda, false, 0..needed).unwrap();
    }
    let error = step.attend_in(&cuda, false, 1..floats).unwrap_err();
    assert!(matches!(error, Error::Misaligned { what: "the attention workspace", align: 256 }), "{error:?}");
}

/// More sequences than query rows: those without a query need no workspace.
#[test]
fn sequences_without_queries_need_no_workspace() {
    let cuda = cuda_or_skip!();
    for cuda in [AttentionKernel::Auto, AttentionKernel::Portable].map(|kernel| cuda.with_attention_kernel(kernel)) {
        let mut step = Step::<f32>::new(&cuda);
        step.load(&cuda, 2);
        step.attend(&cuda, false).unwrap();
        let expected = step.state(&cuda);
        // 3 sequences with a query each, and 300 without between them.
        let mut starts = vec![0, 1];
        starts.extend([1; 300]);
        starts.extend([2, TOKENS as i32]);
        let spread = |values: &[i32], width: usize| -> Vec<i32> {
            [&values[..width], &vec![0; 300 * width], &values[width..]].concat()
        };
        let (lens, tables) = (download(&cuda, &step.lens, SEQS), download(&cuda, &step.tables, SEQS * TABLE));
        step.starts = upload(&cuda, &starts);
        step.lens = upload(&cuda, &spread(&lens, 1));
        step.tables = upload(&cuda, &spread(&tables, TABLE));
        cuda.upload(&Step::<f32>::no_output(), &mut step.output).unwrap();
        step.attend(&cuda, false).unwrap();
        assert!(step.state(&cuda) == expected, "{:?}", cuda.attention_kernel());
    }
}

#[test]
fn kernels_that_do_not_exist_say_so() {
    let cuda = cuda_or_skip!();
    let mut step = Step::<f32>::new(&cuda);
    step.load(&cuda, 2);
    // f32 rows are never rounded to 16 bits.
    let error = step.attend(&cuda.with_attention_kernel(AttentionKernel::TensorCore), false).unwrap_err();
    assert!(matches!(error, Error::NoKernel { backend: "cuda", .. }), "{error:?}");
    step.attend(&cuda, false).unwrap();
}

/// Threads with clones of one handle: calls interleave, each buffer's are in order, faults are all seen.
#[test]
fn threads_share_a_handle() {
    let cuda = cuda_or_skip!();
    let rounds = if devices::emulated() { 5 } else { 100 };
    let seen: u32 = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4u64)
            .map(|worker| {
                let cuda = (*cuda).clone();
                scope.spawn(move || {
                    let mut step = Step::<f32>::new(&cuda);
                    let mut seen = 0;
                    for round in 0..rounds {
                        step.load(&cuda, worker * 100 + round);
                        if round + 1 == rounds && worker == 0 {
                            cuda.upload(&[i64::MAX; SEQS], &mut step.slots).unwrap();
                        }
                        step.write(&cuda).unwrap();
                        step.attend(&cuda, false).unwrap();
                        assert!(step.state(&cuda).2.iter().all(|&bits| f32::from_bits(bits).is_finite()));
                        seen |= cuda.faults().unwrap().bits();
                    }
                    seen
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).fold(0, |all, seen| all | seen)
    });
    assert_eq!(Faults::from_bits(seen), Faults::SLOT_OUT_OF_RANGE);
    assert!(cuda.faults().unwrap().is_empty());
}

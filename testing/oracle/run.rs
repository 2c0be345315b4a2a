//! The same cases through any backend: upload, run, download. Nothing here computes.

use quantkv::args::{
    Absmax, AttentionParams, BlockPair, CacheWrite, CopyBlocks, Dequantize, Gather, GatherBytes, LayerMut, LayerRef,
    MergeStates, PagedAttention, Quantize, SwapBlocks, UpdateScales,
};
use quantkv::format::Pod;
use quantkv::layout::Half;
use quantkv::memory::Host;
use quantkv::scale::{Granularity, ScaleRef, ScaleStrides};
use quantkv::{Backend, Element, Faults, Result};

use super::attention::{AttentionCase, MergeCase};
use super::geometry::{Geometry, Layer, Scales};
use super::rows::{CacheWriteCase, ConvertCase, GatherCase, Rows};
use crate::with_element;

pub fn upload<B: Backend, T: Pod>(backend: &B, data: &[T]) -> B::Buffer<T> {
    let mut buffer = backend.zeros("test data", data.len()).unwrap();
    backend.upload(data, &mut buffer).unwrap();
    buffer
}

pub fn download<B: Backend, T: Pod>(backend: &B, buffer: &B::Buffer<T>, len: usize) -> Vec<T> {
    let mut data = vec![T::default(); len];
    backend.download(buffer, &mut data).unwrap();
    data
}

pub fn upload_as<B: Backend, T: Element>(backend: &B, data: &[f32]) -> B::Buffer<T> {
    let data: Vec<T> = data.iter().map(|&x| T::from_f32(x)).collect();
    upload(backend, &data)
}

pub fn download_as<B: Backend, T: Element>(backend: &B, buffer: &B::Buffer<T>, len: usize) -> Vec<f32> {
    download(backend, buffer, len).into_iter().map(T::to_f32).collect()
}

pub fn strides(scales: &Scales) -> ScaleStrides {
    ScaleStrides { head: scales.head, channel: scales.channel }
}

/// One layer in a backend's memory.
pub struct DeviceLayer<B: Backend> {
    k: B::Buffer<u8>,
    v: B::Buffer<u8>,
    k_dynamic: Option<B::Buffer<f32>>,
    v_dynamic: Option<B::Buffer<f32>>,
}

impl<B: Backend> DeviceLayer<B> {
    pub fn upload(backend: &B, layer: &Layer) -> Self {
        DeviceLayer {
            k: upload(backend, &layer.k),
            v: upload(backend, &layer.v),
            k_dynamic: layer.k_dynamic.as_ref().map(|scales| upload(backend, scales)),
            v_dynamic: layer.v_dynamic.as_ref().map(|scales| upload(backend, scales)),
        }
    }

    /// The layer as it is now; `like` gives the lengths.
    pub fn download(&self, backend: &B, like: &Layer) -> Layer {
        let dynamic = |buffer: &Option<B::Buffer<f32>>, like: &Option<Vec<f32>>| {
            buffer.as_ref().zip(like.as_ref()).map(|(buffer, like)| download(backend, buffer, like.len()))
        };
        Layer {
            k: download(backend, &self.k, like.k.len()),
            v: download(backend, &self.v, like.v.len()),
            k_dynamic: dynamic(&self.k_dynamic, &like.k_dynamic),
            v_dynamic: dynamic(&self.v_dynamic, &like.v_dynamic),
        }
    }

    pub fn as_ref<'a>(&'a self, backend: &B) -> LayerRef<'a, B> {
        LayerRef {
            k: backend.view(&self.k),
            v: backend.view(&self.v),
            k_dynamic: self.k_dynamic.as_ref().map(|scales| backend.view(scales)),
            v_dynamic: self.v_dynamic.as_ref().map(|scales| backend.view(scales)),
        }
    }

    pub fn as_mut<'a>(&'a mut self, backend: &B) -> LayerMut<'a, B> {
        LayerMut {
            k: backend.view_mut(&mut self.k),
            v: backend.view_mut(&mut self.v),
            k_dynamic: self.k_dynamic.as_mut().map(|scales| backend.view_mut(scales)),
            v_dynamic: self.v_dynamic.as_mut().map(|scales| backend.view_mut(scales)),
        }
    }
}

impl Layer {
    pub fn host_ref(&self) -> LayerRef<'_, Host> {
        LayerRef { k: &self.k, v: &self.v, k_dynamic: self.k_dynamic.as_deref(), v_dynamic: self.v_dynamic.as_deref() }
    }

    pub fn host_mut(&mut self) -> LayerMut<'_, Host> {
        LayerMut {
            k: &mut self.k,
            v: &mut self.v,
            k_dynamic: self.k_dynamic.as_deref_mut(),
            v_dynamic: self.v_dynamic.as_deref_mut(),
        }
    }
}

pub fn cache_write<B: Backend>(backend: &B, case: &CacheWriteCase) -> Result<(Layer, Faults)> {
    let mut layer = DeviceLayer::upload(backend, &case.before);
    let slots = upload(backend, &case.slot_mapping);
    let (k_scale, v_scale) = (upload(backend, &case.k_scale.values), upload(backend, &case.v_scale.values));
    with_element!(case.dtype, T => {
        let key = upload_as::<B, T>(backend, &case.key.data);
        let value = upload_as::<B, T>(backend, &case.value.data);
        backend.cache_write::<T>(CacheWrite {
            shape: case.geometry.shape(),
            cache: layer.as_mut(backend),
            key: backend.view(&key),
            key_strides: case.key.strides,
            value: backend.view(&value),
            value_strides: case.value.strides,
            slot_mapping: backend.view(&slots),
            k_scale: ScaleRef { values: backend.view(&k_scale), strides: strides(&case.k_scale) },
            v_scale: ScaleRef { values: backend.view(&v_scale), strides: strides(&case.v_scale) },
        })?;
    });
    Ok((layer.download(backend, &case.before), backend.faults()?))
}

pub fn copy_blocks<B: Backend>(
    backend: &B,
    geometry: &Geometry,
    layers: &[Layer],
    pairs: &[BlockPair],
) -> Result<Vec<Layer>> {
    let mut device: Vec<_> = layers.iter().map(|layer| DeviceLayer::upload(backend, layer)).collect();
    let mut views: Vec<_> = device.iter_mut().map(|layer| layer.as_mut(backend)).collect();
    backend.copy_blocks(CopyBlocks { shape: geometry.shape(), layers: &mut views, pairs })?;
    drop(views);
    Ok(device.iter().zip(layers).map(|(device, like)| device.download(backend, like)).collect())
}

/// Device `src` to host `dst`.
pub fn swap_out<B: Backend>(
    backend: &B,
    (src_geometry, src): (&Geometry, &[Layer]),
    (dst_geometry, dst): (&Geometry, &[Layer]),
    pairs: &[BlockPair],
) -> Result<Vec<Layer>> {
    let device: Vec<_> = src.iter().map(|layer| DeviceLayer::upload(backend, layer)).collect();
    let mut out = dst.to_vec();
    let views: Vec<_> = device.iter().map(|layer| layer.as_ref(backend)).collect();
    let mut host: Vec<_> = out.iter_mut().map(Layer::host_mut).collect();
    backend.swap_out(SwapBlocks {
        src_shape: src_geometry.shape(),
        src: &views,
        dst_shape: dst_geometry.shape(),
        dst: &mut host,
        pairs,
    })?;
    drop((views, host));
    // Reading the device back waits for the transfer.
    let unchanged: Vec<_> = device.iter().zip(src).map(|(device, like)| device.download(backend, like)).collect();
    assert!(unchanged.iter().zip(src).all(|(a, b)| same_layer(a, b)), "swap_out wrote to its source");
    Ok(out)
}

/// Host `src` to device `dst`.
pub fn swap_in<B: Backend>(
    backend: &B,
    (src_geometry, src): (&Geometry, &[Layer]),
    (dst_geometry, dst): (&Geometry, &[Layer]),
    pairs: &[BlockPair],
) -> Result<Vec<Layer>> {
    let mut device: Vec<_> = dst.iter().map(|layer| DeviceLayer::upload(backend, layer)).collect();
    let mut views: Vec<_> = device.iter_mut().map(|layer| layer.as_mut(backend)).collect();
    let host: Vec<_> = src.iter().map(Layer::host_ref).collect();
    backend.swap_in(SwapBlocks {
        src_shape: src_geometry.shape(),
        src: &host,
        dst_shape: dst_geometry.shape(),
        dst: &mut views,
        pairs,
    })?;
    drop(views);
    Ok(device.iter().zip(dst).map(|(device, like)| device.download(backend, like)).collect())
}

/// Bit equality, NaN scales included.
pub fn same_layer(a: &Layer, b: &Layer) -> bool {
    let bits =
        |scales: &Option<Vec<f32>>| scales.as_ref().map(|all| all.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    a.k == b.k && a.v == b.v && [Half::K, Half::V].iter().all(|&half| bits(a.dynamic(half)) == bits(b.dynamic(half)))
}

pub fn gather<B: Backend>(backend: &B, case: &GatherCase) -> Result<(Rows, Rows, Faults)> {
    let layer = DeviceLayer::upload(backend, &case.layer);
    let (k_scale, v_scale) = (upload(backend, &case.k_scale.values), upload(backend, &case.v_scale.values));
    let (tables, cu) = (upload(backend, &case.tables), upload(backend, &case.cu_seq_lens));
    let starts = case.starts.as_ref().map(|starts| upload(backend, starts));
    with_element!(case.dtype, T => {
        let mut key = upload_as::<B, T>(backend, &case.key.data);
        let mut value = upload_as::<B, T>(backend, &case.value.data);
        backend.gather::<T>(Gather {
            shape: case.geometry.shape(),
            cache: layer.as_ref(backend),
            k_scale: ScaleRef { values: backend.view(&k_scale), strides: strides(&case.k_scale) },
            v_scale: ScaleRef { values: backend.view(&v_scale), strides: strides(&case.v_scale) },
            block_tables: backend.view(&tables),
            block_table_stride: case.table_stride,
            cu_seq_lens: backend.view(&cu),
            starts: starts.as_ref().map(|starts| backend.view(starts)),
            num_tokens: case.num_tokens,
            key: backend.view_mut(&mut key),
            key_strides: case.key.strides,
            value: backend.view_mut(&mut value),
            value_strides: case.value.strides,
        })?;
        let key = Rows { data: download_as(backend, &key, case.key.data.len()), ..case.key };
        let value = Rows { data: download_as(backend, &value, case.value.data.len()), ..case.value };
        Ok((key, value, backend.faults()?))
    })
}

/// `fill` and `tail` as for the oracle's function of the same name.
pub fn gather_bytes<B: Backend>(
    backend: &B,
    case: &GatherCase,
    fill: u8,
    tail: usize,
) -> Result<([Vec<u8>; 2], Faults)> {
    let layer = DeviceLayer::upload(backend, &case.layer);
    let (tables, cu) = (upload(backend, &case.tables), upload(backend, &case.cu_seq_lens));
    let starts = case.starts.as_ref().map(|starts| upload(backend, starts));
    let len = |half| {
        let row = case.geometry.heads * case.geometry.dim(half) * super::formats::bytes_of(case.geometry.format(half));
        case.num_tokens * row + tail
    };
    let mut key = upload(backend, &vec![fill; len(Half::K)]);
    let mut value = upload(backend, &vec![fill; len(Half::V)]);
    backend.gather_bytes(GatherBytes {
        shape: case.geometry.shape(),
        cache: layer.as_ref(backend),
        block_tables: backend.view(&tables),
        block_table_stride: case.table_stride,
        cu_seq_lens: backend.view(&cu),
        starts: starts.as_ref().map(|starts| backend.view(starts)),
        num_tokens: case.num_tokens,
        key: backend.view_mut(&mut key),
        value: backend.view_mut(&mut value),
    })?;
    Ok(([download(backend, &key, len(Half::K)), download(backend, &value, len(Half::V))], backend.faults()?))
}

pub fn quantize<B: Backend>(backend: &B, case: &ConvertCase) -> Result<Vec<u8>> {
    let scale = upload(backend, &case.scale.values);
    let mut codes = upload(backend, &case.codes);
    with_element!(case.dtype, T => {
        let input = upload_as::<B, T>(backend, &case.rows.data);
        backend.quantize::<T>(Quantize {
            num_tokens: case.tokens,
            num_heads: case.heads,
            head_dim: case.dim,
            format: case.format,
            input: backend.view(&input),
            strides: case.rows.strides,
            scale: ScaleRef { values: backend.view(&scale), strides: strides(&case.scale) },
            codes: backend.view_mut(&mut codes),
        })?;
    });
    Ok(download(backend, &codes, case.codes.len()))
}

pub fn dequantize<B: Backend>(backend: &B, case: &ConvertCase) -> Result<Rows> {
    let scale = upload(backend, &case.scale.values);
    let codes = upload(backend, &case.codes);
    with_element!(case.dtype, T => {
        let mut output = upload_as::<B, T>(backend, &case.rows.data);
        backend.dequantize::<T>(Dequantize {
            num_tokens: case.tokens,
            num_heads: case.heads,
            head_dim: case.dim,
            format: case.format,
            codes: backend.view(&codes),
            scale: ScaleRef { values: backend.view(&scale), strides: strides(&case.scale) },
            output: backend.view_mut(&mut output),
            strides: case.rows.strides,
        })?;
        Ok(Rows { data: download_as(backend, &output, case.rows.data.len()), ..case.rows })
    })
}

pub fn absmax<B: Backend>(
    backend: &B,
    rows: &Rows,
    dtype: quantkv::DType,
    (num_tokens, num_heads, head_dim): (usize, usize, usize),
    granularity: Granularity,
    running: &[f32],
) -> Result<Vec<f32>> {
    let mut maxima = upload(backend, running);
    with_element!(dtype, T => {
        let input = upload_as::<B, T>(backend, &rows.data);
        backend.absmax::<T>(Absmax {
            input: backend.view(&input),
            strides: rows.strides,
            num_tokens,
            num_heads,
            head_dim,
            granularity,
            running: backend.view_mut(&mut maxima),
        })?;
    });
    Ok(download(backend, &maxima, running.len()))
}

pub fn update_scales<B: Backend>(backend: &B, absmax: &[f32], divisor: f32) -> Result<Vec<f32>> {
    let maxima = upload(backend, absmax);
    let mut scales = upload(backend, &vec![f32::NAN; absmax.len()]);
    backend.update_scales(UpdateScales {
        absmax: backend.view(&maxima),
        divisor,
        scales: backend.view_mut(&mut scales),
    })?;
    Ok(download(backend, &scales, absmax.len()))
}

/// Output, LSE if asked for, and faults.
pub type AttentionOutput = (Vec<f32>, Option<Vec<f32>>, Faults);

pub fn attention<B: Backend>(backend: &B, case: &AttentionCase) -> Result<AttentionOutput> {
    let layer = DeviceLayer::upload(backend, &case.layer);
    let (k_scale, v_scale) = (upload(backend, &case.k_scale.values), upload(backend, &case.v_scale.values));
    let (tables, starts) = (upload(backend, &case.tables), upload(backend, &case.query_starts));
    let lens = upload(backend, &case.seq_lens);
    let alibi = case.alibi.as_ref().map(|slopes| upload(backend, slopes));
    let sinks = case.sinks.as_ref().map(|sinks| upload(backend, sinks));
    let shape = case.geometry.shape();
    // A workspace of NaN: nothing may be read from it before it is written.
    let floats = backend.attention_workspace_len(&shape, case.num_heads, case.num_tokens);
    let mut workspace = upload(backend, &vec![f32::NAN; floats]);
    let mut lse = case.lse.as_ref().map(|lse| upload(backend, lse));
    let params: AttentionParams = case.params;
    with_element!(case.dtype, T => {
        let query = upload_as::<B, T>(backend, &case.query.data);
        let mut output = upload_as::<B, T>(backend, &case.output.data);
        backend.paged_attention::<T>(PagedAttention {
            shape,
            cache: layer.as_ref(backend),
            k_scale: ScaleRef { values: backend.view(&k_scale), strides: strides(&case.k_scale) },
            v_scale: ScaleRef { values: backend.view(&v_scale), strides: strides(&case.v_scale) },
            params,
            num_heads: case.num_heads,
            num_tokens: case.num_tokens,
            max_query_len: case.max_query_len,
            query: backend.view(&query),
            query_strides: case.query.strides,
            query_starts: backend.view(&starts),
            seq_lens: backend.view(&lens),
            block_tables: backend.view(&tables),
            block_table_stride: case.table_stride,
            alibi_slopes: alibi.as_ref().map(|slopes| backend.view(slopes)),
            sinks: sinks.as_ref().map(|sinks| backend.view(sinks)),
            output: backend.view_mut(&mut output),
            output_strides: case.output.strides,
            lse: lse.as_mut().map(|lse| backend.view_mut(lse)),
            workspace: backend.view_mut(&mut workspace),
            plan_is_ready: false,
        })?;
        let out = download_as(backend, &output, case.output.data.len());
        let lse = lse.as_ref().zip(case.lse.as_ref()).map(|(lse, like)| download(backend, lse, like.len()));
        Ok((out, lse, backend.faults()?))
    })
}

/// Output, and LSE if asked for.
pub fn merge<B: Backend>(backend: &B, case: &MergeCase) -> Result<(Vec<f32>, Option<Vec<f32>>)> {
    let (a_lse, b_lse) = (upload(backend, &case.a_lse), upload(backend, &case.b_lse));
    let len = case.tokens * case.heads;
    let mut lse = case.with_lse.then(|| upload(backend, &vec![f32::NAN; len]));
    with_element!(case.dtype, T => {
        let (a, b) = (upload_as::<B, T>(backend, &case.a), upload_as::<B, T>(backend, &case.b));
        let mut output = upload_as::<B, T>(backend, &case.output);
        backend.merge_states::<T>(MergeStates {
            num_tokens: case.tokens,
            num_heads: case.heads,
            head_dim: case.dim,
            a: backend.view(&a),
            a_lse: backend.view(&a_lse),
            b: backend.view(&b),
            b_lse: backend.view(&b_lse),
            strides: case.strides,
            output: backend.view_mut(&mut output),
            lse: lse.as_mut().map(|lse| backend.view_mut(lse)),
        })?;
        let out = download_as(backend, &output, case.output.len());
        Ok((out, lse.as_ref().map(|lse| download(backend, lse, len))))
    })
}

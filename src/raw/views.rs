//! From the safe storey to this one, for GPUs: argument structs over a backend's views become the same structs over
//! [`Pointers`], after a look at the stream that each view belongs to.

use super::Pointers;
use crate::args::{LayerMut, LayerRef};
use crate::error::Result;
use crate::format::Pod;
use crate::memory::{Host, Memory};
use crate::raw::{PtrMut, PtrRef};
use crate::scale::ScaleRef;

/// Views that can be had as pointers, if they are of stream `S`.
pub(crate) trait IntoPointers<S: ?Sized> {
    type Pointers;

    fn into_pointers(self, stream: &S, what: &'static str) -> Result<Self::Pointers>;
}

impl<S: ?Sized, B: IntoPointers<S>> IntoPointers<S> for Option<B> {
    type Pointers = Option<B::Pointers>;

    fn into_pointers(self, stream: &S, what: &'static str) -> Result<Self::Pointers> {
        self.map(|buffer| buffer.into_pointers(stream, what)).transpose()
    }
}

/// Memory whose views are of streams of type `S`.
pub(crate) trait DeviceMemory<S: ?Sized>: Memory {
    fn pointer<T: Pod>(view: Self::Ref<'_, T>, stream: &S, what: &'static str) -> Result<PtrRef<T>>;
    fn pointer_mut<T: Pod>(view: Self::Mut<'_, T>, stream: &S, what: &'static str) -> Result<PtrMut<T>>;
    /// The same elements, for a shorter time.
    fn reborrow<'a, T: Pod>(view: &'a mut Self::Mut<'_, T>) -> Self::Mut<'a, T>;
}

/// Rebuilds a struct over pointers: first the fields that are plain, then those that hold buffers.
macro_rules! pointers {
    ($from:ident as $to:ident { $($plain:ident),*; $($buffer:ident),* } on $stream:expr) => {
        $to {
            $($plain: $from.$plain,)*
            $($buffer: $crate::raw::views::IntoPointers::into_pointers($from.$buffer, $stream, stringify!($buffer))?,)*
        }
    };
}
pub(crate) use pointers;

impl<'a, S: ?Sized, M: DeviceMemory<S>> IntoPointers<S> for ScaleRef<'a, M> {
    type Pointers = ScaleRef<'a, Pointers>;

    fn into_pointers(self, stream: &S, what: &'static str) -> Result<Self::Pointers> {
        Ok(ScaleRef { values: M::pointer(self.values, stream, what)?, strides: self.strides })
    }
}

impl<'a, S: ?Sized, M: DeviceMemory<S>> IntoPointers<S> for LayerRef<'a, M> {
    type Pointers = LayerRef<'a, Pointers>;

    fn into_pointers(self, stream: &S, _: &'static str) -> Result<Self::Pointers> {
        let dynamic = |view: Option<M::Ref<'a, f32>>, what| view.map(|view| M::pointer(view, stream, what)).transpose();
        Ok(LayerRef {
            k: M::pointer(self.k, stream, "k")?,
            v: M::pointer(self.v, stream, "v")?,
            k_dynamic: dynamic(self.k_dynamic, "k_dynamic")?,
            v_dynamic: dynamic(self.v_dynamic, "v_dynamic")?,
        })
    }
}

impl<'a, S: ?Sized, M: DeviceMemory<S>> IntoPointers<S> for LayerMut<'a, M> {
    type Pointers = LayerMut<'a, Pointers>;

    fn into_pointers(mut self, stream: &S, _: &'static str) -> Result<Self::Pointers> {
        layer_pointers(&mut self, stream)
    }
}

/// The layer's pointers, while it stays borrowed.
pub(crate) fn layer_pointers<'p, S: ?Sized, M: DeviceMemory<S>>(
    layer: &mut LayerMut<'_, M>,
    stream: &S,
) -> Result<LayerMut<'p, Pointers>> {
    let LayerMut { k, v, k_dynamic, v_dynamic } = layer;
    let dynamic = |view: Option<M::Mut<'_, f32>>, what| view.map(|view| M::pointer_mut(view, stream, what)).transpose();
    Ok(LayerMut {
        k: M::pointer_mut(M::reborrow(k), stream, "k")?,
        v: M::pointer_mut(M::reborrow(v), stream, "v")?,
        k_dynamic: dynamic(k_dynamic.as_mut().map(M::reborrow), "k_dynamic")?,
        v_dynamic: dynamic(v_dynamic.as_mut().map(M::reborrow), "v_dynamic")?,
    })
}

/// Host memory as the copies have it.
pub(crate) fn host_ref<'p>(layer: &LayerRef<'_, Host>) -> LayerRef<'p, Pointers> {
    let dynamic = |scales: Option<&[f32]>| scales.map(|scales| PtrRef::new(scales.as_ptr(), scales.len()));
    LayerRef {
        k: PtrRef::new(layer.k.as_ptr(), layer.k.len()),
        v: PtrRef::new(layer.v.as_ptr(), layer.v.len()),
        k_dynamic: dynamic(layer.k_dynamic),
        v_dynamic: dynamic(layer.v_dynamic),
    }
}

/// The same, to be written.
pub(crate) fn host_mut<'p>(layer: &mut LayerMut<'_, Host>) -> LayerMut<'p, Pointers> {
    let dynamic = |scales: &mut [f32]| PtrMut::new(scales.as_mut_ptr(), scales.len());
    LayerMut {
        k: PtrMut::new(layer.k.as_mut_ptr(), layer.k.len()),
        v: PtrMut::new(layer.v.as_mut_ptr(), layer.v.len()),
        k_dynamic: layer.k_dynamic.as_deref_mut().map(dynamic),
        v_dynamic: layer.v_dynamic.as_deref_mut().map(dynamic),
    }
}

/// Declares operations of a backend that are the raw storey's (module `raw`, where this is used) once their buffers are
/// pointers. The backend has `stream()` and `enqueue()`.
macro_rules! operations {
    () => {
        $crate::raw::views::operations! {
            cache_write<T>: CacheWrite {
                shape, key_strides, value_strides;
                cache, key, value, slot_mapping, k_scale, v_scale
            }
            merge_states<T>: MergeStates { num_tokens, num_heads, head_dim, strides; a, a_lse, b, b_lse, output, lse }
            gather<T>: Gather {
                shape, block_table_stride, num_tokens, key_strides, value_strides;
                cache, k_scale, v_scale, block_tables, cu_seq_lens, starts, key, value
            }
            gather_bytes: GatherBytes {
                shape, block_table_stride, num_tokens;
                cache, block_tables, cu_seq_lens, starts, key, value
            }
            absmax<T>: Absmax { strides, num_tokens, num_heads, head_dim, granularity; input, running }
            update_scales: UpdateScales { divisor; absmax, scales }
            quantize<T>: Quantize { num_tokens, num_heads, head_dim, format, strides; input, scale, codes }
            dequantize<T>: Dequantize { num_tokens, num_heads, head_dim, format, strides; codes, scale, output }
        }
    };
    ($($name:ident $(<$t:ident>)? : $op:ident { $($plain:ident),*; $($buffer:ident),* })+) => {$(
        fn $name $(<$t: Element>)? (&self, op: $op<'_, Self $(, $t)?>) -> Result<()> {
            let op = $crate::raw::views::pointers!(op as $op { $($plain),*; $($buffer),* } on self.stream());
            // SAFETY: the pointers are those of live views, of this stream: whatever uses or frees the memory
            // afterwards comes later in its order. What is written is borrowed exclusively.
            self.enqueue(|launch| unsafe { raw::$name(op, launch) })
        }
    )+};
}
pub(crate) use operations;

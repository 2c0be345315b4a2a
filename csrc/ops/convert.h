// quantize and dequantize: dense rows of activations to dense codes and back, by the codec and scales of the cache.
//
//   codes[t, h, d] = encode(rows[t, h, d] / scale(h, d))        rows[t, h, d] = decode(codes[t, h, d]) * scale(h, d)
//
// Codes are gapless. Rows in vectors of 8 channels where they are aligned, element by element where not.
#pragma once
#include "../core/rows.h"

namespace quantkv {

struct ConvertParams {
  quantkv_convert op;
  RowShare share;
};

QKV_DEVICE int64_t code_index(const quantkv_convert &op, int64_t token, int head) {
  return (token * op.num_heads + head) * op.head_dim;
}

// The grid covers all rows; lanes stride over the vectors of a row, however long it is.
template <Format A, int kTokens>
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, 3) quantize_vectors(const ConvertParams p) {
  wait_for_previous_kernel();
  const quantkv_convert &op = p.op;
  const Format format = static_cast<Format>(op.format);
  const RowPlace place(p.share);
  const int head = place.row;
  if (head >= p.share.rows) return;
  RowScale scale = {1.0f, nullptr, 0, 0.0f};
  if (is_quantized(format)) scale = static_row_scale(op.scale, head);
  for (int channel = place.lane * kVector; channel < op.head_dim; channel += p.share.lanes() * kVector) {
    auto source_of = [&](int64_t token) {
      return static_cast<const Stored<A> *>(op.rows.data) + row_index(op.rows, token, head) + channel;
    };
    Vector<A> x[kTokens];
    QKV_UNROLL
    for (int i = 0; i < kTokens; i++) {
      const int64_t token = place.first_token + i * p.share.side;
      x[i] = zero_vector<A>();
      if (i < p.share.steps && token < op.num_tokens) x[i] = stream_vector<A>(source_of(token));
    }
    EasyScales<true> easy;
    QKV_UNROLL
    for (int i = 0; i < kVector; i++) easy.set(i, scale.at(channel + i));
    const Store store = store_of<A>(format, easy.are_easy());
    QKV_UNROLL
    for (int i = 0; i < kTokens; i++) {
      const int64_t token = place.first_token + i * p.share.side;
      if (i >= p.share.steps || token >= op.num_tokens) continue;
      char *codes = static_cast<char *>(op.codes) + (code_index(op, token, head) + channel) * bytes_of(format);
      if (store_fast(store, codes, x[i], easy)) continue;
      store_elements(format, codes, source_of(token), scale, channel);
    }
  }
}

template <Format A, int kTokens>
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, 3) dequantize_vectors(const ConvertParams p) {
  wait_for_previous_kernel();
  const quantkv_convert &op = p.op;
  const RowPlace place(p.share);
  const int head = place.row;
  if (head >= p.share.rows) return;
  dispatch_format(static_cast<Format>(op.format), [&](auto tag) {
    constexpr Format F = decltype(tag)::value;
    for (int channel = place.lane * kVector; channel < op.head_dim; channel += p.share.lanes() * kVector) {
      float scale[kVector];
      QKV_UNROLL
      for (int i = 0; i < kVector; i++) scale[i] = is_quantized(F) ? static_scale(op.scale, head, channel + i) : 1.0f;
      Vector<F> codes[kTokens];
      QKV_UNROLL
      for (int i = 0; i < kTokens; i++) {
        const int64_t token = place.first_token + i * p.share.side;
        codes[i] = zero_vector<F>();
        if (i >= p.share.steps || token >= op.num_tokens) continue;
        codes[i] = stream_vector<F>(static_cast<const Stored<F> *>(op.codes) + code_index(op, token, head) + channel);
      }
      QKV_UNROLL
      for (int i = 0; i < kTokens; i++) {
        const int64_t token = place.first_token + i * p.share.side;
        if (i >= p.share.steps || token >= op.num_tokens) continue;
        store_vector(static_cast<Stored<A> *>(op.rows.data) + row_index(op.rows, token, head) + channel,
                     from_stored_vector<A>(codes[i], scale));
      }
    }
  });
}

// A warp a (token, head), an element a lane.
template <class T, bool kQuantize>
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, 4) convert_elements(const ConvertParams p) {
  wait_for_previous_kernel();
  const quantkv_convert &op = p.op;
  const int64_t first = global_warp(), warps = global_warps();
  const int64_t rows = op.num_tokens * op.num_heads;
  for (int64_t i = first; i < rows; i += warps) {
    const int64_t token = i / op.num_heads;
    const int head = static_cast<int>(i - token * op.num_heads);
    T *row = static_cast<T *>(op.rows.data) + row_index(op.rows, token, head);
    dispatch_format(static_cast<Format>(op.format), [&](auto tag) {
      constexpr Format F = decltype(tag)::value;
      for (int d = lane_index(); d < op.head_dim; d += kWarp) {
        const float scale = is_quantized(F) ? static_scale(op.scale, head, d) : 1.0f;
        if constexpr (kQuantize) {
          store_element<F>(op.codes, code_index(op, token, head) + d, row[d], scale);
        } else {
          row[d] = load_element_as<T, F>(op.codes, code_index(op, token, head) + d, scale);
        }
      }
    });
  }
}

} // namespace quantkv

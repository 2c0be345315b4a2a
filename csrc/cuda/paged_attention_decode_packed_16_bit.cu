// The decode kernel over 16-bit caches whose rows are packed.
#include "paged_attention_decode.h"

QKV_INSTANTIATE_DECODE(Format::F16, Order::Packed)
QKV_INSTANTIATE_DECODE(Format::BF16, Order::Packed)

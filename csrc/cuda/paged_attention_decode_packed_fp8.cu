// The decode kernel over FP8 caches whose rows are packed.
#include "paged_attention_decode.h"

QKV_INSTANTIATE_DECODE(Format::E4M3, Order::Packed)
QKV_INSTANTIATE_DECODE(Format::E5M2, Order::Packed)

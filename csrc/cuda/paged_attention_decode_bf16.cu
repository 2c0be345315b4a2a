// The decode kernel over BF16 caches.
#include "paged_attention_decode.h"

QKV_INSTANTIATE_DECODE(Format::BF16, Order::Rows)

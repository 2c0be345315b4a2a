// The decode kernel over E5M2 caches.
#include "paged_attention_decode.h"

QKV_INSTANTIATE_DECODE(Format::E5M2, Order::Rows)

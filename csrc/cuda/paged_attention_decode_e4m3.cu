// The decode kernel over E4M3 caches.
#include "paged_attention_decode.h"

QKV_INSTANTIATE_DECODE(Format::E4M3, Order::Rows)

// The decode kernel over F16 caches.
#include "paged_attention_decode.h"

QKV_INSTANTIATE_DECODE(Format::F16, Order::Rows)

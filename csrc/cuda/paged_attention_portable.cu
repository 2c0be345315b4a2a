// The f32 attention kernel, on CUDA.
#include "../launch/paged_attention_portable.h"

// The f32 attention kernel, on ROCm.
#define QKV_CODE_OBJECT quantkv_hip_code_paged_attention_portable
#include "../launch/paged_attention_portable.h"

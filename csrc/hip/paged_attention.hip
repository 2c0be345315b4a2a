// paged_attention: which kernels take a call, and the plan's, on ROCm.
#define QKV_CODE_OBJECT quantkv_hip_code_paged_attention
#include "../launch/paged_attention.h"

// absmax and update_scales, on ROCm.
#define QKV_CODE_OBJECT quantkv_hip_code_absmax
#include "../launch/absmax.h"

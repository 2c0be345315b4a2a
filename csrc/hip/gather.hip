// gather, on ROCm.
#define QKV_CODE_OBJECT quantkv_hip_code_gather
#include "../launch/gather.h"

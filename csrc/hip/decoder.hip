// The reference decoder's small kernels, on ROCm.
#define QKV_CODE_OBJECT quantkv_hip_code_decoder
#include "../launch/decoder.h"

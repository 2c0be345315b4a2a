// quantize and dequantize, on ROCm.
#define QKV_CODE_OBJECT quantkv_hip_code_convert
#include "../launch/convert.h"

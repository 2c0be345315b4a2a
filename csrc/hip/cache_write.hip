// cache_write, on ROCm.
#define QKV_CODE_OBJECT quantkv_hip_code_cache_write
#include "../launch/cache_write.h"

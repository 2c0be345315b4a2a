// copy_blocks, on ROCm.
#define QKV_CODE_OBJECT quantkv_hip_code_copy_blocks
#include "../launch/copy_blocks.h"

// merge_states, on ROCm.
#define QKV_CODE_OBJECT quantkv_hip_code_merge_states
#include "../launch/merge_states.h"

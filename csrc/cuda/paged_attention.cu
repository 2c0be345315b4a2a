// paged_attention: which kernels take a call, and the plan's, on CUDA.
#include "../launch/paged_attention.h"

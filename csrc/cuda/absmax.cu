// absmax and update_scales, on CUDA.
#include "../launch/absmax.h"

// The reference decoder's small kernels, on CUDA.
#include "../launch/decoder.h"

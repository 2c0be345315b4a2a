// swap_blocks, on CUDA.
#include "../launch/swap_blocks.h"

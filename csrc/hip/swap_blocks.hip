// swap_blocks, on ROCm.
#include "../launch/swap_blocks.h"

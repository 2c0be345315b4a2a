// copy_blocks, on CUDA.
#include "../launch/copy_blocks.h"

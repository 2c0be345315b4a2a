// cache_write, on CUDA.
#include "../launch/cache_write.h"

// gather, on CUDA.
#include "../launch/gather.h"

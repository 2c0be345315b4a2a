// quantize and dequantize, on CUDA.
#include "../launch/convert.h"

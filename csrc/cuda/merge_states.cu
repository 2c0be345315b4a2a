// merge_states, on CUDA.
#include "../launch/merge_states.h"

// The loops of mix_loops.h for any processor.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "mix_kernels.h"
#include "mix_loops.h"

const rwkv_peft::MixKernels rwkv_peft::kPlainMixes = MIX_KERNELS("plain");

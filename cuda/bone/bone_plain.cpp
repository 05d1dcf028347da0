// Bone's kernels for any processor: vectors of four floats, which compilers map to SSE2 or NEON.
#include <stdint.h>
#include <string.h>

#include "bone_call.h"

#define KERNELS kPlainBone
#define NAME "plain"
#define LANES 4
#define ROWS 2
#include "bone_kernels.h"

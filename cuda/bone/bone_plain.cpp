// Bone's kernels for every other CPU.
#define KERNELS kPlainKernels
#define LANES 4
#define ROWS 2
#include "bone_kernels.h"

// WKV6 on CUDA, for fp32, bf16 and fp16 elements and head sizes 32, 64 and 128.
#pragma once

#include "../wkv6_call.h"

namespace rwkv_peft {

// Launches on Launch::stream of the current device. Throws std::runtime_error if a launch fails.
extern const Device kCudaDevice;

}  // namespace rwkv_peft

// The part of CUDA that the kernels of cuda/wkv6/gpu use, implemented on one CPU thread.
//
// Each CUDA thread of a block is a fiber. __syncthreads() returns control to a scheduler, which resumes every fiber once
// per round, in rising or falling order of threadIdx. If a barrier is missing, some thread reads or writes too early in
// one of the two orders. To show this, tests can disable a single barrier of the source. Blocks run one after the other,
// in the same order as the threads.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads, blocks)
#define __shared__ static  // blocks run one at a time, so only the threads of one block share it
#define __syncthreads() Block::wait(__FILE__, __LINE__)

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;

using __half = _Float16;
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half(float x) { return static_cast<__half>(x); }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
// Rounds to nearest, ties to even. The NaNs of the kernels are quiet NaNs, which stay NaN after the addition.
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

class Block {
 public:
  static inline bool falling = false;
  static inline std::string missing_barrier;  // "file.cuh:line"

  static void run(int threads, const std::function<void()>& kernel) {
    Block block(threads, kernel);
    current_ = &block;
    block.run_rounds();
  }

  static void wait(const char* file, int line) {
    if (line == missing_line() && missing_barrier == std::string(file).substr(std::string(file).rfind('/') + 1) + ":" +
                                                         std::to_string(line)) {
      return;
    }
    current_->yield();
  }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool done = false;
  };

  Block(int threads, const std::function<void()>& kernel) : kernel_(kernel), fibers_(threads) {
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::enter, 0);
    }
  }

  static int missing_line() {
    return missing_barrier.empty() ? 0 : std::stoi(missing_barrier.substr(missing_barrier.find(':') + 1));
  }

  static void enter() {
    current_->kernel_();
    current_->fibers_[threadIdx.x].done = true;
  }

  void yield() { swapcontext(&fibers_[threadIdx.x].context, &scheduler_); }

  void run_rounds() {
    const int threads = static_cast<int>(fibers_.size());
    for (int done = 0; done < threads;) {
      for (int i = 0; i < threads; ++i) {
        threadIdx.x = falling ? threads - 1 - i : i;
        swapcontext(&scheduler_, &fibers_[threadIdx.x].context);
        done += fibers_[threadIdx.x].done;
      }
      if (done != 0 && done != threads) throw std::logic_error("not every thread reaches the same barrier");
    }
  }

  static inline Block* current_ = nullptr;
  const std::function<void()>& kernel_;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
};

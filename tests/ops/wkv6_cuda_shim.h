// The little of CUDA that wkv6_kernels.cuh uses, on one CPU thread.
//
// Each CUDA thread of a block is a fiber. __syncthreads() hands control back; a round resumes every fiber once, in
// rising or falling order of threadIdx. A missing barrier lets some thread read too early in one of the two orders.
#pragma once

#include <ucontext.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one block at a time: what is static is shared by its threads and by nobody else

struct Index {
  int x;
};
inline Index threadIdx, blockIdx;

class Block {
 public:
  static void run(int threads, bool falling, const std::function<void()>& kernel) {
    Block block(threads, kernel);
    current_ = &block;
    block.run_rounds(falling);
  }

  static void wait() { current_->yield(); }

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

  static void enter() {
    current_->kernel_();
    current_->fibers_[threadIdx.x].done = true;
  }

  void yield() { swapcontext(&fibers_[threadIdx.x].context, &scheduler_); }

  void run_rounds(bool falling) {
    const int threads = static_cast<int>(fibers_.size());
    for (int done = 0; done < threads;) {
      for (int i = 0; i < threads; ++i) {
        threadIdx.x = falling ? threads - 1 - i : i;
        swapcontext(&scheduler_, &fibers_[threadIdx.x].context);
        done += fibers_[threadIdx.x].done;
      }
      if (done != 0 && done != threads) throw std::logic_error("a barrier that not every thread reaches");
    }
  }

  static inline Block* current_ = nullptr;
  const std::function<void()>& kernel_;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
};

inline void __syncthreads() { Block::wait(); }

// WKV6 on CUDA: both sweeps of wkv6_sweeps.h, one block per head, one thread per channel, serial in time.
//
// A thread of a value sweep owns a column of the state, a thread of a key sweep a row; nothing but the current token's
// vectors is shared, and no two threads add to the same number: the results are deterministic.
//
// Nothing here but the language itself is CUDA's, so that tests/ops/wkv6_cuda_shim.h can run these very lines on a CPU.
#pragma once

#include "wkv6_sweeps.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace rwkv_peft {

__device__ inline float to_float(float x) { return x; }
__device__ inline void store(float* to, float x) { *to = x; }

#ifdef __CUDACC__
// By intrinsics: PyTorch compiles extensions with the conversion operators of these types switched off.
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }
__device__ inline void store(__half* to, float x) { *to = __float2half(x); }
#endif

// Grid: B*H blocks of N threads.
template <int N, typename scalar_t>
__global__ void value_sweep_kernel(Launch n, ValueSweep a) {
  __shared__ float read[N], write[N], bonus_write[N], decay[N];
  const int j = threadIdx.x;  // value column; while loading, also the key channel whose numbers this thread fetches
  const int64_t head = blockIdx.x;
  const float u = a.u[head % n.heads * N + j];
  float state[N];  // column j
  for (int i = 0; i < N; ++i) state[i] = a.first_state[(head * N + i) * N + j];

  for (int64_t step = 0; step < n.tokens; ++step) {
    const int64_t t = a.backward_in_time ? n.tokens - 1 - step : step;
    const int64_t row = n.row(head, t);
    if (n.chunk != 0 && t % n.chunk == 0) {
      float* kept = a.chunk_states + (head * n.chunks() + t / n.chunk) * N * N;
      for (int i = 0; i < N; ++i) kept[i * N + j] = state[i];
    }
    __syncthreads();  // everyone is done with the token before
    read[j] = to_float(static_cast<const scalar_t*>(a.read)[row + j]);
    write[j] = to_float(static_cast<const scalar_t*>(a.write)[row + j]);
    bonus_write[j] = u * write[j];
    decay[j] = a.decay[row + j];
    __syncthreads();
    const float in = to_float(static_cast<const scalar_t*>(a.in)[row + j]);
    float out = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out += read[i] * (state[i] + bonus_write[i] * in);
      state[i] = decay[i] * state[i] + write[i] * in;
    }
    store(static_cast<scalar_t*>(a.out) + row + j, out);
  }
  for (int i = 0; i < N; ++i) a.last_state[(head * N + i) * N + j] = state[i];
}

// A thread's view of a key sweep: key channel i of one head. States of the current chunk lie in global scratch as
// [token][value][key], so that the threads of a warp touch neighbours; each reads back only what it wrote itself.
template <int N, typename scalar_t>
struct KeyThread {
  const Launch& n;
  const KeySweep& a;
  int64_t head;
  int i;
  float *v, *grad_y;  // shared, N each

  __device__ float at(const void* rows, int64_t row) const {
    return to_float(static_cast<const scalar_t*>(rows)[row + i]);
  }

  __device__ float* states() const { return a.scratch + head * n.chunk * N * N + i; }

  // scratch[t - begin] becomes the state before token t.
  __device__ void recompute_states(int64_t begin, int64_t end) const {
    float state[N];  // row i
    const float* kept = a.chunk_states + ((head * n.chunks() + begin / n.chunk) * N + i) * N;
    for (int j = 0; j < N; ++j) state[j] = kept[j];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = n.row(head, t);
      const float decay = a.decay[row + i], k = at(a.k, row);
      float* before = states() + (t - begin) * N * N;
      __syncthreads();  // everyone is done with the token before
      v[i] = at(a.v, row);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < N; ++j) {
        before[j * N] = state[j];
        state[j] = decay * state[j] + k * v[j];
      }
    }
  }

  // Writes the gradients of token t and moves `grad`, row i of the state's gradient, to the token before.
  __device__ void step_back(int64_t t, const float* before, float u, float* grad, float& grad_u) const {
    const int64_t row = n.row(head, t);
    const float decay = a.decay[row + i], r = at(a.r, row), k = at(a.k, row);
    __syncthreads();  // everyone is done with the token before
    v[i] = at(a.v, row);
    grad_y[i] = at(a.grad_y, row);
    __syncthreads();
    float c = 0.0f, grad_r = 0.0f, grad_k = 0.0f, grad_decay = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float state = before[j * N];
      c += v[j] * grad_y[j];
      grad_r += state * grad_y[j];
      grad_k += grad[j] * v[j];
      grad_decay += grad[j] * state;
      grad[j] = decay * grad[j] + r * grad_y[j];
    }
    store(static_cast<scalar_t*>(a.grad_r) + row + i, grad_r + u * k * c);
    store(static_cast<scalar_t*>(a.grad_k) + row + i, grad_k + u * r * c);
    a.grad_decay[row + i] = grad_decay;
    grad_u += r * k * c;
  }
};

// Grid: B*H blocks of N threads.
template <int N, typename scalar_t>
__global__ void key_sweep_kernel(Launch n, KeySweep a) {
  __shared__ float v[N], grad_y[N];
  const int i = threadIdx.x;
  const int64_t head = blockIdx.x;
  const KeyThread<N, scalar_t> thread{n, a, head, i, v, grad_y};
  const float u = a.u[head % n.heads * N + i];
  float grad_u = 0.0f;
  float grad[N];
  for (int j = 0; j < N; ++j) grad[j] = a.grad_last_state[(head * N + i) * N + j];

  for (int64_t c = n.chunks() - 1; c >= 0; --c) {
    const int64_t begin = c * n.chunk, end = begin + n.chunk < n.tokens ? begin + n.chunk : n.tokens;
    thread.recompute_states(begin, end);
    for (int64_t t = end - 1; t >= begin; --t) {
      thread.step_back(t, thread.states() + (t - begin) * N * N, u, grad, grad_u);
    }
  }
  a.grad_u[head * N + i] = grad_u;
}

}  // namespace rwkv_peft

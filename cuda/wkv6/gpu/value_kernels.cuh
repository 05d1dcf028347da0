// WKV6 on CUDA, parallel over chunks of Launch::chunk tokens: code shared by all kernels, and the kernels of a value
// sweep.
//
// A value sweep updates a state (key x value) token by token and reads one row from it at each token:
//     out_t = (read_t . (u * write_t)) in_t + read_t S,    then    S <- diag(d_t) S + write_t^T in_t
// With (read, write, in) = (r, k, v) this is the forward pass, and S is the state. With (k, r, grad_y), from the last
// token to the first, S is the gradient G of the state, and out is grad_v. A sweep consists of three kernels:
//     summary_kernel   the state of each chunk when started from zero, and the chunk's decay; all chunks in parallel
//     scan_kernel      the state before each chunk; serial, with one multiply-add per chunk
//     value_kernel     the outputs of each chunk, token by token from the state before it; all chunks in parallel
// Decays are only multiplied, never divided. Nothing overflows, and a decay of 0 (a reset) is exact at any position.
// No two threads add to the same value, and every sum has a fixed order, so the results are deterministic.
//
// The kernels use no CUDA libraries, so tests/ops/wkv6/wkv6_cuda_shim.h can run them unchanged on a CPU.
#pragma once

#include "../wkv6_call.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace rwkv_peft {

constexpr int kStage = 8;   // tokens of a value sweep that are in shared memory at the same time

// Conversions use intrinsics, because PyTorch compiles extensions without the conversion operators of these types.
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }
__device__ inline void store(__half* to, float x) { *to = __float2half(x); }

// Returns the logarithm of the decay, limited to a value whose decay is 0 in fp32, so that sums stay finite. NaN stays
// NaN.
__device__ inline float log_decay(float w) {
  const float log = -expf(w);
  return log < -104.0f ? -104.0f : log;
}

// The chunk of a block of threads, and its tokens in the order of a sweep: steps 0, 1, ... `count` - 1.
template <int N>
struct ChunkPlace {
  int64_t head;      // index over the heads of all sequences
  int64_t index;     // head * chunks + chunk
  int part;          // index among the `parts` blocks of this chunk
  int count;         // number of tokens
  int64_t first;     // offset of step 0's row in a (B, T, H, N) array
  int64_t per_step;  // offset from the row of one step to the next

  __device__ ChunkPlace(const Launch& n, int parts, bool backward_in_time) {
    const unsigned block = blockIdx.x, chunks = static_cast<unsigned>(n.chunks());
    const unsigned chunk = block / parts % chunks;
    part = static_cast<int>(block % parts);
    index = block / parts;
    head = block / parts / chunks;
    const int64_t begin = chunk * n.chunk, left = n.tokens - begin;
    count = static_cast<int>(left < n.chunk ? left : n.chunk);
    const int64_t stride = n.heads * N;
    first = n.row(head, backward_in_time ? begin + count - 1 : begin);
    per_step = backward_in_time ? -stride : stride;
  }

  __device__ int64_t row(int step) const { return first + step * per_step; }
};

template <typename scalar_t>
__device__ inline float load(const void* rows, int64_t offset) {
  return to_float(static_cast<const scalar_t*>(rows)[offset]);
}

struct ValueSweep {
  bool backward_in_time;
  const void *read, *write, *in;  // (B, T, H, N)
  const float *w, *u;             // (B, T, H, N), (H, N)
  const float* first_state;       // (B, H, N, N)
  void* out;                      // (B, T, H, N)
  float* last_state;              // (B, H, N, N)
  float* states;                  // (B, H, chunks, N, N): summaries, then the state before each chunk in sweep order
  float* decays;                  // (B, H, chunks, N): decays of whole chunks
};

// How a block of N threads splits the state's N keys and kColumns of its values: 16 keys x kTile values per thread.
template <int N>
struct ValueTile {
  static constexpr int kColumns = N < 64 ? N : 64;
  static constexpr int kParts = N / kColumns;
  static constexpr int kTile = kColumns / 16;
  static constexpr int kGroups = N / 16;  // threads that share a column

  int group, key, column;  // first key, first column within the block's part

  __device__ ValueTile() : group(threadIdx.x / 16), key(group * 16), column(threadIdx.x % 16 * kTile) {}
};

template <int N>
struct alignas(16) SummaryShared {
  float write[kStage][N], in[kStage][ValueTile<N>::kColumns];
};

// Grid: B*H*chunks*kParts blocks of N threads.
template <int N, typename scalar_t>
__global__ void __launch_bounds__(N, 1) summary_kernel(Launch n, ValueSweep a) {
  using Tile = ValueTile<N>;
  __shared__ SummaryShared<N> shared;
  const ChunkPlace<N> chunk(n, Tile::kParts, a.backward_in_time);
  const Tile tile;
  const int channel = threadIdx.x;
  float state[16][Tile::kTile] = {};
  float reach = 0.0f;  // logarithm of the decay from after the current token to the end of the chunk

  for (int stage = (chunk.count - 1) / kStage * kStage; stage >= 0; stage -= kStage) {
    for (int s = kStage - 1; s >= 0; --s) {
      const bool there = stage + s < chunk.count;
      const int64_t row = chunk.row(stage + s) + channel;
      shared.write[s][channel] = there ? load<scalar_t>(a.write, row) * expf(reach) : 0.0f;
      reach += there ? log_decay(a.w[row]) : 0.0f;
    }
    for (int e = threadIdx.x; e < kStage * Tile::kColumns; e += N) {
      const int s = e / Tile::kColumns, column = e % Tile::kColumns;
      const int64_t row = chunk.row(stage + s) + chunk.part * Tile::kColumns;
      shared.in[s][column] = stage + s < chunk.count ? load<scalar_t>(a.in, row + column) : 0.0f;
    }
    __syncthreads();
#pragma unroll 2
    for (int s = 0; s < kStage; ++s) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kTile; ++j) {
          state[i][j] += shared.write[s][tile.key + i] * shared.in[s][tile.column + j];
        }
      }
    }
    __syncthreads();  // all threads are done with this stage
  }

  if (chunk.part == 0) a.decays[chunk.index * N + channel] = expf(reach);
  float* to = a.states + (chunk.index * N + tile.key) * N + chunk.part * Tile::kColumns + tile.column;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kTile; ++j) to[i * N + j] = state[i][j];
  }
}

// Grid: B*H*N*N threads, one per element of the state.
template <int N>
__global__ void scan_kernel(Launch n, ValueSweep a) {
  constexpr int kAhead = 8;  // chunks that are loaded at the same time
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t head = thread / (N * N), within = thread % (N * N), chunks = n.chunks();
  const int64_t first = a.backward_in_time ? chunks - 1 : 0, per_step = a.backward_in_time ? -1 : 1;
  float state = a.first_state[thread];

  for (int64_t step = 0; step < chunks; step += kAhead) {
    float added[kAhead], decay[kAhead];
#pragma unroll
    for (int e = 0; e < kAhead; ++e) {
      const int64_t chunk = head * chunks + first + (step + e) * per_step;
      const bool there = step + e < chunks;
      added[e] = there ? a.states[chunk * N * N + within] : 0.0f;
      decay[e] = there ? a.decays[chunk * N + within / N] : 1.0f;
    }
#pragma unroll
    for (int e = 0; e < kAhead; ++e) {
      const int64_t chunk = head * chunks + first + (step + e) * per_step;
      if (step + e < chunks) a.states[chunk * N * N + within] = state;
      state = decay[e] * state + added[e];
    }
  }
  a.last_state[thread] = state;
}

template <int N>
struct alignas(16) ValueShared {
  using Tile = ValueTile<N>;
  float read[kStage][N], write[kStage][N], decay[kStage][N];
  float in[kStage][Tile::kColumns];
  float out[Tile::kGroups][kStage][Tile::kColumns];  // each group's part of out, to be summed
  float bonus[Tile::kGroups][kStage];                // each group's part of read . (u * write), to be summed
};

// Grid: B*H*chunks*kParts blocks of N threads.
template <int N, typename scalar_t>
__global__ void __launch_bounds__(N, 1) value_kernel(Launch n, ValueSweep a) {
  using Tile = ValueTile<N>;
  __shared__ ValueShared<N> shared;
  const ChunkPlace<N> chunk(n, Tile::kParts, a.backward_in_time);
  const Tile tile;
  const int channel = threadIdx.x, from_column = chunk.part * Tile::kColumns;
  const float* u = a.u + chunk.head % n.heads * N + tile.key;
  float state[16][Tile::kTile];
  const float* before = a.states + (chunk.index * N + tile.key) * N + from_column + tile.column;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kTile; ++j) state[i][j] = before[i * N + j];
  }

  for (int stage = 0; stage < chunk.count; stage += kStage) {
    for (int s = 0; s < kStage; ++s) {
      const bool there = stage + s < chunk.count;
      const int64_t row = chunk.row(stage + s) + channel;
      shared.read[s][channel] = there ? load<scalar_t>(a.read, row) : 0.0f;
      shared.write[s][channel] = there ? load<scalar_t>(a.write, row) : 0.0f;
      shared.decay[s][channel] = there ? expf(log_decay(a.w[row])) : 1.0f;
    }
    for (int e = threadIdx.x; e < kStage * Tile::kColumns; e += N) {
      const int s = e / Tile::kColumns, column = e % Tile::kColumns;
      const bool there = stage + s < chunk.count;
      shared.in[s][column] = there ? load<scalar_t>(a.in, chunk.row(stage + s) + from_column + column) : 0.0f;
    }
    __syncthreads();

    if (threadIdx.x % 16 < kStage) {  // a group has 16 threads; one per token
      const int s = threadIdx.x % 16;
      float bonus = 0.0f;
      for (int i = 0; i < 16; ++i) bonus += shared.read[s][tile.key + i] * u[i] * shared.write[s][tile.key + i];
      shared.bonus[tile.group][s] = bonus;
    }
#pragma unroll 1
    for (int s = 0; s < kStage; ++s) {
      float out[Tile::kTile] = {};
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float read = shared.read[s][tile.key + i], write = shared.write[s][tile.key + i];
        const float decay = shared.decay[s][tile.key + i];
#pragma unroll
        for (int j = 0; j < Tile::kTile; ++j) {
          out[j] += read * state[i][j];
          state[i][j] = decay * state[i][j] + write * shared.in[s][tile.column + j];
        }
      }
#pragma unroll
      for (int j = 0; j < Tile::kTile; ++j) shared.out[tile.group][s][tile.column + j] = out[j];
    }
    __syncthreads();

    // Each thread stores the elements whose `in` it loaded, so no barrier is needed before the next stage's loads.
    for (int e = threadIdx.x; e < kStage * Tile::kColumns; e += N) {
      const int s = e / Tile::kColumns, column = e % Tile::kColumns;
      float out = 0.0f, bonus = 0.0f;
#pragma unroll
      for (int g = 0; g < Tile::kGroups; ++g) out += shared.out[g][s][column], bonus += shared.bonus[g][s];
      if (stage + s >= chunk.count) continue;
      const int64_t row = chunk.row(stage + s) + from_column + column;
      store(static_cast<scalar_t*>(a.out) + row, out + bonus * shared.in[s][column]);
    }
  }
}

}  // namespace rwkv_peft

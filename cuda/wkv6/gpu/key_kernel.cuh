// WKV6 on CUDA: the gradients of r, k, w and u, which belong to key channels; all chunks in parallel.
//
// These gradients need S_{t-1} and G_t at the same token, but S is known before the chunk and G after it. A chunk is
// therefore divided into sub-chunks of 16 tokens. Given S before a sub-chunk [a, b) and G after it, the gradients need
// only their products with the sub-chunk's own v and grad_y, which are three small tables:
//     state_grad_y[q] = S grad_y_q        grad_state_v[s] = G v_s        v_grad_y[s][q] = v_s . grad_y_q
// and e = rowsum(S * G). With these tables, each key channel processes its 16 tokens independently, with scalars in
// place of rows of S and G: S_{t-1} grad_y_q from the recurrence of S, and G_t as a sum over the tokens after t. Decays
// are only multiplied with each other, and the gradient of w is not a difference of large sums.
#pragma once

#include "value_kernels.cuh"

namespace rwkv_peft {

constexpr int kSub = 16;   // tokens of a sub-chunk
constexpr int kBatch = 8;  // products with S or G that a block sums over its threads at the same time

struct KeySweep {
  const void *r, *k, *v, *grad_y;  // (B, T, H, N)
  const float *w, *u;              // (B, T, H, N), (H, N)
  const float* states;             // (B, H, chunks, N, N): S before each chunk
  const float* grad_states;        // (B, H, chunks, N, N): G after each chunk
  void *grad_r, *grad_k;           // (B, T, H, N)
  float* grad_w;                   // (B, T, H, N)
  float* grad_u;                   // (B, H, chunks, N): one part per chunk
};

// How a block of N threads splits kKeys of the state's keys and all N values: kTile keys x 16 values per thread. Each
// of the first kKeys threads also owns a key channel.
template <int N>
struct KeyTile {
  static constexpr int kKeys = N < 64 ? N : 64;
  static constexpr int kParts = N / kKeys;
  static constexpr int kTile = kKeys / 16;
  static constexpr int kGroups = N / 16;  // threads that share a key

  int group, key, column;  // first key within the block's part, first value

  __device__ KeyTile() : group(threadIdx.x / 16), key(threadIdx.x % 16 * kTile), column(group * 16) {}
};

template <int N>
struct alignas(16) KeyShared {
  using Tile = KeyTile<N>;
  static constexpr int kPitch = N + 4;  // so that threads reading one column of 16 rows use different banks
  float v[kSub][kPitch], grad_y[kSub][kPitch];
  float write[kSub][Tile::kKeys];  // k (r) times the decay between its token and the sub-chunk's end (start)
  float decay[Tile::kKeys];        // decay of the whole sub-chunk
  float state_grad_y[kSub][Tile::kKeys], grad_state_v[kSub][Tile::kKeys], v_grad_y[kSub][kSub];
  float share[Tile::kGroups][kBatch][Tile::kKeys];  // each group's part of the products, to be summed
  float share_of_e[Tile::kGroups][Tile::kKeys];
};

// One thread's view of a block's work.
template <int N, typename scalar_t>
struct KeyThread {
  using Tile = KeyTile<N>;
  using Matrix = float[Tile::kTile][16];  // the thread's part of a state

  const KeySweep& a;
  const ChunkPlace<N>& chunk;
  const Tile& tile;
  KeyShared<N>& shared;

  __device__ bool owns_channel() const { return threadIdx.x < Tile::kKeys; }
  __device__ int channel() const { return chunk.part * Tile::kKeys + threadIdx.x; }

  __device__ void load_values(const void* rows, float (*to)[KeyShared<N>::kPitch], int first) const {
#pragma unroll 4
    for (int s = 0; s < kSub; ++s) {
      const bool there = first + s < chunk.count;
      to[s][threadIdx.x] = there ? load<scalar_t>(rows, chunk.row(first + s) + threadIdx.x) : 0.0f;
    }
  }

  // Loads k of a complete sub-chunk, decayed, and the sub-chunk's decay. `step` then moves S to after the sub-chunk.
  __device__ void load_decayed_keys(int first) const {
    float reach = 0.0f;  // logarithm of the decay from after the token to the end of the sub-chunk
#pragma unroll 4
    for (int s = kSub - 1; s >= 0; --s) {
      const int64_t row = chunk.row(first + s) + channel();
      shared.write[s][threadIdx.x] = load<scalar_t>(a.k, row) * expf(reach);
      reach += log_decay(a.w[row]);
    }
    shared.decay[threadIdx.x] = expf(reach);
  }

  // Moves a state from one end of a sub-chunk to the other.
  __device__ void step(Matrix& state, const float (*values)[KeyShared<N>::kPitch]) const {
#pragma unroll
    for (int i = 0; i < Tile::kTile; ++i) {
      const float decay = shared.decay[tile.key + i];
#pragma unroll
      for (int j = 0; j < 16; ++j) state[i][j] *= decay;
    }
#pragma unroll 2
    for (int s = 0; s < kSub; ++s) {
#pragma unroll
      for (int i = 0; i < Tile::kTile; ++i) {
#pragma unroll
        for (int j = 0; j < 16; ++j) state[i][j] += shared.write[s][tile.key + i] * values[s][tile.column + j];
      }
    }
  }

  // Loads this thread's part of a state saved for the chunk.
  __device__ void load_state(Matrix& state, const float* states) const {
    const float* from = states + (chunk.index * N + chunk.part * Tile::kKeys + tile.key) * N + tile.column;
#pragma unroll
    for (int i = 0; i < Tile::kTile; ++i) {
#pragma unroll
      for (int j = 0; j < 16; ++j) state[i][j] = from[i * N + j];
    }
  }

  // Computes in `state` the state before the sub-chunk at `first`, and loads that sub-chunk's v and grad_y into shared
  // memory.
  __device__ void find_state(Matrix& state, int first) const {
    load_state(state, a.states);
#pragma unroll 1
    for (int earlier = 0; earlier < first; earlier += kSub) {
      load_values(a.v, shared.v, earlier);
      if (owns_channel()) load_decayed_keys(earlier);
      __syncthreads();
      step(state, shared.v);
      __syncthreads();  // all threads are done with the earlier sub-chunk
    }
    load_values(a.v, shared.v, first);
    load_values(a.grad_y, shared.grad_y, first);
    __syncthreads();
  }

  __device__ void multiply_values() const {
    for (int pair = threadIdx.x; pair < kSub * kSub; pair += N) {
      const float *v = shared.v[pair / kSub], *grad_y = shared.grad_y[pair % kSub];
      float sum = 0.0f;
#pragma unroll 16
      for (int j = 0; j < N; ++j) sum += v[j] * grad_y[j];
      shared.v_grad_y[pair / kSub][pair % kSub] = sum;
    }
  }

  __device__ void share_of_e(const Matrix& state, const Matrix& grad) const {
#pragma unroll
    for (int i = 0; i < Tile::kTile; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 16; ++j) sum += state[i][j] * grad[i][j];
      shared.share_of_e[tile.group][tile.key + i] = sum;
    }
  }

  __device__ void share_of_products(const Matrix& state, const float (*values)[KeyShared<N>::kPitch]) const {
#pragma unroll 2
    for (int s = 0; s < kBatch; ++s) {
#pragma unroll
      for (int i = 0; i < Tile::kTile; ++i) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 16; ++j) sum += state[i][j] * values[s][tile.column + j];
        shared.share[tile.group][s][tile.key + i] = sum;
      }
    }
  }

  __device__ void sum_shares(float (*to)[Tile::kKeys]) const {
    for (int e = threadIdx.x; e < kBatch * Tile::kKeys; e += N) {
      const int s = e / Tile::kKeys, key = e % Tile::kKeys;
      float sum = 0.0f;
#pragma unroll
      for (int g = 0; g < Tile::kGroups; ++g) sum += shared.share[g][s][key];
      to[s][key] = sum;
    }
  }

  // Fills the tables from which channel_gradients computes.
  __device__ void make_tables(const Matrix& state, const Matrix& grad) const {
    multiply_values();
    share_of_e(state, grad);
#pragma unroll 1
    for (int batch = 0; batch < 2 * kSub / kBatch; ++batch) {
      const int s = batch * kBatch % kSub;
      const bool of_state = batch < kSub / kBatch;
      if (of_state) share_of_products(state, shared.grad_y + s);
      if (!of_state) share_of_products(grad, shared.v + s);
      __syncthreads();
      sum_shares((of_state ? shared.state_grad_y : shared.grad_state_v) + s);
      __syncthreads();  // all threads are done with the parts; after the last batch, the tables are complete
    }
  }

  // Computes the gradients of one channel's 16 tokens from `first`, and prepares the step of G to before them.
  __device__ void channel_gradients(int first, float u, float& grad_u) const {
    const int own = threadIdx.x;
    float r[kSub], decay[kSub], state_grad_y[kSub];  // the last: S_{t-1} grad_y_q for the current t
    float before = 1.0f;                             // decay from the start of the sub-chunk to the token
#pragma unroll
    for (int t = 0; t < kSub; ++t) {
      const bool there = first + t < chunk.count;
      const int64_t row = chunk.row(first + t) + channel();
      r[t] = there ? load<scalar_t>(a.r, row) : 0.0f;
      decay[t] = there ? expf(log_decay(a.w[row])) : 1.0f;
      state_grad_y[t] = shared.state_grad_y[t][own];
      shared.write[t][own] = before * r[t];
      before *= decay[t];
    }
    shared.decay[own] = before;
    float e = 0.0f;  // rowsum(S_{t-1} * G_b)
#pragma unroll
    for (int g = 0; g < Tile::kGroups; ++g) e += shared.share_of_e[g][own];

#pragma unroll
    for (int t = 0; t < kSub; ++t) {
      if (first + t >= chunk.count) break;
      const int64_t row = chunk.row(first + t) + channel();
      const float k = load<scalar_t>(a.k, row), c = shared.v_grad_y[t][t], grad_state_v = shared.grad_state_v[t][own];
      float behind = 1.0f, grad_k = 0.0f, grad_decay = 0.0f;  // `behind`: decay from after t to q
#pragma unroll
      for (int q = t + 1; q < kSub; ++q) {
        const float read = behind * r[q];
        grad_k += read * shared.v_grad_y[t][q];
        grad_decay += read * state_grad_y[q];
        behind *= decay[q];
      }
      grad_k += behind * grad_state_v;
      grad_decay += behind * e;
      store(static_cast<scalar_t*>(a.grad_r) + row, state_grad_y[t] + u * k * c);
      store(static_cast<scalar_t*>(a.grad_k) + row, grad_k + u * r[t] * c);
      a.grad_w[row] = log_decay(a.w[row]) * decay[t] * grad_decay;  // dd/dw = -exp(w) d, which is 0 if the decay is
      grad_u += r[t] * k * c;
#pragma unroll
      for (int q = t + 1; q < kSub; ++q) state_grad_y[q] = decay[t] * state_grad_y[q] + k * shared.v_grad_y[t][q];
      e = decay[t] * e + k * grad_state_v;
    }
  }
};

// Grid: B*H*chunks*kParts blocks of N threads.
template <int N, typename scalar_t>
__global__ void __launch_bounds__(N, 1) key_kernel(Launch n, KeySweep a) {
  using Tile = KeyTile<N>;
  __shared__ KeyShared<N> shared;
  const ChunkPlace<N> chunk(n, Tile::kParts, /*backward_in_time=*/false);
  const Tile tile;
  const KeyThread<N, scalar_t> thread{a, chunk, tile, shared};
  const float u = thread.owns_channel() ? a.u[chunk.head % n.heads * N + thread.channel()] : 0.0f;
  float grad_u = 0.0f;
  float state[Tile::kTile][16], grad[Tile::kTile][16];
  thread.load_state(grad, a.grad_states);

#pragma unroll 1
  for (int first = (chunk.count - 1) / kSub * kSub; first >= 0; first -= kSub) {
    thread.find_state(state, first);
    thread.make_tables(state, grad);
    if (thread.owns_channel()) thread.channel_gradients(first, u, grad_u);
    __syncthreads();
    thread.step(grad, shared.grad_y);
    __syncthreads();  // all threads are done with this sub-chunk
  }
  if (thread.owns_channel()) a.grad_u[chunk.index * N + thread.channel()] = grad_u;
}

// Sums KeySweep's parts of grad_u to (B, H, N). Grid: B*H blocks of N threads.
template <int N>
__global__ void sum_grad_u_kernel(Launch n, const float* parts, float* grad_u) {
  const int64_t head = blockIdx.x;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t c = 0; c < n.chunks(); ++c) sum += parts[(head * n.chunks() + c) * N + threadIdx.x];
  grad_u[head * N + threadIdx.x] = sum;
}

}  // namespace rwkv_peft

// The two passes over time that WKV6 is made of. Each device implements both; wkv6_host.h calls them.
//
// Per head, with S the state, d = exp(-exp(w)) the decay and everything a row vector:
//     y_t = (r_t . (u * k_t)) v_t + r_t S_{t-1}
//     S_t = diag(d_t) S_{t-1} + k_t^T v_t
// and, with G_t the gradient of the loss in S_t, running backward in time:
//     grad_v_t = (r_t . (u * k_t)) grad_y_t + k_t G_t
//     G_{t-1}  = diag(d_t) G_t + r_t^T grad_y_t
// These are one and the same pass, so `ValueSweep` serves both. What is left are the gradients that belong to a key
// channel i; with c_t = v_t . grad_y_t they are
//     grad_r_t = u * k_t * c_t + S_{t-1} grad_y_t        grad_k_t = u * r_t * c_t + G_t v_t
//     grad_d_t = rowsum(G_t * S_{t-1})                   grad_u   = sum_t r_t * k_t * c_t
// which `KeySweep` computes. A value sweep never mixes value columns and a key sweep never mixes key channels, so both
// split into independent pieces without a single reduction between threads: the results are deterministic.
//
// No torch headers here: nvcc includes this file too.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WKV6_HOST_DEVICE __host__ __device__
#else
#define WKV6_HOST_DEVICE
#endif

namespace rwkv_peft {

enum class Element { kFloat32, kBFloat16, kFloat16 };

// Sizes and place of one call. Rows r, k, v, w are (batch, tokens, heads, head_size), contiguous.
struct Launch {
  int64_t batch, tokens, heads, head_size;
  int64_t chunk;    // a state is kept at every `chunk`-th token; 0 keeps none
  Element element;  // type of r, k, v, y and their gradients; all else is fp32
  void* stream;     // cudaStream_t; unused on CPU

  WKV6_HOST_DEVICE int64_t chunks() const { return chunk == 0 ? 0 : (tokens + chunk - 1) / chunk; }

  // Offset of token t in a (B, T, H, N) array; `head` counts the heads of all sequences, b * heads + h.
  WKV6_HOST_DEVICE int64_t row(int64_t head, int64_t t) const {
    return ((head / heads * tokens + t) * heads + head % heads) * head_size;
  }
};

// out_t = (read_t . (u * write_t)) in_t + read_t S;  then S = diag(decay_t) S + write_t^T in_t.
//   y:      read r, write k, in v,      S the state,        forward in time.
//   grad_v: read k, write r, in grad_y, S its gradient G,   backward in time.
struct ValueSweep {
  const void *read, *write, *in;  // (B, T, H, N)
  const float* decay;             // (B, T, H, N)
  const float* u;                 // (H, N)
  const float* first_state;       // (B, H, N, N), [key][value]
  void* out;                      // (B, T, H, N)
  float* last_state;              // (B, H, N, N)
  float* chunk_states;            // (B, H, chunks, N, N): S before each chunk's first token; unused when chunk is 0
  bool backward_in_time;
};

// Gradients per key channel. States inside a chunk are computed again from the one kept at its start.
struct KeySweep {
  const void *r, *k, *v, *grad_y;     // (B, T, H, N)
  const float* decay;                 // (B, T, H, N)
  const float* u;                     // (H, N)
  const float* chunk_states;          // (B, H, chunks, N, N)
  const float* grad_last_state;       // (B, H, N, N)
  void *grad_r, *grad_k;              // (B, T, H, N)
  float* grad_decay;                  // (B, T, H, N)
  float* grad_u;                      // (B, H, N): one part per sequence, summed by the caller in a fixed order
  float* scratch;                     // (B, H, chunk, N, N) on CUDA; unused on CPU
};

// What a device provides.
struct Sweeps {
  void (*values)(const Launch&, const ValueSweep&);
  void (*keys)(const Launch&, const KeySweep&);
  bool needs_scratch;
};

}  // namespace rwkv_peft

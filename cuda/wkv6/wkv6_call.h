// The interface between rwkv_peft::wkv6 and the code of a device: functions and raw pointers.
//
// For each head, with the state S, the decay d = exp(-exp(w)), and all other values as row vectors:
//     y_t = (r_t . (u * k_t)) v_t + r_t S_{t-1}
//     S_t = diag(d_t) S_{t-1} + k_t^T v_t
// For the gradients, let G_t be the gradient of the loss with respect to S_t, computed from the last token to the
// first, and c_t = v_t . grad_y_t:
//     grad_v_t = (r_t . (u * k_t)) grad_y_t + k_t G_t        grad_r_t = u * k_t * c_t + S_{t-1} grad_y_t
//     G_{t-1}  = diag(d_t) G_t + r_t^T grad_y_t              grad_k_t = u * r_t * c_t + G_t v_t
//     grad_d_t = rowsum(G_t * S_{t-1})                       grad_u   = sum_t r_t * k_t * c_t
//
// This header includes no torch headers, because nvcc compiles it too.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WKV6_HOST_DEVICE __host__ __device__
#else
#define WKV6_HOST_DEVICE
#endif

namespace rwkv_peft {

enum class Element { kFloat32, kBFloat16, kFloat16 };

// Sizes, chunk length, element type and stream of one call. r, k, v, w are (batch, tokens, heads, head_size),
// contiguous.
struct Launch {
  int64_t batch, tokens, heads, head_size;
  int64_t chunk;    // a state is saved before every `chunk`-th token; 0 saves none
  Element element;  // type of r, k, v, y and their gradients; everything else is fp32
  void* stream;     // cudaStream_t; unused on CPU

  WKV6_HOST_DEVICE int64_t chunks() const { return chunk == 0 ? 0 : (tokens + chunk - 1) / chunk; }

  // Returns the offset of token t in a (B, T, H, N) array; `head` is the index over all sequences, b * heads + h.
  WKV6_HOST_DEVICE int64_t row(int64_t head, int64_t t) const {
    return ((head / heads * tokens + t) * heads + head % heads) * head_size;
  }
};

struct Forward {
  const void *r, *k, *v;     // (B, T, H, N)
  const float *w, *u;        // (B, T, H, N), (H, N)
  const float* first_state;  // (B, H, N, N), [key][value]
  void* y;                   // (B, T, H, N)
  float* last_state;         // (B, H, N, N)
  float* chunk_states;       // (B, H, chunks, N, N): S before each chunk's first token; unused when chunk is 0
  float* scratch;            // Device::forward_scratch floats
};

// The states inside a chunk are computed again from the state saved at its start.
struct Backward {
  const void *r, *k, *v;         // (B, T, H, N)
  const float *w, *u;            // (B, T, H, N), (H, N)
  const float* chunk_states;     // (B, H, chunks, N, N)
  const void* grad_y;            // (B, T, H, N)
  const float* grad_last_state;  // (B, H, N, N)
  void *grad_r, *grad_k, *grad_v;  // (B, T, H, N)
  float* grad_w;                 // (B, T, H, N)
  float* grad_u;                 // (B, H, N): one part per sequence; the caller sums them in a fixed order
  float* grad_first_state;       // (B, H, N, N)
  float* scratch;                // Device::backward_scratch floats
};

struct Device {
  void (*forward)(const Launch&, const Forward&);
  void (*backward)(const Launch&, const Backward&);
  int64_t (*forward_scratch)(const Launch&);
  int64_t (*backward_scratch)(const Launch&);
};

}  // namespace rwkv_peft

// The order of the kernels in a forward and a backward pass, and the layout of the scratch memory.
//
// A `Queue` has launch(kernel, blocks, threads, arguments...): a CUDA stream, or the CPU in tests/ops/wkv6.
#pragma once

#include <stdexcept>
#include <string>

#include "value_kernels.cuh"
#include "key_kernel.cuh"

namespace rwkv_peft {

inline int64_t all_chunks(const Launch& n) { return n.batch * n.heads * n.chunks(); }

// The kernels work in chunks even if no states are saved.
inline Launch in_chunks(Launch n) {
  if (n.chunk == 0) n.chunk = 64;
  return n;
}

inline int64_t forward_scratch(const Launch& n) {
  const int64_t chunks = all_chunks(in_chunks(n)), decays = chunks * n.head_size;
  return n.chunk == 0 ? decays + chunks * n.head_size * n.head_size : decays;
}

inline int64_t backward_scratch(const Launch& n) {
  return all_chunks(in_chunks(n)) * n.head_size * (n.head_size + 2);
}

template <int N, typename scalar_t, typename Queue>
void value_sweep(const Queue& queue, const Launch& n, const ValueSweep& a) {
  constexpr int kScanThreads = 256;  // divides N * N
  const int64_t blocks = all_chunks(n) * ValueTile<N>::kParts;
  queue.launch(summary_kernel<N, scalar_t>, blocks, N, n, a);
  queue.launch(scan_kernel<N>, n.batch * n.heads * N * N / kScanThreads, kScanThreads, n, a);
  queue.launch(value_kernel<N, scalar_t>, blocks, N, n, a);
}

template <int N, typename scalar_t, typename Queue>
void run_pass(const Queue& queue, const Launch& n, const Forward& a) {
  const Launch chunked = in_chunks(n);
  ValueSweep sweep{};
  sweep.read = a.r, sweep.write = a.k, sweep.in = a.v, sweep.w = a.w, sweep.u = a.u;
  sweep.first_state = a.first_state, sweep.out = a.y, sweep.last_state = a.last_state;
  sweep.decays = a.scratch;
  sweep.states = n.chunk == 0 ? a.scratch + all_chunks(chunked) * N : a.chunk_states;
  value_sweep<N, scalar_t>(queue, chunked, sweep);
}

template <int N, typename scalar_t, typename Queue>
void run_pass(const Queue& queue, const Launch& n, const Backward& a) {
  const Launch chunked = in_chunks(n);
  const int64_t chunks = all_chunks(chunked);
  float *grad_states = a.scratch, *decays = grad_states + chunks * N * N, *grad_u = decays + chunks * N;

  ValueSweep values{};
  values.backward_in_time = true;
  values.read = a.k, values.write = a.r, values.in = a.grad_y, values.w = a.w, values.u = a.u;
  values.first_state = a.grad_last_state, values.out = a.grad_v, values.last_state = a.grad_first_state;
  values.states = grad_states, values.decays = decays;
  value_sweep<N, scalar_t>(queue, chunked, values);

  KeySweep keys{};
  keys.r = a.r, keys.k = a.k, keys.v = a.v, keys.grad_y = a.grad_y, keys.w = a.w, keys.u = a.u;
  keys.states = a.chunk_states, keys.grad_states = grad_states;
  keys.grad_r = a.grad_r, keys.grad_k = a.grad_k, keys.grad_w = a.grad_w, keys.grad_u = grad_u;
  queue.launch(key_kernel<N, scalar_t>, chunks * KeyTile<N>::kParts, N, chunked, keys);
  queue.launch(sum_grad_u_kernel<N>, n.batch * n.heads, N, chunked, grad_u, a.grad_u);
}

template <typename scalar_t, typename Queue, typename Pass>
void run_for_head_size(const Queue& queue, const Launch& n, const Pass& a) {
  switch (n.head_size) {
    case 32: return run_pass<32, scalar_t>(queue, n, a);
    case 64: return run_pass<64, scalar_t>(queue, n, a);
    case 128: return run_pass<128, scalar_t>(queue, n, a);
    default: throw std::runtime_error("wkv6: head size must be 32, 64 or 128; found " + std::to_string(n.head_size));
  }
}

// `a` is a Forward or a Backward.
template <typename Queue, typename Pass>
void run(const Queue& queue, const Launch& n, const Pass& a) {
  switch (n.element) {
    case Element::kFloat32: return run_for_head_size<float>(queue, n, a);
    case Element::kBFloat16: return run_for_head_size<__nv_bfloat16>(queue, n, a);
    case Element::kFloat16: return run_for_head_size<__half>(queue, n, a);
  }
}

}  // namespace rwkv_peft

// WKV6 on CPU: two kinds of sweep over time on tiles of V vectors, one OpenMP thread per (head, tile).
//
// A value sweep holds the state as [key][columns of the tile], a key sweep as [value][keys of the tile], so in both the
// vector lanes never meet: no horizontal sums, and any split over tiles gives bitwise the same result.
#include "wkv6_cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <c10/util/BFloat16.h>
#include <omp.h>

namespace rwkv_peft {
namespace {

// out_t = (read_t . (u * write_t)) in_t + read_t S;  then S = diag(decay_t) S + write_t^T in_t.
//   y:      read r, write k, in v,      S the state,        forward in time.
//   grad_v: read k, write r, in grad_y, S its gradient G,   backward in time.
struct ValueSweep {
  const void *read, *write, *in;
  const float *decay, *u, *first_state;
  void* out;
  float *last_state, *chunk_states;
  bool backward_in_time;
};

// Gradients per key channel. States inside a chunk are computed again from the one kept at its start.
struct KeySweep {
  const void *r, *k, *v, *grad_y;
  const float *decay, *u, *chunk_states, *grad_last_state;
  void *grad_r, *grad_k;
  float *grad_decay, *grad_u;
};

constexpr int kLanes = 16;
// A vector extension of GCC and Clang: one AVX-512 register, or two of AVX2, or four of NEON.
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

template <int V>
struct Tile {
  static constexpr int kWidth = V * kLanes;
  Vec part[V];
};

// The piece of a head that one thread works on: `width` channels from `first`, of one head of one sequence.
struct Piece {
  int64_t head;   // batch * heads + head
  int64_t first;
  int64_t width;  // the tile's, or less at the end of a head size that the tile does not divide
};

template <typename scalar_t>
void load(float* to, const scalar_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

// Lanes beyond the piece are zero, and stay zero through every sweep.
template <int V, typename scalar_t>
Tile<V> load_tile(const scalar_t* row, const Piece& piece) {
  Tile<V> tile{};
  load(reinterpret_cast<float*>(&tile), row + piece.first, piece.width);
  return tile;
}

template <int V, typename scalar_t>
void store_tile(scalar_t* row, const Tile<V>& tile, const Piece& piece) {
  const float* lanes = reinterpret_cast<const float*>(&tile);
  for (int64_t i = 0; i < piece.width; ++i) row[piece.first + i] = static_cast<scalar_t>(lanes[i]);
}

float dot(const float* a, const float* b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// ---------------------------------------------------------------------------------------------------- value sweep

// One token: reads and then advances state, N tiles of value columns.
template <int V>
Tile<V> advance_values(std::vector<Tile<V>>& state, Tile<V> in, float bonus, const float* read,
                       const float* write, const float* decay) {
  Tile<V> out;
  for (int p = 0; p < V; ++p) out.part[p] = bonus * in.part[p];
  for (size_t i = 0; i < state.size(); ++i) {
    for (int p = 0; p < V; ++p) {
      Vec& s = state[i].part[p];
      out.part[p] += read[i] * s;
      s = decay[i] * s + write[i] * in.part[p];
    }
  }
  return out;
}

// A thread's worker: its scratch is allocated once and serves every piece the thread takes.
template <int V, typename scalar_t>
class ValueWorker {
 public:
  ValueWorker(const Launch& n, const ValueSweep& a)
      : n_(n), a_(a), N_(n.head_size), state_(N_), read_(N_), write_(N_), bonus_(N_) {}

  void run(const Piece& piece) {
    load_state(a_.first_state + piece.head * N_ * N_, piece);
    for (int64_t step = 0; step < n_.tokens; ++step) {
      const int64_t t = a_.backward_in_time ? n_.tokens - 1 - step : step;
      if (n_.chunk != 0 && t % n_.chunk == 0) {
        store_state(a_.chunk_states + (piece.head * n_.chunks() + t / n_.chunk) * N_ * N_, piece);
      }
      step_over(t, piece);
    }
    store_state(a_.last_state + piece.head * N_ * N_, piece);
  }

 private:
  void step_over(int64_t t, const Piece& piece) {
    const int64_t row = n_.row(piece.head, t);
    load(read_.data(), static_cast<const scalar_t*>(a_.read) + row, N_);
    load(write_.data(), static_cast<const scalar_t*>(a_.write) + row, N_);
    const float* u = a_.u + piece.head % n_.heads * N_;
    for (int64_t i = 0; i < N_; ++i) bonus_[i] = u[i] * write_[i];
    const float bonus = dot(read_.data(), bonus_.data(), N_);
    const Tile<V> in = load_tile<V>(static_cast<const scalar_t*>(a_.in) + row, piece);
    const Tile<V> out = advance_values(state_, in, bonus, read_.data(), write_.data(), a_.decay + row);
    store_tile(static_cast<scalar_t*>(a_.out) + row, out, piece);
  }

  void load_state(const float* from, const Piece& piece) {
    for (int64_t i = 0; i < N_; ++i) state_[i] = load_tile<V>(from + i * N_, piece);
  }

  void store_state(float* to, const Piece& piece) const {
    for (int64_t i = 0; i < N_; ++i) store_tile(to + i * N_, state_[i], piece);
  }

  const Launch& n_;
  const ValueSweep& a_;
  const int64_t N_;
  std::vector<Tile<V>> state_;  // [key]
  std::vector<float> read_, write_, bonus_;
};

// ------------------------------------------------------------------------------------------------------ key sweep

// Columns of a [key][value] state as [value][keys of the piece].
template <int V>
void load_transposed(Tile<V>* to, const float* state, int64_t N, const Piece& piece) {
  std::fill(to, to + N, Tile<V>{});
  for (int64_t i = 0; i < piece.width; ++i) {
    for (int64_t j = 0; j < N; ++j) to[j].part[i / kLanes][i % kLanes] = state[(piece.first + i) * N + j];
  }
}

// next = diag(decay) state + k^T v, transposed.
template <int V>
void advance_keys(Tile<V>* next, const Tile<V>* state, Tile<V> decay, Tile<V> k, const float* v,
                  int64_t N) {
  for (int64_t j = 0; j < N; ++j) {
    for (int p = 0; p < V; ++p) next[j].part[p] = decay.part[p] * state[j].part[p] + k.part[p] * v[j];
  }
}

// What one token's gradients take from the state before it and the gradient of the state after it.
template <int V>
struct KeySums {
  Tile<V> state_grad_y;  // S grad_y
  Tile<V> grad_v;        // G v
  Tile<V> grad_state;    // rowsum(G * S)
};

// Also moves `grad`, the gradient of the state, one token back.
template <int V>
KeySums<V> retreat_keys(Tile<V>* grad, const Tile<V>* state, Tile<V> decay, Tile<V> r, const float* v,
                        const float* grad_y, int64_t N) {
  KeySums<V> sums{};
  for (int64_t j = 0; j < N; ++j) {
    for (int p = 0; p < V; ++p) {
      const Vec s = state[j].part[p], g = grad[j].part[p];
      sums.state_grad_y.part[p] += s * grad_y[j];
      sums.grad_v.part[p] += g * v[j];
      sums.grad_state.part[p] += g * s;
      grad[j].part[p] = decay.part[p] * g + r.part[p] * grad_y[j];
    }
  }
  return sums;
}

template <int V, typename scalar_t>
class KeyWorker {
 public:
  KeyWorker(const Launch& n, const KeySweep& a)
      : n_(n), a_(a), N_(n.head_size), states_(n.chunk * N_), grad_(N_), v_(N_), grad_y_(N_) {}

  void run(const Piece& piece) {
    const Tile<V> u = load_tile<V>(a_.u + piece.head % n_.heads * N_, piece);
    Tile<V> grad_u{};
    load_transposed(grad_.data(), a_.grad_last_state + piece.head * N_ * N_, N_, piece);
    for (int64_t c = n_.chunks() - 1; c >= 0; --c) {
      const int64_t begin = c * n_.chunk, end = std::min(begin + n_.chunk, n_.tokens);
      recompute_states(c, begin, end, piece);
      for (int64_t t = end - 1; t >= begin; --t) step_back(t, &states_[(t - begin) * N_], u, grad_u, piece);
    }
    store_tile(a_.grad_u + piece.head * N_, grad_u, piece);
  }

 private:
  // states_[(t - begin) * N] becomes the state before token t.
  void recompute_states(int64_t c, int64_t begin, int64_t end, const Piece& piece) {
    load_transposed(states_.data(), a_.chunk_states + (piece.head * n_.chunks() + c) * N_ * N_, N_, piece);
    for (int64_t t = begin; t + 1 < end; ++t) {
      const int64_t row = n_.row(piece.head, t);
      load(v_.data(), static_cast<const scalar_t*>(a_.v) + row, N_);
      const Tile<V> decay = load_tile<V>(a_.decay + row, piece), k = tile(a_.k, row, piece);
      Tile<V>* state = &states_[(t - begin) * N_];
      advance_keys(state + N_, state, decay, k, v_.data(), N_);
    }
  }

  void step_back(int64_t t, const Tile<V>* state, const Tile<V>& u, Tile<V>& grad_u, const Piece& piece) {
    const int64_t row = n_.row(piece.head, t);
    const Tile<V> r = tile(a_.r, row, piece), k = tile(a_.k, row, piece), decay = load_tile<V>(a_.decay + row, piece);
    load(v_.data(), static_cast<const scalar_t*>(a_.v) + row, N_);
    load(grad_y_.data(), static_cast<const scalar_t*>(a_.grad_y) + row, N_);
    const float c = dot(v_.data(), grad_y_.data(), N_);
    KeySums<V> sums = retreat_keys(grad_.data(), state, decay, r, v_.data(), grad_y_.data(), N_);
    for (int p = 0; p < V; ++p) {
      sums.state_grad_y.part[p] += u.part[p] * k.part[p] * c;
      sums.grad_v.part[p] += u.part[p] * r.part[p] * c;
      grad_u.part[p] += r.part[p] * k.part[p] * c;
    }
    store_tile(static_cast<scalar_t*>(a_.grad_r) + row, sums.state_grad_y, piece);
    store_tile(static_cast<scalar_t*>(a_.grad_k) + row, sums.grad_v, piece);
    store_tile(a_.grad_decay + row, sums.grad_state, piece);
  }

  Tile<V> tile(const void* rows, int64_t row, const Piece& piece) const {
    return load_tile<V>(static_cast<const scalar_t*>(rows) + row, piece);
  }

  const Launch& n_;
  const KeySweep& a_;
  const int64_t N_;
  std::vector<Tile<V>> states_;  // [chunk][value]
  std::vector<Tile<V>> grad_;    // [value]
  std::vector<float> v_, grad_y_;
};

// ------------------------------------------------------------------------------------------------------- launching

// Spreads every head and every tile of `width` channels over the threads.
template <typename Worker, typename Sweep>
void run_pieces(const Launch& n, const Sweep& a, int64_t width) {
  const int64_t tiles = (n.head_size + width - 1) / width;
#pragma omp parallel
  {
    Worker worker(n, a);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < n.batch * n.heads * tiles; ++item) {
      const int64_t first = item % tiles * width;
      worker.run(Piece{item / tiles, first, std::min(width, n.head_size - first)});
    }
  }
}

// The widest tile that a head fills and that still leaves a piece for each thread: wide tiles reuse what they load.
int tile_vectors(const Launch& n) {
  for (int vectors : {4, 2}) {
    const int64_t width = vectors * kLanes;
    if (n.head_size >= width && n.batch * n.heads * (n.head_size / width) >= omp_get_max_threads()) return vectors;
  }
  return 1;
}

template <int V, typename scalar_t>
void run_tiles(const Launch& n, const ValueSweep& a) {
  run_pieces<ValueWorker<V, scalar_t>>(n, a, Tile<V>::kWidth);
}

template <int V, typename scalar_t>
void run_tiles(const Launch& n, const KeySweep& a) {
  run_pieces<KeyWorker<V, scalar_t>>(n, a, Tile<V>::kWidth);
}

template <typename scalar_t, typename Sweep>
void run_with_tiles(const Launch& n, const Sweep& a) {
  switch (tile_vectors(n)) {
    case 4: return run_tiles<4, scalar_t>(n, a);
    case 2: return run_tiles<2, scalar_t>(n, a);
    default: return run_tiles<1, scalar_t>(n, a);
  }
}

// fp16 is upcast by the caller: few CPUs compute with it.
template <typename Sweep>
void run_cpu(const Launch& n, const Sweep& a) {
  return n.element == Element::kBFloat16 ? run_with_tiles<c10::BFloat16>(n, a) : run_with_tiles<float>(n, a);
}

int64_t row_elements(const Launch& n) { return n.batch * n.tokens * n.heads * n.head_size; }

void compute_decay(const Launch& n, const float* w, float* decay) {
#pragma omp parallel for
  for (int64_t i = 0; i < row_elements(n); ++i) decay[i] = std::exp(-std::exp(w[i]));
}

void forward(const Launch& n, const Forward& a) {
  compute_decay(n, a.w, a.scratch);
  run_cpu(n, ValueSweep{a.r, a.k, a.v, a.scratch, a.u, a.first_state, a.y, a.last_state, a.chunk_states, false});
}

void backward(const Launch& n, const Backward& a) {
  compute_decay(n, a.w, a.scratch);
  Launch keep_no_states = n;
  keep_no_states.chunk = 0;
  run_cpu(keep_no_states, ValueSweep{a.k, a.r, a.grad_y, a.scratch, a.u, a.grad_last_state, a.grad_v,
                                     a.grad_first_state, nullptr, true});
  run_cpu(n, KeySweep{a.r, a.k, a.v, a.grad_y, a.scratch, a.u, a.chunk_states, a.grad_last_state, a.grad_r, a.grad_k,
                      a.grad_w, a.grad_u});
#pragma omp parallel for
  for (int64_t i = 0; i < row_elements(n); ++i) {
    const float w = std::min(a.w[i], 80.0f);  // exp(w) must not overflow where the decay is 0
    a.grad_w[i] *= -std::exp(w - std::exp(w));
  }
}

}  // namespace

const Device kCpuDevice{forward, backward, row_elements, row_elements};

}  // namespace rwkv_peft

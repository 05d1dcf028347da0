// WKV6's CPU kernels for one instruction set, given by WKV6_LANES and WKV6_ROWS. The file of each instruction set
// includes this header and defines a table with WKV6_KERNELS. Everything here has internal linkage. Otherwise the
// linker could use code compiled for one instruction set in place of another's.

namespace {

using namespace rwkv_peft;

constexpr int kLanes = WKV6_LANES;  // floats in a vector register
constexpr int kRows = WKV6_ROWS;    // rows in a register tile of two vectors

#include "vector.h"

#include "block.h"

// The head size rounded up to kTile: a compile-time constant for the usual size, 64.
using Padded64 = std::integral_constant<int64_t, 64>;
using PaddedAny = int64_t;

inline int64_t padded_size(const Launch& n) { return (n.head_size + kTile - 1) / kTile * kTile; }

// ---------------------------------------------------------------------------------------------------------- products

// A matrix whose element (row, k) is data[row * row_step + k * k_step].
struct Left {
  const float* data;
  int64_t row_step, k_step;
};

// Computes tile += a b for kRows rows of `a`, from `row`, and V vectors of columns of `b`.
template <int V>
inline __attribute__((always_inline)) void add_product(Vec (&tile)[kRows][V], Left a, int64_t row, const float* b,
                                                       int64_t b_step, int64_t first_k, int64_t last_k) {
  for (int64_t k = first_k; k < last_k; ++k) {
    Vec right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + k * b_step + v * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const float left = a.data[(row + i) * a.row_step + k * a.k_step];
      for (int v = 0; v < V; ++v) tile[i][v] += left * right[v];
    }
  }
}

// Calls work(row, channel, tile) with zeroed register tiles that cover `rows` and `channels`.
template <typename Work>
inline __attribute__((always_inline)) void for_tiles(int64_t rows, Channels channels, const Work& work) {
  for (int64_t row = 0; row < rows; row += kRows) {
    int64_t channel = channels.first;
    for (; channel + 2 * kLanes <= channels.last; channel += 2 * kLanes) {
      Vec tile[kRows][2] = {};
      work(row, channel, tile);
    }
    for (; channel < channels.last; channel += kLanes) {
      Vec tile[kRows][1] = {};
      work(row, channel, tile);
    }
  }
}

template <int V>
inline void store_tile(float* to, int64_t step, const Vec (&tile)[kRows][V]) {
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < V; ++v) store(to + i * step + v * kLanes, tile[i][v]);
  }
}

// Computes out (kBlock, channels) = a (kBlock, padded) times b (padded, channels).
template <typename Size>
void product(float* out, const float* a, const float* b, Channels channels, Size padded) {
  for_tiles(kBlock, channels, [&](int64_t row, int64_t channel, auto& tile) {
    add_product(tile, {a, padded, 1}, row, b + channel, padded, 0, padded);
    store_tile(out + row * padded + channel, padded, tile);
  });
}

// Computes state (padded, channels) = diag(P(start, end)) state + a^T b, for a, b (kBlock, padded).
template <typename Size>
void advance(float* state, const Block& block, const float* a, const float* b, Channels channels, Size padded) {
  for_tiles(padded, channels, [&]<int V>(int64_t row, int64_t channel, Vec (&tile)[kRows][V]) {
    float* at = state + row * padded + channel;
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < V; ++v) {
        const Vec x = load(at + i * padded + v * kLanes);
        tile[i][v] = block.change[row + i] * x + block.keep[row + i] * x;
      }
    }
    add_product(tile, {a, 1, padded}, row, b + channel, padded, 0, kBlock);
    store_tile(at, padded, tile);
  });
}

// Computes the state after the block in `to`, from `state` before it. Columns, not rows, are key channels here.
template <typename Size>
void advance_transposed(float* to, const float* state, const Block& block, const float* a, const float* b,
                        Channels channels, Size padded) {
  for_tiles(padded, channels, [&]<int V>(int64_t row, int64_t channel, Vec (&tile)[kRows][V]) {
    const float* at = state + row * padded + channel;
    for (int v = 0; v < V; ++v) {
      const Vec change = load(block.change + channel + v * kLanes), keep = load(block.keep + channel + v * kLanes);
      for (int i = 0; i < kRows; ++i) {
        const Vec x = load(at + i * padded + v * kLanes);
        tile[i][v] = change * x + keep * x;
      }
    }
    add_product(tile, {a, 1, padded}, row, b + channel, padded, 0, kBlock);
    store_tile(to + row * padded + channel, padded, tile);
  });
}

// -------------------------------------------------------------------------------------- loading and storing states

inline int64_t within(Channels channels, int64_t head_size) { return std::min(channels.last, head_size) - channels.first; }

void load_state(float* state, int64_t padded, const float* from, int64_t head_size, Channels channels) {
  for (int64_t i = 0; i < padded; ++i) {
    float* row = state + i * padded;
    const int64_t count = i < head_size ? within(channels, head_size) : 0;
    std::fill(row + channels.first + count, row + channels.last, 0.0f);
    copy(row + channels.first, from + i * head_size + channels.first, count);
  }
}

void store_state(float* to, int64_t padded, const float* state, int64_t head_size, Channels channels) {
  for (int64_t i = 0; i < head_size; ++i) {
    copy(to + i * head_size + channels.first, state + i * padded + channels.first, within(channels, head_size));
  }
}

// Stores the transpose of the rows `channels` of `from` (size, size) in `to` (padded, channels).
void transpose(float* to, int64_t padded, const float* from, int64_t size, Channels channels) {
  for (int64_t i = channels.first; i < channels.last; i += kLanes) {
    for (int64_t j = 0; j < padded; j += kLanes) {
      transpose_square(to + j * padded + i, padded, from + i * size + j, size, size - i, size - j);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- scratch memory

struct Arena {
  float* next;

  float* take(int64_t count) {
    float* taken = next;
    next += (count + kTile - 1) / kTile * kTile;
    return taken;
  }
};

constexpr int64_t kRowsOfBlock = 10, kVectorsOfBlock = 3;

Block take_block(Arena& arena, int64_t padded) {
  Block b{};
  for (float** rows : {&b.r, &b.k, &b.v, &b.grad_y, &b.rate, &b.decay, &b.before, &b.after, &b.r_in, &b.k_out}) {
    *rows = arena.take(kBlock * padded);
  }
  for (float** vector : {&b.whole, &b.keep, &b.change}) *vector = arena.take(padded);
  return b;
}

int64_t block_floats(int64_t padded) { return (kRowsOfBlock * kBlock + kVectorsOfBlock) * padded; }

int64_t blocks_of(int64_t tokens) { return (tokens + kBlock - 1) / kBlock; }

// Returns the chunk length; without saved states, all tokens are one chunk.
int64_t chunk_of(const Launch& n) { return n.chunk == 0 ? n.tokens : std::min(n.chunk, n.tokens); }

template <typename Size>
void load_block(const Block& b, const Launch& n, const Forward& a, int64_t head, Size padded) {
  load_rows(b.r, n.element, a.r, n, head, b, padded);
  load_rows(b.k, n.element, a.k, n, head, b, padded);
  load_rows(b.v, n.element, a.v, n, head, b, padded);
  load_rows(b.rate, Element::kFloat32, a.w, n, head, b, padded);
  std::fill(b.rate + b.count * padded, b.rate + kBlock * padded, -100.0f);
  prepare_decays(b, padded);
}

// ------------------------------------------------------------------------------------------------------------- forward

int64_t forward_scratch(const Launch& n, int64_t heads) {
  const int64_t padded = padded_size(n);
  return block_floats(padded) + heads * (padded + 1) * padded + kBlock * padded + kBlock * kBlock;
}

template <typename Size>
struct ForwardWork {
  const Launch& n;
  const Forward& a;
  Channels values;
  Size padded;
  Block block;
  float *y, *scores;

  // Computes tokens [b.begin, b.begin + b.count) of a head.
  void run(int64_t head, float* state, const float* u) {
    const Block& b = block;
    load_block(b, n, a, head, padded);
    triangle<true>(scores, b.r, b.k, b.decay, u, padded);
    for_tiles(kBlock, values, [&](int64_t row, int64_t channel, auto& tile) {
      add_product(tile, {b.r_in, padded, 1}, row, state + channel, padded, 0, padded);
      add_product(tile, {scores, 1, kBlock}, row, b.v + channel, padded, 0, row + kRows);
      store_tile(y + row * padded + channel, padded, tile);
    });
    for (int64_t t = 0; t < b.count; ++t) {
      store_row(a.y, n.element, n.row(head, b.begin + t) + values.first, y + t * padded + values.first,
                within(values, n.head_size));
    }
    advance(state, b, b.k_out, b.v, values, padded);
  }
};

template <typename Size>
void forward_heads(const Launch& n, const Forward& a, const Piece& piece, Arena arena, Size padded) {
  const int64_t N = n.head_size, chunk = chunk_of(n), state_size = padded * padded;
  const int64_t first = piece.first_head, heads = piece.last_head - first;
  ForwardWork<Size> work{n, a, piece.values, padded, take_block(arena, padded), nullptr, nullptr};
  work.y = arena.take(kBlock * padded), work.scores = arena.take(kBlock * kBlock);
  float *states = arena.take(heads * state_size), *u = arena.take(heads * padded);
  for (int64_t h = 0; h < heads; ++h) {
    load_row(u + h * padded, Element::kFloat32, a.u, (first + h) % n.heads * N, N);
    load_state(states + h * state_size, padded, a.first_state + (first + h) * N * N, N, piece.values);
  }
  for (int64_t t = 0; t < n.tokens; t += work.block.count) {
    work.block.begin = t, work.block.count = std::min<int64_t>({kBlock, chunk - t % chunk, n.tokens - t});
    for (int64_t h = 0; h < heads; ++h) {
      float* state = states + h * state_size;
      if (n.chunk != 0 && t % chunk == 0) {
        float* kept = a.chunk_states + ((first + h) * n.chunks() + t / chunk) * N * N;
        store_state(kept, padded, state, N, piece.values);
      }
      work.run(first + h, state, u + h * padded);
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    store_state(a.last_state + (first + h) * N * N, padded, states + h * state_size, N, piece.values);
  }
}

void forward(const Launch& n, const Forward& a, const Piece& piece, float* scratch) {
  if (padded_size(n) == Padded64::value) return forward_heads(n, a, piece, {scratch}, Padded64());
  forward_heads(n, a, piece, {scratch}, PaddedAny(padded_size(n)));
}

#include "backward.h"

// ---------------------------------------------------------------------------------------------------------------- step

int64_t step_scratch(const Launch& n) { return 7 * padded_size(n); }

// Computes V vectors of columns of y = r (u k^T v + S), from column j, and updates these columns of the state.
template <int V>
inline void step_columns(float* y, float* state, int64_t j, int64_t N, const float* r, const float* k, const float* v,
                         const float* u, const float* keep, const float* change) {
  Vec in[V], out[V] = {};
  for (int p = 0; p < V; ++p) in[p] = load(v + j + p * kLanes);
  for (int64_t i = 0; i < N; ++i) {
    for (int p = 0; p < V; ++p) {
      float* at = state + i * N + j + p * kLanes;
      const Vec s = load(at), write = k[i] * in[p];
      out[p] += r[i] * (s + u[i] * write);
      store(at, change[i] * s + (keep[i] * s + write));
    }
  }
  for (int p = 0; p < V; ++p) store(y + j + p * kLanes, out[p]);
}

inline void step_column(float* y, float* state, int64_t j, int64_t N, const float* r, const float* k, const float* v,
                        const float* u, const float* keep, const float* change) {
  y[j] = 0.0f;
  for (int64_t i = 0; i < N; ++i) {
    float& s = state[i * N + j];
    const float write = k[i] * v[j];
    y[j] += r[i] * (s + u[i] * write);
    s = change[i] * s + (keep[i] * s + write);
  }
}

void step(const Launch& n, const Step& a, int64_t head, float* scratch) {
  const int64_t N = n.head_size, row = n.row(head, 0), padded = padded_size(n);
  Arena arena{scratch};
  float *r = arena.take(padded), *k = arena.take(padded), *v = arena.take(padded), *u = arena.take(padded);
  float *keep = arena.take(padded), *change = arena.take(padded), *y = arena.take(padded);
  load_row(r, n.element, a.r, row, N);
  load_row(k, n.element, a.k, row, N);
  load_row(v, n.element, a.v, row, N);
  load_row(u, Element::kFloat32, a.u, head % n.heads * N, N);
  load_row(change, Element::kFloat32, a.w, row, N);
  for (int64_t i = 0; i < N; i += kLanes) {
    const Decay d = decay_of(load(change + i));
    const auto small = d.change < -0.5f;
    store(change + i, small ? d.decay : d.change);
    store(keep + i, small ? Vec{} : splat(1.0f));
  }
  float* state = a.state + head * N * N;
  int64_t j = 0;
  for (; j + 4 * kLanes <= N; j += 4 * kLanes) step_columns<4>(y, state, j, N, r, k, v, u, keep, change);
  for (; j + kLanes <= N; j += kLanes) step_columns<1>(y, state, j, N, r, k, v, u, keep, change);
  for (; j < N; ++j) step_column(y, state, j, N, r, k, v, u, keep, change);
  store_row(a.y, n.element, row, y, N);
}

}  // namespace

#define WKV6_KERNELS(name) {name, forward, backward, step, forward_scratch, backward_scratch, step_scratch}

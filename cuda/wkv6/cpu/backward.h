// The gradients of one piece. Only passes.h includes this header.

// The data of one head of a piece. G is the gradient of the loss with respect to the state.
struct HeadGradients {
  float* grad;             // G, (padded, padded), [key][value]
  float* grad_transposed;  // the same, [value][key]
  float *u, *grad_u;       // (padded)
};

constexpr int64_t kVectorsOfHead = 2;

// The value side computes grad_v and the gradient of the first state. The key side computes all other gradients. Both
// go from the last token to the first.
template <typename Size>
struct BackwardWork {
  const Launch& n;
  const Backward& a;
  Channels values, keys;
  Size padded;
  float* blocks;                    // memory for the Blocks of a chunk
  float* states;                    // the states before them, (blocks, padded, padded), [value][key]
  float* scores;                    // (kBlock, kBlock), [s][t]
  float *rows_a, *rows_b, *rows_c;  // (kBlock, padded)

  int64_t state_size() const { return padded * padded; }

  // Returns block i of a chunk with tokens [begin, end).
  Block block(int64_t i, int64_t begin, int64_t end) const {
    Arena arena{blocks + i * block_floats(padded)};
    Block b = take_block(arena, padded);
    b.begin = begin + i * kBlock, b.count = std::min<int64_t>(kBlock, end - b.begin);
    return b;
  }

  void run_chunk(int64_t chunk, int64_t head, const HeadGradients& h) const {
    const int64_t begin = chunk * n.chunk, end = std::min(begin + n.chunk, n.tokens);
    load_chunk(chunk, head, begin, end);
    for (int64_t i = blocks_of(end - begin) - 1; i >= 0; --i) {
      const Block b = block(i, begin, end);
      if (!keys.empty()) key_side(b, head, states + i * state_size(), h);
      if (!values.empty()) value_side(b, head, h);
    }
  }

  // Loads the chunk's blocks and recomputes the states before them.
  void load_chunk(int64_t chunk, int64_t head, int64_t begin, int64_t end) const {
    const Forward rows{a.r, a.k, a.v, a.w, a.u, nullptr, nullptr, nullptr, nullptr, nullptr};
    const int64_t N = n.head_size;
    transpose(states, padded, a.chunk_states + (head * n.chunks() + chunk) * N * N, N, keys);
    for (int64_t i = 0; i < blocks_of(end - begin); ++i) {
      const Block b = block(i, begin, end);
      load_block(b, n, rows, head, padded);
      load_rows(b.grad_y, n.element, a.grad_y, n, head, b, padded);
      float* state = states + i * state_size();
      if (b.begin + b.count < end) advance_transposed(state + state_size(), state, b, b.v, b.k_out, keys, padded);
    }
  }

  // Computes grad_v, and moves G to before the block.
  void value_side(const Block& b, int64_t head, const HeadGradients& h) const {
    triangle<true>(scores, b.r, b.k, b.decay, h.u, padded);
    for_tiles(kBlock, values, [&](int64_t row, int64_t channel, auto& tile) {
      add_product(tile, {b.k_out, padded, 1}, row, h.grad + channel, padded, 0, padded);
      add_product(tile, {scores, kBlock, 1}, row, b.grad_y + channel, padded, row, kBlock);
      store_tile(rows_a + row * padded + channel, padded, tile);
    });
    store_rows(b, head, a.grad_v, n.element, rows_a, values);
    advance(h.grad, b, b.r_in, b.grad_y, values, padded);
  }

  // Computes the gradients of key channels, and moves the transposed G to before the block. `state` is the state before
  // the block.
  void key_side(const Block& b, int64_t head, const float* state, const HeadGradients& h) const {
    triangle<false>(scores, b.grad_y, b.v, nullptr, nullptr, padded);
    product(rows_a, b.grad_y, state, keys, padded);
    product(rows_b, b.v, h.grad_transposed, keys, padded);
    for (int64_t i = keys.first; i < keys.last; i += kLanes) key_channels(b, state, h, i);
    store_rows(b, head, a.grad_r, n.element, rows_a, keys);
    store_rows(b, head, a.grad_k, n.element, rows_b, keys);
    store_rows(b, head, a.grad_w, Element::kFloat32, rows_c, keys);
    advance_transposed(h.grad_transposed, h.grad_transposed, b, b.grad_y, b.r_in, keys, padded);
  }

  // Computes grad_r, grad_k, grad_w and grad_u of kLanes key channels, from channel i. On entry rows_a holds grad_y S^T
  // and rows_b holds v G^T. On return rows_a, rows_b, rows_c hold grad_r, grad_k, grad_w.
  void key_channels(const Block& b, const float* state, const HeadGradients& h, int64_t i) const {
    PairGradients pairs;
    pair_gradients(pairs, scores, b.r + i, b.k + i, b.decay + i, padded);

    // The gradient of a decay's logarithm is the sum over all paths through its token, from the state or an earlier
    // token to a later token or the state. It has no differences, so no precision is lost by cancellation.
    Vec later = through_block(b, state, h, i), earlier{};
    for (int64_t t = 0; t < kBlock; ++t) {
      const int64_t back = kBlock - 1 - t, x = i + t * padded, y = i + back * padded;
      pairs.decay[t] += earlier;
      earlier += load(b.k_out + x) * load(rows_b + x);
      pairs.decay[back] += later;
      later += load(b.r_in + y) * load(rows_a + y);
    }
    const Vec u = load(h.u + i);
    Vec grad_u{};  // first the sum of the block: short sums have smaller rounding errors
    for (int64_t t = 0, x = i; t < kBlock; ++t, x += padded) {
      const Vec r = load(b.r + x), k = load(b.k + x), own = scores[t * (kBlock + 1)] * u;
      store(rows_a + x, load(b.before + x) * load(rows_a + x) + (pairs.r[t] + k * own));
      store(rows_b + x, load(b.after + x) * load(rows_b + x) + (pairs.k[t] + r * own));
      store(rows_c + x, -load(b.rate + x) * pairs.decay[t]);
      grad_u += r * k * scores[t * (kBlock + 1)];
    }
    store(h.grad_u + i, load(h.grad_u + i) + grad_u);
  }

  // Returns P(start, end) rowsum(G * S) for kLanes key channels: the paths from the state to the state.
  Vec through_block(const Block& b, const float* state, const HeadGradients& h, int64_t i) const {
    Vec sum[4] = {};  // four independent chains of additions
    for (int64_t j = 0; j < padded; j += 4) {
      for (int64_t c = 0; c < 4; ++c) {
        const int64_t x = (j + c) * padded + i;
        sum[c] += load(state + x) * load(h.grad_transposed + x);
      }
    }
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) * load(b.whole + i);
  }

  void store_rows(const Block& b, int64_t head, void* to, Element element, const float* rows, Channels channels) const {
    for (int64_t t = 0; t < b.count; ++t) {
      store_row(to, element, n.row(head, b.begin + t) + channels.first, rows + t * padded + channels.first,
                within(channels, n.head_size));
    }
  }
};

int64_t backward_scratch(const Launch& n, int64_t heads) {
  const int64_t padded = padded_size(n), blocks = blocks_of(chunk_of(n)), state = padded * padded;
  return blocks * (block_floats(padded) + state) + 3 * kBlock * padded + kBlock * kBlock +
         heads * (2 * state + kVectorsOfHead * padded);
}

template <typename Size>
HeadGradients take_head(const BackwardWork<Size>& w, int64_t head, Arena& arena) {
  const int64_t N = w.n.head_size, padded = w.padded;
  HeadGradients h{arena.take(padded * padded), arena.take(padded * padded), arena.take(padded), arena.take(padded)};
  load_row(h.u, Element::kFloat32, w.a.u, head % w.n.heads * N, N);
  std::fill(h.grad_u, h.grad_u + padded, 0.0f);
  load_state(h.grad, padded, w.a.grad_last_state + head * N * N, N, w.values);
  transpose(h.grad_transposed, padded, w.a.grad_last_state + head * N * N, N, w.keys);
  return h;
}

template <typename Size>
void backward_heads(const Launch& n, const Backward& a, const Piece& piece, Arena arena, Size padded) {
  const int64_t N = n.head_size, blocks = blocks_of(chunk_of(n)), rows = kBlock * padded;
  BackwardWork<Size> w{n, a, piece.values, piece.keys, padded, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  w.blocks = arena.take(blocks * block_floats(padded)), w.states = arena.take(blocks * padded * padded);
  w.scores = arena.take(kBlock * kBlock);
  w.rows_a = arena.take(rows), w.rows_b = arena.take(rows), w.rows_c = arena.take(rows);
  HeadGradients heads[kMostHeads];
  for (int64_t i = piece.first_head; i < piece.last_head; ++i) heads[i - piece.first_head] = take_head(w, i, arena);
  for (int64_t chunk = n.chunks() - 1; chunk >= 0; --chunk) {
    for (int64_t i = piece.first_head; i < piece.last_head; ++i) w.run_chunk(chunk, i, heads[i - piece.first_head]);
  }
  for (int64_t i = piece.first_head; i < piece.last_head; ++i) {
    const HeadGradients& h = heads[i - piece.first_head];
    store_state(a.grad_first_state + i * N * N, padded, h.grad, N, piece.values);
    copy(a.grad_u + i * N + piece.keys.first, h.grad_u + piece.keys.first, within(piece.keys, N));
  }
}

void backward(const Launch& n, const Backward& a, const Piece& piece, float* scratch) {
  if (padded_size(n) == Padded64::value) return backward_heads(n, a, piece, {scratch}, Padded64());
  backward_heads(n, a, piece, {scratch}, PaddedAny(padded_size(n)));
}

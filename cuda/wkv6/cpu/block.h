// A block of kBlock tokens of one head: its rows in fp32, and the contributions of its tokens to each other. Only
// passes.h includes this header.
//
// Let P(s, t) be the product of the decays of tokens s+1 .. t-1. From the state S before the block, the block computes
// its outputs and the state S' after it:
//     y_t = (r_t P(start, t)) S + sum_{s<t} A_ts v_s + (r_t . (u * k_t)) v_t,    A_ts = sum_i r_ti P_i(s, t) k_si
//     S'  = diag(P(start, end)) S + sum_s (k_s P(s, end))^T v_s
// Every P is a product of values in [0, 1] and never a quotient, so nothing overflows for any decays.

constexpr int kBlock = 16;
constexpr int kPairs = kBlock * (kBlock + 1) / 2;

// Arrays of (kBlock, padded head size); the padding is zero. A block at the end of a chunk may have fewer than kBlock
// tokens. The missing tokens have rows of zeros and decay 1, which do not affect the results.
struct Block {
  int64_t begin;
  int64_t count;
  float *r, *k, *v, *grad_y;
  float *rate, *decay;    // exp(w), exp(-exp(w))
  float *before, *after;  // P(start, t), P(t, end)
  float *r_in, *k_out;    // r * before, k * after
  // (padded head size): P(start, end), and keep and change such that P(start, end) * x = keep * x + change * x, which
  // is also precise if P(start, end) is close to 1.
  float *whole, *keep, *change;
};

// A product of decays, stored both as 1 + change, which is precise close to 1, and as the product, which is precise if
// it is small.
struct Product {
  Vec change, product;

  void times(const Vec& decay, const Vec& decay_change) {
    change = change * decay + decay_change;
    product *= decay;
  }
  auto small() const { return change < -0.5f; }
  Vec value() const { return small() ? product : 1.0f + change; }
};

inline void load_rows(float* to, Element element, const void* rows, const Launch& n, int64_t head, const Block& block,
                      int64_t padded) {
  for (int64_t t = 0; t < block.count; ++t) {
    load_row(to + t * padded, element, rows, n.row(head, block.begin + t), n.head_size);
  }
  std::fill(to + block.count * padded, to + kBlock * padded, 0.0f);
}

// Fills in everything that depends on w. On entry `rate` holds w, and r and k are already loaded.
template <typename Size>
void prepare_decays(const Block b, Size padded) {  // by value: the pointers must stay in registers
  for (int64_t i = 0; i < padded; i += kLanes) {
    Vec change[kBlock];
    for (int64_t t = 0, x = i; t < kBlock; ++t, x += padded) {
      const Decay d = decay_of(load(b.rate + x));
      store(b.rate + x, d.rate);
      store(b.decay + x, d.decay);
      change[t] = d.change;
    }
    Product before{Vec{}, splat(1.0f)}, after = before;
    for (int64_t t = 0; t < kBlock; ++t) {  // both directions at once: each is a chain of dependent steps
      const int64_t back = kBlock - 1 - t, x = i + t * padded, y = i + back * padded;
      store(b.before + x, before.value());
      store(b.r_in + x, before.value() * load(b.r + x));
      before.times(load(b.decay + x), change[t]);
      store(b.after + y, after.value());
      store(b.k_out + y, after.value() * load(b.k + y));
      after.times(load(b.decay + y), change[back]);
    }
    store(b.whole + i, before.value());
    store(b.keep + i, before.small() ? Vec{} : splat(1.0f));
    store(b.change + i, before.small() ? before.product : before.change);
  }
}

// --------------------------------------------------------------------------------------------- pairs of a block's tokens

// Adds x_t . y_s over G vectors of channels, from channel i, to sums[pair] for every s <= t. The lanes are not summed
// yet. With `Decayed`, y_s is multiplied by P(s, t), or by u if s = t.
template <bool Decayed, bool First, int G, typename Size>
inline void add_pairs(Vec* sums, const float* x, const float* y, const float* decay, const float* u, int64_t i,
                      Size padded) {
  Vec* sum = sums;
  for (int64_t s = 0; s < kBlock; ++s) {
    Vec left[G];
    Vec own = First ? Vec{} : *sum;
    for (int g = 0; g < G; ++g) {
      const int64_t at = i + g * kLanes;
      left[g] = load(y + s * padded + at);
      own += load(x + s * padded + at) * (Decayed ? load(u + at) * left[g] : left[g]);
    }
    *sum++ = own;
    for (int64_t t = s + 1; t < kBlock; ++t) {
      Vec pair = First ? Vec{} : *sum;
      for (int g = 0; g < G; ++g) {
        const int64_t at = t * padded + i + g * kLanes;
        pair += load(x + at) * left[g];
        if (Decayed) left[g] *= load(decay + at);
      }
      *sum++ = pair;
    }
  }
}

// Computes scores[s][t] = x_t . y_s, decayed as above, for s <= t, and 0 for s > t.
template <bool Decayed, typename Size>
void triangle(float* scores, const float* x, const float* y, const float* decay, const float* u, Size padded) {
  constexpr int kGroup = kTile / kLanes * 2;
  Vec sums[(kPairs + kLanes - 1) / kLanes * kLanes];
  for (int pair = kPairs; pair % kLanes != 0; ++pair) sums[pair] = Vec{};
  int64_t i = padded % (kGroup * kLanes) == 0 ? kGroup * kLanes : kTile;
  if (i == kTile) {
    add_pairs<Decayed, true, kGroup / 2>(sums, x, y, decay, u, 0, padded);
  } else {
    add_pairs<Decayed, true, kGroup>(sums, x, y, decay, u, 0, padded);
  }
  for (; i < padded; i += kGroup * kLanes) add_pairs<Decayed, false, kGroup>(sums, x, y, decay, u, i, padded);

  float flat[kBlock + sizeof sums / sizeof *sums];
  for (int pair = 0; pair < kPairs; pair += kLanes) store(flat + kBlock + pair, sum_each(sums + pair));
  const float* row = flat + kBlock;  // the pairs of s; the first one is t = s
  for (int s = 0; s < kBlock; row += kBlock - s, ++s) {
    for (int t = 0; t < kBlock; t += kLanes) {
      const Vec pairs = load(row - s + t);
      store(scores + s * kBlock + t, lane_numbers(Lanes()) + t >= s ? pairs : Vec{});
    }
  }
}

// --------------------------------------------------------------------------------------------- gradients of the pairs

// The contributions of the pairs s < t of a block to the gradients, for kLanes key channels.
struct PairGradients {
  Vec r[kBlock], k[kBlock];
  Vec decay[kBlock];  // times the decay: the gradient of its logarithm
};

constexpr int kHalf = kBlock / 2;

// Computes the pairs inside the half that starts at token First. `grad_scores` has the layout of triangle()'s scores;
// r, k, decay point to the channels of the block's first token.
template <int First, typename Size>
inline void pairs_within(PairGradients& out, const float* grad_scores, const float* r, const float* k,
                         const float* decay, Size padded) {
  Vec grad_r[kHalf], grad_decay[kHalf];
  unrolled<kHalf>([&](auto t) { grad_r[t] = grad_decay[t] = Vec{}; });
  unrolled<kHalf>([&](auto s) {
    const float* grad = grad_scores + (First + s) * kBlock + First;
    Vec left[kHalf];  // k_s P(s, t)
    Vec written = load(k + (First + s) * padded);
    unrolled<kHalf>([&](auto t) {
      if constexpr (t > s) {
        left[t] = written;
        grad_r[t] += grad[t] * written;
        if constexpr (t < kHalf - 1) written *= load(decay + (First + t) * padded);
      }
    });
    Vec read{};  // sum of grad * r * P(t, .) over the tokens from t to the end
    unrolled<kHalf>([&](auto step) {
      constexpr int t = kHalf - 1 - step;
      if constexpr (t > s) {
        Vec through{};
        if constexpr (t < kHalf - 1) {
          through = load(decay + (First + t) * padded) * read;
          grad_decay[t] += left[t] * through;
        }
        read = grad[t] * load(r + (First + t) * padded) + through;
      }
    });
    out.k[First + s] = read;
  });
  unrolled<kHalf>([&](auto t) { out.r[First + t] = grad_r[t], out.decay[First + t] = grad_decay[t]; });
}

// Adds the pairs with s in the first half and t in the second half. Their decay is the product of a factor for s and a
// factor for t, so they are computed with two small matrix products.
template <typename Size>
inline void pairs_across(PairGradients& out, const float* grad_scores, const float* r, const float* k,
                         const float* decay, Size padded) {
  Vec left[kHalf], right[kHalf], to_middle[kHalf], from_middle[kHalf];  // k_s P(s, middle), r_t P(middle, t)
  Vec p = splat(1.0f), q = p;
  for (int i = 0; i < kHalf; ++i) {
    const int s = kHalf - 1 - i;
    to_middle[s] = p, left[s] = p * load(k + s * padded);
    from_middle[i] = q, right[i] = q * load(r + (kHalf + i) * padded);
    p *= load(decay + s * padded), q *= load(decay + (kHalf + i) * padded);
  }
  Vec written[kHalf] = {};  // gradient of what s adds to the state in the middle
  for (int t = 0; t < kHalf; ++t) {
    unrolled<kHalf>([&](auto s) { written[s] += grad_scores[s * kBlock + kHalf + t] * right[t]; });
  }
  Vec read[kHalf] = {};
  for (int s = 0; s < kHalf; ++s) {
    unrolled<kHalf>([&](auto t) { read[t] += grad_scores[s * kBlock + kHalf + t] * left[s]; });
  }
  Vec earlier{}, later{};
  for (int i = 0; i < kHalf; ++i) {
    const int s = i, t = kHalf - 1 - i;
    out.decay[s] += earlier, out.decay[kHalf + t] += later;
    earlier += left[s] * written[s], later += right[t] * read[t];
    out.k[s] += to_middle[s] * written[s];
    out.r[kHalf + t] += from_middle[t] * read[t];
  }
}

template <typename Size>
inline void pair_gradients(PairGradients& out, const float* grad_scores, const float* r, const float* k,
                           const float* decay, Size padded) {
  pairs_within<0>(out, grad_scores, r, k, decay, padded);
  pairs_within<kHalf>(out, grad_scores, r, k, decay, padded);
  pairs_across(out, grad_scores, r, k, decay, padded);
}

// Vectors of kLanes floats by the extension that GCC and Clang share. Included by wkv6_cpu_passes.h only, which sees to
// it that all of this is compiled for one instruction set and visible in one file.

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t BitsVec __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * sizeof(uint16_t))));

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float* to, const Vec& x) { std::memcpy(to, &x, sizeof x); }

// work(0), ..., work(Count - 1), each index a constant, so that arrays indexed by it can stay in registers.
template <int Count, typename Work>
inline __attribute__((always_inline)) void unrolled(const Work& work) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (work(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, Count>());
}

inline Vec splat(float x) { return x - Vec{}; }

// ------------------------------------------------------------------------------------------- rows in and out of fp32

inline void widen(float* to, const uint16_t* bf16) {
  HalfVec half;
  std::memcpy(&half, bf16, sizeof half);
  const BitsVec bits = __builtin_convertvector(half, BitsVec) << 16;
  std::memcpy(to, &bits, sizeof bits);
}

// To the nearest bf16, ties to even; NaN stays NaN.
inline void narrow(uint16_t* bf16, const float* from) {
  BitsVec bits;
  std::memcpy(&bits, from, sizeof bits);
  const Vec x = load(from);
  const BitsVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const HalfVec half = __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, HalfVec);
  std::memcpy(bf16, &half, sizeof half);
}

inline void copy(float* to, const float* from, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store(to + i, load(from + i));
  for (int64_t i = whole; i < count; ++i) to[i] = from[i];
}

// `count` elements of a (B, T, H, N) array from `offset` on, then zeros up to a multiple of kTile.
inline void load_row(float* to, Element element, const void* rows, int64_t offset, int64_t count) {
  const int64_t whole = count / kLanes * kLanes, rest = count - whole, padded = (count + kTile - 1) / kTile * kTile;
  for (int64_t i = whole; i < padded; i += kLanes) store(to + i, Vec{});
  if (element == Element::kBFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(rows) + offset;
    for (int64_t i = 0; i < whole; i += kLanes) widen(to + i, from + i);
    if (rest == 0) return;
    uint16_t end[kLanes] = {};
    std::memcpy(end, from + whole, rest * sizeof *from);
    widen(to + whole, end);
  } else {
    copy(to, static_cast<const float*>(rows) + offset, count);
  }
}

inline void store_row(void* rows, Element element, int64_t offset, const float* from, int64_t count) {
  const int64_t whole = count / kLanes * kLanes, rest = count - whole;
  if (element == Element::kBFloat16) {
    uint16_t* to = static_cast<uint16_t*>(rows) + offset;
    for (int64_t i = 0; i < whole; i += kLanes) narrow(to + i, from + i);
    if (rest == 0) return;
    uint16_t padded[kLanes];
    narrow(padded, from + whole);
    std::memcpy(to + whole, padded, rest * sizeof *to);
  } else {
    copy(static_cast<float*>(rows) + offset, from, count);
  }
}

// ------------------------------------------------------------------------------------------------------- exponentials

struct Exponential {
  Vec exp, expm1;
};

// Both to within 2 units in the last place, for x from -2000 to 88; results below 1e-38 are 0.
inline Exponential exponential(const Vec& x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vec shifted = x * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  const Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n log 2, in two parts; |f| <= 0.35
  Vec p = f * 1.98412698e-4f + 1.38888889e-3f;                // (exp(f) - 1) / f by its Taylor series
  p = p * f + 8.33333333e-3f;
  p = p * f + 4.16666667e-2f;
  p = p * f + 1.66666667e-1f;
  p = p * f + 0.5f;
  p = (p * f) * f + f;
  IntVec exponent;  // of 2^n as floats store it; 0 makes the result 0
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent -= 0x4B400000 - 127;
  exponent = (exponent > 0 ? exponent : 0) << 23;
  Vec scale;  // 2^n
  std::memcpy(&scale, &exponent, sizeof scale);
  return {scale * p + scale, scale * p + (scale - 1.0f)};
}

struct Decay {
  Vec rate;    // exp(w)
  Vec decay;   // exp(-rate)
  Vec change;  // decay - 1, exact where the decay is close to 1
};

// Any w: beyond 7 the decay is 0 in fp32 and float64 alike, below -100 it is 1 and cannot be told from it. NaN stays NaN.
inline Decay decay_of(Vec w) {
  w = w > 7.0f ? splat(7.0f) : w;
  w = w < -100.0f ? splat(-100.0f) : w;
  const Vec rate = exponential(w).exp;
  const Exponential x = exponential(-rate);
  return {rate, x.exp, x.expm1};
}

// ------------------------------------------------------------------------------------------------- lanes to elsewhere

#ifdef __clang__
#define WKV6_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define WKV6_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

using Lanes = std::make_integer_sequence<int, kLanes>;

// Sums of neighbours: first a's, then b's.
template <int... I>
inline Vec add_neighbours(const Vec& a, const Vec& b, std::integer_sequence<int, I...>) {
  return WKV6_SHUFFLE(a, b, (2 * I)...) + WKV6_SHUFFLE(a, b, (2 * I + 1)...);
}

// Lane i is the sum over the lanes of x[i], for Count = kLanes vectors; for fewer, kLanes / Count lanes each are left.
template <int Count = kLanes>
inline Vec sum_each(const Vec* x) {
  if constexpr (Count == 1) {
    return *x;
  } else {
    return add_neighbours(sum_each<Count / 2>(x), sum_each<Count / 2>(x + Count / 2), Lanes());
  }
}

template <int... I>
inline IntVec lane_numbers(std::integer_sequence<int, I...>) {
  return IntVec{I...};
}

// a0 b0 a1 b1 ..., of the halves of a and b that start at `First`.
template <int First, int... I>
inline Vec interleave(const Vec& a, const Vec& b, std::integer_sequence<int, I...>) {
  return WKV6_SHUFFLE(a, b, (First + I / 2 + I % 2 * kLanes)...);
}

// Up to kLanes floats, the missing ones 0.
inline Vec load_part(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  Vec x{};
  if (count > 0) std::memcpy(&x, from, count * sizeof *from);
  return x;
}

// to[j][i] = from[i][j], kLanes x kLanes, by log2(kLanes) perfect shuffles of the rows. Of `from` there are only `rows`
// and `columns`; the rest is taken to be 0.
inline void transpose_square(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
                             int64_t columns) {
  Vec x[kLanes], y[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = load_part(from + i * from_stride, i < rows ? columns : 0);
  for (int round = 1; round < kLanes; round *= 2) {
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = interleave<0>(x[i], x[i + kLanes / 2], Lanes());
      y[2 * i + 1] = interleave<kLanes / 2>(x[i], x[i + kLanes / 2], Lanes());
    }
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
  for (int i = 0; i < kLanes; ++i) store(to + i * to_stride, x[i]);
}

// Vectors of kLanes floats, with the vector extension of GCC and Clang. Only passes.h includes this header, inside an
// unnamed namespace, so that everything is compiled for one instruction set and visible in one file.

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

// Calls work(0), ..., work(Count - 1). Each index is a constant, so arrays indexed by it can stay in registers.
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

// Rounds to the nearest bf16, ties to even. NaN stays NaN.
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

// Loads `count` elements of a (B, T, H, N) array from `offset`, and zeros up to a multiple of kTile.
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

// Both are accurate to 2 units in the last place for x from -2000 to 88. Results below 1e-38 are 0.
inline Exponential exponential(const Vec& x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits of the sum
  const Vec shifted = x * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  const Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n log 2, in two parts; |f| <= 0.35
  Vec p = f * 1.98412698e-4f + 1.38888889e-3f;                // (exp(f) - 1) / f as a Taylor series
  p = p * f + 8.33333333e-3f;
  p = p * f + 4.16666667e-2f;
  p = p * f + 1.66666667e-1f;
  p = p * f + 0.5f;
  p = (p * f) * f + f;
  IntVec exponent;  // of 2^n as stored in a float; 0 makes the result 0
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

// Accepts any w. Above 7 the decay is 0 even in float64; below -100 it is equal to 1 after rounding. NaN stays NaN.
inline Decay decay_of(Vec w) {
  w = w > 7.0f ? splat(7.0f) : w;
  w = w < -100.0f ? splat(-100.0f) : w;
  const Vec rate = exponential(w).exp;
  const Exponential x = exponential(-rate);
  return {rate, x.exp, x.expm1};
}

// ---------------------------------------------------------------------------------------- exchange between the lanes

#ifdef __clang__
#define WKV6_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define WKV6_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

using Lanes = std::make_integer_sequence<int, kLanes>;

// Returns the sums of neighboring lanes: first those of a, then those of b.
template <int... I>
inline Vec add_neighbors(const Vec& a, const Vec& b, std::integer_sequence<int, I...>) {
  return WKV6_SHUFFLE(a, b, (2 * I)...) + WKV6_SHUFFLE(a, b, (2 * I + 1)...);
}

// Returns a vector whose lane i is the sum of all lanes of x[i], for Count = kLanes vectors. For fewer vectors, each
// keeps kLanes / Count partial sums.
template <int Count = kLanes>
inline Vec sum_each(const Vec* x) {
  if constexpr (Count == 1) {
    return *x;
  } else {
    return add_neighbors(sum_each<Count / 2>(x), sum_each<Count / 2>(x + Count / 2), Lanes());
  }
}

template <int... I>
inline IntVec lane_numbers(std::integer_sequence<int, I...>) {
  return IntVec{I...};
}

// Returns a0 b0 a1 b1 ... from the halves of a and b that start at lane `First`.
template <int First, int... I>
inline Vec interleave(const Vec& a, const Vec& b, std::integer_sequence<int, I...>) {
  return WKV6_SHUFFLE(a, b, (First + I / 2 + I % 2 * kLanes)...);
}

// Loads up to kLanes floats; missing ones are 0.
inline Vec load_part(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  Vec x{};
  if (count > 0) std::memcpy(&x, from, count * sizeof *from);
  return x;
}

// Transposes a kLanes x kLanes matrix, to[j][i] = from[i][j], with log2(kLanes) perfect shuffles of the rows. `from`
// has only `rows` rows and `columns` columns; the rest is 0.
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

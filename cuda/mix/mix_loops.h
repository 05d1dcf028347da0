// The loops of mix_kernels.h, which the compiler vectorizes. The file of each instruction set includes all other
// headers, sets the instruction set, includes this file, and defines a table with MIX_KERNELS. Everything here has
// internal linkage. Otherwise the linker could use code compiled for one instruction set in place of another's.

namespace {

using namespace rwkv_peft;

struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from), "bit_cast needs equal sizes");
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

template <typename scalar_t>
scalar_t narrow(float x);

template <>
inline float narrow<float>(float x) { return x; }

// Rounds to nearest, ties to even. NaN stays NaN.
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0 : rounded)};
}

// Returns e^x to about 1 ulp for |x| <= 60, in a form that compilers vectorize: x = n ln2 + r, e^x = 2^n e^r.
inline float exponential(float x) {
  constexpr float kShift = 0x1.8p23f;  // adding it rounds to an integer, which is then in the low bits of the sum
  const float shifted = x * 0x1.715476p0f + kShift;
  const float n = shifted - kShift;
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000);
}

// Above 60 the result is 1 in fp32. Below -60 it stays at e^-60: products with smaller values could be subnormal, and
// arithmetic with subnormals is about a hundred times slower.
inline float sigmoid(float x) {
  x = x < -60.0f ? -60.0f : x;
  x = x > 60.0f ? 60.0f : x;
  return 1.0f / (1.0f + exponential(-x));
}

template <typename T>
const T* row_of(const void* tensor, int64_t row, const Rows& n) {
  return static_cast<const T*>(tensor) + row * n.width;
}

template <typename T>
T* row_of(void* tensor, int64_t row, const Rows& n) {
  return static_cast<T*>(tensor) + row * n.width;
}

template <typename T>
const T* previous_of(const void* x, const void* last, int64_t row, const Rows& n) {
  if (n.starts && n.starts[row]) return static_cast<const T*>(n.zeros);
  return row % n.tokens ? row_of<T>(x, row - 1, n) : row_of<T>(last, row / n.tokens, n);
}

// ------------------------------------------------------------------------------------------------- token shift, mixes

template <typename scalar_t, typename out_t, bool whole>
void lerp(const Lerp& a, int64_t begin, int64_t end) {
  const Rows& n = a.rows;
  for (int64_t i = 0; i < n.count; ++i) {
    const scalar_t* x = row_of<scalar_t>(a.x, n.first + i, n);
    const scalar_t* previous = previous_of<scalar_t>(a.x, a.last, n.first + i, n);
    for (int64_t m = 0; m < a.mixes; ++m) {
      const float* base = a.base + m * n.width;
      const float* amounts = a.amounts ? a.amounts + (m * n.count + i) * n.width : nullptr;
      out_t* out = row_of<out_t>(a.out[m], whole ? n.first + i : i, n);
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) {
        const float here = widen(x[j]), amount = base[j] + (amounts ? amounts[j] : 0.0f);
        out[j] = narrow<out_t>(here + (widen(previous[j]) - here) * amount);
      }
    }
  }
}

template <typename scalar_t>
void lerp_backward_row(const LerpBackward& a, int64_t i, int64_t m, int64_t begin, int64_t end) {
  const Rows& n = a.rows;
  const scalar_t* grad = row_of<scalar_t>(a.grad_out[m], n.first + i, n);
  const float* base = a.base + m * n.width;
  float *self = a.grad_self + i * n.width, *previous = a.grad_previous + i * n.width;
  if (a.amounts == nullptr) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      const float g = widen(grad[j]), moved = g * base[j];
      self[j] += g - moved;
      previous[j] += moved;
    }
    return;
  }
  float* amounts = a.amounts + (m * n.count + i) * n.width;
  const scalar_t* x = row_of<scalar_t>(a.x, n.first + i, n);
  const scalar_t* before = previous_of<scalar_t>(a.x, a.last, n.first + i, n);
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) {
    const float g = widen(grad[j]), moved = g * (base[j] + amounts[j]);
    self[j] += g - moved;
    previous[j] += moved;
    amounts[j] = g * (widen(before[j]) - widen(x[j]));
  }
}

template <typename scalar_t>
void add_grad_base(const LerpBackward& a, int64_t i, int64_t m, int64_t begin, int64_t end) {
  const Rows& n = a.rows;
  const scalar_t* grad = row_of<scalar_t>(a.grad_out[m], n.first + i, n);
  const scalar_t* x = row_of<scalar_t>(a.x, n.first + i, n);
  const scalar_t* before = previous_of<scalar_t>(a.x, a.last, n.first + i, n);
  float* grad_base = a.grad_base + m * n.width;
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) grad_base[j] += widen(grad[j]) * (widen(before[j]) - widen(x[j]));
}

template <typename scalar_t>
void lerp_backward(const LerpBackward& a, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < a.rows.count; ++i) {
    std::fill(a.grad_self + i * a.rows.width + begin, a.grad_self + i * a.rows.width + end, 0.0f);
    std::fill(a.grad_previous + i * a.rows.width + begin, a.grad_previous + i * a.rows.width + end, 0.0f);
    for (int64_t m = 0; m < a.mixes; ++m) {
      lerp_backward_row<scalar_t>(a, i, m, begin, end);
      if (a.grad_base) add_grad_base<scalar_t>(a, i, m, begin, end);
    }
  }
}

template <typename scalar_t>
void shift_backward(const ShiftBackward& a, int64_t begin, int64_t end) {
  const Rows& n = a.rows;
  for (int64_t i = n.count - 1; i >= 0; --i) {
    const int64_t row = n.first + i, token = row % n.tokens;
    const bool followed = token + 1 < n.tokens;
    const float *self = a.grad_self + i * n.width, *previous = a.grad_previous + i * n.width;
    const float* mixed = a.grad_mixed ? a.grad_mixed + i * n.width : nullptr;
    scalar_t* grad_x = row_of<scalar_t>(a.grad_x, row, n);
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      const float g = mixed ? mixed[j] : 0.0f, moved = mixed ? g * a.mixed_base[j] : 0.0f;
      grad_x[j] = narrow<scalar_t>(self[j] + (g - moved) + (followed ? a.carry[j] : 0.0f));
      a.carry[j] = previous[j] + moved;
    }
    if (a.grad_mixed_base) {
      const scalar_t* x = row_of<scalar_t>(a.x, row, n);
      const scalar_t* before = previous_of<scalar_t>(a.x, a.last, row, n);
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) a.grad_mixed_base[j] += mixed[j] * (widen(before[j]) - widen(x[j]));
    }
    if (n.starts && n.starts[row]) std::fill(a.carry + begin, a.carry + end, 0.0f);  // no gradient crosses a start
    if (token != 0) continue;
    scalar_t* grad_last = row_of<scalar_t>(a.grad_last, row / n.tokens, n);
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) grad_last[j] = narrow<scalar_t>(a.carry[j]);
  }
}

// ------------------------------------------------------------------------------------------------ GroupNorm and gate

struct Moments {
  float mean, scale;  // scale is 1 / standard deviation
};

inline Moments moments_of(const float* y, int64_t count, float eps) {
  float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += y[j];
  const float mean = sum / count;
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < count; ++j) squares += (y[j] - mean) * (y[j] - mean);
  return {mean, 1.0f / std::sqrt(squares / count + eps)};
}

template <typename scalar_t>
void load(float* to, const scalar_t* from, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] = widen(from[j]);
}

template <typename scalar_t>
void gated_norm(const GatedNorm& a, int64_t begin, int64_t end) {
  std::vector<float> buffer(a.group);
  float* y = buffer.data();
  for (int64_t row = 0; row < a.rows.count; ++row) {
    for (int64_t first = begin; first < end; first += a.group) {
      load(y, row_of<scalar_t>(a.y, row, a.rows) + first, a.group);
      const Moments m = moments_of(y, a.group, a.eps);
      const scalar_t* gate = row_of<scalar_t>(a.gate, row, a.rows) + first;
      const float *weight = a.weight + first, *bias = a.bias + first;
      scalar_t* out = row_of<scalar_t>(a.out, row, a.rows) + first;
#pragma omp simd
      for (int64_t j = 0; j < a.group; ++j) {
        const float g = widen(gate[j]), normal = (y[j] - m.mean) * m.scale * weight[j] + bias[j];
        out[j] = narrow<scalar_t>(normal * g * sigmoid(g));
      }
    }
  }
}

// Computes one group's columns in one row. y and grad are scratch memory for `group` floats each.
template <typename scalar_t>
void gated_norm_backward_group(const GatedNormBackward& a, int64_t row, int64_t first, float* y, float* grad) {
  const GatedNorm& f = a.forward;
  load(y, row_of<scalar_t>(f.y, row, f.rows) + first, f.group);
  const Moments m = moments_of(y, f.group, f.eps);
  const scalar_t* gate = row_of<scalar_t>(f.gate, row, f.rows) + first;
  const scalar_t* grad_out = row_of<scalar_t>(a.grad_out, row, f.rows) + first;
  scalar_t* grad_gate = row_of<scalar_t>(a.grad_gate, row, f.rows) + first;
  scalar_t* grad_y = row_of<scalar_t>(a.grad_y, row, f.rows) + first;
  const float *weight = f.weight + first, *bias = f.bias + first;
#pragma omp simd
  for (int64_t j = 0; j < f.group; ++j) {  // y becomes normalized y, and grad the gradient of y * weight + bias
    const float g = widen(gate[j]), s = sigmoid(g), upper = widen(grad_out[j]);
    y[j] = (y[j] - m.mean) * m.scale;
    grad_gate[j] = narrow<scalar_t>(upper * (y[j] * weight[j] + bias[j]) * s * (1.0f + g * (1.0f - s)));
    grad[j] = upper * g * s;
  }
  if (a.grad_weight) {
    for (int64_t j = 0; j < f.group; ++j) a.grad_weight[first + j] += grad[j] * y[j];
    for (int64_t j = 0; j < f.group; ++j) a.grad_bias[first + j] += grad[j];
  }
  float mean = 0.0f, slope = 0.0f;
#pragma omp simd reduction(+ : mean, slope)
  for (int64_t j = 0; j < f.group; ++j) {
    grad[j] *= weight[j];
    mean += grad[j];
    slope += grad[j] * y[j];
  }
  mean /= f.group, slope /= f.group;
#pragma omp simd
  for (int64_t j = 0; j < f.group; ++j) grad_y[j] = narrow<scalar_t>(m.scale * (grad[j] - mean - y[j] * slope));
}

template <typename scalar_t>
void gated_norm_backward(const GatedNormBackward& a, int64_t begin, int64_t end) {
  const int64_t group = a.forward.group;
  std::vector<float> y(group), grad(group);
  for (int64_t row = 0; row < a.forward.rows.count; ++row) {
    for (int64_t first = begin; first < end; first += group) {
      gated_norm_backward_group<scalar_t>(a, row, first, y.data(), grad.data());
    }
  }
}

// ------------------------------------------------------------------------------------------------------ squared ReLU

template <typename scalar_t>
void relu_square(const void* k_, void* out_, int64_t count) {
  const scalar_t* k = static_cast<const scalar_t*>(k_);
  scalar_t* out = static_cast<scalar_t*>(out_);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const float wide = widen(k[j]), positive = wide < 0.0f ? 0.0f : wide;
    out[j] = narrow<scalar_t>(positive * positive);
  }
}

// The derivative 2 relu(k) equals 2 sqrt(out), so k does not have to be saved.
template <typename scalar_t>
void relu_square_backward(const void* grad_, const void* out_, void* grad_k_, int64_t count) {
  const scalar_t *grad = static_cast<const scalar_t*>(grad_), *out = static_cast<const scalar_t*>(out_);
  scalar_t* grad_k = static_cast<scalar_t*>(grad_k_);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) grad_k[j] = narrow<scalar_t>(2.0f * std::sqrt(widen(out[j])) * widen(grad[j]));
}

}  // namespace

#define MIX_LOOPS(scalar_t)                                                                                      \
  {lerp<scalar_t, scalar_t, /*whole=*/true>, lerp<scalar_t, float, /*whole=*/false>, lerp_backward<scalar_t>,    \
   shift_backward<scalar_t>, gated_norm<scalar_t>, gated_norm_backward<scalar_t>, relu_square<scalar_t>,         \
   relu_square_backward<scalar_t>}
#define MIX_KERNELS(name) {name, MIX_LOOPS(float), MIX_LOOPS(BFloat16)}

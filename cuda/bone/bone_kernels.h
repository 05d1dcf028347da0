// The kernels of bone_call.h. The file of each instruction set includes this header once and defines
//     KERNELS, NAME  the table and its name      LANES  floats in a vector      ROWS  rows in a register tile
// It includes all other headers before it sets the instruction set. Everything here has internal linkage. Otherwise the
// linker could use code compiled for one instruction set in place of another's.

namespace rwkv_peft {
namespace {

typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));

inline Vec load(const float* from) {
  Vec x;
  memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }

inline Vec load_bf16(const uint16_t* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  Vec x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Rounds to nearest, ties to even. NaN stays NaN.
inline void store_bf16(uint16_t* to, Vec x) {
  Bits bits;
  memcpy(&bits, &x, sizeof bits);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits is_nan = (Bits)(x != x);
  const Halves halves = __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), Halves);
  memcpy(to, &halves, sizeof halves);
}

inline int64_t offset(const Blocks& blocks, int64_t group, int64_t row) {
  return group * blocks.group_stride + row * blocks.row_stride;
}

inline Vec load(const Blocks& blocks, int64_t at) {
  return blocks.is_bf16 ? load_bf16(static_cast<const uint16_t*>(blocks.data) + at)
                        : load(static_cast<const float*>(blocks.data) + at);
}

inline void store(const Blocks& blocks, int64_t at, Vec x) {
  if (blocks.is_bf16) return store_bf16(static_cast<uint16_t*>(blocks.data) + at, x);
  store(static_cast<float*>(blocks.data) + at, x);
}

// packed[row - first][i] = blocks[group][row][i] for the rows [first, last).
void pack(float* packed, const Blocks& blocks, int64_t group, int64_t first, int64_t last, int64_t r) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = offset(blocks, group, row);
    for (int64_t i = 0; i < r; i += LANES, packed += LANES) store(packed, load(blocks, at + i));
  }
}

void add(float* out, const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) store(out + i, load(a + i) + load(b + i));
}

// A tile of a product in registers: R rows by V vectors.
template <int R, int V>
struct Tile {
  Vec sum[R][V];

  // Computes sum += left right for R rows. The elements are left[row * row_stride + k * step] and
  // right[k * width + column], for k < depth.
  void multiply(const float* left, int64_t row_stride, int64_t step, const float* right, int64_t width, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      Vec b[V];
      for (int v = 0; v < V; ++v) b[v] = load(right + k * width + v * LANES);
      for (int i = 0; i < R; ++i) {
        const float a = left[i * row_stride + k * step];
        for (int v = 0; v < V; ++v) sum[i][v] += a * b[v];
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------------------ mix

// Packed copies of x + tile and of x for some rows of a group. The kernel does not read the blocks directly: they are
// often a multiple of 4 kB away from `out`, and a load at such a distance from a recent store has to wait for it.
struct Packed {
  const float *in, *x;
};

template <int R, int V>
void mix_tile(const Mix& a, Packed packed, int64_t group, int64_t row, int64_t column) {
  Tile<R, V> update{};
  update.multiply(packed.in, a.r, 1, a.matrices + group * a.r * a.r + column, a.r, a.r);
  for (int i = 0; i < R; ++i) {
    const int64_t out = offset(a.out, group, row + i) + column;
    const float* x = packed.x + i * a.r + column;
    for (int v = 0; v < V; ++v) store(a.out, out + v * LANES, load(x + v * LANES) + update.sum[i][v]);
    if (a.sum == nullptr) continue;
    float* sum = a.sum + (row + i) * a.r + column;
    for (int v = 0; v < V; ++v) store(sum + v * LANES, load(sum + v * LANES) + update.sum[i][v]);
  }
}

template <int V>
void mix_columns(const Mix& a, Packed packed, int64_t group, int64_t first, int64_t last, int64_t column) {
  int64_t row = first;
  const auto at = [&] { return Packed{packed.in + (row - first) * a.r, packed.x + (row - first) * a.r}; };
  for (; row + ROWS <= last; row += ROWS) mix_tile<ROWS, V>(a, at(), group, row, column);
  for (; row < last; ++row) mix_tile<1, V>(a, at(), group, row, column);
}

// Processes kMixRows rows in all groups before the next rows, because the rows of one group are pages apart.
void mix(const Mix& a, int64_t first_group, int64_t last_group, int64_t first_row, int64_t last_row, float* buffer) {
  for (int64_t row = first_row; row < last_row; row += kMixRows) {
    const int64_t end = row + kMixRows < last_row ? row + kMixRows : last_row;
    for (int64_t group = first_group; group < last_group; ++group) {
      pack(buffer, a.x, group, row, end, a.r);
      Packed packed{buffer, buffer};
      if (a.tile != nullptr) {
        float* in = buffer + kMixRows * a.r;
        add(in, buffer, a.tile + row * a.r, (end - row) * a.r);
        packed.in = in;
      }
      int64_t column = 0;
      for (; column + 4 * LANES <= a.r; column += 4 * LANES) mix_columns<4>(a, packed, group, row, end, column);
      for (; column < a.r; column += LANES) mix_columns<1>(a, packed, group, row, end, column);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- outer

template <int R, int V>
void outer_tile(float* out, int64_t r, const float* left, const float* right, int64_t rows) {
  Tile<R, V> tile;
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < V; ++v) tile.sum[i][v] = load(out + i * r + v * LANES);
  }
  tile.multiply(left, 1, r, right, r, rows);
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < V; ++v) store(out + i * r + v * LANES, tile.sum[i][v]);
  }
}

template <int V>
void outer_columns(float* out, int64_t r, const float* left, const float* right, int64_t rows) {
  int64_t i = 0;
  for (; i + ROWS <= r; i += ROWS) outer_tile<ROWS, V>(out + i * r, r, left + i, right, rows);
  for (; i < r; ++i) outer_tile<1, V>(out + i * r, r, left + i, right, rows);
}

// Whether the rows can be read in place, without packing.
inline bool is_packed(const Blocks& blocks, int64_t r) { return !blocks.is_bf16 && blocks.row_stride == r; }

void outer(const Outer& a, int64_t group, float* buffer) {
  const int64_t r = a.r;
  float *left = buffer, *packed = buffer + kPackedRows * r, *out = a.out + group * r * r;
  memset(out, 0, r * r * sizeof(float));
  for (int64_t row = 0; row < a.rows; row += kPackedRows) {
    const int64_t end = row + kPackedRows < a.rows ? row + kPackedRows : a.rows;
    pack(left, a.left, group, row, end, r);
    if (a.tile != nullptr) add(left, left, a.tile + row * r, (end - row) * r);
    const float* right = packed;
    if (is_packed(a.right, r)) {
      right = static_cast<const float*>(a.right.data) + offset(a.right, group, row);
    } else {
      pack(packed, a.right, group, row, end, r);
    }
    int64_t j = 0;
    for (; j + 4 * LANES <= r; j += 4 * LANES) outer_columns<4>(out + j, r, left, right + j, end - row);
    for (; j < r; j += LANES) outer_columns<1>(out + j, r, left, right + j, end - row);
  }
}

}  // namespace

const BoneKernels KERNELS{NAME, mix, outer};

}  // namespace rwkv_peft

// Products of bfloat16 in float32, two elements of the inner dimension at a time: by AMX tiles where the build has them, else by AVX-512 BF16.
//
// Left operands lie in panels [depth / DEPTH][rows][DEPTH]. Right operands are packed in pairs, [depth / 2][LANES]: a lane is a column of the product.
//
// A processor looks ahead by some hundred instructions only. So products are made step by step, and between the steps other work can be done.
#pragma once

#include <utility>

#include "lanes.h"

#if defined(__AVX512BF16__) && LANES == 16
#define PAIRS
#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define TILES
#endif

typedef uint32_t Pair;  // the element of the even row below, of the odd row above

constexpr int DEPTH = 32;  // of one AMX tile; rows and depth below are its multiples

INLINE void transpose16(__m512i* x) {
  __m512i a[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; k++) {
      x[i + 2 * k] = _mm512_unpacklo_epi64(a[i + k], a[i + 2 + k]);
      x[i + 2 * k + 1] = _mm512_unpackhi_epi64(a[i + k], a[i + 2 + k]);
    }
  for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
    a[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    a[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    a[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    x[i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0xdd);
    x[4 + i] = _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0x88);
    x[12 + i] = _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0xdd);
  }
}

constexpr int STEP_ROWS = 32;  // of the left operand, multiplied together

// ``left`` [rows][depth] x ``right`` [BLOCKS][depth / 2][LANES], set or added to ``out`` [BLOCKS][rows][LANES]. Rows are a multiple of STEP_ROWS, the depth of DEPTH.
struct PairProduct {
  const bfloat16* left;
  size_t panel;  // elements from panel to panel
  const Pair* right;
  size_t right_stride;  // from block to block, as that of the result
  float* out;
  size_t out_stride;
  int rows, depth;
  bool add;
};

#if defined(TILES)

// Compilers do not know that tiles are loaded from memory and stored there: this stands between these and all else that uses the same memory.
INLINE void settle() { __asm__ volatile("" ::: "memory"); }

// While it lives, all eight tiles are of 64 bytes a row: 0, 1 and 4 of ``rows`` rows, 2, 3 and 5 of ``more``, 6 and 7 of 16.
struct Tiles {
  explicit Tiles(int rows = 16, int more = 16) {
    alignas(64) uint8_t config[64] = {1};
    const int of[8] = {rows, rows, more, more, rows, more, 16, 16};
    for (int tile = 0; tile < 8; tile++) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = of[tile];
    }
    __asm__ volatile("" : : "r"(config) : "memory");  // GCC takes no more than eight bytes to be read
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

// Two tiles of the left operand by one of each block of the right. With the first step of some rows their sums are begun; those of the rows before leave the tiles then,
// for the last steps' sums are not ready at once.
struct PairStep {
  const bfloat16* left;
  const Pair* right;
  size_t right_stride;
  bool is_first, add;
  float *out, *before;
  size_t out_stride, before_stride;
};

// The intrinsics want a tile's number as a literal.
#define LEAVE(tile, out, stride) _tile_stored(tile, (out) + tile / 2 * (stride) + tile % 2 * 16 * LANES, 64)
#define BEGIN(tile)                                                                             \
  if (s.is_first) {                                                                             \
    if (s.before) LEAVE(tile, s.before, s.before_stride);                                       \
    if (s.add) _tile_loadd(tile, s.out + tile / 2 * s.out_stride + tile % 2 * 16 * LANES, 64);  \
    else _tile_zero(tile);                                                                      \
  }

// One of a step's pieces, two for each block. What is on the left passes by: the hint in its loads keeps it from pushing all else out of the innermost cache.
template <int PIECE>
INLINE void multiply_piece(const PairStep& s) {
  if constexpr (PIECE == 0) {
    BEGIN(0)
    _tile_loadd(6, s.right, 64);
    _tile_stream_loadd(4, s.left, 64);
    _tile_dpbf16ps(0, 4, 6);
  } else if constexpr (PIECE == 1) {
    BEGIN(1)
    _tile_stream_loadd(5, s.left + 16 * DEPTH, 64);
    _tile_dpbf16ps(1, 5, 6);
  } else if constexpr (PIECE == 2) {
    BEGIN(2)
    _tile_loadd(7, s.right + s.right_stride, 64);
    _tile_dpbf16ps(2, 4, 7);
  } else {
    BEGIN(3)
    _tile_dpbf16ps(3, 5, 7);
  }
}

// The steps of some products, one product after the other.
class PairSteps {
 public:
  inline __attribute__((always_inline)) PairSteps(const PairProduct* products, int count) : p(products) {
    for (int i = 0; i < count; i++) left_over += products[i].rows / STEP_ROWS * (products[i].depth / DEPTH);
  }
  int num_left() const { return left_over; }

  inline __attribute__((always_inline)) PairStep next() {
    float* out = p->out + row * LANES;
    const PairStep step = {p->left + row * DEPTH + k / DEPTH * p->panel, p->right + k / 2 * LANES, p->right_stride, k == 0, p->add, out, before, p->out_stride, before_stride};
    left_over--;
    k += DEPTH;
    if (k == p->depth) {
      k = 0;
      before = out;
      before_stride = p->out_stride;
      row += STEP_ROWS;
      if (row == p->rows) {
        row = 0;
        p++;
      }
    }
    return step;
  }

  // Behind the last step: the last sums leave the tiles.
  template <int BLOCKS>
  inline __attribute__((always_inline)) void finish() const {
    if (!before) return;
    LEAVE(0, before, before_stride);
    LEAVE(1, before, before_stride);
    if (BLOCKS == 2) {
      LEAVE(2, before, before_stride);
      LEAVE(3, before, before_stride);
    }
  }

 private:
  const PairProduct* p;
  int row = 0, k = 0, left_over = 0;
  float* before = nullptr;
  size_t before_stride = 0;
};

#undef BEGIN
#undef LEAVE

// All pieces of a step at once.
template <int BLOCKS>
INLINE void multiply_step(const PairStep& step) {
  multiply_piece<0>(step);
  multiply_piece<1>(step);
  if constexpr (BLOCKS == 2) {
    multiply_piece<2>(step);
    multiply_piece<3>(step);
  }
}

// A whole product.
template <int BLOCKS>
INLINE void multiply(const PairProduct& product) {
  settle();
  PairSteps steps(&product, 1);
  while (steps.num_left()) multiply_step<BLOCKS>(steps.next());
  steps.finish<BLOCKS>();
  settle();
}

#else

struct Tiles {
  ~Tiles() {}
};

constexpr int AT_ONCE = 8;  // rows of the left operand: with two blocks, half of the registers hold their sums
constexpr int DEPTH_STEPS = DEPTH / 2;

template <int STEP, int BLOCKS, class Beside>
INLINE void multiply_pair(const bfloat16* left, const Pair* right, size_t right_stride, __m512 (&sums)[AT_ONCE][BLOCKS], Beside& beside) {
  __m512bh columns[BLOCKS];
#pragma GCC unroll 2
  for (int b = 0; b < BLOCKS; b++) columns[b] = (__m512bh)_mm512_loadu_si512(right + b * right_stride + STEP * LANES);
#pragma GCC unroll 8
  for (int r = 0; r < AT_ONCE; r++) {
    int pair;
    memcpy(&pair, left + r * DEPTH + 2 * STEP, sizeof pair);
    const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
    for (int b = 0; b < BLOCKS; b++) sums[r][b] = _mm512_dpbf16_ps(sums[r][b], x, columns[b]);
  }
  beside.template step<STEP>();
}

template <int BLOCKS, class Beside, size_t... STEPS>
INLINE void multiply_depth(const bfloat16* left, const Pair* right, size_t right_stride, __m512 (&sums)[AT_ONCE][BLOCKS], Beside& beside, std::index_sequence<STEPS...>) {
  (multiply_pair<STEPS, BLOCKS>(left, right, right_stride, sums, beside), ...);
  beside.end();
}

struct Nothing {
  bool is_left() const { return false; }
  template <int STEP>
  void step() {}
  void end() {}
};

// A whole product, and beside it as much other work as there is: a step of it behind each of DEPTH_STEPS pairs of the inner dimension, then its end.
template <int BLOCKS, class Beside>
INLINE void multiply_beside(const PairProduct& p, Beside& beside) {
  constexpr auto steps = std::make_index_sequence<DEPTH_STEPS>();
  for (int m = 0; m < p.rows; m += AT_ONCE) {
    float* out = p.out + m * LANES;
    __m512 sums[AT_ONCE][BLOCKS];
#pragma GCC unroll 8
    for (int r = 0; r < AT_ONCE; r++)
#pragma GCC unroll 2
      for (int b = 0; b < BLOCKS; b++) sums[r][b] = p.add ? _mm512_loadu_ps(out + b * p.out_stride + r * LANES) : _mm512_setzero_ps();
    const bfloat16* left = p.left + m * DEPTH;
    const Pair* right = p.right;
    for (int k = 0; k < p.depth; k += DEPTH, left += p.panel, right += DEPTH_STEPS * LANES) {
      Nothing nothing;
      if (beside.is_left()) multiply_depth<BLOCKS>(left, right, p.right_stride, sums, beside, steps);
      else multiply_depth<BLOCKS>(left, right, p.right_stride, sums, nothing, steps);
    }
#pragma GCC unroll 8
    for (int r = 0; r < AT_ONCE; r++)
#pragma GCC unroll 2
      for (int b = 0; b < BLOCKS; b++) _mm512_storeu_ps(out + b * p.out_stride + r * LANES, sums[r][b]);
  }
}

template <int BLOCKS>
static void multiply(const PairProduct& p) {
  Nothing nothing;
  multiply_beside<BLOCKS>(p, nothing);
}

#endif

#endif

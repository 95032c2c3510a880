// Products of bfloat16 in float32, two elements of the inner dimension at a time: by AMX tiles where the build has them, else by AVX-512 BF16.
//
// Left operands lie in panels [depth / DEPTH][rows][DEPTH]. Right operands are packed in pairs, [depth / 2][LANES]: a lane is a column of the product.
#pragma once

#include "lanes.h"

#if defined(__AVX512BF16__) && LANES == 16
#define PAIRS

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

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)

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

// out[BLOCKS][rows][LANES] (+)= left [rows][depth] x right[BLOCKS][depth / 2][LANES].
template <int BLOCKS, bool ADD>
static void multiply_pairs(const bfloat16* left, size_t panel, const Pair* right, size_t right_stride, int depth, float* out, size_t out_stride, int rows) {
  __asm__ volatile("" ::: "memory");  // compilers do not know that tiles are loaded from memory
  for (int m = 0; m < rows; m += 32, left += 32 * DEPTH, out += 32 * LANES) {
    if (ADD) {
      _tile_loadd(0, out, 64);
      _tile_loadd(1, out + 16 * LANES, 64);
      if (BLOCKS == 2) {
        _tile_loadd(2, out + out_stride, 64);
        _tile_loadd(3, out + out_stride + 16 * LANES, 64);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const bfloat16* x = left;
    for (int k = 0; k < depth; k += DEPTH, x += panel) {
      _tile_loadd(6, right + k / 2 * LANES, 64);
      _tile_loadd(4, x, 64);
      _tile_loadd(5, x + 16 * DEPTH, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (BLOCKS == 2) {
        _tile_loadd(7, right + right_stride + k / 2 * LANES, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + 16 * LANES, 64);
    if (BLOCKS == 2) {
      _tile_stored(2, out + out_stride, 64);
      _tile_stored(3, out + out_stride + 16 * LANES, 64);
    }
  }
  __asm__ volatile("" ::: "memory");
}

#else

struct Tiles {
  ~Tiles() {}
};

template <int BLOCKS, bool ADD>
static void multiply_pairs(const bfloat16* left, size_t panel, const Pair* right, size_t right_stride, int depth, float* out, size_t out_stride, int rows) {
  constexpr int AT_ONCE = 8;
  for (int m = 0; m < rows; m += AT_ONCE, left += AT_ONCE * DEPTH, out += AT_ONCE * LANES) {
    __m512 sums[AT_ONCE][BLOCKS];
#pragma GCC unroll 8
    for (int r = 0; r < AT_ONCE; r++)
#pragma GCC unroll 2
      for (int b = 0; b < BLOCKS; b++) sums[r][b] = ADD ? _mm512_loadu_ps(out + b * out_stride + r * LANES) : _mm512_setzero_ps();
    for (int k = 0; k < depth; k += 2) {
      __m512bh columns[BLOCKS];
#pragma GCC unroll 2
      for (int b = 0; b < BLOCKS; b++) columns[b] = (__m512bh)_mm512_loadu_si512(right + b * right_stride + k / 2 * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < AT_ONCE; r++) {
        int pair;
        memcpy(&pair, left + k / DEPTH * panel + r * DEPTH + k % DEPTH, sizeof pair);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int b = 0; b < BLOCKS; b++) sums[r][b] = _mm512_dpbf16_ps(sums[r][b], x, columns[b]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < AT_ONCE; r++)
#pragma GCC unroll 2
      for (int b = 0; b < BLOCKS; b++) _mm512_storeu_ps(out + b * out_stride + r * LANES, sums[r][b]);
  }
}

#endif
#endif

// The decodes of rows.h for bfloat16 on AMX tiles. K is multiplied in place: sixteen rows of a block are one tile, and the columns of the other are the
// queries of several heads. V is paired on its way through the cache. So a decode waits for memory, not for arithmetic.
#pragma once

#include "pair_tiles.h"

#if defined(TILES)
#define PAIR_ROWS

constexpr int BLOCK_ROWS = 16;       // of one tile of K
constexpr int UNIT = 2 * BLOCK_ROWS;  // positions of one head that are read at once
constexpr int MOST_PAIR_GROUP = 8;   // a weight is the sum of two numbers of bfloat16, in two rows of a tile

INLINE bool rows_fit_tiles(const Step& step) {
  return step.dtype == BFLOAT16 && step.key_dim % DEPTH == 0 && step.value_dim % DEPTH == 0 && step.block_size % BLOCK_ROWS == 0 && step.group() <= MOST_PAIR_GROUP;
}

// K/V heads of one item: as many as have their queries in the columns of one tile.
INLINE int pair_heads_at_once(const Step& step) {
  const int heads = LANES / step.group();
  return heads < step.num_kv_heads ? heads : step.num_kv_heads;
}

struct PairRowScratch {
  Pair* query;        // [heads][Dk / 2][LANES], zero but in the head's own columns
  Pair* value;        // [Dv / LANES][UNIT / 2][LANES] of one unit
  float* scores;      // [LANES][STRIDE]
  bfloat16* weights;  // [heads][2][group][PART]: rounded, and what rounding took away
  float* out;         // [heads][Dv / LANES][2][group][LANES], columns in the order of ``pair_values``
  uintptr_t end;      // of the memory that is used

  PairRowScratch(const Step& step, uintptr_t memory) : end((memory + 63) / 64 * 64) {
    const auto take = [this](size_t nbytes) {
      end += nbytes;
      return end - nbytes;
    };
    const size_t heads = pair_heads_at_once(step), rows = heads * step.group();
    query = (Pair*)take(heads * step.key_dim / 2 * LANES * sizeof(Pair));
    value = (Pair*)take((size_t)step.value_dim * UNIT / 2 * sizeof(Pair));
    scores = (float*)take(LANES * STRIDE * sizeof(float));
    weights = (bfloat16*)take(2 * rows * PART * sizeof(bfloat16));
    out = (float*)take(2 * rows * step.value_dim * sizeof(float));
  }
  static size_t nbytes(const Step& step) { return PairRowScratch(step, 64).end; }
};

// Where the units of an item lie: first those of K, turn by turn and in a turn head by head, and then those of V.
struct Units {
  const bfloat16* at[2 * PART / BLOCK_ROWS];  // of the first head, two tiles for each turn; K, then V
  int turns, heads;
  int64_t key_stride[2], value_stride[2];     // head, token

  Units(const Step& step, const Item& item, int start, int end) : turns((end + UNIT - 1) / UNIT), heads(item.heads) {
    const int32_t* table = step.tables + item.seq * step.table_stride;
    for (int tile = 0; tile < 2 * turns; tile++) {
      const int position = start + (tile * BLOCK_ROWS < end ? tile : tile - 1) * BLOCK_ROWS;  // a turn may lack its second half: then the first twice
      const int64_t block = table[position / step.block_size], offset = position % step.block_size;
      at[tile] = (const bfloat16*)step.key + block * step.key_stride[0] + item.kv_head * step.key_stride[1] + offset * step.key_stride[2];
      at[2 * turns + tile] = (const bfloat16*)step.value + block * step.value_stride[0] + item.kv_head * step.value_stride[1] + offset * step.value_stride[2];
    }
    for (int i = 0; i < 2; i++) {
      key_stride[i] = step.key_stride[1 + i];
      value_stride[i] = step.value_stride[1 + i];
    }
  }
};

// One unit: two tiles of sixteen rows.
struct Unit {
  const bfloat16* half[2];
  int64_t stride;

  Unit(const Units& units, int number) {
    const int turn = number / units.heads, head = number % units.heads;
    const int64_t* strides = turn < units.turns ? units.key_stride : units.value_stride;
    stride = strides[1];
    for (int i = 0; i < 2; i++) half[i] = units.at[2 * turn + i] + head * strides[0];
  }
  inline __attribute__((always_inline)) void prefetch(int i, int d) const {
    const bfloat16* row = half[i] + d;
    for (int r = 0; r < BLOCK_ROWS; r++, row += stride) __builtin_prefetch(row, 0, 3);
  }
};

// The unit to prefetch while unit ``number`` is in use: the last one prefetches itself.
INLINE Unit unit_behind(const Units& units, int number) {
  return Unit(units, number + 1 < 2 * units.turns * units.heads ? number + 1 : number);
}

static void pack_row_queries(const Step& step, const Item& item, const PairRowScratch& scratch) {
  const bfloat16* rows[LANES];
  const bfloat16* source = (const bfloat16*)step.query + step.cu_seqlens_q[item.seq] * step.query_stride[0];
  for (int r = 0; r < LANES; r++) rows[r] = r < item.num_rows ? source + (item.kv_head * step.group() + r) * step.query_stride[1] : NOTHING;
  const int pairs = step.key_dim / 2;
  Pair* last = scratch.query + (size_t)(item.heads - 1) * pairs * LANES;  // overwritten at the end
  pack_queries(rows, LANES, step.key_dim, step.key_dim, last);
  for (int head = 0; head < item.heads; head++) {
    const __mmask16 own = (__mmask16)(((1u << step.group()) - 1) << head * step.group());
    Pair* out = scratch.query + (size_t)head * pairs * LANES;
    for (int p = 0; p < pairs; p++) _mm512_storeu_si512(out + p * LANES, _mm512_maskz_loadu_epi32(own, last + p * LANES));
  }
}

// Scores of all rows with the positions of all turns, not scaled: scores[row][position].
static void score_units(const Step& step, const Units& units, const PairRowScratch& scratch) {
  const Tiles tiles;
  for (int turn = 0; turn < units.turns; turn++) {
    _tile_zero(0);
    _tile_zero(1);
    const Pair* query = scratch.query;
    for (int head = 0; head < units.heads; head++) {
      const Unit key(units, turn * units.heads + head), next = unit_behind(units, turn * units.heads + head);
      for (int d = 0; d < step.key_dim; d += DEPTH, query += DEPTH / 2 * LANES) {
        _tile_loadd(2, query, 64);
        _tile_loadd(3, key.half[0] + d, key.stride * sizeof(bfloat16));
        next.prefetch(0, d);
        _tile_dpbf16ps(0, 3, 2);
        _tile_loadd(4, key.half[1] + d, key.stride * sizeof(bfloat16));
        next.prefetch(1, d);
        _tile_dpbf16ps(1, 4, 2);
      }
    }
    alignas(64) float columns[UNIT][LANES];
    _tile_stored(0, columns, 64);
    _tile_stored(1, columns + BLOCK_ROWS, 64);
    __asm__ volatile("" : : "r"(columns) : "memory");  // compilers do not know that tiles are stored
    for (int half = 0; half < 2; half++) {
      __m512i x[LANES];
      for (int i = 0; i < LANES; i++) x[i] = _mm512_loadu_si512(columns[half * BLOCK_ROWS + i]);
      transpose16(x);
      for (int i = 0; i < LANES; i++) _mm512_storeu_si512(scratch.scores + i * STRIDE + turn * UNIT + half * BLOCK_ROWS, x[i]);
    }
  }
}

// Scores of ``columns`` positions to weights and their sum.
static void soften_rows(const Step& step, const Item& item, const PairRowScratch& scratch, int start, Sums sums) {
  const int group = step.group(), end = item.high - start, columns = round_up(end, UNIT);
  for (int r = 0; r < item.num_rows; r++) {
    float* x = scratch.scores + r * STRIDE;
    const float* slope = step.slopes ? step.slopes + item.kv_head * group + r : nullptr;
    const float most = finish_scores(x, item.low - start, end, columns, step, slope, start - (step.seq_lens[item.seq] - 1));
    bfloat16* rounded = scratch.weights + ((size_t)(r / group * 2) * group + r % group) * PART;
    Floats total = {};
    for (int t = 0; t < columns; t += UNIT) {
      const Floats a = exp2(load(x + t) - splat(most)), b = exp2(load(x + t + LANES) - splat(most));
      total += a + b;
      const Floats upper_a = (Floats)((Words)a & 0xffff0000u), upper_b = (Floats)((Words)b & 0xffff0000u);
      _mm512_storeu_si512(rounded + t, (__m512i)_mm512_cvtne2ps_pbh((__m512)upper_b, (__m512)upper_a));
      _mm512_storeu_si512(rounded + group * PART + t, (__m512i)_mm512_cvtne2ps_pbh((__m512)(b - upper_b), (__m512)(a - upper_a)));
    }
    sums.most[r] = most;
    sums.sum[r] = sum(total);
  }
}

// Rows of V in pairs, 32 columns at a time as two tiles: in each quarter of a register the first four columns of eight are in one and the others in the other.
// Rows outside of [begin, end) are zeros: what is there was not written, or is not seen.
static void pair_values(const Unit& unit, const Unit& behind, int dim, int begin, int end, Pair* out) {
  for (int half = 0; half < 2; half++)
    for (int row = 0; row < BLOCK_ROWS; row += 2) {
      const int at = half * BLOCK_ROWS + row;
      const __mmask32 first = at >= begin && at < end ? 0xffffffffu : 0, second = at + 1 >= begin && at + 1 < end ? 0xffffffffu : 0;
      const bfloat16 *even = unit.half[half] + row * unit.stride, *odd = even + unit.stride, *next = behind.half[half] + row * behind.stride;
      for (int d = 0; d < dim; d += 2 * LANES) {
        __builtin_prefetch(next + d, 0, 3);
        __builtin_prefetch(next + behind.stride + d, 0, 3);
        const __m512i x = _mm512_maskz_loadu_epi16(first, even + d), y = _mm512_maskz_loadu_epi16(second, odd + d);
        Pair* to = out + (d / LANES * (UNIT / 2) + at / 2) * LANES;
        _mm512_storeu_si512(to, _mm512_unpacklo_epi16(x, y));
        _mm512_storeu_si512(to + UNIT / 2 * LANES, _mm512_unpackhi_epi16(x, y));
      }
    }
}

// out[head] (+)= weights[head] x V of the head.
static void weigh_units(const Step& step, const Item& item, const Units& units, const PairRowScratch& scratch, int start) {
  const int rows = 2 * step.group(), size = rows * LANES;
  const Tiles tiles(rows);
  for (int turn = 0; turn < units.turns; turn++)
    for (int head = 0; head < units.heads; head++) {
      const int number = (units.turns + turn) * units.heads + head, from = start + turn * UNIT;
      pair_values(Unit(units, number), unit_behind(units, number), step.value_dim, item.low - from, item.high - from, scratch.value);
      __asm__ volatile("" ::: "memory");  // compilers do not know that tiles are loaded from memory
      float* out = scratch.out + (size_t)head * step.value_dim * rows;
      _tile_loadd(4, scratch.weights + (size_t)head * rows * PART + turn * UNIT, PART * sizeof(bfloat16));
      for (int d = 0; d < step.value_dim; d += DEPTH, out += 2 * size) {
        const Pair* value = scratch.value + d * UNIT / 2;
        if (turn == 0) {
          _tile_zero(0);
          _tile_zero(1);
        } else {
          _tile_loadd(0, out, 64);
          _tile_loadd(1, out + size, 64);
        }
        _tile_loadd(6, value, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, value + UNIT / 2 * LANES, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stored(0, out, 64);
        _tile_stored(1, out + size, 64);
      }
    }
  __asm__ volatile("" ::: "memory");
}

// The sums of the two rows of each query, in the order of ``load_two``.
static void end_pair_rows(const Step& step, const Item& item, const PairRowScratch& scratch, Sums sums) {
  const __m512i evens = _mm512_set_epi32(30, 28, 14, 12, 26, 24, 10, 8, 22, 20, 6, 4, 18, 16, 2, 0), odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  const int group = step.group(), size = 2 * group * LANES;
  for (int r = 0; r < item.num_rows; r++) {
    const float* x = scratch.out + (size_t)(r / group) * step.value_dim * 2 * group + r % group * LANES;
    float* value = sums.value + (size_t)r * sums.stride;
    for (int d = 0; d < step.value_dim; d += DEPTH, x += 2 * size) {
      const __m512 first = (__m512)(load(x) + load(x + group * LANES)), second = (__m512)(load(x + size) + load(x + size + group * LANES));
      _mm512_storeu_ps(value + d, _mm512_permutex2var_ps(first, evens, second));
      _mm512_storeu_ps(value + d + LANES, _mm512_permutex2var_ps(first, odds, second));
    }
  }
}

// As ``attend_rows``.
static void attend_pair_rows(const Step& step, const Item& item, float* memory, Sums sums) {
  const PairRowScratch scratch(step, (uintptr_t)memory);
  const int start = item.low / BLOCK_ROWS * BLOCK_ROWS;
  const Units units(step, item, start, item.high - start);
  pack_row_queries(step, item, scratch);
  score_units(step, units, scratch);
  soften_rows(step, item, scratch, start, sums);
  weigh_units(step, item, units, scratch, start);
  end_pair_rows(step, item, scratch, sums);
}

#endif

// K/V heads of one item of decodes, and scratch for it.
INLINE int decode_heads(const Step& step) {
#if defined(PAIR_ROWS)
  if (rows_fit_tiles(step)) return pair_heads_at_once(step);
#endif
  return heads_at_once(step);
}

INLINE size_t decode_scratch(const Step& step) {
#if defined(PAIR_ROWS)
  if (rows_fit_tiles(step)) return PairRowScratch::nbytes(step);
#endif
  return row_scratch(step);
}

template <class T>
INLINE void attend_few(const Step& step, const Item& item, const Item* next, bool is_asked, float* memory, Sums sums) {
#if defined(PAIR_ROWS)
  if constexpr (std::is_same<T, bfloat16>::value)
    if (rows_fit_tiles(step)) return attend_pair_rows(step, item, memory, sums);
#endif
  attend_rows<T>(step, item, next, is_asked, memory, sums);
}

// The work of tiles.h for bfloat16 where pairs of it can be multiplied: scores and weights are kept transposed, a lane being a row (a query and a
// head of the group). So K is not transposed, V once for many rows, and maxima and sums of a row never cross lanes.
//
// As there, a row's result is its own alone: what is hidden from it weighs exactly nothing, and tiles begin at fixed positions.
#pragma once

#include <type_traits>

#include "pairs.h"
#include "rows.h"
#include "tiles.h"

constexpr int PAIR_TILE_ROWS = 256;
constexpr int MOST_PACKED = 512;   // positions whose K and V are packed at once
constexpr int PAIR_COLUMNS = 128;  // positions whose scores are in use at once

#if defined(PAIRS)

alignas(64) static const bfloat16 NOTHING[1024] = {};  // the widest row of K or V, where no position is

// Some tokens' rows of K or V; zeros outside of [begin, end).
INLINE void rows_or_nothing(const bfloat16** rows, const void* base, const int64_t* stride, const Step& step, const int32_t* table, int head, int tile,
                            int begin, int end, int columns) {
  for (int t = 0; t < begin; t++) rows[t] = NOTHING;
  row_addresses(rows + begin, base, stride, step, table, head, tile + begin, tile + end);
  for (int t = end; t < columns; t++) rows[t] = NOTHING;
}

// A mask of the elements that are left, of as many as a register holds.
INLINE uint32_t within(int left) { return left >= 32 ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0; }

// Queries to [rows / LANES][width / 2][LANES] pairs; ``width`` is ``dim`` rounded up, and what is behind ``dim`` zero.
INLINE void pack_queries(const bfloat16* const* rows, int num_rows, int dim, int width, Pair* out) {
  for (int r = 0; r < num_rows; r += LANES)
    for (int d = 0; d < width; d += 2 * LANES, out += LANES * LANES) {
      __m512i x[LANES];
      for (int i = 0; i < LANES; i++) x[i] = _mm512_maskz_loadu_epi16(within(dim - d), rows[r + i] + d);
      transpose16(x);
      for (int i = 0; i < LANES; i++) _mm512_storeu_si512(out + i * LANES, x[i]);
    }
}

// K to panels [width / DEPTH][columns][DEPTH].
INLINE void pack_keys(const bfloat16* const* rows, int columns, int dim, int width, bfloat16* out, size_t panel) {
  for (int t = 0; t < columns; t++, out += DEPTH) {
    if (t + AHEAD < columns) prefetch_row(rows[t + AHEAD], dim);
    for (int d = 0; d < width; d += DEPTH) _mm512_storeu_si512(out + d / DEPTH * panel, _mm512_maskz_loadu_epi16(within(dim - d), rows[t] + d));
  }
}

// V, transposed, to panels [columns / DEPTH][width][DEPTH].
INLINE void pack_values(const bfloat16* const* rows, int columns, int dim, int width, bfloat16* out) {
  for (int t = 0; t < columns; t += DEPTH, rows += DEPTH)
    for (int d = 0; d < width; d += LANES, out += LANES * DEPTH) {
      const __mmask16 some = (__mmask16)within(dim - d);
      __m512i x[LANES];
      for (int i = 0; i < LANES; i++) {
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, rows[2 * i] + d));
        const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, rows[2 * i + 1] + d));
        x[i] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
      }
      if (d == 0 && t + DEPTH < columns)
        for (int i = 0; i < DEPTH; i++) prefetch_row(rows[DEPTH + i], dim);
      transpose16(x);
      for (int i = 0; i < LANES; i++) _mm512_storeu_si512(out + i * DEPTH, x[i]);
    }
}

// 2^x for x up to 0, relative error 1e-4: a weight is rounded to bfloat16 next. A polynomial of degree 3 that is exact at whole numbers.
INLINE Floats weight_of(Floats x) {
  const __m512 rest = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Floats p = splat(7.826797e-2f);
  p = fma(p, (Floats)rest, splat(2.2630768e-1f));
  p = fma(p, (Floats)rest, splat(6.9542435e-1f));
  p = fma(p, (Floats)rest, splat(1.f));
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
}

// Sixteen rows' sums so far; a lane is a row.
struct Block {
  Floats most, sum;
  Ints first, last;  // positions that each row sees; the last not included
  Ints position;
  Floats slope;
};

// Scores to logits in base 2, in place, where a product with the scale is not enough.
INLINE void bend(float* scores, int columns, const Step& step, const Block& block, int tile) {
  const Floats scale = splat(step.softcap > 0 ? step.scale / step.softcap : step.scale * LOG2E), cap = splat(step.softcap * LOG2E);
  for (int t = 0; t < columns; t++) {
    Floats x = load(scores + t * LANES) * scale;
    if (step.softcap > 0) x = tanh(x) * cap;
    x = fma(block.slope, __builtin_convertvector(tile + t - block.position, Floats), x);
    store(scores + t * LANES, x);
  }
}

// Scores [columns][LANES] of the positions from ``tile`` to weights in pairs. Returns by how much earlier sums shrink.
template <bool HIDDEN>
INLINE Floats soften(const float* scores, int columns, float factor, int tile, Block& block, Pair* weights) {
  const Ints low = block.first - tile, high = block.last - tile;
  const auto seen = [&](int t) {
    const __m512i column = _mm512_set1_epi32(t);
    return _mm512_mask_cmplt_epi32_mask(_mm512_cmple_epi32_mask((__m512i)low, column), column, (__m512i)high);
  };
  Floats most[4] = {splat(MINUS_INFINITY), splat(MINUS_INFINITY), splat(MINUS_INFINITY), splat(MINUS_INFINITY)}, sums[4] = {};
  for (int t = 0; t < columns; t += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512 x = (__m512)load(scores + (t + i) * LANES);
      most[i] = (Floats)(HIDDEN ? _mm512_mask_max_ps((__m512)most[i], seen(t + i), (__m512)most[i], x) : _mm512_max_ps((__m512)most[i], x));
    }
  const Floats here = larger(larger(most[0], most[1]), larger(most[2], most[3])) * splat(factor);
  const Floats now = larger(here, block.most);
  const Floats base = now == splat(MINUS_INFINITY) ? splat(0.f) : now;
  const Floats scale = splat(factor);
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int t = 0; t < columns; t += 4) {
    Floats weight[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      weight[i] = weight_of(fma(load(scores + (t + i) * LANES), scale, -base));
      if (HIDDEN) weight[i] = (Floats)_mm512_maskz_mov_ps(seen(t + i), (__m512)weight[i]);
      sums[i] += weight[i];
    }
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)weight[i + 1], (__m512)weight[i]);
      _mm512_storeu_si512(weights + (t + i) / 2 * LANES, _mm512_permutexvar_epi16(pairs, (__m512i)both));
    }
  }
  const Floats shrink = exp2(block.most - base);
  block.sum = block.sum * shrink + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  block.most = now;
  return shrink;
}

// Positions whose K and V are packed at once: so many that they stay in the second-level cache.
INLINE int packed_columns(int width) { return width <= 256 ? MOST_PACKED : width <= 512 ? MOST_PACKED / 2 : MOST_PACKED / 4; }

struct PairScratch {
  int width, out_width;  // of K and V, rounded up
  int columns;           // packed at once
  Pair* query;           // [rows / LANES][width / 2][LANES]
  bfloat16* key;         // [width / DEPTH][columns][DEPTH]
  bfloat16* value;       // [columns / DEPTH][out_width][DEPTH]
  float* scores;         // [2][PAIR_COLUMNS][LANES]
  Pair* weights;         // [2][PAIR_COLUMNS / 2][LANES]
  float* out;            // [rows / LANES][out_width][LANES]
  Block* blocks;         // [rows / LANES]
  uintptr_t end;         // of the memory that is used

  PairScratch(const Step& step, uintptr_t memory) : width(round_up(step.key_dim, DEPTH)), out_width(round_up(step.value_dim, DEPTH)), end(memory) {
    columns = packed_columns(width + out_width);
    const auto take = [this](size_t nbytes) {
      end += nbytes;
      return end - nbytes;
    };
    blocks = (Block*)take(PAIR_TILE_ROWS / LANES * sizeof(Block));
    query = (Pair*)take((size_t)PAIR_TILE_ROWS * width / 2 * sizeof(Pair));
    key = (bfloat16*)take((size_t)columns * width * sizeof(bfloat16));
    value = (bfloat16*)take((size_t)columns * out_width * sizeof(bfloat16));
    scores = (float*)take(2 * PAIR_COLUMNS * LANES * sizeof(float));
    weights = (Pair*)take(PAIR_COLUMNS * LANES * sizeof(Pair));
    out = (float*)take((size_t)PAIR_TILE_ROWS * out_width * sizeof(float));
  }
  static size_t floats(const Step& step) { return PairScratch(step, 0).end / sizeof(float); }
};

// One or two blocks of rows over the packed positions [begin, end), counted from ``tile``.
template <int BLOCKS>
static void attend_blocks(const Step& step, const PairScratch& scratch, int number, int tile, int begin, int end, bool bent) {
  Block* blocks = scratch.blocks + number;
  // Rows are in the order of their positions, and so is what they see.
  const Block &low = blocks[0], &high = blocks[BLOCKS - 1];
  const int first = low.first[0] - tile > begin ? low.first[0] - tile : begin, last = high.last[LANES - 1] - tile < end ? high.last[LANES - 1] - tile : end;
  const int width = scratch.width, out_width = scratch.out_width;
  const Pair* query = scratch.query + (size_t)number * width / 2 * LANES;
  float* out = scratch.out + (size_t)number * out_width * LANES;
  for (int from = first / PAIR_COLUMNS * PAIR_COLUMNS; from < last; from += PAIR_COLUMNS) {
    const int columns = last - from < PAIR_COLUMNS ? round_up(last - from, DEPTH) : PAIR_COLUMNS;
    const bool hidden = high.first[LANES - 1] - tile > from || low.last[0] - tile < from + columns;
    multiply_pairs<BLOCKS, false>(scratch.key + from * DEPTH, scratch.columns * DEPTH, query, width / 2 * LANES, width, scratch.scores, PAIR_COLUMNS * LANES, columns);
    for (int b = 0; b < BLOCKS; b++) {
      float* scores = scratch.scores + b * PAIR_COLUMNS * LANES;
      Pair* weights = scratch.weights + b * PAIR_COLUMNS / 2 * LANES;
      if (bent) bend(scores, columns, step, blocks[b], tile + from);
      const float factor = bent ? 1.f : step.scale * LOG2E;
      const Floats shrink = hidden ? soften<true>(scores, columns, factor, tile + from, blocks[b], weights) : soften<false>(scores, columns, factor, tile + from, blocks[b], weights);
      if (_mm512_cmpneq_ps_mask((__m512)shrink, _mm512_set1_ps(1.f))) {
        float* x = out + b * out_width * LANES;
        for (int d = 0; d < out_width; d++) store(x + d * LANES, load(x + d * LANES) * shrink);
      }
    }
    multiply_pairs<BLOCKS, true>(scratch.value + from * out_width, out_width * DEPTH, scratch.weights, PAIR_COLUMNS / 2 * LANES, columns, out, out_width * LANES, out_width);
  }
}

// Packs the queries of an item, and says what each of its rows sees. Behind the last row it stands again, so that blocks are full.
static void begin_rows(const Step& step, const Item& item, const PairScratch& scratch, int num_rows) {
  const int group = step.group(), first_position = step.seq_lens[item.seq] - step.num_queries(item.seq);  // of the sequence's first query
  const bfloat16* rows[PAIR_TILE_ROWS];
  for (int r = 0; r < num_rows; r++) {
    const int row = item.first_row + (r < item.num_rows ? r : item.num_rows - 1), position = first_position + row / group;
    const int head = item.kv_head * group + row % group, lane = r % LANES, first = step.first_visible(position);
    rows[r] = (const bfloat16*)step.query + (step.cu_seqlens_q[item.seq] + row / group) * step.query_stride[0] + head * step.query_stride[1];
    Block& block = scratch.blocks[r / LANES];
    block.position[lane] = position;
    block.first[lane] = first > item.low ? first : item.low;
    block.last[lane] = position < item.high ? position + 1 : item.high;
    block.slope[lane] = step.slopes ? step.slopes[head] * LOG2E : 0.f;
    block.most[lane] = MINUS_INFINITY;
    block.sum[lane] = 0;
  }
  pack_queries(rows, num_rows, step.key_dim, scratch.width, scratch.query);
  memset(scratch.out, 0, (size_t)num_rows * scratch.out_width * sizeof(float));
}

static void end_rows(const Item& item, const PairScratch& scratch, Sums sums) {
  for (int b = 0; b * LANES < item.num_rows; b++) {
    const int left = item.num_rows - b * LANES, count = left < LANES ? left : LANES;
    for (int i = 0; i < count; i++) {
      sums.most[b * LANES + i] = scratch.blocks[b].most[i];
      sums.sum[b * LANES + i] = scratch.blocks[b].sum[i];
    }
    for (int d = 0; d < scratch.out_width; d += LANES) {
      __m512i x[LANES];
      for (int i = 0; i < LANES; i++) x[i] = _mm512_loadu_si512(scratch.out + ((size_t)b * scratch.out_width + d + i) * LANES);
      transpose16(x);
      for (int i = 0; i < count; i++) _mm512_storeu_si512(sums.value + (size_t)(b * LANES + i) * sums.stride + d, x[i]);
    }
  }
}

// An item's rows over its positions; the sums are left in ``sums``, whose stride is a multiple of PANEL.
static void attend_pairs(const Step& step, const Item& item, float* memory, Sums sums) {
  const PairScratch scratch(step, (uintptr_t)memory);
  const int columns = scratch.columns, num_blocks = (item.num_rows + LANES - 1) / LANES;
  const int32_t* table = step.tables + item.seq * step.table_stride;
  const bool bent = step.softcap > 0 || step.slopes || step.scale <= 0;
  const bfloat16* rows[MOST_PACKED];
  begin_rows(step, item, scratch, num_blocks * LANES);
  const Tiles tiles;
  for (int tile = item.low / columns * columns; tile < item.high; tile += columns) {
    const int begin = item.low > tile ? item.low - tile : 0, end = item.high - tile < columns ? item.high - tile : columns;
    const int used = round_up(end, DEPTH);
    rows_or_nothing(rows, step.key, step.key_stride, step, table, item.kv_head, tile, begin, end, used);
    pack_keys(rows, used, step.key_dim, scratch.width, scratch.key, (size_t)columns * DEPTH);
    rows_or_nothing(rows, step.value, step.value_stride, step, table, item.kv_head, tile, begin, end, used);
    pack_values(rows, used, step.value_dim, scratch.out_width, scratch.value);
    int b = 0;
    for (; b + 2 <= num_blocks; b += 2) attend_blocks<2>(step, scratch, b, tile, begin, end, bent);
    if (b < num_blocks) attend_blocks<1>(step, scratch, b, tile, begin, end, bent);
  }
  end_rows(item, scratch, sums);
}

#endif

// Rows of one item, and scratch for it.
INLINE int tile_rows(const Step& step) {
#if defined(PAIRS)
  if (step.dtype == BFLOAT16) return PAIR_TILE_ROWS;
#endif
  return TILE_ROWS;
}

INLINE size_t tile_floats(const Step& step) {
#if defined(PAIRS)
  if (step.dtype == BFLOAT16) return PairScratch::floats(step);
#endif
  return TileScratch::floats(step);
}

template <class T>
INLINE void attend_many(const Step& step, const Item& item, float* memory, Sums sums) {
#if defined(PAIRS)
  if constexpr (std::is_same<T, bfloat16>::value) return attend_pairs(step, item, memory, sums);
#endif
  attend_tiles<T>(step, item, memory, sums);
}

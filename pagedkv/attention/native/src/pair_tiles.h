// The work of tiles.h for bfloat16 where pairs of it can be multiplied: scores and weights are kept transposed, a lane being a row (a query and a
// head of the group). So K is not transposed, V once for many rows, and maxima and sums of a row never cross lanes.
//
// As there, a row's result is its own alone: what is hidden from it weighs exactly nothing, and tiles begin at fixed positions.
#pragma once

#include <algorithm>
#include <type_traits>

#include "pairs.h"
#include "rows.h"
#include "tiles.h"
#include "weighing.h"

constexpr int PAIR_TILE_ROWS = 512;  // for which K and V are packed once
constexpr int MOST_PACKED = 512;     // positions whose K and V are packed at once
constexpr int MOST_TOGETHER = 128;   // positions whose scores are in use at once
constexpr int PACKED_AHEAD = 24;     // rows of K between the one that is packed and the one that is prefetched

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
    if (t + PACKED_AHEAD < columns) prefetch_row(rows[t + PACKED_AHEAD], dim);
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

// Positions whose K and V are packed at once, and rows for which they are: so many that all stays in the second-level cache. ``width`` is of both.
INLINE int packed_columns(int width) { return width <= 256 ? MOST_PACKED : width <= 512 ? MOST_PACKED / 2 : MOST_PACKED / 4; }
INLINE int packed_rows(int width) { return width <= 512 ? PAIR_TILE_ROWS : PAIR_TILE_ROWS / 2; }

// Few stay in the first-level cache, many read and write sums of V less often. Where scores of two parts are kept there is no room for them in that cache either way.
INLINE int columns_together(int width) { return SCORE_BUFFERS == 1 && width <= 96 ? MOST_TOGETHER / 2 : MOST_TOGETHER; }

struct PairScratch {
  int width, out_width;  // of K and V, rounded up
  int rows, columns;     // packed at once
  int together;          // positions whose scores are in use
  Pair* query;           // [rows / LANES][width / 2][LANES]
  bfloat16* key;         // [width / DEPTH][columns][DEPTH]
  bfloat16* value;       // [columns / DEPTH][out_width][DEPTH]
  float* scores;         // [SCORE_BUFFERS][2][together][LANES]
  Pair* weights;         // [2][2][together / 2][LANES], of a part and of the last
  float* out;            // [rows / LANES][out_width][LANES]
  Block* blocks;         // [rows / LANES]
  uintptr_t end;         // of the memory that is used

  PairScratch(const Step& step, uintptr_t memory) : width(round_up(step.key_dim, DEPTH)), out_width(round_up(step.value_dim, DEPTH)), end(memory) {
    columns = packed_columns(width + out_width);
    rows = packed_rows(width + out_width);
    together = columns_together(out_width);
    const auto take = [this](size_t nbytes) {
      end += nbytes;
      return end - nbytes;
    };
    blocks = (Block*)take(rows / LANES * sizeof(Block));
    query = (Pair*)take((size_t)rows * width / 2 * sizeof(Pair));
    key = (bfloat16*)take((size_t)columns * width * sizeof(bfloat16));
    value = (bfloat16*)take((size_t)columns * out_width * sizeof(bfloat16));
    scores = (float*)take(SCORE_BUFFERS * 2 * together * LANES * sizeof(float));
    weights = (Pair*)take(2 * together * LANES * sizeof(Pair));
    out = (float*)take((size_t)rows * out_width * sizeof(float));
  }
  static size_t floats(const Step& step) { return PairScratch(step, 0).end / sizeof(float); }
};

// One or two blocks of rows over some of the packed positions.
struct Part {
  int number, from, columns;  // first block; positions, counted from the packed ones' first
  bool is_hidden;             // some from some rows
};

// The packed positions [begin, end), counted from ``tile``, that blocks of rows see, ``BLOCKS`` of these at a time. While weights are made of one part's scores, the
// products before and behind it are made: what the last part adds to the result, and the next part's scores.
template <int BLOCKS>
struct Stream {
  const Step& step;
  const PairScratch& scratch;
  const int tile;

  float* out(const Part& part) const { return scratch.out + (size_t)part.number * scratch.out_width * LANES; }
  float* scores(int number, int block) const { return scratch.scores + (number % SCORE_BUFFERS * 2 + block) * scratch.together * LANES; }
  Pair* weights(int number, int block) const { return scratch.weights + (number % 2 * 2 + block) * scratch.together / 2 * LANES; }

  int cut(int first_block, int end_block, int begin, int end, Part* parts) const {
    int count = 0;
    for (int number = first_block; number < end_block; number += BLOCKS) {
      // Rows are in the order of their positions, and so is what they see.
      const Block &low = scratch.blocks[number], &high = scratch.blocks[number + BLOCKS - 1];
      const int first = std::max(low.first[0] - tile, begin), last = std::min(high.last[LANES - 1] - tile, end);
      for (int from = first / scratch.together * scratch.together; from < last; from += scratch.together) {
        const int columns = std::min(round_up(last - from, DEPTH), scratch.together);
        parts[count++] = {number, from, columns, high.first[LANES - 1] - tile > from || low.last[0] - tile < from + columns};
      }
    }
    return count;
  }

  PairProduct score(const Part& part, int number) const {
    const size_t stride = scratch.width / 2 * LANES;
    return {scratch.key + part.from * DEPTH, (size_t)scratch.columns * DEPTH, scratch.query + part.number * stride, stride, scores(number, 0), (size_t)scratch.together * LANES, part.columns, scratch.width, false};
  }
  PairProduct add_values(const Part& part, int number) const {
    const int width = scratch.out_width;
    return {scratch.value + part.from * width, (size_t)width * DEPTH, weights(number, 0), (size_t)scratch.together / 2 * LANES, out(part), (size_t)width * LANES, width, part.columns, true};
  }

  Scores block_scores(const Part& part, int number, int b) const {
    return {scores(number, b), part.columns, tile + part.from, score_factor(step), is_bent(step)};
  }

  inline __attribute__((always_inline)) Softening softening(const Part& part, int number, int b) const {
    return {block_scores(part, number, b), scratch.blocks[part.number + b], weights(number, b)};
  }

  // Scores of a block to logits where the scale alone does not make them, and what exponents count from to where these need it, if that is in doubt. Whether it moved.
  inline __attribute__((always_inline)) bool prepare(const Part& part, int number, int b) const {
    Block& block = scratch.blocks[part.number + b];
    const bool bent = is_bent(step);
    if (bent) bend(scores(number, b), part.columns, step, block, tile + part.from);
    return (bent || block.is_new()) && raise(block_scores(part, number, b), block);
  }
  __attribute__((noinline)) void shrink_sums(const Part& part, int b) const {
    const Floats shrink = scratch.blocks[part.number + b].shrink;
    float* x = out(part) + b * scratch.out_width * LANES;
    for (int d = 0; d < scratch.out_width; d++) store(x + d * LANES, load(x + d * LANES) * shrink);
  }

  // The part's weights, beside the products of the ``last`` part and the ``next`` if there are such.
  template <bool HIDDEN>
  void soften(const Part& part, int number, const Part* last, const Part* next) const {
    PairProduct products[2];
    int count = 0;
    if (last) products[count++] = add_values(*last, number - 1);
    if (next) products[count++] = score(*next, number + 1);
    const bool low_moved = prepare(part, number, 0), high_moved = BLOCKS == 2 && prepare(part, number, 1);
    Softening low = softening(part, number, 0), high = softening(part, number, BLOCKS - 1);
    weigh_beside<HIDDEN, BLOCKS>(low, high, part.columns, products, count);
    if (low_moved) shrink_sums(part, 0);
    if (high_moved) shrink_sums(part, 1);
    if (__builtin_expect(low.is_exceeded() | (BLOCKS == 2 && high.is_exceeded()), 0)) return weigh_again(part, number, next);
    Block* blocks = scratch.blocks + part.number;
    blocks[0].sum += low.total();
    if (BLOCKS == 2) blocks[1].sum += high.total();
  }

  // Where weights have grown too large they are made again; so are their scores, if the next part's have taken their place. (Weights of bent scores never are.)
  __attribute__((noinline)) void weigh_again(const Part& part, int number, const Part* next) const {
    if (SCORE_BUFFERS == 1) multiply<BLOCKS>(score(part, number));
    for (int b = 0; b < BLOCKS; b++) {
      if (raise(block_scores(part, number, b), scratch.blocks[part.number + b])) shrink_sums(part, b);
      Softening soft = softening(part, number, b);
      weigh<true>(soft, part.columns);
      scratch.blocks[part.number + b].sum += soft.total();
    }
    if (SCORE_BUFFERS == 1 && next) multiply<BLOCKS>(score(*next, number + 1));
  }

  void run(const Part* parts, int count) const {
    if (count == 0) return;
    multiply<BLOCKS>(score(parts[0], 0));
    for (int i = 0; i < count; i++) {
      const Part *last = i > 0 ? parts + i - 1 : nullptr, *next = i + 1 < count ? parts + i + 1 : nullptr;
      const Part* beside = next && (SCORE_BUFFERS > 1 || next->columns <= parts[i].columns) ? next : nullptr;  // whose scores have a place
      if (parts[i].is_hidden) soften<true>(parts[i], i, last, beside);
      else soften<false>(parts[i], i, last, beside);
      if (next != beside) multiply<BLOCKS>(score(*next, i + 1));
    }
    multiply<BLOCKS>(add_values(parts[count - 1], count - 1));
  }
};

template <int BLOCKS>
static void attend_blocks(const Step& step, const PairScratch& scratch, int first_block, int end_block, int tile, int begin, int end) {
  Part parts[PAIR_TILE_ROWS / LANES / BLOCKS * MOST_PACKED / (MOST_TOGETHER / 2)];
  const Stream<BLOCKS> stream = {step, scratch, tile};
  stream.run(parts, stream.cut(first_block, end_block, begin, end, parts));
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
    block.top[lane] = MINUS_INFINITY;
    block.sum[lane] = 0;
  }
  pack_queries(rows, num_rows, step.key_dim, scratch.width, scratch.query);
  memset(scratch.out, 0, (size_t)num_rows * scratch.out_width * sizeof(float));
}

static void end_rows(const Step& step, const Item& item, const PairScratch& scratch, Sums sums) {
  for (int b = 0; b * LANES < item.num_rows; b++) {
    const int left = item.num_rows - b * LANES, count = left < LANES ? left : LANES;
    const Floats most = Exponents::logit(scratch.blocks[b].top, score_factor(step));
    for (int i = 0; i < count; i++) {
      sums.most[b * LANES + i] = most[i];
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
    const int paired = num_blocks / 2 * 2;
    attend_blocks<2>(step, scratch, 0, paired, tile, begin, end);
    attend_blocks<1>(step, scratch, paired, num_blocks, tile, begin, end);
  }
  end_rows(step, item, scratch, sums);
}

#endif

// Rows of one item, and scratch for it.
INLINE int tile_rows(const Step& step) {
#if defined(PAIRS)
  if (step.dtype == BFLOAT16) return PairScratch(step, 0).rows;
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

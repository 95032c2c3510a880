// Prefill chunks, and decodes with large groups: many rows over many positions, as two small matrix products per tile of positions.
//
// A tile's K (transposed) and V are packed as float32 into panels that stay in the cache while all rows pass. Every row goes through the same
// operations in the same order whatever rows are beside it, and tiles begin at fixed positions: so a row's result is its own alone.
#pragma once

#include "lanes.h"
#include "step.h"

constexpr int PANEL = 2 * LANES;                // columns that are multiplied at once
constexpr int ROWS = LANES == 16 ? 12 : 6;      // rows that are multiplied at once: as many sums as fit into registers
constexpr int TILE_ROWS = 96;
constexpr int TILE_COLUMNS = 128;
constexpr int WIDE_TILE_COLUMNS = 64;           // for wide heads, so that a tile stays in the second-level cache
constexpr int TILED_PART = 2048;                // positions of one item where few rows look at many

// Addresses of the rows of K or V at positions [low, high).
template <class T>
INLINE void row_addresses(const T** rows, const void* base, const int64_t* stride, const Step& step, const int32_t* table, int head, int low, int high) {
  const T* heads = (const T*)base + head * stride[1];
  for (int position = low; position < high;) {
    const int offset = position % step.block_size, count = std::min(step.block_size - offset, high - position);
    const T* row = heads + table[position / step.block_size] * stride[0] + offset * stride[2];
    for (int i = 0; i < count; i++) rows[i] = row + i * stride[2];
    rows += count;
    position += count;
  }
}

INLINE int tile_columns(const Step& step) { return step.key_dim > 256 ? WIDE_TILE_COLUMNS : TILE_COLUMNS; }

// out[ROW_COUNT, PANEL] (+)= left[ROW_COUNT, depth] x panel[depth, PANEL].
template <int ROW_COUNT, bool ADD>
INLINE void multiply(const float* left, int left_stride, const float* panel, int depth, float* out, int out_stride) {
  Floats sums[ROW_COUNT][2];
#pragma GCC unroll 12
  for (int r = 0; r < ROW_COUNT; r++) {
    sums[r][0] = ADD ? load(out + r * out_stride) : Floats{};
    sums[r][1] = ADD ? load(out + r * out_stride + LANES) : Floats{};
  }
  for (int k = 0; k < depth; k++) {
    const Floats first = load(panel + k * PANEL), second = load(panel + k * PANEL + LANES);
#pragma GCC unroll 12
    for (int r = 0; r < ROW_COUNT; r++) {
      const Floats x = splat(left[r * left_stride + k]);
      sums[r][0] = fma(x, first, sums[r][0]);
      sums[r][1] = fma(x, second, sums[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROW_COUNT; r++) {
    store(out + r * out_stride, sums[r][0]);
    store(out + r * out_stride + LANES, sums[r][1]);
  }
}

// out[rows, columns] (+)= left[rows, depth] x panels [columns / PANEL][panel_depth][PANEL], of which the first ``depth`` rows are used.
template <bool ADD>
static void multiply_all(const float* left, int left_stride, const float* panels, int panel_depth, int depth, float* out, int out_stride, int rows, int columns) {
  for (int c = 0; c < columns; c += PANEL) {
    const float* panel = panels + (size_t)c * panel_depth;
    int r = 0;
    for (; r + ROWS <= rows; r += ROWS) multiply<ROWS, ADD>(left + r * left_stride, left_stride, panel, depth, out + r * out_stride + c, out_stride);
    for (; r + 2 <= rows; r += 2) multiply<2, ADD>(left + r * left_stride, left_stride, panel, depth, out + r * out_stride + c, out_stride);
    for (; r < rows; r++) multiply<1, ADD>(left + r * left_stride, left_stride, panel, depth, out + r * out_stride + c, out_stride);
  }
}

struct TileScratch {
  float *query, *key, *value, *scores, *sums;

  TileScratch(const Step& step, float* memory) {
    const size_t columns = tile_columns(step), out = round_up(step.value_dim, PANEL);
    query = memory;
    key = query + TILE_ROWS * (size_t)step.key_dim;
    value = key + columns * step.key_dim;
    scores = value + columns * out;
    sums = scores + TILE_ROWS * columns;
  }
  static size_t floats(const Step& step) {
    const size_t columns = tile_columns(step), out = round_up(step.value_dim, PANEL);
    return TILE_ROWS * (step.key_dim + columns + out + 2) + columns * (step.key_dim + out);
  }
};

#if defined(__AVX2__)
// Eight rows of eight floats to eight columns.
INLINE void transpose8(const float* const* rows, int d, float* out, int out_stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm256_unpacklo_ps(_mm256_loadu_ps(rows[2 * i] + d), _mm256_loadu_ps(rows[2 * i + 1] + d));
    a[2 * i + 1] = _mm256_unpackhi_ps(_mm256_loadu_ps(rows[2 * i] + d), _mm256_loadu_ps(rows[2 * i + 1] + d));
  }
  for (int i = 0; i < 2; i++) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(b[i], b[4 + i], 0x20));
    _mm256_storeu_ps(out + (4 + i) * out_stride, _mm256_permute2f128_ps(b[i], b[4 + i], 0x31));
  }
}
#endif

// K rows [begin, end) of a tile to panels [columns / PANEL][dim][PANEL]; what is outside of them becomes zero, and is never read.
template <class T>
static void pack_key(const T* const* rows, int begin, int end, int columns, int dim, float* panels) {
  for (int c = 0; c < columns; c++) {
    float* out = panels + (size_t)(c / PANEL) * dim * PANEL + c % PANEL;
    if (c < begin || c >= end) {
      for (int d = 0; d < dim; d++) out[d * PANEL] = 0;
      continue;
    }
    int d = 0;
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
      if (c % 8 == 0 && c + 8 <= end) {
        for (; d + 8 <= dim; d += 8) transpose8(rows + c, d, out + d * PANEL, PANEL);
        for (; d < dim; d++)
          for (int i = 0; i < 8; i++) out[d * PANEL + i] = rows[c + i][d];
        c += 7;
        continue;
      }
#endif
    for (; d < dim; d += LANES) {
      float some[LANES];
      const int count = dim - d < LANES ? dim - d : LANES;
      store(some, count == LANES ? load(rows[c] + d) : load_part(rows[c] + d, count));
      for (int i = 0; i < count; i++) out[(d + i) * PANEL] = some[i];
    }
  }
}

// V rows to panels [dim / PANEL][columns][PANEL], columns of the output behind ``dim`` zero.
template <class T>
static void pack_value(const T* const* rows, int begin, int end, int columns, int dim, float* panels) {
  for (int p = 0; p * PANEL < dim; p++)
    for (int c = 0; c < columns; c++) {
      float* out = panels + ((size_t)p * columns + c) * PANEL;
      for (int d = 0; d < PANEL; d += LANES) {
        const int left = dim - p * PANEL - d;
        Floats x = {};
        if (c >= begin && c < end && left > 0) x = left >= LANES ? load(rows[c] + p * PANEL + d) : load_part(rows[c] + p * PANEL + d, left);
        store(out + d, x);
      }
    }
}

// One row's scores of a tile to weights, in place: columns outside of [begin, end) weigh nothing. Rescales what was summed before.
INLINE void soften_row(float* scores, int begin, int end, int columns, const Step& step, const float* slope, int first_distance, float* most, float* total,
                       float* value, int value_stride) {
  if (begin >= end) {
    memset(scores, 0, columns * sizeof(float));
    return;
  }
  const float here = finish_scores(scores, begin, end, columns, step, slope, first_distance), before = *most;
  const float now = here > before ? here : before;
  Floats sums = {};
  for (int t = 0; t < columns; t += LANES) {
    const Floats weight = exp2(load(scores + t) - splat(now));
    store(scores + t, weight);
    sums += weight;
  }
  const float shrink = before == now ? 1.f : exp2(splat(before - now))[0];
  *total = *total * shrink + sum(sums);
  *most = now;
  if (shrink != 1.f)
    for (int d = 0; d < value_stride; d += LANES) store(value + d, load(value + d) * splat(shrink));
}

// An item's rows over its positions; the sums are left in ``sums``, whose stride is a multiple of PANEL.
template <class T>
static void attend_tiles(const Step& step, const Item& item, float* memory, Sums sums) {
  const int group = step.group(), seq = item.seq, columns = tile_columns(step), dim = step.key_dim;
  const int first_position = step.seq_lens[seq] - step.num_queries(seq);  // of the sequence's first query
  const int32_t* table = step.tables + seq * step.table_stride;
  const T* source = (const T*)step.query + step.cu_seqlens_q[seq] * step.query_stride[0];
  TileScratch scratch(step, memory);
  for (int r = 0; r < item.num_rows; r++) {
    const int row = item.first_row + r;
    const T* head = source + row / group * step.query_stride[0] + (item.kv_head * group + row % group) * step.query_stride[1];
    for (int d = 0; d < dim; d += LANES) {
      const Floats x = d + LANES <= dim ? load(head + d) : load_part(head + d, dim - d);
      store_part(scratch.query + (size_t)r * dim + d, x, dim - d < LANES ? dim - d : LANES);
    }
    sums.most[r] = MINUS_INFINITY;
    sums.sum[r] = 0;
    memset(sums.value + (size_t)r * sums.stride, 0, sums.stride * sizeof(float));
  }
  for (int tile = item.low / columns * columns; tile < item.high; tile += columns) {
    const int begin = item.low > tile ? item.low - tile : 0, end = item.high - tile < columns ? item.high - tile : columns;
    const int used = round_up(end, PANEL);
    const T* rows[TILE_COLUMNS];
    row_addresses(rows + begin, step.key, step.key_stride, step, table, item.kv_head, tile + begin, tile + end);
    pack_key(rows, begin, end, used, dim, scratch.key);
    row_addresses(rows + begin, step.value, step.value_stride, step, table, item.kv_head, tile + begin, tile + end);
    pack_value(rows, begin, end, used, step.value_dim, scratch.value);
    multiply_all<false>(scratch.query, dim, scratch.key, dim, dim, scratch.scores, columns, item.num_rows, used);
    for (int r = 0; r < item.num_rows; r++) {
      const int row = item.first_row + r, position = first_position + row / group;
      const int seen = step.first_visible(position) - tile, own = position + 1 - tile;
      const float* slope = step.slopes ? step.slopes + item.kv_head * group + row % group : nullptr;
      soften_row(scratch.scores + r * columns, seen > begin ? seen : begin, own < end ? own : end, used, step, slope, tile - position, sums.most + r,
                 sums.sum + r, sums.value + (size_t)r * sums.stride, sums.stride);
    }
    multiply_all<true>(scratch.scores, columns, scratch.value, used, used, sums.value, sums.stride, item.num_rows, sums.stride);
  }
}

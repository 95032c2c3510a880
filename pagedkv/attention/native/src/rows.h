// Decodes: few rows over many positions. K and V are read once, in place, row by row; blocks are scattered in memory, so the rows ahead
// are prefetched by software: the hardware's prefetcher stops at every block.
#pragma once

#include "lanes.h"
#include "step.h"

constexpr int PART = 256;   // positions that are summed up at once; longer sequences are cut at its multiples, whatever else is in the batch
constexpr int AHEAD = 24;   // rows between the one in use and the one that is prefetched
constexpr int BATCH = 32;   // rows of V that pass while the sums are in registers

// Addresses of the rows of K or V at positions [low, high).
template <class T>
INLINE void row_addresses(const T** rows, const void* base, const int64_t* stride, const Step& step, const int32_t* table, int head, int low, int high) {
  int block = low / step.block_size, offset = low % step.block_size;
  const T* heads = (const T*)base + head * stride[1];
  for (int position = low; position < high; block++, offset = 0) {
    const T* row = heads + table[block] * stride[0] + offset * stride[2];
    for (; offset < step.block_size && position < high; offset++, position++, row += stride[2]) *rows++ = row;
  }
}

template <class T>
INLINE void prefetch_row(const T* row, int dim) {
  for (int byte = 0; byte < dim * (int)sizeof(T); byte += 64) __builtin_prefetch((const char*)row + byte, 0, 3);
}

// Scores of ``TOKENS`` rows of K with ``HEADS`` queries [HEADS, stride], not scaled: scores[head * scores_stride + token].
template <class T, int HEADS, int TOKENS>
INLINE void score_rows(const T* const* rows, int dim, const float* query, int query_stride, float* scores, int scores_stride) {
  Floats sums[HEADS][TOKENS] = {};
  int d = 0;
  for (; d + LANES <= dim; d += LANES) {
    Floats q[HEADS];
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++) q[h] = load(query + h * query_stride + d);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      const Floats k = load(rows[t] + d);
#pragma GCC unroll 8
      for (int h = 0; h < HEADS; h++) sums[h][t] = fma(k, q[h], sums[h][t]);
    }
  }
  if (d < dim)
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      const Floats k = load_part(rows[t] + d, dim - d);
#pragma GCC unroll 8
      for (int h = 0; h < HEADS; h++) sums[h][t] = fma(k, load(query + h * query_stride + d), sums[h][t]);
    }
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++) {
    if constexpr (TOKENS % 4 == 0) {
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; t += 4) sum4(&sums[h][t], scores + h * scores_stride + t);
    } else {
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; t++) scores[h * scores_stride + t] = sum(sums[h][t]);
    }
  }
}

// value[head, d .. d + WIDTH registers) += weights[head, t] * row t, for ``count`` rows of V.
template <class T, int HEADS, int WIDTH>
INLINE void weigh_rows(const T* const* rows, int count, int d, const float* weights, int weights_stride, float* value, int value_stride) {
  Floats sums[HEADS][WIDTH];
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 8
    for (int w = 0; w < WIDTH; w++) sums[h][w] = load(value + h * value_stride + d + w * LANES);
  for (int t = 0; t < count; t++) {
    Floats weight[HEADS];
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++) weight[h] = splat(weights[h * weights_stride + t]);
#pragma GCC unroll 8
    for (int w = 0; w < WIDTH; w++) {
      const Floats v = load(rows[t] + d + w * LANES);
#pragma GCC unroll 8
      for (int h = 0; h < HEADS; h++) sums[h][w] = fma(v, weight[h], sums[h][w]);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 8
    for (int w = 0; w < WIDTH; w++) store(value + h * value_stride + d + w * LANES, sums[h][w]);
}

template <class T, int HEADS>
INLINE void weigh_batch(const T* const* rows, int count, int dim, const float* weights, int weights_stride, float* value, int value_stride) {
  constexpr int WIDTH = HEADS == 1 ? 8 : HEADS == 2 ? 4 : HEADS == 3 ? 4 : 2;
  int d = 0;
  for (; d + WIDTH * LANES <= dim; d += WIDTH * LANES) weigh_rows<T, HEADS, WIDTH>(rows, count, d, weights, weights_stride, value, value_stride);
  for (; d + LANES <= dim; d += LANES) weigh_rows<T, HEADS, 1>(rows, count, d, weights, weights_stride, value, value_stride);
  if (d < dim)
    for (int h = 0; h < HEADS; h++) {
      Floats total = load(value + h * value_stride + d);
      for (int t = 0; t < count; t++) total = fma(load_part(rows[t] + d, dim - d), splat(weights[h * weights_stride + t]), total);
      store(value + h * value_stride + d, total);
    }
}

// Scores to logits in base 2, in place: scale, soft cap, slope. Columns outside of [begin, end) become minus infinity, up to ``columns``, a
// multiple of the lanes. Returns the largest.
INLINE float finish_scores(float* scores, int begin, int end, int columns, const Step& step, const float* slope, int first_distance) {
  Floats most = splat(MINUS_INFINITY), lane;
  for (int i = 0; i < LANES; i++) lane[i] = (float)i;
  const Floats scale = splat(step.softcap > 0 ? step.scale / step.softcap : step.scale * LOG2E);
  if (step.softcap > 0 || slope) {
    const Floats cap = splat(step.softcap * LOG2E), slant = splat(slope ? *slope * LOG2E : 0.f);
    for (int t = begin / LANES * LANES; t < end; t += LANES) {
      Floats x = load(scores + t) * scale;
      if (step.softcap > 0) x = tanh(x) * cap;
      if (slope) x = fma(slant, splat((float)(first_distance + t)) + lane, x);
      store(scores + t, x);
    }
  } else {
    for (int t = begin / LANES * LANES; t < end; t += LANES) store(scores + t, load(scores + t) * scale);
  }
  for (int t = 0; t < begin; t++) scores[t] = MINUS_INFINITY;
  for (int t = end; t < columns; t++) scores[t] = MINUS_INFINITY;
  for (int t = 0; t < columns; t += LANES) most = larger(most, load(scores + t));
  return largest(most);
}

// The weighted sums of up to four heads over positions [low, high), at most PART of them.
template <class T, int HEADS>
static void attend_heads(const T* const* key_rows, const T* const* value_rows, int count, const Step& step, const float* query, int query_stride,
                         const float* slopes, int first_distance, Sums sums, float* scores) {
  constexpr int TOKENS = HEADS == 1 ? 8 : HEADS == 4 ? 2 : 4;
  constexpr int STRIDE = PART + LANES;
  int t = 0;
  for (; t + TOKENS <= count; t += TOKENS) {
    for (int i = 0; i < TOKENS; i++) {
      // Behind the last row of K come the first rows of V.
      const int next = t + i + AHEAD;
      if (next < count) prefetch_row(key_rows[next], step.key_dim);
      else if (next - count < count) prefetch_row(value_rows[next - count], step.value_dim);
    }
    score_rows<T, HEADS, TOKENS>(key_rows + t, step.key_dim, query, query_stride, scores + t, STRIDE);
  }
  for (; t < count; t++) score_rows<T, HEADS, 1>(key_rows + t, step.key_dim, query, query_stride, scores + t, STRIDE);
  for (int h = 0; h < HEADS; h++) {
    float* x = scores + h * STRIDE;
    const float most = finish_scores(x, 0, count, round_up(count, LANES), step, slopes ? slopes + h : nullptr, first_distance);
    Floats total = {};
    for (int i = 0; i < count; i += LANES) {
      const Floats weight = exp2(load(x + i) - splat(most));
      store(x + i, weight);
      total += weight;
    }
    sums.most[h] = most;
    sums.sum[h] = sum(total);
    memset(sums.value + h * sums.stride, 0, sums.stride * sizeof(float));
  }
  for (t = 0; t < count; t += BATCH) {
    const int some = count - t < BATCH ? count - t : BATCH;
    for (int i = 0; i < BATCH && t + i + AHEAD < count; i++) prefetch_row(value_rows[t + i + AHEAD], step.value_dim);
    weigh_batch<T, HEADS>(value_rows + t, some, step.value_dim, scores + t, STRIDE, sums.value, sums.stride);
  }
}

INLINE size_t row_scratch(const Step& step) {
  const int dim = round_up(step.key_dim, LANES), out = round_up(step.value_dim, LANES);
  return step.group() * (size_t)(dim + out + 2) * sizeof(float) + 4 * (PART + LANES) * sizeof(float) + 2 * PART * sizeof(void*) + 256;
}

// One decode's rows of one K/V head over the item's positions; the sums are left in ``sums``.
template <class T>
static void attend_rows(const Step& step, const Item& item, float* scratch, Sums sums) {
  const int group = step.group(), count = item.high - item.low, dim = round_up(step.key_dim, LANES);
  const T** key_rows = (const T**)scratch;
  const T** value_rows = key_rows + PART;
  float* query = (float*)(value_rows + PART);
  float* scores = query + group * dim;
  const int32_t* table = step.tables + item.seq * step.table_stride;
  row_addresses(key_rows, step.key, step.key_stride, step, table, item.kv_head, item.low, item.high);
  row_addresses(value_rows, step.value, step.value_stride, step, table, item.kv_head, item.low, item.high);
  const T* source = (const T*)step.query + step.cu_seqlens_q[item.seq] * step.query_stride[0];
  for (int h = 0; h < group; h++) {
    const T* head = source + (item.kv_head * group + h) * step.query_stride[1];
    for (int d = 0; d < step.key_dim; d += LANES)
      store(query + h * dim + d, d + LANES <= step.key_dim ? load(head + d) : load_part(head + d, step.key_dim - d));
  }
  const float* slopes = step.slopes ? step.slopes + item.kv_head * group : nullptr;
  const int distance = item.low - (step.seq_lens[item.seq] - 1);
  for (int h = 0; h < group;) {
    Sums here = {sums.most + h, sums.sum + h, sums.value + h * sums.stride, sums.stride};
    const float* q = query + h * dim;
    const float* slope = slopes ? slopes + h : nullptr;
    switch (group - h) {
      case 1: attend_heads<T, 1>(key_rows, value_rows, count, step, q, dim, slope, distance, here, scores); h += 1; break;
      case 2: attend_heads<T, 2>(key_rows, value_rows, count, step, q, dim, slope, distance, here, scores); h += 2; break;
      case 3: attend_heads<T, 3>(key_rows, value_rows, count, step, q, dim, slope, distance, here, scores); h += 3; break;
      default: attend_heads<T, 4>(key_rows, value_rows, count, step, q, dim, slope, distance, here, scores); h += 4; break;
    }
  }
}

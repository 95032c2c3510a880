// Decodes: few rows over many positions. K and V are read once, in place, row by row; blocks are scattered in memory, so the rows ahead
// are prefetched by software: the hardware's prefetcher stops at every block.
#pragma once

#include "lanes.h"
#include "step.h"

constexpr int PART = 256;  // positions that are summed up at once; longer sequences are cut at its multiples, whatever else is in the batch
constexpr int STRIDE = PART + LANES;  // of scores, from query to query
constexpr int TURN = 16;   // positions of one head before the next head's turn
constexpr int RUN = 32;    // the same where one head is read alone: for so long sums stay in registers
constexpr int AHEAD = 24;  // and rows between the one in use and the one that is prefetched there; with turns it is the next turn's
constexpr int NEAR_NBYTES = 4096;

// K/V heads of one item. What all heads of a block hold lies side by side: where one head's share is small, several are read by turns.
INLINE int heads_at_once(const Step& step) {
  const int nbytes = step.block_size * step.key_dim * (step.dtype == FLOAT32 ? 4 : 2), near = nbytes < NEAR_NBYTES ? 2 * NEAR_NBYTES / nbytes : 1;
  const int most = 64 / step.group() > 1 ? 64 / step.group() : 1, heads = near < most ? near : most;
  return heads < step.num_kv_heads ? heads : step.num_kv_heads;
}

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

// Scores of ``TOKENS`` rows of K, each ``shift`` elements behind its address, with ``HEADS`` queries [HEADS, stride] as ``load_query`` laid them
// out, not scaled: scores[head * scores_stride + token].
template <class T, int HEADS, int TOKENS>
INLINE void score_rows(const T* const* rows, int64_t shift, int dim, const float* query, int query_stride, float* scores, int scores_stride) {
  Floats sums[HEADS][TOKENS] = {};
  int d = 0;
  for (; d + 2 * LANES <= dim; d += 2 * LANES)
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      const Two k = load_two(rows[t] + shift + d);
#pragma GCC unroll 8
      for (int h = 0; h < HEADS; h++) {
        sums[h][t] = fma(k.a, load(query + h * query_stride + d), sums[h][t]);
        sums[h][t] = fma(k.b, load(query + h * query_stride + d + LANES), sums[h][t]);
      }
    }
  if (d + LANES <= dim) {
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      const Floats k = load(rows[t] + shift + d);
#pragma GCC unroll 8
      for (int h = 0; h < HEADS; h++) sums[h][t] = fma(k, load(query + h * query_stride + d), sums[h][t]);
    }
    d += LANES;
  }
  if (d < dim)
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      const Floats k = load_part(rows[t] + shift + d, dim - d);
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

// value[head, d .. d + WIDTH registers) += weights[head, t] * row t, for ``count`` rows of V; in the order of ``load_two`` where WIDTH is not 1.
template <class T, int HEADS, int WIDTH>
INLINE void weigh_rows(const T* const* rows, int64_t shift, int count, int d, const float* weights, int weights_stride, float* value, int value_stride) {
  Floats sums[HEADS][WIDTH];
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 8
    for (int w = 0; w < WIDTH; w++) sums[h][w] = load(value + h * value_stride + d + w * LANES);
  for (int t = 0; t < count; t++) {
    Floats weight[HEADS];
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++) weight[h] = splat(weights[h * weights_stride + t]);
    if constexpr (WIDTH == 1) {
      const Floats v = load(rows[t] + shift + d);
#pragma GCC unroll 8
      for (int h = 0; h < HEADS; h++) sums[h][0] = fma(v, weight[h], sums[h][0]);
    } else {
#pragma GCC unroll 8
      for (int w = 0; w < WIDTH; w += 2) {
        const Two v = load_two(rows[t] + shift + d + w * LANES);
#pragma GCC unroll 8
        for (int h = 0; h < HEADS; h++) {
          sums[h][w] = fma(v.a, weight[h], sums[h][w]);
          sums[h][w + 1] = fma(v.b, weight[h], sums[h][w + 1]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 8
    for (int w = 0; w < WIDTH; w++) store(value + h * value_stride + d + w * LANES, sums[h][w]);
}

template <class T, int HEADS>
INLINE void weigh_batch(const T* const* rows, int64_t shift, int count, int dim, const float* weights, int weights_stride, float* value, int value_stride) {
  constexpr int WIDTH = HEADS == 1 ? 8 : HEADS == 2 ? 4 : HEADS == 3 ? 4 : 2;
  int d = 0;
  for (; d + WIDTH * LANES <= dim; d += WIDTH * LANES) weigh_rows<T, HEADS, WIDTH>(rows, shift, count, d, weights, weights_stride, value, value_stride);
  for (; d + 2 * LANES <= dim; d += 2 * LANES) weigh_rows<T, HEADS, 2>(rows, shift, count, d, weights, weights_stride, value, value_stride);
  for (; d + LANES <= dim; d += LANES) weigh_rows<T, HEADS, 1>(rows, shift, count, d, weights, weights_stride, value, value_stride);
  if (d < dim)
    for (int h = 0; h < HEADS; h++) {
      Floats total = load(value + h * value_stride + d);
      for (int t = 0; t < count; t++) total = fma(load_part(rows[t] + shift + d, dim - d), splat(weights[h * weights_stride + t]), total);
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

// One run of positions of some queries, up to four, of one K/V head.
struct Run {
  int from, count;         // positions
  int head, row, left;     // K/V head, first query, queries of the head from it on
  int distance, prefetch;  // from a row to the one to prefetch, and rows of the run that have such a one
};

// Calls ``work`` for each run of ``count`` positions, which ``more`` rows of interest follow.
template <class F>
INLINE void each_run(int count, int more, int heads, int group, F&& work) {
  const int length = heads > 1 ? TURN : RUN, distance = heads > 1 ? TURN : AHEAD;
  for (int from = 0; from < count; from += length) {
    const int some = count - from < length ? count - from : length, behind = count + more - from - distance;
    for (int head = 0; head < heads; head++)
      for (int h = 0; h < group; h += 4) work(Run{from, some, head, head * group + h, group - h, distance, h ? 0 : behind < some ? behind : some});
  }
}

template <class T, int HEADS>
static void score_run(const Run& run, const T* const* rows, int64_t shift, int dim, const float* query, float* scores) {
  constexpr int TOKENS = HEADS == 1 ? 8 : HEADS == 4 ? 2 : 4;
  const int stride = round_up(dim, LANES);
  int t = 0;
  for (; t + TOKENS <= run.count; t += TOKENS) {
    for (int i = t; i < t + TOKENS && i < run.prefetch; i++) prefetch_row(rows[i + run.distance] + shift, dim);
    score_rows<T, HEADS, TOKENS>(rows + t, shift, dim, query, stride, scores + t, STRIDE);
  }
  for (; t < run.count; t++) score_rows<T, HEADS, 1>(rows + t, shift, dim, query, stride, scores + t, STRIDE);
}

template <class T, int HEADS>
static void weigh_run(const Run& run, const T* const* rows, int64_t shift, int dim, const float* weights, float* value, int value_stride) {
  for (int i = 0; i < run.prefetch; i++) prefetch_row(rows[i + run.distance] + shift, dim);
  weigh_batch<T, HEADS>(rows, shift, run.count, dim, weights, STRIDE, value, value_stride);
}

INLINE size_t row_scratch(const Step& step) {
  const int dim = round_up(step.key_dim, LANES);
  return step.group() * heads_at_once(step) * (size_t)(dim + STRIDE) * sizeof(float) + 2 * PART * sizeof(void*) + 256;
}

// A query as float32, padded with zeros to whole registers, in the order of ``load_two``.
template <class T>
INLINE void load_query(const T* query, int dim, float* out) {
  int d = 0;
  for (; d + 2 * LANES <= dim; d += 2 * LANES) {
    const Two q = load_two(query + d);
    store(out + d, q.a);
    store(out + d + LANES, q.b);
  }
  for (; d < dim; d += LANES) store(out + d, d + LANES <= dim ? load(query + d) : load_part(query + d, dim - d));
}

// One decode's rows of some K/V heads over the item's positions; the sums are left in ``sums``.
template <class T>
static void attend_rows(const Step& step, const Item& item, float* scratch, Sums sums) {
  const int group = step.group(), heads = item.heads, count = item.high - item.low, dim = round_up(step.key_dim, LANES);
  const T** key_rows = (const T**)scratch;
  const T** value_rows = key_rows + count;  // right behind, so that the first are prefetched while the last rows of K are in use
  float* query = (float*)(key_rows + 2 * PART);
  float* scores = query + item.num_rows * dim;
  const int32_t* table = step.tables + item.seq * step.table_stride;
  row_addresses(key_rows, step.key, step.key_stride, step, table, item.kv_head, item.low, item.high);
  row_addresses(value_rows, step.value, step.value_stride, step, table, item.kv_head, item.low, item.high);
  const T* source = (const T*)step.query + step.cu_seqlens_q[item.seq] * step.query_stride[0];
  for (int r = 0; r < item.num_rows; r++) {
    const T* head = source + (item.kv_head * group + r) * step.query_stride[1];
    load_query(head, step.key_dim, query + r * dim);
  }
  each_run(count, count, heads, group, [&](const Run& run) {
    const T* const* rows = key_rows + run.from;
    const int64_t shift = run.head * step.key_stride[1];
    const float* q = query + run.row * dim;
    float* x = scores + run.row * STRIDE + run.from;
    switch (run.left) {
      case 1: return score_run<T, 1>(run, rows, shift, step.key_dim, q, x);
      case 2: return score_run<T, 2>(run, rows, shift, step.key_dim, q, x);
      case 3: return score_run<T, 3>(run, rows, shift, step.key_dim, q, x);
      default: return score_run<T, 4>(run, rows, shift, step.key_dim, q, x);
    }
  });
  const float* slopes = step.slopes ? step.slopes + item.kv_head * group : nullptr;
  for (int r = 0; r < item.num_rows; r++) {
    float* x = scores + r * STRIDE;
    const float most = finish_scores(x, 0, count, round_up(count, LANES), step, slopes ? slopes + r : nullptr, item.low - (step.seq_lens[item.seq] - 1));
    Floats total = {};
    for (int i = 0; i < count; i += LANES) {
      const Floats weight = exp2(load(x + i) - splat(most));
      store(x + i, weight);
      total += weight;
    }
    sums.most[r] = most;
    sums.sum[r] = sum(total);
    memset(sums.value + r * sums.stride, 0, sums.stride * sizeof(float));
  }
  each_run(count, 0, heads, group, [&](const Run& run) {
    const T* const* rows = value_rows + run.from;
    const int64_t shift = run.head * step.value_stride[1];
    const float* x = scores + run.row * STRIDE + run.from;
    float* value = sums.value + run.row * sums.stride;
    switch (run.left) {
      case 1: return weigh_run<T, 1>(run, rows, shift, step.value_dim, x, value, sums.stride);
      case 2: return weigh_run<T, 2>(run, rows, shift, step.value_dim, x, value, sums.stride);
      case 3: return weigh_run<T, 3>(run, rows, shift, step.value_dim, x, value, sums.stride);
      default: return weigh_run<T, 4>(run, rows, shift, step.value_dim, x, value, sums.stride);
    }
  });
}

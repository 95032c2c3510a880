// Decodes: few rows over many positions. K and V are read once, in place, row by row; blocks are scattered in memory, so the rows ahead
// are prefetched by software: the hardware's prefetcher stops at every block. Each line is asked for while the one that lies as far behind it is in
// use: where many are asked for at once, the processor's few slots for lines on their way are full, and it waits before it goes on multiplying.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lanes.h"
#include "step.h"

constexpr int PART = 256;  // positions that are summed up at once; longer sequences are cut at its multiples, whatever else is in the batch
constexpr int STRIDE = PART + LANES;  // of scores, from query to query
constexpr int TURN = 16;   // positions of one head before the next head's turn
constexpr int RUN = 32;    // the same where one head is read alone: for so long sums stay in registers
constexpr int AHEAD = 24;  // and rows between the one in use and the one that is prefetched there; with turns it is the next turn's
static_assert(TURN <= AHEAD, "as many addresses stand behind the last");
constexpr int NEAR_NBYTES = 8192;  // of one head in a block: below, several heads take turns, so that more is read that lies side by side
constexpr int SLICE = 2 * LANES;   // elements of K that are multiplied at once

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

// The lines of COUNT elements, of which some may be behind a row's end. The hint: they are read once, and need no place in the outer caches.
template <int COUNT, class T>
INLINE void prefetch_part(const T* p) {
#pragma GCC unroll 8
  for (size_t byte = 0; byte < COUNT * sizeof(T); byte += 64) __builtin_prefetch((const char*)p + byte, 0, 0);
}

// Products of slices of K and of queries, summed up in lanes; and how queries are kept for them, padded with zeros to whole slices.
template <class T>
struct Dots {
  typedef float Query;
  typedef Two Slice;

  static inline __attribute__((always_inline)) Two load(const T* k) { return load_two(k); }
  static inline __attribute__((always_inline)) Two load(const T* k, int count) {  // of a row's end; no more is read
    if (count <= LANES) return {load_part(k, count), Floats{}};
    return {::load(k), load_part(k + LANES, count - LANES)};
  }
  static inline __attribute__((always_inline)) Floats add(const Two& k, const float* query, Floats sum) { return fma(k.b, ::load(query + LANES), fma(k.a, ::load(query), sum)); }
  static inline __attribute__((always_inline)) void keep(const Two& slice, float* query) {
    store(query, slice.a);
    store(query + LANES, slice.b);
  }
};

#if defined(__AVX512BF16__) && LANES == 16

// Two products for each lane: those of bfloat16 are exact in float32.
template <>
struct Dots<bfloat16> {
  typedef bfloat16 Query;
  typedef __m512i Slice;

  static inline __attribute__((always_inline)) __m512i load(const bfloat16* k) { return _mm512_loadu_si512(k); }
  static inline __attribute__((always_inline)) __m512i load(const bfloat16* k, int count) { return _mm512_maskz_loadu_epi16((1u << count) - 1, k); }
  static inline __attribute__((always_inline)) Floats add(__m512i k, const bfloat16* query, Floats sum) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)k, (__m512bh)load(query));
  }
  static inline __attribute__((always_inline)) void keep(__m512i slice, bfloat16* query) { _mm512_storeu_si512(query, slice); }
};

#endif

// Scores of ``TOKENS`` rows of K, each ``shift`` elements behind its address, with ``HEADS`` queries [HEADS, stride] as ``load_query`` laid them
// out, not scaled: scores[head * scores_stride + token].
template <class T, int HEADS, int TOKENS>
INLINE void score_rows(const T* const* rows, int64_t shift, int ahead, int dim, const typename Dots<T>::Query* query, int query_stride, float* scores, int scores_stride) {
  Floats sums[HEADS][TOKENS] = {};
  const auto add = [&](int d, auto... count) {
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      prefetch_part<SLICE>(rows[t + ahead] + shift + d);
      const auto k = Dots<T>::load(rows[t] + shift + d, count...);
#pragma GCC unroll 8
      for (int h = 0; h < HEADS; h++) sums[h][t] = Dots<T>::add(k, query + h * query_stride + d, sums[h][t]);
    }
  };
  int d = 0;
  for (; d + SLICE <= dim; d += SLICE) add(d);
  if (d < dim) add(d, dim - d);
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
INLINE void weigh_rows(const T* const* rows, int64_t shift, int ahead, int count, int d, const float* weights, int weights_stride, float* value, int value_stride) {
  Floats sums[HEADS][WIDTH];
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 8
    for (int w = 0; w < WIDTH; w++) sums[h][w] = load(value + h * value_stride + d + w * LANES);
  for (int t = 0; t < count; t++) {
    prefetch_part<WIDTH * LANES>(rows[t + ahead] + shift + d);
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
INLINE void weigh_batch(const T* const* rows, int64_t shift, int ahead, int count, int dim, const float* weights, int weights_stride, float* value, int value_stride) {
  constexpr int WIDTH = HEADS == 1 ? 8 : HEADS == 2 ? 4 : HEADS == 3 ? 4 : LANES == 16 ? 4 : 2;
  int d = 0;
  for (; d + WIDTH * LANES <= dim; d += WIDTH * LANES) weigh_rows<T, HEADS, WIDTH>(rows, shift, ahead, count, d, weights, weights_stride, value, value_stride);
  for (; d + 2 * LANES <= dim; d += 2 * LANES) weigh_rows<T, HEADS, 2>(rows, shift, ahead, count, d, weights, weights_stride, value, value_stride);
  for (; d + LANES <= dim; d += LANES) weigh_rows<T, HEADS, 1>(rows, shift, ahead, count, d, weights, weights_stride, value, value_stride);
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
  int from, count;      // positions
  int head, row, left;  // K/V head, first query, queries of the head from it on
  int ahead;            // from a row to the one to prefetch
};

// From the row in use to the one that is prefetched there.
INLINE int rows_ahead(int heads) { return heads > 1 ? TURN : AHEAD; }

// Calls ``work`` for each run of ``count`` positions.
template <class F>
INLINE void each_run(int count, int heads, int group, F&& work) {
  const int length = heads > 1 ? TURN : RUN, ahead = rows_ahead(heads);
  for (int from = 0; from < count; from += length)
    for (int head = 0; head < heads; head++)
      for (int h = 0; h < group; h += 4) work(Run{from, std::min(count - from, length), head, head * group + h, group - h, h ? 0 : ahead});
}

template <class T, int HEADS>
static void score_run(const Run& run, const T* const* rows, int64_t shift, int dim, const typename Dots<T>::Query* query, float* scores) {
  constexpr int TOKENS = HEADS == 1 ? 8 : HEADS == 4 && LANES < 16 ? 2 : 4;
  const int stride = round_up(dim, SLICE);
  int t = 0;
  for (; t + TOKENS <= run.count; t += TOKENS) score_rows<T, HEADS, TOKENS>(rows + t, shift, run.ahead, dim, query, stride, scores + t, STRIDE);
  for (; t < run.count; t++) score_rows<T, HEADS, 1>(rows + t, shift, run.ahead, dim, query, stride, scores + t, STRIDE);
}

template <class T, int HEADS>
static void weigh_run(const Run& run, const T* const* rows, int64_t shift, int dim, const float* weights, float* value, int value_stride) {
  weigh_batch<T, HEADS>(rows, shift, run.ahead, run.count, dim, weights, STRIDE, value, value_stride);
}

INLINE size_t row_scratch(const Step& step) {
  const int dim = round_up(step.key_dim, SLICE);
  return step.group() * heads_at_once(step) * (size_t)(dim + STRIDE) * sizeof(float) + (2 * PART + AHEAD) * sizeof(void*) + 256;
}

// A query as products with it are made of it.
template <class T>
INLINE void load_query(const T* query, int dim, typename Dots<T>::Query* out) {
  int d = 0;
  for (; d + SLICE <= dim; d += SLICE) Dots<T>::keep(Dots<T>::load(query + d), out + d);
  if (d < dim) Dots<T>::keep(Dots<T>::load(query + d, dim - d), out + d);
}

// One decode's rows of some K/V heads over the item's positions; the sums are left in ``sums``.
template <class T>
static void attend_rows(const Step& step, const Item& item, float* scratch, Sums sums) {
  const int group = step.group(), heads = item.heads, count = item.high - item.low, dim = round_up(step.key_dim, SLICE);
  const T** key_rows = (const T**)scratch;
  const T** value_rows = key_rows + count;  // right behind, so that the first are prefetched while the last rows of K are in use
  float* scores = (float*)(key_rows + 2 * PART + AHEAD);
  auto* query = (typename Dots<T>::Query*)(scores + item.num_rows * STRIDE);
  const int32_t* table = step.tables + item.seq * step.table_stride;
  row_addresses(key_rows, step.key, step.key_stride, step, table, item.kv_head, item.low, item.high);
  for (int head = 0; head < heads; head++)  // what nothing before has asked for
    for (int t = 0; t < std::min(count, rows_ahead(heads)); t++) prefetch_row(key_rows[t] + head * step.key_stride[1], step.key_dim);
  row_addresses(value_rows, step.value, step.value_stride, step, table, item.kv_head, item.low, item.high);
  std::fill_n(value_rows + count, AHEAD, value_rows[count - 1]);  // nothing more to prefetch
  const T* source = (const T*)step.query + step.cu_seqlens_q[item.seq] * step.query_stride[0];
  for (int r = 0; r < item.num_rows; r++) load_query(source + (item.kv_head * group + r) * step.query_stride[1], step.key_dim, query + r * dim);
  each_run(count, heads, group, [&](const Run& run) {
    const T* const* rows = key_rows + run.from;
    const int64_t shift = run.head * step.key_stride[1];
    const auto* q = query + run.row * dim;
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
  each_run(count, heads, group, [&](const Run& run) {
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

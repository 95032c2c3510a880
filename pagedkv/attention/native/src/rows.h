// Decodes: few rows over many positions. K and V are read once, in place, row by row; blocks are scattered in memory, so the rows ahead
// are prefetched by software: the hardware's prefetcher stops at every block. Each line is asked for beside the arithmetic of another, and more than
// once: a processor forgets what it is asked for while all its slots for lines on their way are taken (Zen 5 one in eight of 48 lines at once).
#pragma once

#include <algorithm>
#include <type_traits>

#include "lanes.h"
#include "step.h"

constexpr int PART = 256;  // positions that are summed up at once; longer sequences are cut at its multiples, whatever else is in the batch
constexpr int STRIDE = PART + LANES;  // of scores, from query to query
constexpr int TURN = 16;  // positions of one head before the next head's turn
constexpr int RUN = 32;   // the same where one head is read alone: for so long sums stay in registers
constexpr int ASKS = LANES == 16 ? 4 : 2;  // for each line, evenly over the way; they cost less than they give as long as the arithmetic has time left
constexpr int AHEAD_NBYTES = 24576, MOST_AHEAD = 64;  // from what is in use to what is asked for first; and in rows of each head
constexpr int ADDRESSES = 2 * PART + MOST_AHEAD + 8;  // of an item's rows and the next one's first; whole lines of the cache
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
  const T* heads = (const T*)base + head * stride[1];
  for (int position = low; position < high;) {
    const int offset = position % step.block_size, count = std::min(step.block_size - offset, high - position);
    const T* row = heads + table[position / step.block_size] * stride[0] + offset * stride[2];
    for (int i = 0; i < count; i++) rows[i] = row + i * stride[2];
    rows += count;
    position += count;
  }
}

template <class T>
INLINE void prefetch_row(const T* row, int dim) {
  for (int byte = 0; byte < dim * (int)sizeof(T); byte += 64) __builtin_prefetch((const char*)row + byte, 0, 3);
}

// Which rows are asked for while one is in use: ``first`` rows behind it, and again where they are some ``step`` nearer.
struct Leads {
  int first = 0, step = 0;  // none where the row has been in use before
};

template <class T>
INLINE Leads leads_of(int heads, int dim) {
  const int step = std::min(MOST_AHEAD, std::max(TURN, AHEAD_NBYTES / (heads * dim * (int)sizeof(T)))) / ASKS;
  return {ASKS * step, step};
}

// Asks for the lines of COUNT elements from ``d`` on, of which some may be behind a row's end; parts of one line share what is asked for it.
// The hint: they are read once, and need no place in the outer caches.
template <int COUNT, class T>
INLINE void prefetch_part(const T* const* rows, const Leads& leads, int64_t shift, int d) {
  constexpr int NBYTES = COUNT * sizeof(T), PARTS = NBYTES < 64 ? 64 / NBYTES : 1, NUM_ASKS = std::max(1, ASKS / PARTS);
  const int ask = PARTS == 1 ? 0 : d / COUNT % PARTS * NUM_ASKS;
  if (leads.first == 0 || ask >= ASKS) return;
#pragma GCC unroll 8
  for (int i = 0; i < NUM_ASKS; i++) {
    const char* p = (const char*)(rows[leads.first - (ask + i) * leads.step] + shift + d);
#pragma GCC unroll 8
    for (int byte = 0; byte < NBYTES; byte += 64) __builtin_prefetch(p + byte, 0, 0);
  }
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
INLINE void score_rows(const T* const* rows, int64_t shift, const Leads& leads, int dim, const typename Dots<T>::Query* query, int query_stride, float* scores, int scores_stride) {
  Floats sums[HEADS][TOKENS] = {};
  const auto add = [&](int d, auto... count) {
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      prefetch_part<SLICE>(rows + t, leads, shift, d);
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
INLINE void weigh_rows(const T* const* rows, int64_t shift, const Leads& leads, int count, int d, const float* weights, int weights_stride, float* value, int value_stride) {
  Floats sums[HEADS][WIDTH];
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 8
    for (int w = 0; w < WIDTH; w++) sums[h][w] = load(value + h * value_stride + d + w * LANES);
  for (int t = 0; t < count; t++) {
    prefetch_part<WIDTH * LANES>(rows + t, leads, shift, d);
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
INLINE void weigh_batch(const T* const* rows, int64_t shift, const Leads& leads, int count, int dim, const float* weights, int weights_stride, float* value, int value_stride) {
  constexpr int WIDTH = HEADS == 1 ? 8 : HEADS == 2 ? 4 : HEADS == 3 ? 4 : LANES == 16 ? 4 : 2;
  int d = 0;
  for (; d + WIDTH * LANES <= dim; d += WIDTH * LANES) weigh_rows<T, HEADS, WIDTH>(rows, shift, leads, count, d, weights, weights_stride, value, value_stride);
  for (; d + 2 * LANES <= dim; d += 2 * LANES) weigh_rows<T, HEADS, 2>(rows, shift, leads, count, d, weights, weights_stride, value, value_stride);
  for (; d + LANES <= dim; d += LANES) weigh_rows<T, HEADS, 1>(rows, shift, leads, count, d, weights, weights_stride, value, value_stride);
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
  const Floats nothing = splat(MINUS_INFINITY), scale = splat(step.softcap > 0 ? step.scale / step.softcap : step.scale * LOG2E);
  const Floats cap = splat(step.softcap * LOG2E), slant = splat(slope ? *slope * LOG2E : 0.f);
  Floats most = nothing, lane;
  for (int i = 0; i < LANES; i++) lane[i] = (float)i;
  for (int t = 0; t < columns; t += LANES) {
    Floats x = nothing;
    if (t + LANES > begin && t < end) {
      x = load(scores + t) * scale;
      if (step.softcap > 0) x = tanh(x) * cap;
      if (slope) x = fma(slant, splat((float)(first_distance + t)) + lane, x);
      if (t < begin || t + LANES > end) x = (lane >= splat((float)(begin - t))) & (lane < splat((float)(end - t))) ? x : nothing;
    }
    store(scores + t, x);
    most = larger(most, x);
  }
  return largest(most);
}

// One run of positions of some queries, up to four, of one K/V head.
struct Run {
  int from, count;      // positions
  int head, row, left;  // K/V head, first query, queries of the head from it on
  Leads leads;          // to rows that are asked for
};

// Asks for the first line of what the next run asks for: the processor has to look up where a page lies, and forgets less of the rest if it knows.
template <class T>
INLINE void find_page(const Run& run, const T* const* rows, int64_t shift) {
  __builtin_prefetch(rows[run.count + run.leads.first] + shift, 0, 0);
}

// Calls ``work`` for each run of ``count`` positions.
template <class F>
INLINE void each_run(int count, int heads, int group, const Leads& leads, F&& work) {
  const int length = heads > 1 ? TURN : RUN;
  for (int from = 0; from < count; from += length)
    for (int head = 0; head < heads; head++)
      for (int h = 0; h < group; h += 4) work(Run{from, std::min(count - from, length), head, head * group + h, group - h, h ? Leads() : leads});
}

template <class T, int HEADS>
static void score_run(const Run& run, const T* const* rows, int64_t shift, int dim, const typename Dots<T>::Query* query, float* scores) {
  find_page(run, rows, shift);
  constexpr int TOKENS = HEADS == 1 ? 8 : HEADS == 4 && LANES < 16 ? 2 : 4;
  const int stride = round_up(dim, SLICE);
  int t = 0;
  for (; t + TOKENS <= run.count; t += TOKENS) score_rows<T, HEADS, TOKENS>(rows + t, shift, run.leads, dim, query, stride, scores + t, STRIDE);
  for (; t < run.count; t++) score_rows<T, HEADS, 1>(rows + t, shift, run.leads, dim, query, stride, scores + t, STRIDE);
}

template <class T, int HEADS>
static void weigh_run(const Run& run, const T* const* rows, int64_t shift, int dim, const float* weights, float* value, int value_stride) {
  find_page(run, rows, shift);
  weigh_batch<T, HEADS>(rows, shift, run.leads, run.count, dim, weights, STRIDE, value, value_stride);
}

INLINE size_t row_scratch(const Step& step) {
  const int dim = round_up(step.key_dim, SLICE);
  return step.group() * heads_at_once(step) * (size_t)(dim + STRIDE) * sizeof(float) + ADDRESSES * sizeof(void*) + 256;
}

// A query as products with it are made of it.
template <class T>
INLINE void load_query(const T* query, int dim, typename Dots<T>::Query* out) {
  int d = 0;
  for (; d + SLICE <= dim; d += SLICE) Dots<T>::keep(Dots<T>::load(query + d), out + d);
  if (d < dim) Dots<T>::keep(Dots<T>::load(query + d, dim - d), out + d);
}

// One decode's rows of some K/V heads over the item's positions; the sums are left in ``sums``. ``next`` is what this thread does then, if it is
// known and a decode, too: its first rows are asked for here; ``is_asked`` says that the item before did so for this one.
template <class T>
static void attend_rows(const Step& step, const Item& item, const Item* next, bool is_asked, float* scratch, Sums sums) {
  const int group = step.group(), heads = item.heads, count = item.high - item.low, dim = round_up(step.key_dim, SLICE);
  const Leads leads = leads_of<T>(heads, step.key_dim);
  const T** key_rows = (const T**)scratch;
  const T** value_rows = key_rows + count;  // each right behind the other, and so they are asked for
  const T** next_rows = value_rows + count;
  float* scores = (float*)(key_rows + ADDRESSES);
  auto* query = (typename Dots<T>::Query*)(scores + item.num_rows * STRIDE);
  const auto find = [&](const T** rows, const void* base, const int64_t* stride, const Item& where, int num_rows) {
    row_addresses(rows, base, stride, step, step.tables + where.seq * step.table_stride, where.kv_head, where.low, where.low + num_rows);
  };
  find(key_rows, step.key, step.key_stride, item, count);
  find(value_rows, step.value, step.value_stride, item, count);
  const int known = next ? std::min(leads.first + 1, next->high - next->low) : 0;
  if (next) find(next_rows, step.key, step.key_stride, *next, known);
  std::fill_n(next_rows + known, leads.first + 1 - known, next_rows[known - 1]);
  if (!is_asked)
    for (int t = 0; t < std::min(count, leads.step); t++)
      for (int head = 0; head < heads; head++) prefetch_row(key_rows[t] + head * step.key_stride[1], step.key_dim);
  const T* source = (const T*)step.query + step.cu_seqlens_q[item.seq] * step.query_stride[0];
  for (int r = 0; r < item.num_rows; r++) load_query(source + (item.kv_head * group + r) * step.query_stride[1], step.key_dim, query + r * dim);
  each_run(count, heads, group, leads, [&](const Run& run) {
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
  each_run(count, heads, group, leads, [&](const Run& run) {
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

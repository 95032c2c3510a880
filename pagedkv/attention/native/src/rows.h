// Decodes: few rows over many positions. K and V are read once, in place, row by row.
#pragma once

#include <type_traits>
#include <utility>

#include "turns.h"

constexpr int STRIDE = PART + LANES;  // of scores, from query to query
constexpr int SLICE = 2 * LANES;      // elements of K that are multiplied at once

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

// Calls ``work`` with each number as a constant: where a loop's body has a loop itself, compilers unroll it too late to keep its arrays in registers.
template <int... NUMBERS, class F>
INLINE void each_below(std::integer_sequence<int, NUMBERS...>, F&& work) {
  (work(std::integral_constant<int, NUMBERS>()), ...);
}

// Scores of ``TOKENS`` rows of K from ``first`` on, with ``HEADS`` queries [HEADS, stride] as ``load_query`` laid them out, not scaled:
// scores[head * STRIDE + token]. Lines are read in the order in which they lie in memory: the hardware's prefetcher helps where it sees that.
template <class T, int HEADS, int TOKENS, int DIM>
INLINE void score_rows(const Turn<T>& turn, int first, int any_dim, const typename Dots<T>::Query* query, int query_stride, float* scores) {
  const int dim = DIM ? DIM : any_dim;
  Floats sums[HEADS][TOKENS];
  each_below(std::make_integer_sequence<int, TOKENS>(), [&](auto t) {
    const int64_t row = (first + t) * turn.stride;
    Floats own[HEADS] = {};
    const auto add = [&](int d, auto... count) {
      prefetch_part<SLICE>(turn, row + d, d);
      const auto k = Dots<T>::load(turn.rows + row + d, count...);
#pragma GCC unroll 8
      for (int h = 0; h < HEADS; h++) own[h] = Dots<T>::add(k, query + h * query_stride + d, own[h]);
    };
    int d = 0;
#pragma GCC unroll 4
    for (; d + SLICE <= dim; d += SLICE) add(d);
    if (d < dim) add(d, dim - d);
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++) sums[h][t] = own[h];
  });
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++) {
    if constexpr (TOKENS % 4 == 0) {
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; t += 4) sum4(&sums[h][t], scores + h * STRIDE + first + t);
    } else {
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; t++) scores[h * STRIDE + first + t] = sum(sums[h][t]);
    }
  }
}

template <class T, int HEADS, int DIM>
static void score_turn(const Turn<T>& turn, int count, int dim, const typename Dots<T>::Query* query, float* scores) {
  constexpr int TOKENS = HEADS == 1 ? 8 : HEADS == 4 && LANES < 16 ? 2 : 4;
  const int stride = round_up(dim, SLICE);
  int t = 0;
  for (; t + TOKENS <= count; t += TOKENS) score_rows<T, HEADS, TOKENS, DIM>(turn, t, dim, query, stride, scores);
  for (; t < count; t++) score_rows<T, HEADS, 1, DIM>(turn, t, dim, query, stride, scores);
}

// Widths of most models are known to the compiler.
template <class T, int HEADS>
static void score_run(const Turn<T>& turn, int count, int dim, const typename Dots<T>::Query* query, float* scores) {
  if (dim == 64) score_turn<T, HEADS, 64>(turn, count, 64, query, scores);
  else if (dim == 128) score_turn<T, HEADS, 128>(turn, count, 128, query, scores);
  else score_turn<T, HEADS, 0>(turn, count, dim, query, scores);
}

// value[head, d .. d + WIDTH registers) += weights[head, t] * row t, for the turn's first ``count`` rows of V; in the order of ``load_two`` where WIDTH is not 1.
template <class T, int HEADS, int WIDTH>
INLINE void weigh_rows(const Turn<T>& turn, int count, int d, const float* weights, float* value, int value_stride) {
  Floats sums[HEADS][WIDTH];
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 8
    for (int w = 0; w < WIDTH; w++) sums[h][w] = load(value + h * value_stride + d + w * LANES);
  for (int t = 0; t < count; t++) {
    const int64_t place = t * turn.stride + d;
    prefetch_part<WIDTH * LANES>(turn, place, d);
    Floats weight[HEADS];
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++) weight[h] = splat(weights[h * STRIDE + t]);
    if constexpr (WIDTH == 1) {
      const Floats v = load(turn.rows + place);
#pragma GCC unroll 8
      for (int h = 0; h < HEADS; h++) sums[h][0] = fma(v, weight[h], sums[h][0]);
    } else {
#pragma GCC unroll 8
      for (int w = 0; w < WIDTH; w += 2) {
        const Two v = load_two(turn.rows + place + w * LANES);
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
static void weigh_run(const Turn<T>& turn, int count, int dim, const float* weights, float* value, int value_stride) {
  constexpr int WIDTH = HEADS == 1 ? 8 : HEADS == 2 ? 4 : HEADS == 3 ? 4 : LANES == 16 ? 4 : 2;
  int d = 0;
  for (; d + WIDTH * LANES <= dim; d += WIDTH * LANES) weigh_rows<T, HEADS, WIDTH>(turn, count, d, weights, value, value_stride);
  for (; d + 2 * LANES <= dim; d += 2 * LANES) weigh_rows<T, HEADS, 2>(turn, count, d, weights, value, value_stride);
  for (; d + LANES <= dim; d += LANES) weigh_rows<T, HEADS, 1>(turn, count, d, weights, value, value_stride);
  if (d < dim)
    for (int h = 0; h < HEADS; h++) {
      Floats total = load(value + h * value_stride + d);
      for (int t = 0; t < count; t++) total = fma(load_part(turn.rows + t * turn.stride + d, dim - d), splat(weights[h * STRIDE + t]), total);
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

INLINE size_t row_scratch(const Step& step) {
  const size_t dim = round_up(step.key_dim, SLICE);
  return step.group() * heads_at_once(step) * (dim + STRIDE) * sizeof(float) + num_addresses(step) * sizeof(void*) + 256;
}

// A query as products with it are made of it.
template <class T>
INLINE void load_query(const T* query, int dim, typename Dots<T>::Query* out) {
  int d = 0;
  for (; d + SLICE <= dim; d += SLICE) Dots<T>::keep(Dots<T>::load(query + d), out + d);
  if (d < dim) Dots<T>::keep(Dots<T>::load(query + d, dim - d), out + d);
}

// Scores of one query to weights, in place; their largest logit and their sum. The largest weight is 1, however large its score.
INLINE void soften(float* x, int count, const Step& step, const float* slope, int first_distance, float* most, float* total) {
  const int columns = round_up(count, LANES);
  float factor = 1, top;
  if (step.softcap <= 0 && !slope && step.scale > 0) {  // logits are scores times a factor, and the largest score is the largest logit's
    factor = step.scale * LOG2E;
    for (int i = count; i < columns; i++) x[i] = MINUS_INFINITY;
    Floats lanes = load(x);
    for (int i = LANES; i < columns; i += LANES) lanes = larger(lanes, load(x + i));
    top = largest(lanes);
  } else {
    top = finish_scores(x, 0, count, columns, step, slope, first_distance);
  }
  Floats lanes = {};
  for (int i = 0; i < columns; i += LANES) {
    const Floats weight = exp2((load(x + i) - splat(top)) * splat(factor));
    store(x + i, weight);
    lanes += weight;
  }
  *most = top * factor;
  *total = sum(lanes);
}

// Calls ``work`` with the number of queries, up to four, as a constant.
template <class F>
INLINE void with_heads(int left, F&& work) {
  switch (left) {
    case 1: return work(std::integral_constant<int, 1>());
    case 2: return work(std::integral_constant<int, 2>());
    case 3: return work(std::integral_constant<int, 3>());
    default: return work(std::integral_constant<int, 4>());
  }
}

// One decode's rows of some K/V heads over the item's positions; the sums are left in ``sums``. ``next`` is what this thread does then, if it is
// known and a decode, too: its first rows are asked for here; ``is_asked`` says that the item before did so for this one.
template <class T>
static void attend_rows(const Step& step, const Item& item, const Item* next, bool is_asked, float* scratch, Sums sums) {
  const int group = step.group(), count = item.high - item.low, dim = round_up(step.key_dim, SLICE);
  const Turns<T> turns(step, item, next, (const T**)scratch);
  float* scores = (float*)(turns.at + num_addresses(step));
  auto* query = (typename Dots<T>::Query*)(scores + item.num_rows * STRIDE);
  if (!is_asked)
    for (int turn = 0; turn < std::min(turns.count, turns.lead(ASKS - 1)); turn++)
      for (int t = 0; t < turns.length; t++) prefetch_row(turns.at[turn] + t * step.key_stride[2], step.key_dim);
  const T* source = (const T*)step.query + step.cu_seqlens_q[item.seq] * step.query_stride[0];
  for (int r = 0; r < item.num_rows; r++) load_query(source + (item.kv_head * group + r) * step.query_stride[1], step.key_dim, query + r * dim);
  each_run(item, 0, turns.length, group, [&](const Run& run) {
    const Turn<T> turn = turns.turn(run, step.key_stride[2], run.left == group);
    float* x = scores + run.row * STRIDE + run.from;
    with_heads(run.left, [&](auto heads) { score_run<T, heads>(turn, run.count, step.key_dim, query + run.row * dim, x); });
    if (turn.asks) turns.ask_rest(run, step.key_stride[2]);
  });
  const float* slopes = step.slopes ? step.slopes + item.kv_head * group : nullptr;
  for (int r = 0; r < item.num_rows; r++) {
    soften(scores + r * STRIDE, count, step, slopes ? slopes + r : nullptr, item.low - (step.seq_lens[item.seq] - 1), sums.most + r, sums.sum + r);
    memset(sums.value + r * sums.stride, 0, sums.stride * sizeof(float));
  }
  each_run(item, turns.count, turns.length, group, [&](const Run& run) {
    const Turn<T> turn = turns.turn(run, step.value_stride[2], run.left == group);
    const float* x = scores + run.row * STRIDE + run.from;
    with_heads(run.left, [&](auto heads) { weigh_run<T, heads>(turn, run.count, step.value_dim, x, sums.value + run.row * sums.stride, sums.stride); });
    if (turn.asks) turns.ask_rest(run, step.value_stride[2]);
  });
}

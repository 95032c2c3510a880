// Weights of scores in pairs, and their sums, made beside products: what makes a weight waits for what it is made of, and what stands behind it in a processor's queue waits with it.
//
// Weights are rounded to bfloat16, and so they go into the sum, too: what one row's only large weight gains or loses, its sum does.
#pragma once

#include "softening.h"

#if defined(PAIRS)

#if defined(TILES)

constexpr int SCORE_BUFFERS = 1;  // the next part's scores take the place of those that are weights already

class Softening {
 public:
  inline __attribute__((always_inline)) Softening(const Scores& scores, const Block& block, Pair* weights)
      : x(scores.x), weights(weights), low(block.first - scores.tile), high(block.last - scores.tile), exponents(block.top, scores.factor) {}

  // Four columns. (No arrays: compilers would keep them in memory.)
  template <bool HIDDEN>
  inline __attribute__((always_inline)) void weigh(int t) {
    const Words a = weight<HIDDEN>(t), b = weight<HIDDEN>(t + 1), c = weight<HIDDEN>(t + 2), d = weight<HIDDEN>(t + 3);
    sum += ((Floats)a + (Floats)b) + ((Floats)c + (Floats)d);
    bits |= a | b | c | d;
    _mm512_storeu_si512(weights + t / 2 * LANES, (__m512i)(a >> 16 | b));
    _mm512_storeu_si512(weights + (t / 2 + 1) * LANES, (__m512i)(c >> 16 | d));
  }
  // Whether some weight is MOST_WEIGHT or more: their exponents alone have their uppermost bit set.
  inline __attribute__((always_inline)) bool is_exceeded() const { return _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x40000000)); }
  inline __attribute__((always_inline)) Floats total() const { return sum; }

 private:
  const float* x;
  Pair* weights;
  Ints low, high;  // positions that each row sees, counted from ``tile``
  const Exponents exponents;
  Floats sum = {};
  Words bits = {};

  template <bool HIDDEN>
  inline __attribute__((always_inline)) Words weight(int t) const {
    const __m512i w = (__m512i)((Words)weight_of(exponents.of(load(x + t * LANES))) + 0x8000), upper = _mm512_set1_epi32((int)0xffff0000);
    return (Words)(HIDDEN ? _mm512_maskz_and_epi32(Scores::seen(low, high, t), w, upper) : _mm512_and_epi32(w, upper));
  }
};

// The pieces of ``STEPS`` steps that belong beside one of the turns below.
template <int BLOCKS, int STEPS, int TURN>
INLINE void multiply_beside(const PairStep& a, const PairStep& b) {
  constexpr int pieces = 2 * BLOCKS, first = STEPS * TURN % pieces;
  const PairStep& step = STEPS * TURN < pieces ? a : b;
  if constexpr (STEPS > 0) multiply_piece<first>(step);
  if constexpr (STEPS > 1) multiply_piece<first + 1>(step);
}

// Eight columns, four of a block at a turn, and beside them some steps.
template <bool HIDDEN, int BLOCKS, int STEPS>
INLINE void weigh_some(Softening& low, Softening& high, int t, PairSteps& steps) {
  PairStep a, b;
  if constexpr (STEPS > 0) a = steps.next();
  if constexpr (STEPS > 1) b = steps.next();
  low.weigh<HIDDEN>(t);
  multiply_beside<BLOCKS, STEPS, 0>(a, b);
  if constexpr (BLOCKS == 2) high.weigh<HIDDEN>(t);
  if constexpr (BLOCKS == 2) multiply_beside<BLOCKS, STEPS, 1>(a, b);
  low.weigh<HIDDEN>(t + 4);
  multiply_beside<BLOCKS, STEPS, BLOCKS>(a, b);
  if constexpr (BLOCKS == 2) high.weigh<HIDDEN>(t + 4);
  if constexpr (BLOCKS == 2) multiply_beside<BLOCKS, STEPS, 3>(a, b);
}

// Weights of ``columns`` scores of one or two blocks, beside some products.
template <bool HIDDEN, int BLOCKS>
INLINE void weigh_beside(Softening& low, Softening& high, int columns, const PairProduct* products, int count) {
  PairSteps steps(products, count);
  const int num_steps = steps.num_left(), units = columns / 8;
  for (int t = 0, due = num_steps; t < columns; t += 8, due += num_steps) {
    if (due < units) {
      weigh_some<HIDDEN, BLOCKS, 0>(low, high, t, steps);
    } else if (due < 2 * units) {
      weigh_some<HIDDEN, BLOCKS, 1>(low, high, t, steps);
      due -= units;
    } else {
      weigh_some<HIDDEN, BLOCKS, 2>(low, high, t, steps);
      for (due -= 2 * units; due >= units; due -= units) multiply_step<BLOCKS>(steps.next());
    }
  }
  steps.finish<BLOCKS>();
  settle();
}

// The same of one block, beside nothing.
template <bool HIDDEN>
INLINE void weigh(Softening& soft, int columns) {
  for (int t = 0; t < columns; t += 4) soft.weigh<HIDDEN>(t);
}

#else

constexpr int SCORE_BUFFERS = 2;

// Sums of a block's weights so far, and what they are made of.
struct Softening {
  const float* x;
  Pair* weights;
  Ints low, high;  // positions that each row sees, counted from ``tile``
  Exponents exponents;
  Floats sum = {}, most = splat(MINUS_INFINITY);  // ``most``: the largest exponent

  Softening(const Scores& scores, const Block& block, Pair* weights)
      : x(scores.x), weights(weights), low(block.first - scores.tile), high(block.last - scores.tile), exponents(block.top, scores.factor) {}

  bool is_exceeded() const { return _mm512_cmp_ps_mask((__m512)most, _mm512_set1_ps(MOST_EXPONENT), _CMP_GE_OQ); }
  Floats total() const { return sum; }
};

constexpr float LEAST_EXPONENT = -127;  // of zero, as numbers are written: what is further down weighs nothing
constexpr int STAGES = 4;               // from a score to its weight, each behind a pair of a product's inner dimension: what one of them needs is ready then

// Weights of ``columns`` scores of one or two blocks, made one at a time in stages of a few instructions that do not wait. No more than four of all are of the kind that
// multiplies. The others run on units that products leave free; on Zen 5 that is not so for scalef and reduce, which would be fewer.
template <bool HIDDEN, int BLOCKS>
class Weighing {
 public:
  inline __attribute__((always_inline)) Weighing(Softening* const* soft, int columns) : soft(soft), columns(columns) {}

  bool is_left() const { return block < BLOCKS; }

  template <int STEP>
  inline __attribute__((always_inline)) void step() {
    constexpr int stage = STEP % STAGES, column = STEP / STAGES;
    Softening& s = *soft[block];
    if constexpr (stage == 0) {
      exponent = (Floats)_mm512_max_ps(_mm512_set1_ps(LEAST_EXPONENT), (__m512)s.exponents.of(load(s.x + (t + column) * LANES)));
    } else if constexpr (stage == 1) {
      if constexpr (HIDDEN) seen = Scores::seen(s.low, s.high, t + column);
      s.most = (Floats)(HIDDEN ? _mm512_mask_max_ps((__m512)s.most, seen, (__m512)s.most, (__m512)exponent) : _mm512_max_ps((__m512)s.most, (__m512)exponent));
      const Floats whole = (Floats)_mm512_roundscale_ps((__m512)exponent, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
      rest = exponent - whole;
      scale = ((Words)_mm512_cvtps_epi32((__m512)whole) << 23) + 0x8000;  // a half of bfloat16's last place with it
    } else if constexpr (stage == 2) {
      power = fma(fma(splat(POWER[3]), rest, splat(POWER[2])), rest, splat(POWER[1]));
    } else {
      const __m512i w = (__m512i)((Words)fma(power, rest, splat(POWER[0])) + scale), upper = _mm512_set1_epi32((int)0xffff0000);
      const Words weight = (Words)(HIDDEN ? _mm512_maskz_and_epi32(seen, w, upper) : _mm512_and_epi32(w, upper));
      if constexpr (column % 2 == 1) {
        s.sum += (Floats)even + (Floats)weight;
        _mm512_storeu_si512(s.weights + (t + column) / 2 * LANES, (__m512i)(even >> 16 | weight));
      }
      even = weight;
    }
  }

  // Behind the last step of some.
  inline __attribute__((always_inline)) void end() {
    t += DEPTH_STEPS / STAGES;
    if (t < columns) return;
    t = 0;
    block++;
  }

  // All that is left, beside nothing.
  void finish() {
    while (is_left()) finish_steps(std::make_index_sequence<DEPTH_STEPS>());
  }

 private:
  Softening* const* soft;
  int columns, block = 0, t = 0;
  Floats exponent, rest, power;
  Words scale, even;
  __mmask16 seen;

  template <size_t... STEPS>
  inline __attribute__((always_inline)) void finish_steps(std::index_sequence<STEPS...>) {
    (step<STEPS>(), ...);
    end();
  }
};

template <bool HIDDEN, int BLOCKS>
INLINE void weigh_beside(Softening& low, Softening& high, int columns, const PairProduct* products, int count) {
  Softening* const soft[] = {&low, &high};
  Weighing<HIDDEN, BLOCKS> weighing(soft, columns);
  for (int i = 0; i < count; i++) multiply_beside<BLOCKS>(products[i], weighing);
  weighing.finish();
}

template <bool HIDDEN>
INLINE void weigh(Softening& soft, int columns) {
  weigh_beside<HIDDEN, 1>(soft, soft, columns, nullptr, 0);
}

#endif

#endif

// From scores to weights in pairs, for attention whose lanes are rows: nothing crosses lanes, and what a row gets is its own alone.
#pragma once

#include "pairs.h"
#include "step.h"

#if defined(PAIRS)

// Exponents count from a point that is SLACK above the largest logit in base 2, and move only when one is so far above it that its weight is MOST_WEIGHT: that is seldom.
constexpr float SLACK = 30, MOST_WEIGHT = 2;

// 2^x, relative error 1e-4: a weight is rounded to bfloat16 next. A polynomial of degree 3 that is exact at whole numbers.
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
  Floats most, sum;  // ``most``: what exponents count from
  Floats shrink;     // of the sums of V, where ``most`` has moved
  Ints first, last;  // positions that each row sees; the last not included
  Ints position;
  Floats slope;

  Floats base() const { return most == splat(MINUS_INFINITY) ? splat(0.f) : most; }
  bool is_new() const { return _mm512_cmpeq_ps_mask((__m512)most, _mm512_set1_ps(MINUS_INFINITY)); }
};

// Whether a product with the scale does not make a logit in base 2 of a score.
INLINE bool is_bent(const Step& step) { return step.softcap > 0 || step.slopes || step.scale <= 0; }

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

// Scores [columns][LANES] of a block of rows, at the positions from ``tile`` on, and what of them each row sees.
struct Scores {
  const float* x;
  int columns, tile;
  float factor;  // from scores to logits in base 2
  bool bent;     // what exponents count from is looked at anew before each part, so it can follow the largest logit, whose weight is exact then

  static inline __attribute__((always_inline)) __mmask16 seen(const Ints& low, const Ints& high, int t) {
    const __m512i column = _mm512_set1_epi32(t);
    return _mm512_mask_cmplt_epi32_mask(_mm512_cmple_epi32_mask((__m512i)low, column), column, (__m512i)high);
  }
};

// Moves what exponents count from in rows where the largest score is far above it or the first that is seen. Sums so far shrink; those of V have to, if this returns true.
static __attribute__((noinline)) bool raise(const Scores& scores, Block& block) {
  const Floats nothing = splat(MINUS_INFINITY), factor = splat(scores.factor);
  const Ints low = block.first - scores.tile, high = block.last - scores.tile;
  Floats largest = nothing;
  for (int t = 0; t < scores.columns; t++)
    largest = (Floats)_mm512_mask_max_ps((__m512)largest, Scores::seen(low, high, t), (__m512)largest, (__m512)load(scores.x + t * LANES));
  const Floats highest = fma(largest, factor, splat(SLACK));
  const Ints far = scores.bent ? highest > block.most : weight_of(fma(largest, factor, -block.base())) >= splat(MOST_WEIGHT);
  const Ints above = far | ((block.most == nothing) & (largest != nothing));
  const Floats now = above ? highest : block.most;
  block.shrink = above ? exp2(block.most - now) : splat(1.f);
  block.most = now;
  block.sum *= block.shrink;
  return _mm512_test_epi32_mask((__m512i)above, (__m512i)above);
}

// Weights of scores in pairs, and their sums.
class Softening {
 public:
  inline __attribute__((always_inline)) Softening(const Scores& scores, const Block& block)
      : x(scores.x), low(block.first - scores.tile), high(block.last - scores.tile), factor(splat(scores.factor)), base(block.base()) {}

  // Four columns. (No arrays: compilers would keep them in memory.)
  template <bool HIDDEN>
  inline __attribute__((always_inline)) void weigh(int t, Pair* weights) {
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
  Ints low, high;  // positions that each row sees, counted from ``tile``
  Floats factor, base, sum = {};
  Words bits = {};

  // Rounded to bfloat16, and so it goes into the sum, too: what one row's only large weight gains or loses, its sum does.
  template <bool HIDDEN>
  inline __attribute__((always_inline)) Words weight(int t) const {
    const __m512i w = (__m512i)((Words)weight_of(fma(load(x + t * LANES), factor, -base)) + 0x8000), upper = _mm512_set1_epi32((int)0xffff0000);
    return (Words)(HIDDEN ? _mm512_maskz_and_epi32(Scores::seen(low, high, t), w, upper) : _mm512_and_epi32(w, upper));
  }
};

#endif

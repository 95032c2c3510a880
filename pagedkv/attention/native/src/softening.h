// From scores to weights in pairs, for attention whose lanes are rows: nothing crosses lanes, and what a row gets is its own alone.
#pragma once

#include "pairs.h"
#include "step.h"

#if defined(PAIRS)

// Exponents count from a point that is SLACK above the logit in base 2 of the ``top``, once a row's largest score. It moves only when a score is so far above it that its weight
// is MOST_WEIGHT, its exponent MOST_EXPONENT: that is seldom.
constexpr float SLACK = 30, MOST_WEIGHT = 2, MOST_EXPONENT = 1;

// 2^x for x from 0 to 1, relative error 1e-4: a weight is rounded to bfloat16 next. A polynomial of degree 3 that is exact at 0 and 1.
constexpr float POWER[] = {1.f, 6.9542435e-1f, 2.2630768e-1f, 7.826797e-2f};

#if defined(TILES)

INLINE Floats weight_of(Floats x) {
  const __m512 rest = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Floats p = splat(POWER[3]);
  p = fma(p, (Floats)rest, splat(POWER[2]));
  p = fma(p, (Floats)rest, splat(POWER[1]));
  p = fma(p, (Floats)rest, splat(POWER[0]));
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
}

#endif

// From scores to exponents. Without AMX the top is taken off first, so that the largest score's exponent is right however large it is; beside AMX's products there is
// no time for one more instruction.
struct Exponents {
  Floats factor, from;

  // ``top`` is a score, minus infinity where there is none yet; ``factor`` makes logits in base 2 of scores.
#if defined(TILES)
  Exponents(Floats top, float factor) : factor(splat(factor)), from(top == splat(MINUS_INFINITY) ? Floats{} : logit(top, factor)) {}

  inline __attribute__((always_inline)) Floats of(Floats x) const { return fma(x, factor, -from); }
  static Floats between(Floats top, Floats now, float factor) { return logit(top, factor) - logit(now, factor); }
  Ints are_exceeded_by(Floats largest) const { return weight_of(of(largest)) >= splat(MOST_WEIGHT); }
#else
  Exponents(Floats top, float factor) : factor(splat(factor)), from(top == splat(MINUS_INFINITY) ? Floats{} : top) {}

  inline __attribute__((always_inline)) Floats of(Floats x) const { return fma(x - from, factor, splat(-SLACK)); }
  static Floats between(Floats top, Floats now, float factor) { return (top - now) * splat(factor); }
  Ints are_exceeded_by(Floats largest) const { return of(largest) >= splat(MOST_EXPONENT); }
#endif
  // What exponents count from, in base 2.
  static Floats logit(Floats top, float factor) { return fma(top, splat(factor), splat(SLACK)); }
};

// Sixteen rows' sums so far; a lane is a row.
struct Block {
  Floats top, sum;
  Floats shrink;     // of the sums of V, where ``top`` has moved
  Ints first, last;  // positions that each row sees; the last not included
  Ints position;
  Floats slope;

  bool is_new() const { return _mm512_cmpeq_ps_mask((__m512)top, _mm512_set1_ps(MINUS_INFINITY)); }
};

// Whether a product with the scale does not make a logit in base 2 of a score.
INLINE bool is_bent(const Step& step) { return step.softcap > 0 || step.slopes || step.scale <= 0; }

// What makes logits in base 2 of scores, after ``bend`` if they are bent.
INLINE float score_factor(const Step& step) { return is_bent(step) ? 1.f : step.scale * LOG2E; }

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
  const Floats nothing = splat(MINUS_INFINITY);
  const Ints low = block.first - scores.tile, high = block.last - scores.tile;
  Floats largest = nothing;
  for (int t = 0; t < scores.columns; t++)
    largest = (Floats)_mm512_mask_max_ps((__m512)largest, Scores::seen(low, high, t), (__m512)largest, (__m512)load(scores.x + t * LANES));
  const Ints far = scores.bent ? largest > block.top : Exponents(block.top, scores.factor).are_exceeded_by(largest);
  const Ints above = far | ((block.top == nothing) & (largest != nothing));
  const Floats now = above ? largest : block.top;
  block.shrink = above ? exp2(Exponents::between(block.top, now, scores.factor)) : splat(1.f);
  block.top = now;
  block.sum *= block.shrink;
  return _mm512_test_epi32_mask((__m512i)above, (__m512i)above);
}

#endif

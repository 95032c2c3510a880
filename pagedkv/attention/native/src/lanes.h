// One register of float lanes, whatever the instruction set: arithmetic, conversions, exp2, tanh and sums.
//
// The width follows the flags that the file is compiled with: 16 lanes with AVX-512, 8 with AVX2, else 4 (SSE2, NEON, anything that the
// compiler lowers to). -DPAGEDKV_LANES=n forces another width, which the compiler then makes from narrower registers: so the 16-lane code
// can be tested on a machine without AVX-512.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(PAGEDKV_LANES)
#define LANES PAGEDKV_LANES
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

constexpr float LOG2E = 1.44269504088896341f;
constexpr float MINUS_INFINITY = -__builtin_inff();

INLINE Floats splat(float x) { return x - Floats{}; }  // folded to a broadcast; x + 0 would not be, for the sake of -0

INLINE Floats load(const float* p) {
  Floats r;
  memcpy(&r, p, sizeof r);
  return r;
}

INLINE Floats load(const bfloat16* p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Words) << 16);
}

INLINE Floats load(const float16* p) {
#if defined(__AVX512F__) && LANES == 16
  __m256i h;
  memcpy(&h, p, sizeof h);
  return (Floats)_mm512_cvtph_ps(h);
#elif defined(__F16C__) && LANES == 8
  __m128i h;
  memcpy(&h, p, sizeof h);
  return (Floats)_mm256_cvtph_ps(h);
#else
  // The exponent is moved to float32's place and rebased by a multiplication, which also makes subnormal numbers right.
  Halves h;
  memcpy(&h, p, sizeof h);
  Words w = __builtin_convertvector(h, Words), sign = (w & 0x8000) << 16, magnitude = w & 0x7fff;
  Floats finite = (Floats)(magnitude << 13) * splat(5.192296858534828e33f);  // 2^112
  Words special = (Words)(magnitude >= 0x7c00);
  Words bits = (special & ((magnitude << 13) | 0x7f800000u)) | (~special & (Words)finite);
  return (Floats)(bits | sign);
#endif
}

INLINE Floats load(const int8_t* p) {
#if defined(__AVX512F__) && LANES == 16  // compilers convert bytes one by one
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__) && LANES == 8
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  typedef int8_t Bytes __attribute__((vector_size(LANES)));
  typedef int16_t Shorts __attribute__((vector_size(LANES * 2)));
  Bytes b;
  memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(b, Shorts), Ints), Floats);
#endif
}

INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

// v in bfloat16, as lower halves: to nearest, ties to even; a NaN stays one.
INLINE Words nearest_bfloat16(Floats v) {
#if defined(__AVX512BF16__) && LANES == 16  // what is below the least normal number becomes zero
  return (Words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const Words u = (Words)v, nan = (Words)(v != v);
  return ((nan & 0x7fc00000u) | (~nan & (u + 0x7fff + ((u >> 16) & 1)))) >> 16;
#endif
}

INLINE void store(bfloat16* p, Floats v) {
  const Words upper = nearest_bfloat16(v);
#if defined(__AVX512F__) && LANES == 16  // what compilers make of the conversion below takes three times as long
  const __m256i h = _mm512_cvtepi32_epi16((__m512i)upper);
#elif defined(__AVX2__) && LANES == 8
  const __m256i twice = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)upper, (__m256i)upper), 0x08);
  const __m128i h = _mm256_castsi256_si128(twice);
#else
  const Halves h = __builtin_convertvector(upper, Halves);
#endif
  memcpy(p, &h, sizeof h);
}

INLINE void store(float16* p, Floats v) {
#if defined(__AVX512F__) && LANES == 16
  __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &h, sizeof h);
#elif defined(__F16C__) && LANES == 8
  __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  memcpy(p, &h, sizeof h);
#else
  // Adding a number whose last place is float16's last place lets the float unit round; the rest is moving bits.
  Words u = (Words)v, sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  Words nan = (Words)(magnitude > 0x7f800000u), large = (Words)(magnitude >= 0x477ff000u), small = (Words)(magnitude < 0x38800000u);
  Words subnormal = (Words)((Floats)magnitude + splat(0.5f)) - 0x3f000000u;
  Words normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Words bits = (small & subnormal) | (~small & normal);
  bits = (large & 0x7c00) | (~large & bits);
  bits = (nan & 0x7e00) | (~nan & bits);
  Halves h = __builtin_convertvector(bits | sign, Halves);
  memcpy(p, &h, sizeof h);
#endif
}

// Two registers of consecutive elements. Those of bfloat16 come as they are cheapest to convert: first the even ones, then the odd ones.
struct Two {
  Floats a, b;
};

template <class T>
INLINE Two load_two(const T* p) {
  return {load(p), load(p + LANES)};
}

INLINE Two load_two(const bfloat16* p) {
  Words pairs;
  memcpy(&pairs, p, sizeof pairs);
  return {(Floats)(pairs << 16), (Floats)(pairs & 0xffff0000u)};
}

// Stores them in the order in which ``load_two`` found them.
template <class T>
INLINE void store_two(T* p, Two v) {
  store(p, v.a);
  store(p + LANES, v.b);
}

INLINE void store_two(bfloat16* p, Two v) {
  const Words pairs = nearest_bfloat16(v.a) | nearest_bfloat16(v.b) << 16;
  memcpy(p, &pairs, sizeof pairs);
}

// The first ``count`` elements, the other lanes zero; nothing behind them is read or written.
template <class T>
INLINE Floats load_part(const T* p, int count) {
  T some[LANES] = {};
  memcpy(some, p, count * sizeof(T));
  return load(some);
}

template <class T>
INLINE void store_part(T* p, Floats v, int count) {
  T some[LANES];
  store(some, v);
  memcpy(p, some, count * sizeof(T));
}

INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }  // contracted by -ffp-contract=fast

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

INLINE float sum(Floats v) {
#if defined(__AVX512F__) && LANES == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  float some[LANES], total = 0;
  store(some, v);
  for (int i = 0; i < LANES; i++) total += some[i];
  return total;
#endif
}

INLINE float largest(Floats v) {
#if defined(__AVX512F__) && LANES == 16
  return _mm512_reduce_max_ps((__m512)v);
#else
  float some[LANES];
  store(some, v);
  float most = some[0];
  for (int i = 1; i < LANES; i++) most = some[i] > most ? some[i] : most;
  return most;
#endif
}

// The sums of four registers' lanes, side by side.
INLINE void sum4(const Floats* v, float* out) {
#if defined(__AVX512F__) && LANES == 16
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512d ab = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b)), cd = (__m512d)(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
  const __m512 quarters = (__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd);
  const __m256 halves = _mm512_castps512_ps256(quarters) + _mm512_extractf32x8_ps(quarters, 1);
  _mm_storeu_ps(out, _mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1));
#elif defined(__AVX2__) && LANES == 8
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]), _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  for (int i = 0; i < 4; i++) out[i] = sum(v[i]);
#endif
}

// 2^x, relative error below 2e-7; below -126 it is exactly 0, so that what is masked away weighs nothing. Polynomial of Cephes (exp2f).
INLINE Floats exp2(Floats x) {
#if defined(__AVX512DQ__) && LANES == 16
  const Floats rest = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Floats magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  Floats clamped = larger(x, splat(-126.f));
  Floats whole = (clamped + magic) - magic, rest = clamped - whole;
#endif
  Floats p = splat(1.535336188319500e-4f);
  p = fma(p, rest, splat(1.339887440266574e-3f));
  p = fma(p, rest, splat(9.618437357674640e-3f));
  p = fma(p, rest, splat(5.550332471162809e-2f));
  p = fma(p, rest, splat(2.402264791363012e-1f));
  p = fma(p, rest, splat(6.931472028550421e-1f));
  p = fma(p, rest, splat(1.f));
#if defined(__AVX512DQ__) && LANES == 16
  return (Floats)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_GE_OQ), (__m512)p, (__m512)(x - rest));
#else
  Ints exponent = (__builtin_convertvector(whole, Ints) + 127) << 23;
  Ints keep = x >= splat(-126.f);
  return (Floats)((Ints)(p * (Floats)exponent) & keep);
#endif
}

// tanh(x), relative error below 2e-7. Polynomial of Cephes (tanhf) near 0, where the quotient would cancel.
INLINE Floats tanh(Floats x) {
  const Words sign = (Words)x & 0x80000000u;
  const Floats magnitude = (Floats)((Words)x & 0x7fffffffu), square = magnitude * magnitude;
  const Floats decay = exp2(magnitude * splat(-2.f * LOG2E));
  const Floats far = (splat(1.f) - decay) / (splat(1.f) + decay);
  Floats p = splat(-5.70498872745e-3f);
  p = fma(p, square, splat(2.06390887954e-2f));
  p = fma(p, square, splat(-5.37397155531e-2f));
  p = fma(p, square, splat(1.33314422036e-1f));
  p = fma(p, square, splat(-3.33332819422e-1f));
  const Floats near = fma(p * square, magnitude, magnitude);
  return (Floats)((Words)(magnitude < splat(0.625f) ? near : far) | sign);
}

INLINE int round_up(int x, int step) { return (x + step - 1) / step * step; }

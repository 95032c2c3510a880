// What a layer computes beside its products and its attention, each in one pass: a norm, a gate, a rotation.
//
// Sums and functions are in float32. Results are rounded to the tensors' own type where the model's code does it, so that half precision
// gives the model's numbers up to the order of a sum.
#pragma once

#include "lanes.h"

// One operation on rows. ``Element`` offsets; the last dimension of every tensor is contiguous.
struct Layer {
  const void *x, *y, *weight;  // norm: x, weight; gate: x (gate), y (up); rotation: x, y (cosines), weight (sines)
  void* out;
  int64_t x_stride[2], y_stride[2], out_stride[2];  // row, head; rows of a norm and of a gate have one head
  int64_t num_rows;
  int32_t num_heads, width, dtype, form;
  float epsilon;
};

enum NormForm { ROUNDED_THEN_SCALED = 0, SCALED_THEN_ROUNDED = 1, SCALED_BY_ONE_PLUS = 2 };
enum GateForm { SILU = 0, GELU_TANH = 1 };

struct Whole {};  // a register's full count of lanes, known to the compiler

template <class T>
INLINE Floats load_some(const T* p, Whole) {
  return load(p);
}
template <class T>
INLINE Floats load_some(const T* p, int count) {
  return load_part(p, count);
}
template <class T>
INLINE void store_some(T* p, Floats v, Whole) {
  store(p, v);
}
template <class T>
INLINE void store_some(T* p, Floats v, int count) {
  store_part(p, v, count);
}

// Calls ``body(first element, count)`` for whole registers and then for what is left.
template <class Body>
INLINE void each(int width, Body body) {
  int d = 0;
  for (; d + LANES <= width; d += LANES) body(d, Whole{});
  if (d < width) body(d, width - d);
}

// As it would be read back after having been stored.
template <class T>
struct Rounded {
  static inline __attribute__((always_inline)) Floats of(Floats v) {
    T some[LANES];
    store(some, v);
    return load(some);
  }
};
template <>
struct Rounded<float> {
  static inline __attribute__((always_inline)) Floats of(Floats v) { return v; }
};
template <>
struct Rounded<bfloat16> {
  static inline __attribute__((always_inline)) Floats of(Floats v) { return (Floats)(nearest_bfloat16(v) << 16); }
};

// Root mean square norm (Zhang and Sennrich, 2019) of one row.
template <class T>
void norm_row(const Layer& layer, int64_t row) {
  const T *x = (const T*)layer.x + row * layer.x_stride[0], *weight = (const T*)layer.weight;
  T* out = (T*)layer.out + row * layer.out_stride[0];
  const int width = layer.width;
  Floats squares[4] = {};
  int place = 0;
  each(width, [&](int d, auto n) {
    const Floats v = load_some(x + d, n);
    squares[place & 3] = fma(v, v, squares[place & 3]);
    place++;
  });
  const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / width;
  const Floats factor = splat(1.f / __builtin_sqrtf(mean + layer.epsilon));
  const Floats added = splat(layer.form == SCALED_BY_ONE_PLUS ? 1.f : 0.f);
  if (layer.form == ROUNDED_THEN_SCALED)
    each(width, [&](int d, auto n) { store_some(out + d, Rounded<T>::of(load_some(x + d, n) * factor) * load_some(weight + d, n), n); });
  else
    each(width, [&](int d, auto n) { store_some(out + d, load_some(x + d, n) * factor * (load_some(weight + d, n) + added), n); });
}

// 1 / x for x from 1 to 2, off by a unit in the last place at most.
INLINE Floats reciprocal(Floats x) {
#if defined(__AVX512F__) && LANES == 16  // a division takes as long as fifteen products
  const Floats near = (Floats)_mm512_rcp14_ps((__m512)x);
  return fma(near, fma(-x, near, splat(1.f)), near);
#else
  return splat(1.f) / x;
#endif
}

INLINE Floats silu(Floats x) {
  const Floats decay = exp2((Floats)((Words)x | 0x80000000u) * splat(LOG2E));  // of -|x|: it never overflows
  return x * ((x < Floats{} ? decay : splat(1.f)) * reciprocal(splat(1.f) + decay));
}

// The approximation of GELU by tanh (Hendrycks and Gimpel, 2016).
INLINE Floats gelu_tanh(Floats x) {
  const Floats inner = splat(0.7978845608028654f) * fma(splat(0.044715f) * x * x, x, x);
  return splat(0.5f) * x * (splat(1.f) + tanh(inner));
}

template <class T>
void gate_row(const Layer& layer, int64_t row) {
  const T *gate = (const T*)layer.x + row * layer.x_stride[0], *up = (const T*)layer.y + row * layer.y_stride[0];
  T* out = (T*)layer.out + row * layer.out_stride[0];
  const bool is_silu = layer.form == SILU;
  each(layer.width, [&](int d, auto n) {
    const Floats g = load_some(gate + d, n);
    store_some(out + d, Rounded<T>::of(is_silu ? silu(g) : gelu_tanh(g)) * load_some(up + d, n), n);
  });
}

// Rotary position embedding (Su et al., 2021), the first half of a head paired with the second, of one row's heads.
template <class T>
void rotate_row(const Layer& layer, int64_t row) {
  const T *cosines = (const T*)layer.y + row * layer.y_stride[0], *sines = (const T*)layer.weight + row * layer.y_stride[0];
  const int half = layer.width / 2;
  for (int head = 0; head < layer.num_heads; head++) {
    const T* x = (const T*)layer.x + row * layer.x_stride[0] + head * layer.x_stride[1];
    T* out = (T*)layer.out + row * layer.out_stride[0] + head * layer.out_stride[1];
    each(half, [&](int d, auto n) {
      const Floats a = load_some(x + d, n), b = load_some(x + half + d, n);
      const Floats first = Rounded<T>::of(a * load_some(cosines + d, n)), second = Rounded<T>::of(b * load_some(cosines + half + d, n));
      store_some(out + d, first - Rounded<T>::of(b * load_some(sines + d, n)), n);
      store_some(out + half + d, second + Rounded<T>::of(a * load_some(sines + half + d, n)), n);
    });
  }
}

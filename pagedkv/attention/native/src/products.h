// Products of a few rows with weights of eight bits and one scale for each output. Arithmetic is in float32: what takes the time of such a
// product is reading its weights, and there are a quarter or half as many bytes of them.
//
// A row's sums are made in the order of the inputs whatever rows are beside it and however many threads run, so neither changes a bit.
#pragma once

#include <algorithm>

#include "lanes.h"
#include "threads.h"

constexpr int OUTPUTS = 4 * LANES;                 // that lie side by side in memory, input by input
constexpr int ROWS_AT_ONCE = LANES == 16 ? 6 : 2;  // what fits into the registers: 4 sums a row, and the weights
constexpr int WEIGHTS_AHEAD = 2048;                // prefetched: a core alone asks for too little memory at a time

// How weights lie in memory, P the panels that hold N outputs, what is behind them of any value.
enum Layout : int32_t {
  BYTES = 0,  // [P, K, OUTPUTS] int8
  PAIRED = 1,  // [P, K / 32, 2, 16, 16] pairs of bfloat16: inputs by 32, two tiles of sixteen outputs
};

// Mirrored field by field in library.py.
struct Product {
  const void* x;       // [M, K]
  const void* weight;  // as ``layout`` says
  const float* scale;  // [P * OUTPUTS], of bytes
  const float* bias;   // as many as the panels hold, or null
  const void* added;   // [M, N] or null
  void* out;           // [M, N], or [M, N / 2] through a gate
  int64_t num_inputs, num_outputs, num_rows;
  int32_t dtype;  // of x, added and out
  int32_t layout;
  int32_t halves;  // whether a panel holds outputs of the first half beside those of the second
  int32_t gate;    // a form of gate of the first half, by which the second is multiplied; -1: none
};

INLINE Floats splat_one(const float* p) { return splat(*p); }
INLINE Floats splat_one(const bfloat16* p) { return (Floats)(Words{} + ((uint32_t)p->bits << 16)); }
INLINE Floats splat_one(const float16* p) {
#if defined(__F16C__)  // else a register is made and taken apart for each number
  return splat(_cvtsh_ss(p->bits));
#else
  return splat(load_part(p, 1)[0]);
#endif
}

template <class T, int M>
INLINE void multiply_rows(const Product& p, int64_t panel, int first_row) {
  const int8_t* weight = (const int8_t*)p.weight + panel * p.num_inputs * OUTPUTS;
  const T* x = (const T*)p.x + first_row * p.num_inputs;
  Floats sums[M][4] = {};
  for (int64_t k = 0; k < p.num_inputs; k++, weight += OUTPUTS) {
    __builtin_prefetch(weight + WEIGHTS_AHEAD);
    const Floats w[4] = {load(weight), load(weight + LANES), load(weight + 2 * LANES), load(weight + 3 * LANES)};
    for (int m = 0; m < M; m++) {
      const Floats input = splat_one(x + m * p.num_inputs + k);
      for (int r = 0; r < 4; r++) sums[m][r] = fma(input, w[r], sums[m][r]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < 4; r++) {
      const int64_t output = panel * OUTPUTS + r * LANES, place = (first_row + m) * p.num_outputs + output;
      const int count = (int)std::min<int64_t>(p.num_outputs - output, LANES);
      if (count <= 0) break;
      Floats result = sums[m][r] * load(p.scale + output);
      if (p.bias) result = result + load(p.bias + output);
      if (p.added) result = result + (count == LANES ? load((const T*)p.added + place) : load_part((const T*)p.added + place, count));
      if (count == LANES) store((T*)p.out + place, result);
      else store_part((T*)p.out + place, result, count);
    }
}

template <class T, int M = ROWS_AT_ONCE>
void multiply_panel(const Product& p, int64_t panel, int first_row) {
  if constexpr (M > 1)
    if (p.num_rows - first_row < M) return multiply_panel<T, M - 1>(p, panel, first_row);
  multiply_rows<T, M>(p, panel, first_row);
}

template <class T>
static void multiply_all_bytes(const Product& p, const Share& share) {
  const int64_t panels = (p.num_outputs + OUTPUTS - 1) / OUTPUTS;
  for (int64_t panel = share.begin(panels); panel < share.end(panels); panel++)
    for (int row = 0; row < p.num_rows; row += ROWS_AT_ONCE) multiply_panel<T>(p, panel, row);
}

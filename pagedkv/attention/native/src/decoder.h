// One decoder layer of bfloat16 in one parallel region: norm, queries with keys and values, attention, its product and sum, norm, gated product, product and sum. Between
// two of them the threads wait for each other and nothing else.
#pragma once

#include "joined.h"
#include "pair_products.h"

// Filled but for the addresses of rows. Mirrored field by field in library.py.
struct Decoder {
  Layer first_norm, second_norm;
  Product joined, output, gated, down;
};

#if defined(PAIRS)

constexpr int64_t SERIAL_MULTIPLICATIONS = 1000000;  // below so many, waking other threads costs more than it gives

INLINE Product applied(Product product, const void* x, const void* added, void* out, int64_t num_rows) {
  product.x = x;
  product.added = added;
  product.out = out;
  product.num_rows = num_rows;
  return product;
}

INLINE void norm_all(Layer norm, const bfloat16* x, bfloat16* out, int64_t num_rows) {
  norm.x = x;
  norm.out = out;
#pragma omp for schedule(static)
  for (int64_t row = 0; row < num_rows; row++) norm_row<bfloat16>(norm, row);
}

// ``scratch`` holds rows of two states, of queries with keys and values, of what attention gives, and of what the gate lets through.
static void run_decoder(const Decoder& d, const Joined& j, const bfloat16* x, const void* cosines, const void* sines, void* key_pool, void* value_pool, bfloat16* out,
                        bfloat16* scratch, float* attend_scratch) {
  const int64_t num_rows = j.rows->num_tokens;
  bfloat16 *normed = scratch, *middle = normed + num_rows * d.joined.num_inputs, *joined = middle + num_rows * d.output.num_outputs;
  bfloat16 *attended = joined + num_rows * d.joined.num_outputs, *gated = attended + num_rows * d.output.num_inputs;
  point_at(j, joined, cosines, sines, key_pool, value_pool, attended);
  const Product first = applied(d.joined, normed, nullptr, joined, num_rows), second = applied(d.output, attended, x, middle, num_rows);
  const Product third = applied(d.gated, normed, nullptr, gated, num_rows), fourth = applied(d.down, gated, middle, out, num_rows);
  const int num_threads = num_rows * d.gated.num_inputs * d.gated.num_outputs < SERIAL_MULTIPLICATIONS ? 1 : j.num_threads;
#pragma omp parallel num_threads(num_threads)
  {
    norm_all(d.first_norm, x, normed, num_rows);
    multiply_all_pairs(first);
#pragma omp barrier
    attend_joined<bfloat16>(j, attend_scratch);
    multiply_all_pairs(second);
#pragma omp barrier
    norm_all(d.second_norm, middle, normed, num_rows);
    multiply_all_pairs(third);
#pragma omp barrier
    multiply_all_pairs(fourth);
  }
}

#endif

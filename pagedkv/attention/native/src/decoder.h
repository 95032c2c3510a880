// Decoder layers of bfloat16 in one parallel region. Of each: norm, queries with keys and values, attention, its product and sum, norm, gated product, product and sum.
// Between two of them the threads wait for each other and for nothing else.
#pragma once

#include "joined.h"
#include "pair_products.h"

// Filled but for the addresses of rows. Mirrored field by field in library.py.
struct Decoder {
  Layer first_norm, second_norm;
  Product joined, output, gated, down;
};

// A layer, and where its K and V are.
struct PlacedDecoder {
  const Decoder* decoder;
  void *key_pool, *value_pool;
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

// To be called by all threads of a parallel region. ``scratch`` holds rows of two states, of queries with keys and values, of what attention gives, and of what the gate
// lets through.
static void run_decoder(const PlacedDecoder& placed, const Joined& j, const bfloat16* x, const void* cosines, const void* sines, bfloat16* out, bfloat16* scratch,
                        float* attend_scratch) {
  const Decoder& d = *placed.decoder;
  const int64_t num_rows = j.rows->num_tokens;
  bfloat16 *normed = scratch, *middle = normed + num_rows * d.joined.num_inputs, *joined = middle + num_rows * d.output.num_outputs;
  bfloat16 *attended = joined + num_rows * d.joined.num_outputs, *gated = attended + num_rows * d.output.num_inputs;
#pragma omp single
  point_at(j, joined, cosines, sines, placed.key_pool, placed.value_pool, attended);
  norm_all(d.first_norm, x, normed, num_rows);
  multiply_all_pairs(applied(d.joined, normed, nullptr, joined, num_rows));
#pragma omp barrier
  attend_joined<bfloat16>(j, attend_scratch);
  multiply_all_pairs(applied(d.output, attended, x, middle, num_rows));
#pragma omp barrier
  norm_all(d.second_norm, middle, normed, num_rows);
  multiply_all_pairs(applied(d.gated, normed, nullptr, gated, num_rows));
#pragma omp barrier
  multiply_all_pairs(applied(d.down, gated, middle, out, num_rows));
}

// Layers one after the other, ``out [layers, T, H]`` of ``x [T, H]``.
static void run_decoders(const PlacedDecoder* layers, int num_layers, const Joined& j, const bfloat16* x, const void* cosines, const void* sines, bfloat16* out,
                         bfloat16* scratch, float* attend_scratch) {
  const Product& largest = layers[0].decoder->gated;
  const int64_t numbers = j.rows->num_tokens * largest.num_inputs;
  const int num_threads = numbers * largest.num_outputs < SERIAL_MULTIPLICATIONS ? 1 : j.num_threads;
#pragma omp parallel num_threads(num_threads)
  for (int i = 0; i < num_layers; i++) run_decoder(layers[i], j, i ? out + (i - 1) * numbers : x, cosines, sines, out + i * numbers, scratch, attend_scratch);
}

#endif

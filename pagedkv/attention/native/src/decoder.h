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

INLINE void norm_all(Layer norm, const bfloat16* x, bfloat16* out, int64_t num_rows, const Share& share) {
  norm.x = x;
  norm.out = out;
  for (int64_t row = share.begin(num_rows); row < share.end(num_rows); row++) norm_row<bfloat16>(norm, row);
}

// A layer's memory. The first three tensors are of the rows that pass from product to product together, the others of all.
struct DecoderScratch {
  bfloat16 *normed, *middle, *gated, *joined, *attended;

  // ``place``: where there are several threads' passing rows, whose these are. ``num_rows`` are at least as many as all of them together.
  DecoderScratch(const Decoder& d, bfloat16* memory, int64_t num_rows, int64_t num_passing, int place) {
    const int64_t width = d.joined.num_inputs + d.output.num_outputs + d.down.num_inputs;
    normed = memory + place * num_passing * width;
    middle = normed + num_passing * d.joined.num_inputs;
    gated = middle + num_passing * d.output.num_outputs;
    joined = memory + num_rows * width;
    attended = joined + num_rows * d.joined.num_outputs;
  }
};

// From a layer's input to queries, keys and values.
INLINE void join_rows(const Decoder& d, const DecoderScratch& scratch, const bfloat16* x, int64_t row, int64_t num_rows, const Share& share) {
  norm_all(d.first_norm, x + row * d.joined.num_inputs, scratch.normed, num_rows, share);
  share.wait();
  multiply_all_pairs(applied(d.joined, scratch.normed, nullptr, scratch.joined + row * d.joined.num_outputs, num_rows), share);
}

// From what attention gives to the layer's output.
INLINE void pass_rows(const Decoder& d, const DecoderScratch& scratch, const bfloat16* x, bfloat16* out, int64_t row, int64_t num_rows, const Share& share) {
  const int64_t place = row * d.output.num_outputs;
  multiply_all_pairs(applied(d.output, scratch.attended + row * d.output.num_inputs, x + place, scratch.middle, num_rows), share);
  share.wait();
  norm_all(d.second_norm, scratch.middle, scratch.normed, num_rows, share);
  share.wait();
  multiply_all_pairs(applied(d.gated, scratch.normed, nullptr, scratch.gated, num_rows), share);
  share.wait();
  multiply_all_pairs(applied(d.down, scratch.gated, scratch.middle, out + place, num_rows), share);
}

// Where there are many rows, each thread takes some at a time from product to product, so that what lies between these stays in its cache; else the threads share out
// every product.
static void run_decoder(const PlacedDecoder& placed, const Joined& j, const bfloat16* x, const void* cosines, const void* sines, bfloat16* out, bfloat16* memory,
                        float* attend_scratch, const Share& all) {
  const Decoder& d = *placed.decoder;
  const int64_t num_rows = j.rows->num_tokens, num_chunks = (num_rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
  const bool by_rows = num_rows >= CHUNK_ROWS * all.parts;
  const DecoderScratch scratch(d, memory, num_rows, by_rows ? CHUNK_ROWS : num_rows, by_rows ? all.part : 0);
  const auto each_chunk = [&](auto work) {
    all.each(num_chunks, [&](int64_t chunk) { work(chunk * CHUNK_ROWS, std::min<int64_t>(num_rows - chunk * CHUNK_ROWS, CHUNK_ROWS)); });
  };
  if (all.part == 0) point_at(j, scratch.joined, cosines, sines, placed.key_pool, placed.value_pool, scratch.attended);
  if (by_rows) {
    each_chunk([&](int64_t row, int64_t count) { join_rows(d, scratch, x, row, count, Share::alone()); });
  } else {
    join_rows(d, scratch, x, 0, num_rows, all);
    all.wait();
  }
  attend_joined<bfloat16>(j, attend_scratch, all);
  if (by_rows) {
    each_chunk([&](int64_t row, int64_t count) { pass_rows(d, scratch, x, out, row, count, Share::alone()); });
  } else {
    pass_rows(d, scratch, x, out, 0, num_rows, all);
    all.wait();
  }
}

// Layers one after the other, ``out [layers, T, H]`` of ``x [T, H]``.
static void run_decoders(const PlacedDecoder* layers, int num_layers, const Joined& j, const bfloat16* x, const void* cosines, const void* sines, bfloat16* out,
                         bfloat16* scratch, float* attend_scratch) {
  const Product& largest = layers[0].decoder->gated;
  const int64_t numbers = j.rows->num_tokens * largest.num_inputs;
  const int num_threads = numbers * largest.num_outputs < SERIAL_MULTIPLICATIONS ? 1 : j.num_threads;
  Meeting meeting;
#pragma omp parallel num_threads(num_threads)
  {
    const Share all = Share::among_all(meeting);
    for (int i = 0; i < num_layers; i++)
      run_decoder(layers[i], j, i ? out + (i - 1) * numbers : x, cosines, sines, out + i * numbers, scratch, attend_scratch, all);
  }
}

#endif

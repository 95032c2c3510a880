// Decoder layers of bfloat16 in one parallel region. Of each: norm, queries with keys and values, attention, its product and sum, norm, gated product, product and sum.
// Between two of them the threads wait for each other and for nothing else.
#pragma once

#include "joined.h"
#include "pair_products.h"

struct Products {
  Product joined, output, gated, down;
};

// Filled but for the addresses of rows. Mirrored field by field in library.py.
struct Decoder {
  Layer first_norm, second_norm;
  Products many, few;     // ``few`` for up to ``most_few`` rows, with weights of eight bits
  int64_t most_few;       // 0: there are none
};

// A layer, and where its K and V are.
struct PlacedDecoder {
  const Decoder* decoder;
  void *key_pool, *value_pool;
};

#if defined(PAIRS)

constexpr int64_t SERIAL_MULTIPLICATIONS = 1000000;  // below so many, waking other threads costs more than it gives

INLINE void multiply_all(Product product, const bfloat16* x, const bfloat16* added, bfloat16* out, int64_t num_rows, const Share& share) {
  product.x = x;
  product.added = added;
  product.out = out;
  product.num_rows = num_rows;
  if (product.layout == BYTES) multiply_all_bytes<bfloat16>(product, share);
  else multiply_all_pairs(product, share);
}

// ``out [rows, I]``, from ``both [rows, 2 I]``: the gate, and beside it what goes through.
INLINE void gate_all(const bfloat16* both, bfloat16* out, int64_t width, int form, int64_t num_rows, const Share& share) {
  Layer gate = {};
  gate.x = both;
  gate.y = both + width;
  gate.out = out;
  gate.x_stride[0] = gate.y_stride[0] = 2 * width;
  gate.out_stride[0] = width;
  gate.width = (int32_t)width;
  gate.form = form;
  for (int64_t row = share.begin(num_rows); row < share.end(num_rows); row++) gate_row<bfloat16>(gate, row);
}

INLINE void norm_all(Layer norm, const bfloat16* x, bfloat16* out, int64_t num_rows, const Share& share) {
  norm.x = x;
  norm.out = out;
  for (int64_t row = share.begin(num_rows); row < share.end(num_rows); row++) norm_row<bfloat16>(norm, row);
}

// A layer's memory. The first tensors are of the rows that pass from product to product together, the last two of all.
struct DecoderScratch {
  bfloat16 *normed, *middle, *gated, *both, *joined, *attended;

  // ``place``: where there are several threads' passing rows, whose these are. ``num_rows`` are at least as many as all of them together.
  DecoderScratch(const Products& p, bfloat16* memory, int64_t num_rows, int64_t num_passing, int place) {
    const int64_t width = p.joined.num_inputs + p.output.num_outputs + p.down.num_inputs + p.gated.num_outputs;
    normed = memory + place * num_passing * width;
    middle = normed + num_passing * p.joined.num_inputs;
    gated = middle + num_passing * p.output.num_outputs;
    both = gated + num_passing * p.down.num_inputs;
    joined = memory + num_rows * width;
    attended = joined + num_rows * p.joined.num_outputs;
  }
};

// A layer with the products that it runs by.
struct DecoderPass {
  const Decoder& d;
  const Products& p;
  const DecoderScratch scratch;

  // From the layer's input to queries, keys and values.
  void join(const bfloat16* x, int64_t row, int64_t num_rows, const Share& share) const {
    norm_all(d.first_norm, x + row * p.joined.num_inputs, scratch.normed, num_rows, share);
    share.wait();
    multiply_all(p.joined, scratch.normed, nullptr, scratch.joined + row * p.joined.num_outputs, num_rows, share);
  }

  // From what attention gives to the layer's output.
  void finish(const bfloat16* x, bfloat16* out, int64_t row, int64_t num_rows, const Share& share) const {
    const int64_t place = row * p.output.num_outputs;
    multiply_all(p.output, scratch.attended + row * p.output.num_inputs, x + place, scratch.middle, num_rows, share);
    share.wait();
    norm_all(d.second_norm, scratch.middle, scratch.normed, num_rows, share);
    share.wait();
    if (p.gated.layout == BYTES) {
      multiply_all(p.gated, scratch.normed, nullptr, scratch.both, num_rows, share);
      share.wait();
      gate_all(scratch.both, scratch.gated, p.down.num_inputs, p.gated.gate, num_rows, share);
    } else {
      multiply_all(p.gated, scratch.normed, nullptr, scratch.gated, num_rows, share);
    }
    share.wait();
    multiply_all(p.down, scratch.gated, scratch.middle, out + place, num_rows, share);
  }
};

// Where there are many rows, each thread takes some at a time from product to product, so that what lies between these stays in its cache; else the threads share out
// every product.
static void run_decoder(const PlacedDecoder& placed, const Joined& j, const bfloat16* x, const void* cosines, const void* sines, bfloat16* out, bfloat16* memory,
                        float* attend_scratch, const Share& all) {
  const Decoder& d = *placed.decoder;
  const int64_t num_rows = j.rows->num_tokens, num_chunks = (num_rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
  const bool by_rows = num_rows >= CHUNK_ROWS * all.parts;
  const Products& p = num_rows <= d.most_few ? d.few : d.many;
  const DecoderPass pass = {d, p, DecoderScratch(p, memory, num_rows, by_rows ? CHUNK_ROWS : num_rows, by_rows ? all.part : 0)};
  const auto each_chunk = [&](auto work) {
    all.each(num_chunks, [&](int64_t chunk) { work(chunk * CHUNK_ROWS, std::min<int64_t>(num_rows - chunk * CHUNK_ROWS, CHUNK_ROWS)); });
  };
  if (all.part == 0) point_at(j, pass.scratch.joined, cosines, sines, placed.key_pool, placed.value_pool, pass.scratch.attended);
  if (by_rows) {
    each_chunk([&](int64_t row, int64_t count) { pass.join(x, row, count, Share::alone()); });
  } else {
    pass.join(x, 0, num_rows, all);
    all.wait();
  }
  attend_joined<bfloat16>(j, attend_scratch, all);
  if (by_rows) {
    each_chunk([&](int64_t row, int64_t count) { pass.finish(x, out, row, count, Share::alone()); });
  } else {
    pass.finish(x, out, 0, num_rows, all);
    all.wait();
  }
}

// Layers one after the other, ``out [layers, T, H]`` of ``x [T, H]``; or ``[T, H]`` of the last one, where each layer writes over what it was given.
static void run_decoders(const PlacedDecoder* layers, int num_layers, const Joined& j, const bfloat16* x, const void* cosines, const void* sines, bfloat16* out,
                         bool keeps_all, bfloat16* scratch, float* attend_scratch) {
  const Product& largest = layers[0].decoder->many.gated;
  const int64_t numbers = j.rows->num_tokens * largest.num_inputs;
  const int num_threads = numbers * largest.num_outputs < SERIAL_MULTIPLICATIONS ? 1 : j.num_threads;
  Meeting meeting;
#pragma omp parallel num_threads(num_threads)
  {
    const Share all = Share::among_all(meeting);
    const int64_t step = keeps_all ? numbers : 0;
    for (int i = 0; i < num_layers; i++)
      run_decoder(layers[i], j, i ? out + (i - 1) * step : x, cosines, sines, out + i * step, scratch, attend_scratch, all);
  }
}

#endif

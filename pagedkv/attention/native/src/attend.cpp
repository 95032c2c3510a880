// The C interface of one instruction set's build. No torch, no Python: addresses, strides and numbers in, a status out.
#include "decoder.h"

#if defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t SERIAL_ELEMENTS = 30000;   // below so much work on rows, waking other threads costs more than it gives
constexpr int64_t SERIAL_PRODUCTS = 300000;  // the same, of multiplications with weights

template <class T>
void attend(const Step& step, const Item* items, const Merge* merges, const Counts& counts, float* scratch, int num_threads) {
  if (!is_worth_threads(step, items, counts.items)) num_threads = 1;
  Meeting meeting;
#pragma omp parallel num_threads(num_threads)
  attend_all<T>(step, items, merges, counts, scratch, Share::among_all(meeting));
}

template <class T>
void attend_joined(const Joined& joined, float* scratch, int num_threads) {
  if (joined.rotation->num_rows * joined.rotation->num_heads * joined.rotation->width < SERIAL_ELEMENTS && !is_worth_threads(*joined.step, joined.items, joined.counts->items))
    num_threads = 1;
  Meeting meeting;
#pragma omp parallel num_threads(num_threads)
  attend_joined<T>(joined, scratch, Share::among_all(meeting));
}

void run_layer(const Layer& layer, void (*row)(const Layer&, int64_t), int num_threads) {
  if (layer.num_rows * layer.num_heads * layer.width < SERIAL_ELEMENTS) num_threads = 1;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t r = 0; r < layer.num_rows; r++) row(layer, r);
}

template <class Multiply>
void run_product(const Product& p, int num_threads, Multiply multiply) {
  if (p.num_rows * p.num_inputs * p.num_outputs < SERIAL_PRODUCTS) num_threads = 1;
  Meeting meeting;
#pragma omp parallel num_threads(num_threads)
  multiply(p, Share::among_all(meeting));
}

}  // namespace

// One entry point per operation: 0, or 1 for a dtype that this build does not know.
#define LAYER_ENTRY(name, row)                                                 \
  int32_t name(const Layer* layer, int32_t num_threads) {                      \
    switch (layer->dtype) {                                                    \
      case FLOAT32: run_layer(*layer, row<float>, num_threads); return 0;      \
      case BFLOAT16: run_layer(*layer, row<bfloat16>, num_threads); return 0;  \
      case FLOAT16: run_layer(*layer, row<float16>, num_threads); return 0;    \
    }                                                                          \
    return 1;                                                                  \
  }

extern "C" {

// Changes whenever a struct or a function here does: a library that is left over from another version is not used.
int32_t pagedkv_abi() { return 5; }
int32_t pagedkv_lanes() { return LANES; }
int32_t pagedkv_multiplies_pairs() {
#if defined(PAIRS)
  return 1;
#else
  return 0;
#endif
}
int32_t pagedkv_step_nbytes() { return sizeof(Step); }
int32_t pagedkv_rows_nbytes() { return sizeof(Rows); }
int32_t pagedkv_layer_nbytes() { return sizeof(Layer); }
int32_t pagedkv_joined_nbytes() { return sizeof(Joined); }
int32_t pagedkv_product_nbytes() { return sizeof(Product); }
int32_t pagedkv_decoder_nbytes() { return sizeof(Decoder); }

#if defined(__AMX_TILE__)
// Linux saves the tiles of a process that has asked for them; without, the first such instruction ends it. Returns 0 when they may be used.
int32_t pagedkv_ask_for_tiles() {
#if defined(__linux__)
  constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, ASK, TILE_DATA) ? 1 : 0;
#else
  return 1;
#endif
}
#endif

LAYER_ENTRY(pagedkv_norm, norm_row)
LAYER_ENTRY(pagedkv_gate, gate_row)
LAYER_ENTRY(pagedkv_rotate, rotate_row)

// Returns 0, or 1 for a dtype or a layout that this build does not know.
int32_t pagedkv_multiply(const Product* product, int32_t num_threads) {
  if (product->layout == PAIRED) {
#if defined(PAIRS)
    run_product(*product, num_threads, multiply_all_pairs);
    return 0;
#else
    return 1;
#endif
  }
  switch (product->dtype) {
    case FLOAT32: run_product(*product, num_threads, multiply_all_bytes<float>); return 0;
    case BFLOAT16: run_product(*product, num_threads, multiply_all_bytes<bfloat16>); return 0;
    case FLOAT16: run_product(*product, num_threads, multiply_all_bytes<float16>); return 0;
  }
  return 1;
}

// Counts into ``counts``; fills ``items`` and ``merges`` where they are given.
void pagedkv_plan(const Step* step, Item* items, Merge* merges, Counts* counts) {
  WorkList work;
  work.items = items;
  work.merges = merges;
  cut_step(work, *step);
  *counts = {work.num_items, work.num_merges, work.num_partials, work.partial_rows};
}

int64_t pagedkv_scratch_nbytes(const Step* step, const Counts* counts, int32_t num_threads) {
  const size_t partials = (partial_floats(*step, counts->partial_rows) * counts->partials + 15) / 16 * 16;
  return (partials + thread_floats(*step) * num_threads) * sizeof(float);
}

// Returns 0, or 1 for a dtype that this build does not know.
int32_t pagedkv_attend(const Step* step, const Item* items, const Merge* merges, const Counts* counts, void* scratch, int32_t num_threads) {
  switch (step->dtype) {
    case FLOAT32: attend<float>(*step, items, merges, *counts, (float*)scratch, num_threads); return 0;
    case BFLOAT16: attend<bfloat16>(*step, items, merges, *counts, (float*)scratch, num_threads); return 0;
    case FLOAT16: attend<float16>(*step, items, merges, *counts, (float*)scratch, num_threads); return 0;
  }
  return 1;
}

// Copies the K and V of some tokens to their slots.
void pagedkv_write(const Rows* rows) {
  for (int64_t t = 0; t < rows->num_tokens; t++) write_token(*rows, t);
}

// Rotates, stores and attends: ``pagedkv_rotate``, ``pagedkv_write`` and ``pagedkv_attend`` of one layer. Returns 0, or 1 for a dtype that
// this build does not know.
int32_t pagedkv_attend_joined(const Joined* joined, void* rows, const void* cosines, const void* sines, void* key_pool, void* value_pool,
                              void* output, void* scratch) {
  point_at(*joined, rows, cosines, sines, key_pool, value_pool, output);
  switch (joined->step->dtype) {
    case FLOAT32: attend_joined<float>(*joined, (float*)scratch, joined->num_threads); return 0;
    case BFLOAT16: attend_joined<bfloat16>(*joined, (float*)scratch, joined->num_threads); return 0;
    case FLOAT16: attend_joined<float16>(*joined, (float*)scratch, joined->num_threads); return 0;
  }
  return 1;
}

// Returns 0, or 1 where this build multiplies no pairs.
int32_t pagedkv_run_decoders(const PlacedDecoder* layers, int32_t num_layers, const Joined* joined, const void* x, const void* cosines, const void* sines, void* out,
                             int32_t keeps_all, void* scratch, void* attend_scratch) {
#if defined(PAIRS)
  run_decoders(layers, num_layers, *joined, (const bfloat16*)x, cosines, sines, (bfloat16*)out, keeps_all, (bfloat16*)scratch, (float*)attend_scratch);
  return 0;
#else
  return 1;
#endif
}

}  // extern "C"

// The C interface of one instruction set's build. No torch, no Python: addresses, strides and numbers in, a status out.
#include <atomic>
#include <new>

#include "layers.h"
#include "products.h"
#include "work.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t SERIAL_COST = 20000;      // below so much work, waking other threads costs more than it gives
constexpr int64_t SERIAL_ELEMENTS = 30000;  // the same, of operations on rows
constexpr int64_t SERIAL_PRODUCTS = 300000; // the same, of multiplications with weights

template <class T>
void write_rows(const Step& step, int seq, int kv_head, int first_row, int num_rows, int heads, Sums sums) {
  const int group = heads ? num_rows : step.group();  // rows of one query
  for (int r = 0; r < num_rows; r++) {
    const int row = first_row + r, head = kv_head * step.group() + row % group;
    float total = sums.sum[r], factor = 1;
    if (step.sinks) {
      const float sink = step.sinks[head] * LOG2E, most = sink > sums.most[r] ? sink : sums.most[r];
      factor = exp2(splat(sums.most[r] - most))[0];
      total = total * factor + exp2(splat(sink - most))[0];
    }
    factor /= total;
    T* out = (T*)step.output + (step.cu_seqlens_q[seq] + row / group) * step.output_stride[0] + head * step.output_stride[1];
    const float* value = sums.value + (size_t)r * sums.stride;
    int d = 0;
    if (heads)
      for (; d + 2 * LANES <= step.value_dim; d += 2 * LANES) store_two(out + d, {load(value + d) * splat(factor), load(value + d + LANES) * splat(factor)});
    for (; d < step.value_dim; d += LANES) {
      const Floats x = load(value + d) * splat(factor);
      if (d + LANES <= step.value_dim) store(out + d, x);
      else store_part(out + d, x, step.value_dim - d);
    }
  }
}

INLINE Sums sums_at(const Step& step, float* memory, int rows) { return {memory, memory + rows, memory + 2 * rows, sums_stride(step)}; }

template <class T>
void run_item(const Step& step, const Item& item, float* scratch, float* partials, int64_t partial_rows) {
  const size_t head = partial_floats(step, tile_rows(step));
  float* place = item.partial < 0 ? scratch : partials + partial_floats(step, partial_rows) * item.partial;
  const Sums sums = sums_at(step, place, item.num_rows);
  if (item.heads) attend_few<T>(step, item, scratch + head, sums);
  else attend_many<T>(step, item, scratch + head, sums);
  if (item.partial < 0) write_rows<T>(step, item.seq, item.kv_head, item.first_row, item.num_rows, item.heads, sums);
}

template <class T>
void run_merge(const Step& step, const Merge& merge, float* partials, int64_t partial_rows) {
  const size_t size = partial_floats(step, partial_rows);
  const Sums into = sums_at(step, partials + size * merge.first_partial, merge.num_rows);
  for (int p = 1; p < merge.num_partials; p++) {
    const Sums more = sums_at(step, partials + size * (merge.first_partial + p), merge.num_rows);
    for (int r = 0; r < merge.num_rows; r++) {
      const float most = into.most[r] > more.most[r] ? into.most[r] : more.most[r];
      if (most == MINUS_INFINITY) continue;
      const float a = exp2(splat(into.most[r] - most))[0], b = exp2(splat(more.most[r] - most))[0];
      into.sum[r] = into.sum[r] * a + more.sum[r] * b;
      into.most[r] = most;
      float *x = into.value + (size_t)r * into.stride, *y = more.value + (size_t)r * into.stride;
      for (int d = 0; d < into.stride; d += LANES) store(x + d, fma(load(y + d), splat(b), load(x + d) * splat(a)));
    }
  }
  write_rows<T>(step, merge.seq, merge.kv_head, 0, merge.num_rows, merge.heads, into);
}

size_t thread_floats(const Step& step) {
  const size_t rows = decode_scratch(step) / sizeof(float) + 1;
  return (partial_floats(step, tile_rows(step)) + std::max(rows, tile_floats(step)) + 64) / 16 * 16;
}

template <class T>
void run(const Step& step, const Item* items, int64_t num_items, const Merge* merges, int64_t num_merges, int64_t num_partials, int64_t partial_rows,
         float* scratch, int num_threads) {
  float* partials = scratch;
  float* own = scratch + (partial_floats(step, partial_rows) * num_partials + 15) / 16 * 16;
  const size_t size = thread_floats(step);
  int64_t total = 0;
  for (int64_t i = 0; i < num_items && total < SERIAL_COST; i++) total += cost(items[i]) * step.key_dim / 64;
  if (total < SERIAL_COST) num_threads = 1;
#pragma omp parallel num_threads(num_threads)
  {
#if defined(_OPENMP)
    float* mine = own + size * omp_get_thread_num();
#else
    float* mine = own;
#endif
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_items; i++) run_item<T>(step, items[i], mine, partials, partial_rows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_merges; i++) run_merge<T>(step, merges[i], partials, partial_rows);
  }
  (void)size;
}

struct Rows {
  const void *key, *value;
  void *key_pool, *value_pool;
  const int64_t *blocks, *offsets;
  int64_t key_stride[2], value_stride[2];            // token, head
  int64_t key_pool_stride[3], value_pool_stride[3];  // block, head, token
  int64_t num_tokens;
  int32_t num_kv_heads, key_nbytes, value_nbytes, item_nbytes;
};

// What lies between two products of a layer whose rows hold queries, keys and values side by side. The structs are filled but for
// the addresses of one layer.
struct Joined {
  Layer* rotation;  // of queries and keys, in place
  Rows* rows;
  Step* step;
  const Item* items;
  const Merge* merges;
  const int64_t* counts;
  int64_t key_offset, value_offset;  // bytes from a row's start
  int32_t num_threads;
};

INLINE void run_layer(const Layer& layer, void (*row)(const Layer&, int64_t), int num_threads) {
  if (layer.num_rows * layer.num_heads * layer.width < SERIAL_ELEMENTS) num_threads = 1;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t r = 0; r < layer.num_rows; r++) row(layer, r);
}

template <class T>
void run_product(const Product& p, int num_threads) {
  const int64_t panels = (p.num_outputs + OUTPUTS - 1) / OUTPUTS;
  if (p.num_rows * p.num_inputs * p.num_outputs < SERIAL_PRODUCTS) num_threads = 1;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t panel = 0; panel < panels; panel++)
    for (int row = 0; row < p.num_rows; row += ROWS_AT_ONCE) multiply_panel<T>(p, panel, row);
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
int32_t pagedkv_abi() { return 4; }
int32_t pagedkv_lanes() { return LANES; }
int32_t pagedkv_step_nbytes() { return sizeof(Step); }
int32_t pagedkv_rows_nbytes() { return sizeof(Rows); }
int32_t pagedkv_layer_nbytes() { return sizeof(Layer); }
int32_t pagedkv_joined_nbytes() { return sizeof(Joined); }
int32_t pagedkv_product_nbytes() { return sizeof(Product); }

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

// Returns 0, or 1 for a dtype that this build does not know.
int32_t pagedkv_multiply(const Product* product, int32_t num_threads) {
  switch (product->dtype) {
    case FLOAT32: run_product<float>(*product, num_threads); return 0;
    case BFLOAT16: run_product<bfloat16>(*product, num_threads); return 0;
    case FLOAT16: run_product<float16>(*product, num_threads); return 0;
  }
  return 1;
}

// Counts into ``counts``: items, merges, partial sums, rows of a partial sum; fills ``items`` and ``merges`` where they are given.
void pagedkv_plan(const Step* step, Item* items, Merge* merges, int64_t* counts) {
  WorkList work;
  work.items = items;
  work.merges = merges;
  cut_step(work, *step);
  counts[0] = work.num_items;
  counts[1] = work.num_merges;
  counts[2] = work.num_partials;
  counts[3] = work.partial_rows;
}

int64_t pagedkv_scratch_nbytes(const Step* step, const int64_t* counts, int32_t num_threads) {
  const size_t partials = (partial_floats(*step, counts[3]) * counts[2] + 15) / 16 * 16;
  return (partials + thread_floats(*step) * num_threads) * sizeof(float);
}

// Returns 0, or 1 for a dtype that this build does not know.
int32_t pagedkv_attend(const Step* step, const Item* items, const Merge* merges, const int64_t* counts, void* scratch, int32_t num_threads) {
  switch (step->dtype) {
    case FLOAT32: run<float>(*step, items, counts[0], merges, counts[1], counts[2], counts[3], (float*)scratch, num_threads); return 0;
    case BFLOAT16: run<bfloat16>(*step, items, counts[0], merges, counts[1], counts[2], counts[3], (float*)scratch, num_threads); return 0;
    case FLOAT16: run<float16>(*step, items, counts[0], merges, counts[1], counts[2], counts[3], (float*)scratch, num_threads); return 0;
  }
  return 1;
}

// Copies the K and V of some tokens to their slots.
void pagedkv_write(const Rows* rows) {
  const Rows r = *rows;
  for (int64_t t = 0; t < r.num_tokens; t++)
    for (int h = 0; h < r.num_kv_heads; h++) {
      const int64_t block = r.blocks[t], offset = r.offsets[t];
      memcpy((char*)r.key_pool + (block * r.key_pool_stride[0] + h * r.key_pool_stride[1] + offset * r.key_pool_stride[2]) * r.item_nbytes,
             (const char*)r.key + (t * r.key_stride[0] + h * r.key_stride[1]) * r.item_nbytes, r.key_nbytes);
      memcpy((char*)r.value_pool + (block * r.value_pool_stride[0] + h * r.value_pool_stride[1] + offset * r.value_pool_stride[2]) * r.item_nbytes,
             (const char*)r.value + (t * r.value_stride[0] + h * r.value_stride[1]) * r.item_nbytes, r.value_nbytes);
    }
}

// Rotates, stores and attends: ``pagedkv_rotate``, ``pagedkv_write`` and ``pagedkv_attend`` of one layer. Returns 0, or 1 for a dtype that
// this build does not know.
int32_t pagedkv_attend_joined(const Joined* joined, void* rows, const void* cosines, const void* sines, void* key_pool, void* value_pool,
                              void* output, void* scratch) {
  const Joined& j = *joined;
  j.rotation->x = j.rotation->out = rows;
  j.rotation->y = cosines;
  j.rotation->weight = sines;
  j.rows->key = (char*)rows + j.key_offset;
  j.rows->value = (char*)rows + j.value_offset;
  j.step->query = rows;
  j.step->output = output;
  j.rows->key_pool = key_pool;
  j.rows->value_pool = value_pool;
  j.step->key = key_pool;
  j.step->value = value_pool;
  if (pagedkv_rotate(j.rotation, j.num_threads)) return 1;
  pagedkv_write(j.rows);
  return pagedkv_attend(j.step, j.items, j.merges, j.counts, scratch, j.num_threads);
}

}  // extern "C"

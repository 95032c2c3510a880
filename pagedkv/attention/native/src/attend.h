// Attention of one step: its items and merges, shared out to threads.
#pragma once

#include "threads.h"
#include "work.h"

constexpr int64_t SERIAL_COST = 20000;  // below so much work, waking other threads costs more than it gives

template <class T>
static void write_rows(const Step& step, int seq, int kv_head, int first_row, int num_rows, int heads, Sums sums) {
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

INLINE Sums sums_at(const Step& step, float* memory, int rows) { return {memory, memory + rows, memory + sums_start(rows), sums_stride(step)}; }

template <class T>
static void run_item(const Step& step, const Item& item, const Item* next, bool is_asked, float* scratch, float* partials, int64_t partial_rows) {
  const size_t head = partial_floats(step, tile_rows(step));
  float* place = item.partial < 0 ? scratch : partials + partial_floats(step, partial_rows) * item.partial;
  const Sums sums = sums_at(step, place, item.num_rows);
  if (item.heads) attend_few<T>(step, item, next, is_asked, scratch + head, sums);
  else attend_many<T>(step, item, scratch + head, sums);
  if (item.partial < 0) write_rows<T>(step, item.seq, item.kv_head, item.first_row, item.num_rows, item.heads, sums);
}

// Puts the sums of a sequence's parts together in those of the first, as many parts at once as there are lanes.
template <class T>
static void run_merge(const Step& step, const Merge& merge, float* partials, int64_t partial_rows) {
  const size_t size = partial_floats(step, partial_rows);
  const auto part = [&](int p) { return sums_at(step, partials + size * (merge.first_partial + p), merge.num_rows); };
  const Sums into = part(0);
  for (int r = 0; r < merge.num_rows; r++) {
    float most = into.most[r], sum = 0;
    for (int p = 1; p < merge.num_partials; p++) most = std::max(most, part(p).most[r]);
    if (most == MINUS_INFINITY) continue;
    float* value = into.value + (size_t)r * into.stride;
    for (int first = 0; first < merge.num_partials; first += LANES) {
      const int count = std::min(merge.num_partials - first, LANES);
      const float* values[LANES];
      Floats factors = splat(MINUS_INFINITY);
      for (int i = 0; i < count; i++) {
        const Sums more = part(first + i);
        factors[i] = more.most[r] - most;
        values[i] = more.value + (size_t)r * into.stride;
      }
      factors = exp2(factors);
      for (int i = 0; i < count; i++) sum += part(first + i).sum[r] * factors[i];
      for (int d = 0; d < into.stride; d += LANES) {
        Floats total = first ? load(value + d) : Floats{};
        for (int i = 0; i < count; i++) total = fma(load(values[i] + d), splat(factors[i]), total);
        store(value + d, total);
      }
    }
    into.most[r] = most;
    into.sum[r] = sum;
  }
  write_rows<T>(step, merge.seq, merge.kv_head, 0, merge.num_rows, merge.heads, into);
}

INLINE size_t thread_floats(const Step& step) {
  const size_t rows = decode_scratch(step) / sizeof(float) + 1;
  return (partial_floats(step, tile_rows(step)) + std::max(rows, tile_floats(step)) + 64) / 16 * 16;
}

// What ``pagedkv_plan`` counted.
struct Counts {
  int64_t items, merges, partials, partial_rows;
};

INLINE bool is_worth_threads(const Step& step, const Item* items, int64_t num_items) {
  int64_t total = 0;
  for (int64_t i = 0; i < num_items && total < SERIAL_COST; i++) total += cost(items[i]) * step.key_dim / 64;
  return total >= SERIAL_COST;
}

template <class T>
static void attend_all(const Step& step, const Item* items, const Merge* merges, const Counts& counts, float* scratch, const Share& share) {
  float* mine = scratch + (partial_floats(step, counts.partial_rows) * counts.partials + 15) / 16 * 16 + thread_floats(step) * share.part;
  const Item* asked = nullptr;  // of whose rows the first are on their way
  const auto is_decode = [&](int64_t i) { return i >= 0 && i < counts.items && items[i].heads; };
  share.each_with_next(counts.items, is_decode, [&](int64_t i, int64_t after) {
    const Item* next = is_decode(i) && is_decode(after) ? items + after : nullptr;
    run_item<T>(step, items[i], next, asked == items + i, mine, scratch, counts.partial_rows);
    asked = next;
  });
  if (counts.merges) share.each(counts.merges, [&](int64_t i) { run_merge<T>(step, merges[i], scratch, counts.partial_rows); });
}

// Which pieces a step is cut into. A cut depends on the sequence alone, never on the number of threads or on what else is in the batch,
// so results do not either.
#pragma once

#include <algorithm>

#include "pair_rows.h"
#include "rows.h"
#include "tiles.h"

constexpr int MOST_ROWS = 16;  // of a decode: with larger groups the tile kernel is faster, packing included

INLINE int sums_stride(const Step& step) { return round_up(step.value_dim, PANEL); }
INLINE int sums_start(int rows) { return round_up(2 * rows, 16); }  // of V's, behind two numbers for each row: stores across lines of the cache cost twice
INLINE size_t partial_floats(const Step& step, int rows) { return sums_start(rows) + (size_t)rows * sums_stride(step); }

// Takes what is cut. Without room it only counts.
struct WorkList {
  Item* items = nullptr;
  Merge* merges = nullptr;
  int64_t num_items = 0, num_merges = 0, num_partials = 0, partial_rows = 1;

  void add(const Item& item) {
    if (items) items[num_items] = item;
    num_items++;
  }
  void add(const Merge& merge) {
    if (merges) merges[num_merges] = merge;
    num_merges++;
  }
};

// One run of rows over positions [low, high), cut at multiples of ``part``.
INLINE void cut_positions(WorkList& work, Item item, int part) {
  const int low = item.low, high = item.high, first = low / part, last = (high - 1) / part;
  if (first == last) {
    work.add(item);
    return;
  }
  work.add(Merge{item.seq, item.kv_head, item.num_rows, (int32_t)work.num_partials, last - first + 1, item.heads, {}});
  work.partial_rows = std::max<int64_t>(work.partial_rows, item.num_rows);
  for (int p = first; p <= last; p++) {
    item.low = std::max(low, p * part);
    item.high = std::min(high, (p + 1) * part);
    item.partial = (int32_t)work.num_partials++;
    work.add(item);
  }
}

static void cut_sequence(WorkList& work, const Step& step, int seq) {
  const int queries = step.num_queries(seq), length = step.seq_lens[seq], rows = queries * step.group();
  if (queries < 1) return;
  const bool tiled = queries > 1 || step.group() > MOST_ROWS || step.batch_invariant;
  if (!tiled) {
    const int at_once = decode_heads(step);
    for (int head = 0; head < step.num_kv_heads; head += at_once) {
      const int heads = std::min(at_once, step.num_kv_heads - head);
      cut_positions(work, {seq, head, 0, heads * step.group(), step.first_visible(length - 1), length, -1, heads}, PART);
    }
    return;
  }
  // Rows of one tile belong to whole queries where they can, so that a tile's positions end early. Tiles are of about the same size: each packs K and V anew.
  const int room = tile_rows(step), most = step.group() > room ? room : room / step.group() * step.group(), tiles = (rows + most - 1) / most;
  const int even = step.group() > room ? most : (queries + tiles - 1) / tiles * step.group();
  for (int head = 0; head < step.num_kv_heads; head++)
    for (int first = 0; first < rows; first += even) {
      const int count = std::min(even, rows - first);
      const int query = first / step.group(), last = (first + count - 1) / step.group();
      Item item = {seq, head, first, count, step.first_visible(length - queries + query), length - queries + last + 1, -1, 0};
      if (rows > most || step.batch_invariant) work.add(item);
      else cut_positions(work, item, TILED_PART);
    }
}

INLINE int64_t cost(const Item& item) { return (int64_t)(item.high - item.low) * (item.heads ? 12 * item.heads + item.num_rows : std::max(item.num_rows, 24)); }

static void cut_step(WorkList& work, const Step& step) {
  for (int seq = 0; seq < step.num_seqs; seq++) cut_sequence(work, step, seq);
  // The longest first: what is begun last is short, and the threads end together.
  if (work.items)
    std::stable_sort(work.items, work.items + work.num_items, [](const Item& a, const Item& b) { return cost(a) > cost(b); });
}

// The way of a decode through K and V. Rows of some heads lie scattered in blocks: they are read by turns, some rows of one head that lie side by side and then the
// next head's, and what comes some turns later is prefetched by software, for the hardware's prefetcher stops at every block. Each line is asked for beside the
// arithmetic of another, and more than once: a processor forgets what it is asked for while all its slots for lines on their way are taken (Zen 5 one in eight of 48
// lines at once).
#pragma once

#include <algorithm>

#include "lanes.h"
#include "step.h"

constexpr int PART = 256;  // positions that are summed up at once; longer sequences are cut at its multiples, whatever else is in the batch
constexpr int TURN = 16, TURN_NBYTES = 4096;  // rows of a turn at most, and bytes where rows are wide
constexpr int ASKS = LANES == 16 ? 5 : 2;  // for each line, evenly over the way; they cost less than they give as long as the arithmetic has time left
constexpr int AHEAD_NBYTES = 20480, MOST_AHEAD = 64;  // from what is in use to what is asked for first; and in turns
constexpr int NEAR_NBYTES = 16384;  // of one head in a block: below, several heads take turns, so that more is read that lies side by side

INLINE int row_nbytes(const Step& step) { return step.key_dim * (step.dtype == FLOAT32 ? 4 : 2); }

// K/V heads of one item. What all heads of a block hold lies side by side: where one head's share is small, several are read by turns.
INLINE int heads_at_once(const Step& step) {
  const int nbytes = step.block_size * row_nbytes(step), near = nbytes < NEAR_NBYTES ? 2 * NEAR_NBYTES / nbytes : 1;
  const int most = 64 / step.group() > 1 ? 64 / step.group() : 1, heads = near < most ? near : most;
  return heads < step.num_kv_heads ? heads : step.num_kv_heads;
}

// Positions of one turn. They divide a block: rows of a turn lie at one stride from each other.
INLINE int turn_length(const Step& step) {
  int length = std::max(4, std::min(TURN, TURN_NBYTES / row_nbytes(step)));
  while (step.block_size % length) length--;
  return length;
}

// How many turns lie between what is in use and what is asked for first.
INLINE int turns_ahead(const Step& step) { return std::max(ASKS, std::min(MOST_AHEAD, AHEAD_NBYTES / (turn_length(step) * row_nbytes(step)))); }

// Turns of K, or of V, of an item, at most: its first and its last may be incomplete.
INLINE int most_turns(const Step& step) { return (PART / turn_length(step) + 2) * heads_at_once(step); }

// Addresses of an item's turns and of the next one's first; whole lines of the cache.
INLINE int num_addresses(const Step& step) { return round_up(2 * most_turns(step) + turns_ahead(step) + 1, 8); }

// Where the item's turns lie in K or V: the first row of each, up to ``end``. Returns where the next address goes.
template <class T>
INLINE const T** turn_addresses(const T** turns, const T** end, const void* base, const int64_t* stride, const Step& step, const Item& item, int length) {
  const int32_t* table = step.tables + item.seq * step.table_stride;
  for (int position = item.low / length * length; position < item.high; position += length) {
    const T* row = (const T*)base + table[position / step.block_size] * stride[0] + item.kv_head * stride[1] + position % step.block_size * stride[2];
    for (int head = 0; head < item.heads && turns < end; head++) *turns++ = row + head * stride[1];
  }
  return turns;
}

template <class T>
INLINE void prefetch_row(const T* row, int dim) {
  for (int byte = 0; byte < dim * (int)sizeof(T); byte += 64) __builtin_prefetch((const char*)row + byte, 0, 3);
}

// Rows of one turn, and those of turns to come that are asked for while these are in use: of each the same elements.
template <class T>
struct Turn {
  const T* rows;
  int64_t stride;
  const T* asked[ASKS];
  bool asks;  // not where the rows have been in use before
};

// Asks for the lines of COUNT elements from ``place`` on, which is ``d`` elements behind a row's start. Some may be behind its end; parts of one line share what
// is asked for it. The hint: they are read once, and need no place in the outer caches.
template <int COUNT, class T>
INLINE void prefetch_part(const Turn<T>& turn, int64_t place, int d) {
  constexpr int NBYTES = COUNT * sizeof(T), PARTS = NBYTES < 64 ? 64 / NBYTES : 1, NUM_ASKS = std::max(1, ASKS / PARTS);
  const int ask = PARTS == 1 ? 0 : d / COUNT % PARTS * NUM_ASKS;
  if (!turn.asks || ask >= ASKS) return;
#pragma GCC unroll 8
  for (int i = 0; i < NUM_ASKS; i++) {
    const char* p = (const char*)(turn.asked[ask + i] + place);
#pragma GCC unroll 8
    for (int byte = 0; byte < NBYTES; byte += 64) __builtin_prefetch(p + byte, 0, 0);
  }
}

// Some queries' part of one turn.
struct Run {
  int turn, skip, count;  // its number, rows at its start that are not the item's, and those that are
  int row, left;          // first query, and queries of the head from it on
  int from;               // first position, counted from the item's
};

// Calls ``work`` for each turn of K or V, numbered from ``number`` on, and each four queries of a head.
template <class F>
INLINE void each_run(const Item& item, int number, int length, int group, F&& work) {
  const int skipped = item.low % length;
  for (int start = item.low - skipped; start < item.high; start += length) {
    const int skip = start < item.low ? skipped : 0, count = std::min(item.high - start, length) - skip;
    for (int head = 0; head < item.heads; head++, number++)
      for (int h = 0; h < group; h += 4) work(Run{number, skip, count, head * group + h, group - h, start + skip - item.low});
  }
}

// The turns of an item: those of K, those of V, and the first ones of what the same thread does next.
template <class T>
struct Turns {
  const T** at;
  int count, length, ahead, dim;

  Turns(const Step& step, const Item& item, const Item* next, const T** memory) : at(memory), length(turn_length(step)), ahead(turns_ahead(step)), dim(step.key_dim) {
    const T** const most = memory + most_turns(step);
    const T** end = turn_addresses(memory, most, step.key, step.key_stride, step, item, length);
    count = (int)(end - memory);
    end = turn_addresses(end, end + count, step.value, step.value_stride, step, item, length);
    const T** const last = end + ahead + 1;
    if (next) end = turn_addresses(end, last, step.key, step.key_stride, step, *next, length);
    std::fill(end, last, end[-1]);
  }

  // The run's rows.
  Turn<T> turn(const Run& run, int64_t stride, bool asks) const {
    Turn<T> turn = {at[run.turn] + run.skip * stride, stride, {}, asks};
#pragma GCC unroll 8
    for (int i = 0; i < ASKS; i++) turn.asked[i] = at[run.turn + lead(i)] + run.skip * stride;
    // Of what the next turn asks for the first line: the processor has to look up where a page lies, and forgets less of the rest if it knows.
    if (asks) __builtin_prefetch(at[run.turn + 1 + lead(0)], 0, 0);
    return turn;
  }

  // Ask ``i`` is for what is so many turns ahead.
  int lead(int i) const { return (ahead * (ASKS - i) + ASKS - 1) / ASKS; }

  // Behind an incomplete turn: what would have been asked for beside the rows that it has not.
  void ask_rest(const Run& run, int64_t stride) const {
    if (run.count == length) return;
    for (int r = 0; r < length; r++)
      if (r < run.skip || r >= run.skip + run.count)
        for (int i = 0; i < ASKS; i++) prefetch_row(at[run.turn + lead(i)] + r * stride, dim);
  }
};

// Products of bfloat16 with weights packed in pairs: on AMX tiles where the build has them, else by AVX-512 BF16. Few rows wait for their weights, which are read once
// and ahead of their use; many find them in the cache, one block of rows after the other.
//
// A row's sums are made in the order of the inputs whatever rows are beside it and however many threads run, so neither changes a bit.
#pragma once

#include "layers.h"
#include "pairs.h"
#include "products.h"
#include "threads.h"

#if defined(PAIRS)

constexpr int TILE = 16;  // outputs, or pairs of inputs, or rows of x, of one tile
constexpr int TILE_PAIRS = TILE * LANES;
constexpr int CHUNK_ROWS = 256;  // of x, that stay in the cache while a thread's weights pass

// A row's sums of a panel's outputs.
typedef float PanelSums[2][LANES];

// The hint with which weights are asked for that are used once. Without AMX they go past the outer caches: steps of up to twelve streams were 5 to 9 %
// shorter for it on Zen 5. With AMX that was not tried.
#if defined(TILES)
constexpr int ONCE = 2;
#else
constexpr int ONCE = 0;
#endif

// The weights that are used next, asked for bit by bit while others are multiplied: a core alone asks for too little memory at a time.
struct Ahead {
  const Pair* next;
  int lines;  // of 64 bytes, for each two tiles that are multiplied

  // Of one block of rows the rest of its panel and the beginning of the next; of more the panels that follow, shared out to the blocks.
  Ahead(const Pair* weight, int64_t panel_pairs, int num_panels, int64_t num_blocks)
      : next(weight + (num_blocks > 1 ? num_panels * panel_pairs : NEAR)), lines((int)((2 * TILE + num_blocks - 1) / num_blocks)) {}

  inline __attribute__((always_inline)) void ask() {
    if (lines == 2 * TILE)
      for (int line = 0; line < 2 * TILE; line++, next += LANES) __builtin_prefetch(next, 0, ONCE);
    else
      for (int line = 0; line < lines; line++, next += LANES) __builtin_prefetch(next, 0, 2);
  }
  static constexpr int NEAR = 8 * TILE_PAIRS;
};

#if defined(TILES)

constexpr int ROWS_TOGETHER = 2 * TILE;  // of x, multiplied with both tiles of a panel at once

// Sums of a block of rows and a panel that wait to be finished, a row at a time: between the multiplications of the next block, so that neither waits for the other.
template <class Finish>
class Waiting {
 public:
  explicit Waiting(Finish finish) : finish(finish) {}
  ~Waiting() { finish_all(); }

  // Where the next block's sums go. Their turn comes with ``wait``.
  PanelSums* next_sums() { return sums[place ^ 1]; }
  inline __attribute__((always_inline)) void wait(int next_panel, int64_t row, int count) {
    finish_all();
    place ^= 1;
    panel = next_panel;
    first_row = row;
    num_rows = count;
    done = 0;
  }
  inline __attribute__((always_inline)) void finish_some(int most) {
    for (; most > 0 && done < num_rows; most--, done++) finish(panel, first_row + done, 1, sums[place] + done);
  }

 private:
  Finish finish;
  int place = 0, panel = 0, num_rows = 0, done = 0;
  int64_t first_row = 0;
  alignas(64) PanelSums sums[2][ROWS_TOGETHER];

  inline __attribute__((always_inline)) void finish_all() { finish_some(ROWS_TOGETHER); }
};

// The sums of BLOCKS tiles of x with a panel.
template <int BLOCKS, class Finish>
INLINE void multiply_tiles(const bfloat16* x, int64_t num_inputs, const Pair* weight, Ahead& ahead, Waiting<Finish>& waiting) {
  const size_t stride = num_inputs * sizeof(bfloat16);
  const int rows_beside = (int)((ROWS_TOGETHER * DEPTH + num_inputs - 1) / num_inputs);
  PanelSums* sums = waiting.next_sums();
  _tile_zero(0);
  _tile_zero(1);
  if (BLOCKS == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  // Weights pass by: the hint in their loads keeps them from pushing x out of the innermost cache.
  for (int64_t k = 0; k < num_inputs; k += DEPTH, weight += 2 * TILE_PAIRS) {
    _tile_loadd(4, x + k, stride);
    _tile_stream_loadd(6, weight, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, weight + TILE_PAIRS, 64);
    _tile_dpbf16ps(1, 4, 7);
    ahead.ask();
    if (BLOCKS == 2) {
      _tile_loadd(5, x + TILE * num_inputs + k, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    waiting.finish_some(rows_beside);
  }
  settle();
  _tile_stored(0, sums[0][0], sizeof *sums);
  _tile_stored(1, sums[0][1], sizeof *sums);
  if (BLOCKS == 2) {
    _tile_stored(2, sums[TILE][0], sizeof *sums);
    _tile_stored(3, sums[TILE][1], sizeof *sums);
  }
  settle();
}

// Calls ``finish(panel, row, count, sums)`` for all rows of x, some at a time, and each of some panels. A block of rows stays in the innermost cache meanwhile, and results of a row are written
// side by side.
template <class Finish>
INLINE void multiply_blocks(const bfloat16* x, int64_t num_rows, int64_t num_inputs, const Pair* weight, int num_panels, Finish finish) {
  Waiting<Finish> waiting(finish);
  const int64_t whole = num_rows / ROWS_TOGETHER * ROWS_TOGETHER, rest = num_rows - whole, panel_pairs = num_inputs / DEPTH * 2 * TILE_PAIRS;
  Ahead ahead(weight, panel_pairs, num_panels, (num_rows + ROWS_TOGETHER - 1) / ROWS_TOGETHER);
  if (whole) {
    const Tiles tiles;
    for (int64_t row = 0; row < whole; row += ROWS_TOGETHER)
      for (int panel = 0; panel < num_panels; panel++) {
        multiply_tiles<2>(x + row * num_inputs, num_inputs, weight + panel * panel_pairs, ahead, waiting);
        waiting.wait(panel, row, ROWS_TOGETHER);
      }
  }
  if (rest) {
    const Tiles tiles(std::min<int>(rest, TILE), std::max<int>(rest - TILE, 1));
    for (int panel = 0; panel < num_panels; panel++) {
      if (rest > TILE) multiply_tiles<2>(x + whole * num_inputs, num_inputs, weight + panel * panel_pairs, ahead, waiting);
      else multiply_tiles<1>(x + whole * num_inputs, num_inputs, weight + panel * panel_pairs, ahead, waiting);
      waiting.wait(panel, whole, (int)rest);
    }
  }
}

#else

constexpr int ROWS_TOGETHER = 12;  // of x: with their sums, two registers of weights and one of x, they fill the registers

template <int ROWS>
INLINE void multiply_rows_of_pairs(const bfloat16* x, int64_t num_inputs, const Pair* weight, Ahead& ahead, PanelSums* sums) {
  __m512 sum[ROWS][2] = {};
  for (int64_t k = 0; k < num_inputs; k += DEPTH, weight += 2 * TILE_PAIRS) {
    ahead.ask();
    for (int pair = 0; pair < TILE; pair++) {
      const __m512bh first = (__m512bh)_mm512_loadu_si512(weight + pair * LANES), second = (__m512bh)_mm512_loadu_si512(weight + TILE_PAIRS + pair * LANES);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; r++) {
        int both;
        memcpy(&both, x + r * num_inputs + k + 2 * pair, sizeof both);
        const __m512bh input = (__m512bh)_mm512_set1_epi32(both);
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], input, first);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], input, second);
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int tile = 0; tile < 2; tile++) store(sums[r][tile], (Floats)sum[r][tile]);
}

// As above, for as many rows as there are, at most ROWS.
template <int ROWS = ROWS_TOGETHER>
INLINE void multiply_some(const bfloat16* x, int rows, int64_t num_inputs, const Pair* weight, Ahead& ahead, PanelSums* sums) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return multiply_some<ROWS - 1>(x, rows, num_inputs, weight, ahead, sums);
  multiply_rows_of_pairs<ROWS>(x, num_inputs, weight, ahead, sums);
}

template <class Finish>
INLINE void multiply_blocks(const bfloat16* x, int64_t num_rows, int64_t num_inputs, const Pair* weight, int num_panels, Finish finish) {
  alignas(64) PanelSums sums[ROWS_TOGETHER];
  const int64_t panel_pairs = num_inputs / DEPTH * 2 * TILE_PAIRS, num_blocks = (num_rows + ROWS_TOGETHER - 1) / ROWS_TOGETHER;
  Ahead ahead(weight, panel_pairs, num_panels, num_blocks);
  // Blocks of about the same size: of a few rows alone, the multiplications would wait for each other.
  const auto first_row = [&](int64_t block) { return num_rows * block / num_blocks; };
  for (int64_t block = 0; block < num_blocks; block++) {
    const int64_t row = first_row(block);
    const int rows = (int)(first_row(block + 1) - row);
    for (int panel = 0; panel < num_panels; panel++) {
      multiply_some(x + row * num_inputs, rows, num_inputs, weight + panel * panel_pairs, ahead, sums);
      finish(panel, row, rows, sums);
    }
  }
}

#endif

// Sixteen sums of a row to where they go.
INLINE void finish_outputs(const Product& p, const float* sums, int64_t row, int64_t output) {
  const int count = (int)std::min<int64_t>(p.num_outputs - output, LANES);
  if (count <= 0) return;
  const int64_t place = row * p.num_outputs + output;
  Floats result = load(sums);
  if (p.bias) result += load(p.bias + output);
  if (p.added) result += count == LANES ? load((const bfloat16*)p.added + place) : load_part((const bfloat16*)p.added + place, count);
  if (count == LANES) store((bfloat16*)p.out + place, result);
  else store_part((bfloat16*)p.out + place, result, count);
}

// The same of sixteen outputs of each half, rounded before and after the gate as the model's code does it. Some rows at once: one alone waits for most of its instructions.
template <int ROWS>
INLINE void finish_gated_rows(const Product& p, const PanelSums* sums, int64_t row, int64_t output) {
  const int64_t half = p.num_outputs / 2;
  Floats gate[ROWS], up[ROWS];
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; r++) {
    gate[r] = load(sums[r][0]);
    up[r] = load(sums[r][1]);
    if (p.bias) {
      gate[r] += load(p.bias + output);
      up[r] += load(p.bias + half + output);
    }
    gate[r] = Rounded<bfloat16>::of(gate[r]);
    up[r] = Rounded<bfloat16>::of(up[r]);
  }
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; r++) gate[r] = Rounded<bfloat16>::of(p.gate == SILU ? silu(gate[r]) : gelu_tanh(gate[r]));
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; r++) store((bfloat16*)p.out + (row + r) * half + output, gate[r] * up[r]);
}

INLINE void finish_gated(const Product& p, const PanelSums* sums, int64_t row, int count, int64_t output) {
  int r = 0;
  for (; r + 3 <= count; r += 3) finish_gated_rows<3>(p, sums + r, row + r, output);
  for (; r < count; r++) finish_gated_rows<1>(p, sums + r, row + r, output);
}

// One row's sums of 32 outputs that lie side by side: a whole line of memory at once.
INLINE void finish_line(const Product& p, const PanelSums& sums, int64_t row, int64_t output) {
  const int64_t place = row * p.num_outputs + output;
  Floats first = load(sums[0]), second = load(sums[1]);
  if (p.bias) {
    first += load(p.bias + output);
    second += load(p.bias + output + LANES);
  }
  if (p.added) {
    first += load((const bfloat16*)p.added + place);
    second += load((const bfloat16*)p.added + place + LANES);
  }
  _mm512_storeu_si512((bfloat16*)p.out + place, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}

// Some rows with some panels.
static void multiply_pair_panels(const Product& p, int64_t first_panel, int num_panels, int64_t first_row, int64_t num_rows) {
  const Pair* weight = (const Pair*)p.weight + first_panel * (p.num_inputs / DEPTH) * 2 * TILE_PAIRS;
  const bfloat16* x = (const bfloat16*)p.x + first_row * p.num_inputs;
  const auto multiply = [&](auto finish) {
    multiply_blocks(x, num_rows, p.num_inputs, weight, num_panels, [&](int panel, int64_t row, int count, const PanelSums* sums) {
      finish(sums, first_row + row, count, (first_panel + panel) * (p.halves ? TILE : 2 * TILE));
    });
  };
  if (p.gate >= 0) multiply([&](const PanelSums* sums, int64_t row, int count, int64_t output) { finish_gated(p, sums, row, count, output); });
  else if (p.halves || (first_panel + num_panels) * 2 * TILE > p.num_outputs)
    multiply([&](const PanelSums* sums, int64_t row, int count, int64_t output) {
      for (int r = 0; r < count; r++) {
        finish_outputs(p, sums[r][0], row + r, output);
        finish_outputs(p, sums[r][1], row + r, output + (p.halves ? p.num_outputs / 2 : TILE));
      }
    });
  else
    multiply([&](const PanelSums* sums, int64_t row, int count, int64_t output) {
      for (int r = 0; r < count; r++) finish_line(p, sums[r], row + r, output);
    });
}

// Panels that a block of rows passes before the next block comes: several where there are many blocks and one stays in the innermost cache, so that what is written of a
// row lies side by side.
INLINE int panels_together(const Product& p) { return p.num_rows > 2 * ROWS_TOGETHER && p.num_inputs <= 768 ? 4 : 1; }

static void multiply_all_pairs(const Product& p, const Share& share) {
  const int64_t panels = (p.num_outputs + 2 * TILE - 1) / (2 * TILE), begin = share.begin(panels), end = share.end(panels);
  const int together = panels_together(p);
  for (int64_t row = 0; row < p.num_rows; row += CHUNK_ROWS)
    for (int64_t panel = begin; panel < end; panel += together)
      multiply_pair_panels(p, panel, (int)std::min<int64_t>(end - panel, together), row, std::min<int64_t>(p.num_rows - row, CHUNK_ROWS));
}

#endif

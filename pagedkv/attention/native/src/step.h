// What the caller hands over: one layer's tensors and one step's tables, all by address and stride. Mirrored field by field in library.py.
#pragma once

#include <cstdint>

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum MaskKind : int32_t { CAUSAL = 0, SLIDING = 1, CHUNKED = 2 };

struct Step {
  // Of the layer; strides in elements, the last dimension contiguous.
  const void* query;       // [T, Hq, Dk]
  void* output;            // [T, Hq, Dv]
  const void* key;         // [N, Hkv, B, Dk]
  const void* value;       // [N, Hkv, B, Dv]
  const float* sinks;      // [Hq] or null
  const float* slopes;     // [Hq] or null
  // Of the step.
  const int32_t* tables;   // [S, M]
  const int32_t* cu_seqlens_q;  // [S + 1]
  const int32_t* seq_lens;      // [S]
  int64_t table_stride;
  int64_t query_stride[2];   // token, head
  int64_t output_stride[2];  // token, head
  int64_t key_stride[3];     // block, head, token
  int64_t value_stride[3];   // block, head, token
  int32_t num_seqs;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t key_dim;
  int32_t value_dim;
  int32_t block_size;
  int32_t dtype;
  int32_t mask;
  int32_t mask_size;
  int32_t batch_invariant;
  float scale;
  float softcap;  // 0 for none

  int group() const { return num_heads / num_kv_heads; }
  int num_queries(int seq) const { return cu_seqlens_q[seq + 1] - cu_seqlens_q[seq]; }

  // The first position that a query at ``position`` sees.
  int first_visible(int position) const {
    if (mask == SLIDING) return position >= mask_size ? position - mask_size + 1 : 0;
    if (mask == CHUNKED) return position - position % mask_size;
    return 0;
  }
};

// A piece of work that one thread does alone: some rows (query, head of the group) of one K/V head, or one query of several, over some positions. It writes either
// the output of these rows, or, where ``partial`` is not -1, sums that ``Merge`` puts together.
struct Item {
  int32_t seq, kv_head;
  int32_t first_row, num_rows;  // row = query * group + head in the group, counted from the sequence's first query of the step
  int32_t low, high;            // positions of K and V
  int32_t partial;              // place among the partial sums, or -1
  int32_t heads;                // K/V heads from kv_head on that the row kernel reads by turns; 0 for one head by the tile kernel
};

struct Merge {
  int32_t seq, kv_head, num_rows, first_partial, num_partials, heads, reserved[2];
};

// Sums over a part of the positions, in base-2 logarithms: ``sum`` of 2^(score - most), and V weighted with the same.
struct Sums {
  float* most;   // [rows]
  float* sum;    // [rows]
  float* value;  // [rows, stride]
  int stride;
};

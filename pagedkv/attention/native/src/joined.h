// What lies between two products of a layer: rotation, storing of K and V, attention.
#pragma once

#include "attend.h"
#include "layers.h"

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
  const Counts* counts;
  int64_t key_offset, value_offset;  // bytes from a row's start
  int32_t num_threads;
};

// Stores the K and V of one token.
INLINE void write_token(const Rows& r, int64_t t) {
  const int64_t block = r.blocks[t], offset = r.offsets[t];
  for (int h = 0; h < r.num_kv_heads; h++) {
    memcpy((char*)r.key_pool + (block * r.key_pool_stride[0] + h * r.key_pool_stride[1] + offset * r.key_pool_stride[2]) * r.item_nbytes,
           (const char*)r.key + (t * r.key_stride[0] + h * r.key_stride[1]) * r.item_nbytes, r.key_nbytes);
    memcpy((char*)r.value_pool + (block * r.value_pool_stride[0] + h * r.value_pool_stride[1] + offset * r.value_pool_stride[2]) * r.item_nbytes,
           (const char*)r.value + (t * r.value_stride[0] + h * r.value_stride[1]) * r.item_nbytes, r.value_nbytes);
  }
}

INLINE void point_at(const Joined& j, void* rows, const void* cosines, const void* sines, void* key_pool, void* value_pool, void* output) {
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
}

template <class T>
static void attend_joined(const Joined& j, float* scratch, const Share& share) {
  for (int64_t t = share.begin(j.rows->num_tokens); t < share.end(j.rows->num_tokens); t++) {
    rotate_row<T>(*j.rotation, t);
    write_token(*j.rows, t);
  }
  share.wait();
  attend_all<T>(*j.step, j.items, j.merges, *j.counts, scratch, share);
}

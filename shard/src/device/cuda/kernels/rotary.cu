// Rotary positions, and the cache of keys and values.
//
// A layer's cache is [blocks][kv heads][keys, values][32 tokens][head_dim] of bf16: of one head in one block the keys, then the
// values, each token's side by side, as both products of attention read them. head_dim is a multiple of 16.
#include "types.cuh"

constexpr int ROTARY_THREADS = 256;
constexpr int COPY_THREADS = 256;

// A frequency, and which number of a position it turns with.
struct Frequency {
  float value;
  unsigned axis;
};

// Cosines and sines of the angles `position[axis] frequency`, which are rounded to f32 as the reference has them, times `scale`.
// positions: [rows, 3]; frequencies: [half]; cos, sin: [rows, half], of `count` elements.
// Grid: any number of blocks, which share the elements. Block: 256.
extern "C" __global__ void __launch_bounds__(ROTARY_THREADS)
    rotary_angles(const unsigned* __restrict__ positions, const Frequency* __restrict__ frequencies, unsigned half,
                  float scale, unsigned long long count, float* __restrict__ cos_of, float* __restrict__ sin_of) {
  const size_t stride = static_cast<size_t>(gridDim.x) * ROTARY_THREADS;
  for (size_t i = static_cast<size_t>(blockIdx.x) * ROTARY_THREADS + threadIdx.x; i < count; i += stride) {
    const Frequency frequency = frequencies[i % half];
    const double angle = static_cast<float>(positions[i / half * 3 + frequency.axis]) * frequency.value;
    cos_of[i] = static_cast<float>(cos(angle)) * scale;
    sin_of[i] = static_cast<float>(sin(angle)) * scale;
  }
}

// Rotates VECTOR pairs of one head: with its halves a and b, (a, b) becomes (a cos - b sin, b cos + a sin). `first` and `second`
// are the places in the halves, `cos` and `sin` those of the first pair. The results are written back, and to the cache unless
// `cached`, the place of `first` there, is null.
__device__ __forceinline__ void rotate_pairs(bf16* first, unsigned half, const float* cos, const float* sin,
                                             bf16* cached) {
  Elements<VECTOR> a = Elements<VECTOR>::load(first);
  Elements<VECTOR> b = Elements<VECTOR>::load(first + half);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const float x = a.at[i], y = b.at[i];
    a.at[i] = x * cos[i] - y * sin[i];
    b.at[i] = y * cos[i] + x * sin[i];
  }
  a.store(first);
  b.store(first + half);
  if (cached != nullptr) {
    a.store(cached);
    b.store(cached + half);
  }
}

// Rotates queries and keys in place and writes keys and values of row `i` to slot `slots[i]`: token `slot % 32` of block `slot
// / 32`.
// qkv: [rows, (num_query + 2 num_kv) head_dim], queries, keys, values; cos, sin: [rows, head_dim / 2]; cache: a layer's.
// M-RoPE is in the angles: each of their columns was taken from the axis whose section it is in.
// Grid: rows. Block: 256.
extern "C" __global__ void __launch_bounds__(ROTARY_THREADS)
    rotary_append(bf16* qkv, const float* cos, const float* sin, const unsigned* slots, unsigned num_query, unsigned num_kv,
                  unsigned head_dim, bf16* cache) {
  let_next_begin();
  wait_for_previous();
  const size_t row = blockIdx.x;
  const unsigned half = head_dim / 2;
  const unsigned slot = slots[row];
  const unsigned offset = slot % KV_BLOCK_TOKENS;
  const size_t part = static_cast<size_t>(KV_BLOCK_TOKENS) * head_dim;
  bf16* const heads = qkv + row * (num_query + 2 * num_kv) * head_dim;
  bf16* const block = cache + static_cast<size_t>(slot / KV_BLOCK_TOKENS) * num_kv * 2 * part;

  const unsigned rotations_per_head = half / VECTOR;
  const unsigned rotations = (num_query + num_kv) * rotations_per_head;
  for (unsigned i = threadIdx.x; i < rotations; i += ROTARY_THREADS) {
    const unsigned head = i / rotations_per_head;
    const unsigned column = i % rotations_per_head * VECTOR;
    bf16* cached = nullptr;
    if (head >= num_query) cached = block + (head - num_query) * 2 * part + offset * head_dim + column;
    const size_t angle = row * half + column;
    rotate_pairs(heads + head * head_dim + column, half, cos + angle, sin + angle, cached);
  }

  const bf16* const values = heads + (num_query + num_kv) * head_dim;
  for (unsigned i = threadIdx.x * VECTOR; i < num_kv * head_dim; i += ROTARY_THREADS * VECTOR) {
    const unsigned head = i / head_dim;
    bf16* const cached = block + (head * 2 + 1) * part + offset * head_dim + i % head_dim;
    *reinterpret_cast<uint4*>(cached) = *reinterpret_cast<const uint4*>(values + i);
  }
}

// Rotates queries and keys in place. qkv: [rows, 3 num_heads head_dim]; cos, sin: [rows, head_dim / 2].
// Grid: rows. Block: 256.
extern "C" __global__ void __launch_bounds__(ROTARY_THREADS)
    vision_rotary(bf16* qkv, const float* __restrict__ cos, const float* __restrict__ sin, unsigned num_heads,
                  unsigned head_dim) {
  const size_t row = blockIdx.x;
  const unsigned half = head_dim / 2;
  const unsigned rotations_per_head = half / VECTOR;
  for (unsigned i = threadIdx.x; i < 2 * num_heads * rotations_per_head; i += ROTARY_THREADS) {
    const unsigned column = i % rotations_per_head * VECTOR;
    bf16* const head = qkv + (row * 3 * num_heads + i / rotations_per_head) * head_dim;
    const size_t angle = row * half + column;
    rotate_pairs(head + column, half, cos + angle, sin + angle, nullptr);
  }
}

// Copies blocks of keys and values in all layers, pair after pair (source, target): a later source may be an earlier target,
// because a thread has the same place of every block, and makes all copies of it, in their order.
// cache: [layers][num_blocks][block_vectors] of 16 bytes; pairs: [num_pairs].
// Grid: (ceil(block_vectors / 256), layers). Block: 256.
extern "C" __global__ void __launch_bounds__(COPY_THREADS)
    copy_blocks(uint4* cache, unsigned num_blocks, unsigned block_vectors, const uint2* __restrict__ pairs,
                unsigned num_pairs) {
  const unsigned place = blockIdx.x * COPY_THREADS + threadIdx.x;
  if (place >= block_vectors) return;
  uint4* const layer = cache + static_cast<size_t>(blockIdx.y) * num_blocks * block_vectors + place;
  for (unsigned i = 0; i < num_pairs; ++i) {
    const uint2 pair = pairs[i];
    layer[static_cast<size_t>(pair.y) * block_vectors] = layer[static_cast<size_t>(pair.x) * block_vectors];
  }
}

// A hash of the bits of a buffer, to find accidents, not forgers.
//
// The bytes are words of 64 bits, little-endian, the last one filled up with zeros. With F = 0x9e3779b97f4a7c15 and the finalizer
// of SplitMix64 as `mix`,
//
//   hash = mix(mix(number of bytes + F) + sum over words i of mix(word[i] ^ mix(F (i + 1)))),
//
// all modulo 2^64. `mix` is one to one, so that a change within one word always changes the hash; any other change is missed once
// in about 2^64 times. The sum of integers does not depend on how blocks and threads share the words.
#include "types.cuh"

constexpr int HASH_THREADS = 256;
constexpr u64 HASH_FACTOR = 0x9e3779b97f4a7c15ull;

__device__ __forceinline__ u64 mix_word(u64 word, u64 index) { return mix(word ^ mix(HASH_FACTOR * (index + 1))); }

__device__ __forceinline__ u64 join_halves(unsigned low, unsigned high) { return static_cast<u64>(high) << 32 | low; }

// Each block's part of the sum over the words. Fastest where the first byte is aligned to 16. partial: [grid].
// Grid: any number of blocks, which share the words. Block: 256.
extern "C" __global__ void __launch_bounds__(HASH_THREADS)
    hash_words(const unsigned char* __restrict__ bytes, u64 num_bytes, u64* __restrict__ partial) {
  let_next_begin();
  const u64 thread = static_cast<u64>(blockIdx.x) * HASH_THREADS + threadIdx.x;
  const u64 num_threads = static_cast<u64>(gridDim.x) * HASH_THREADS;
  u64 sum = 0;
  // Whole vectors of two words, where they can be read as such.
  u64 num_vectors = 0;
  if (reinterpret_cast<size_t>(bytes) % sizeof(uint4) == 0) {
    const uint4* const vectors = reinterpret_cast<const uint4*>(bytes);
    num_vectors = num_bytes / sizeof(uint4);
    for (u64 i = thread; i < num_vectors; i += num_threads) {
      const uint4 v = vectors[i];
      sum += mix_word(join_halves(v.x, v.y), 2 * i) + mix_word(join_halves(v.z, v.w), 2 * i + 1);
    }
  }
  for (u64 i = 2 * num_vectors + thread; i * sizeof(u64) < num_bytes; i += num_threads) {
    u64 word = 0;
    for (u64 byte = i * sizeof(u64); byte < min((i + 1) * sizeof(u64), num_bytes); ++byte) {
      word |= static_cast<u64>(bytes[byte]) << 8 * (byte % sizeof(u64));
    }
    sum += mix_word(word, i);
  }
  sum = block_sum<HASH_THREADS>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// The hash, from the parts of the sum. partial: [num_partial]; hash: [1].
// Grid: 1. Block: 256.
extern "C" __global__ void __launch_bounds__(HASH_THREADS)
    hash_finish(const u64* partial, unsigned num_partial, u64 num_bytes, u64* hash) {
  wait_for_previous();
  u64 sum = 0;
  for (unsigned i = threadIdx.x; i < num_partial; i += HASH_THREADS) sum += partial[i];
  sum = block_sum<HASH_THREADS>(sum);
  if (threadIdx.x == 0) *hash = mix(mix(num_bytes + HASH_FACTOR) + sum);
}

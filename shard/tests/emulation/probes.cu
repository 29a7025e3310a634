// What the emulation itself is tested with: kernels that are right, and kernels with a fault that it must see.
#include "types.cuh"

// Turns the block's numbers around, with a barrier between writing and reading them or without.
// Grid: 1. Dynamic shared memory: 4 bytes a thread.
extern "C" __global__ void reverse(const unsigned* from, unsigned* to, unsigned with_barrier) {
  DYNAMIC_SHARED(unsigned, numbers);
  numbers[threadIdx.x] = from[threadIdx.x];
  if (with_barrier) __syncthreads();
  to[threadIdx.x] = numbers[blockDim.x - 1 - threadIdx.x];
}

// Reads element `index` of four.
extern "C" __global__ void read_shared(unsigned index, unsigned* to) {
  SHARED_ARRAY(unsigned, numbers, 4);
  unsigned* const unbounded = numbers;
  unbounded[threadIdx.x] = threadIdx.x;
  __syncthreads();
  to[threadIdx.x] = unbounded[index];
}

// Reads element `index` of as many as the launch gives.
extern "C" __global__ void read_dynamic_shared(unsigned index, unsigned* to) {
  DYNAMIC_SHARED(unsigned, numbers);
  numbers[threadIdx.x] = threadIdx.x;
  __syncthreads();
  to[threadIdx.x] = numbers[index];
}

extern "C" __global__ void read_global(const unsigned* from, unsigned index, unsigned* to) { to[threadIdx.x] = from[index]; }

// A barrier that the first threads reach and the others do not, who wait at another one of their warp.
extern "C" __global__ void barrier_in_branch() {
  if (threadIdx.x < WARP_THREADS / 2) {
    __syncthreads();
  } else {
    __syncwarp(0xffff0000u);
  }
}

// A barrier that the last thread has ended before.
extern "C" __global__ void early_end() {
  if (threadIdx.x == blockDim.x - 1) return;
  __syncthreads();
}

extern "C" __global__ void shuffle_in_branch(unsigned* to) {
  if (threadIdx.x % 2 == 0) to[threadIdx.x] = __shfl_xor_sync(WHOLE_WARP, threadIdx.x, 2);
}

// Reads 16 bytes from any place.
extern "C" __global__ void read_vector(const unsigned* from, unsigned index, uint4* to) {
  *to = *reinterpret_cast<const uint4*>(from + index);
}

extern "C" __global__ void write_input(const unsigned* from) { const_cast<unsigned*>(from)[threadIdx.x] = 7; }

// Of each thread: the vote of all (is its number odd?), the numbers of the neighbours, or its own at the ends, and that of lane
// 5.
// Grid: 1. Block: 32. to: [32, 4].
extern "C" __global__ void votes(const unsigned* numbers, unsigned* to) {
  const unsigned mine = numbers[threadIdx.x];
  to[threadIdx.x * 4] = __ballot_sync(WHOLE_WARP, mine % 2 == 1);
  to[threadIdx.x * 4 + 1] = __shfl_up_sync(WHOLE_WARP, mine, 1);
  to[threadIdx.x * 4 + 2] = __shfl_down_sync(WHOLE_WARP, mine, 1);
  to[threadIdx.x * 4 + 3] = __shfl_sync(WHOLE_WARP, mine, 5);
}

// The first half of the lanes sums over fours, while the other half goes on; then the halves exchange what they have.
// Grid: 1. Block: 32. to: [32].
extern "C" __global__ void meet_in_halves(const unsigned* numbers, unsigned* to) {
  unsigned mine = numbers[threadIdx.x];
  if (threadIdx.x < WARP_THREADS / 2) {
    mine += __shfl_xor_sync(0xffffu, mine, 1);
    mine += __shfl_xor_sync(0xffffu, mine, 2);
  }
  to[threadIdx.x] = __shfl_xor_sync(WHOLE_WARP, mine, WARP_THREADS / 2);
}

// d += a b, elements as types.cuh says where they are. a: [16, 16], b: [16, 8], d: [16, 8]. Grid: 1. Block: 32.
extern "C" __global__ void product(const bf16* a, const bf16* b, float* d) {
  const unsigned group = threadIdx.x / 4, pair = threadIdx.x % 4;
  const auto two = [](bf16 low, bf16 high) { return low | static_cast<unsigned>(high) << 16; };
  unsigned words_of_a[4], words_of_b[2];
  for (unsigned i = 0; i < 4; ++i) {
    const bf16* const from = a + (group + i % 2 * 8) * 16 + 2 * pair + i / 2 * 8;
    words_of_a[i] = two(from[0], from[1]);
  }
  for (unsigned i = 0; i < 2; ++i) {
    const bf16* const from = b + (2 * pair + i * 8) * 8 + group;
    words_of_b[i] = two(from[0], from[8]);
  }
  float sums[4];
  for (unsigned i = 0; i < 4; ++i) sums[i] = d[(group + i / 2 * 8) * 8 + 2 * pair + i % 2];
  mma_m16n8k16_bf16(sums, words_of_a, words_of_b);
  for (unsigned i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + 2 * pair + i % 2] = sums[i];
}

// Each thread adds one, and writes where in its block and grid it is.
extern "C" __global__ void count_threads(unsigned* count, uint2* places) {
  atomicAdd(count, 1u);
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  places[block * blockDim.x + threadIdx.x] = make_uint2(block, threadIdx.x);
}

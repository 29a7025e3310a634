// What the emulation itself is tested with: kernels that are right, and kernels with a fault that it must see.
#include "wgmma.cuh"

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

// The words of four matrices whose rows lie in another order: row r of matrix i is row `order[8 i + r]` of `from`.
// Grid: 1. Block: 32. Dynamic shared memory: 512 bytes. from: [32, 8] bf16; to: [32, 4].
extern "C" __global__ void matrices(const uint4* from, const unsigned* order, unsigned* to) {
  DYNAMIC_SHARED(uint4, rows);
  rows[threadIdx.x] = from[threadIdx.x];
  __syncwarp();
  unsigned words[4];
  load_matrices(words, rows + order[threadIdx.x]);
  for (unsigned i = 0; i < 4; ++i) to[4 * threadIdx.x + i] = words[i];
}

// Three groups of one vector each, of which the second does not exist, seen before any wait, after waits for all but two and
// all but one, and after a wait for all.
// Grid: 1. Block: 1. Dynamic shared memory: 48 bytes. from: [3]; to: [4, 3].
extern "C" __global__ void copies(const uint4* from, uint4* to) {
  DYNAMIC_SHARED(uint4, vectors);
  for (unsigned i = 0; i < 3; ++i) {
    copy_async(vectors + i, from + i, i != 1);
    commit_copies();
  }
  const auto show = [&](unsigned row) {
    for (unsigned i = 0; i < 3; ++i) to[3 * row + i] = vectors[i];
  };
  show(0);
  wait_copies<2>();
  show(1);
  wait_copies<1>();
  show(2);
  wait_copies<0>();
  show(3);
}

// Whether any thread of the block has a number that is not 0. Grid: 1. numbers, to: [block].
extern "C" __global__ void any_of_block(const unsigned* numbers, unsigned* to) {
  to[threadIdx.x] = __syncthreads_or(numbers[threadIdx.x] != 0);
}

// The first thread waits for a flag, then all read the number that was written before it. Grid: 1. to: [block].
extern "C" __global__ void wait_for_flag(const unsigned* flag, const unsigned* number, unsigned* to) {
  if (threadIdx.x == 0) {
    while (load_acquire(flag) == 0) spin();
  }
  __syncthreads();
  to[threadIdx.x] = *number;
}

// A matrix that lies in no order: eight rows of a vector each make a block of 8 vectors, and `leading` and `stride` vectors are
// between neighbouring blocks.
__device__ __forceinline__ u64 plain_factor(const uint4* matrix, u64 leading, u64 stride) {
  return stride << 32 | leading << 16 | shared_address(matrix) / sizeof(uint4);
}

// The product of a warpgroup, twice: of `a` and the transpose of `b` in shared memory, and of `a` in registers and `b`, row by
// row, in shared memory. What is written: sums before they were waited for, and both after that. `fences` says which fences there are:
// of registers (1), of the copies (2), and of registers once more after a wait (4); and where registers are held: before products
// are begun (8), and after they came (16).
// Grid: 1. Block: 128. Dynamic shared memory: 6144 bytes. a: [64, 16]; transposed: [64, 16]; b: [16, 64]; to: [3, 64, 64].
extern "C" __global__ void warpgroup_products(const uint4* a, const uint4* transposed, const uint4* b, unsigned fences,
                                              float* to) {
  DYNAMIC_SHARED(uint4, shared);
  const unsigned thread = threadIdx.x, group = thread % 32 / 4, pair = thread % 4;
  const unsigned row = thread / 2, half = thread % 2;
  copy_async(shared + row / 8 * 16 + half * 8 + row % 8, a + thread, true);
  copy_async(shared + 128 + row / 8 * 16 + half * 8 + row % 8, transposed + thread, true);
  // Blocks of eight columns, of the first eight rows and then of the others.
  copy_async(shared + 256 + thread % 8 * 16 + thread / 8, b + thread, true);
  commit_copies();
  wait_copies<0>();
  if (fences & 2) fence_shared_for_wgmma();
  __syncthreads();
  unsigned words[1][4];
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned of_row = thread / 32 * 16 + group + i % 2 * 8;
    words[0][i] = reinterpret_cast<const unsigned*>(a)[of_row * 8 + i / 2 * 4 + pair];
  }
  const auto write = [&](unsigned which, const float(&sums)[32]) {
    for (unsigned i = 0; i < 32; ++i) {
      const unsigned of_row = thread / 32 * 16 + group + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * pair + i % 2;
      to[(which * 64 + of_row) * 64 + column] = sums[i];
    }
  };
  float first[32], second[32];
  for (unsigned i = 0; i < 32; ++i) first[i] = second[i] = 1.0f;
  if (fences & 8) {
    hold(first);
    hold(second);
    hold(words);
  }
  if (fences & 1) wgmma_fence();
  wgmma<false>(first, plain_factor(shared, 8, 16), plain_factor(shared + 128, 8, 16));
  wgmma_commit();
  write(0, first);
  wgmma_wait<0>();
  if (fences & 16) hold(first);
  if (fences & 4) wgmma_fence();
  wgmma(second, words[0], plain_factor(shared + 256, 8, 16));
  wgmma_commit();
  wgmma_wait<0>();
  if (fences & 16) {
    hold(second);
    hold(words);
  }
  write(1, first);
  write(2, second);
}

// Three of the four warps of a warpgroup begin a product. Grid: 1. Block: 128. Dynamic shared memory: 4096 bytes.
extern "C" __global__ void product_of_three_warps() {
  DYNAMIC_SHARED(uint4, shared);
  if (threadIdx.x / WARP_THREADS == 2) return;
  float sums[32] = {};
  hold(sums);
  wgmma_fence();
  wgmma<false>(sums, plain_factor(shared, 8, 16), plain_factor(shared + 128, 8, 16));
  wgmma_commit();
  wgmma_wait<0>();
  hold(sums);
}

// Copies a word, which is read before the kernel before is waited for, or after that. Grid: 1. Block: any.
extern "C" __global__ void copy_word(const unsigned* from, unsigned reads_early, unsigned* to) {
  unsigned word = 0;
  if (reads_early != 0) word = *from;
  wait_for_previous();
  if (reads_early == 0) word = *from;
  if (threadIdx.x == 0) *to = word;
}

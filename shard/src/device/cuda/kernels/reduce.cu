// Sums over ranks, each of which has a part of them, and the norm that follows: what is computed in an all-reduce in one shot,
// where every rank reads the parts of all others out of their memory. And a gather of a few words in the same way.
//
// Parts are added in f32 in the order of ranks and rounded once, so that all ranks get the same bits.
//
// Before a rank reads, all must have written. Block b of a rank writes the number of its call, its epoch, to slot [b][rank] of the
// flags of every rank, and waits until all slots [b] of its own flags have come to that number: at each rank the kernel that
// wrote the part has then ended, for the block has waited for that.
//
// No second wait keeps a part from being written over while another rank still reads it, because calls take two buffers in turn.
// A buffer is written again after the next call has ended here. That one waited for every rank to have begun it, which on their
// streams is after the end of this call and so of all its reads. For this a kernel of a stream must write nothing before the one
// before it has ended, and all ranks must make the same calls with the same grids.
//
// These kernels may begin early, for what they then wait for needs no room any more. But none begins early after them: they do
// not call `let_next_begin`. Where ranks share a GPU, blocks that wait for the end of a kernel that waits for another rank would
// keep the room that the other rank's kernels need.
//
// Block b waits only for blocks b, and blocks begin in their order: what waits for room on a device is never waited for by
// what keeps the room.
#include "norm.cuh"

// Threads of a block that works on elements, of any row.
constexpr int ELEMENT_THREADS = 256;
// Looks at a flag between two looks at the word in the host's memory that ends all waiting: that one is far away.
constexpr unsigned LOOKS_PER_ABORT = 256;

// A row that is the sum of the rows that ranks have.
template <int WIDTH>
struct SumOfRows {
  const PerRank<const bf16>& inputs;
  unsigned world_size;
  // Elements before the row.
  size_t start;

  // Rounded, as it would be had it been written in between.
  __device__ __forceinline__ Elements<WIDTH> load(unsigned col) const {
    return Elements<WIDTH>::unpack(load_packed(start + col));
  }

  __device__ __forceinline__ typename Elements<WIDTH>::Packed load_packed(size_t place) const {
    // All reads are under way before the first is waited for: each may cross over to another device.
    typename Elements<WIDTH>::Packed packed[MAX_RANKS];
#pragma unroll
    for (unsigned rank = 0; rank < MAX_RANKS; ++rank) {
      if (rank < world_size) packed[rank] = Elements<WIDTH>::load_packed(inputs.at[rank] + place);
    }
    Elements<WIDTH> sum = Elements<WIDTH>::unpack(packed[0]);
#pragma unroll
    for (unsigned rank = 1; rank < MAX_RANKS; ++rank) {
      if (rank >= world_size) continue;
      const Elements<WIDTH> v = Elements<WIDTH>::unpack(packed[rank]);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) sum.at[i] += v.at[i];
    }
    return sum.pack();
  }
};

template <int WIDTH>
__device__ __forceinline__ void sum_elements(const PerRank<const bf16>& inputs, unsigned world_size, size_t count, bf16* out) {
  const SumOfRows<WIDTH> sums = {inputs, world_size, 0};
  const size_t first = (static_cast<size_t>(blockIdx.x) * ELEMENT_THREADS + threadIdx.x) * WIDTH;
  for (size_t i = first; i < count; i += static_cast<size_t>(gridDim.x) * ELEMENT_THREADS * WIDTH) {
    *reinterpret_cast<typename Elements<WIDTH>::Packed*>(out + i) = sums.load_packed(i);
  }
}

__device__ __forceinline__ void sum_of_any_width(const PerRank<const bf16>& inputs, unsigned world_size, size_t count,
                                                 bf16* out) {
  if (count % VECTOR == 0) {
    sum_elements<VECTOR>(inputs, world_size, count, out);
  } else {
    sum_elements<1>(inputs, world_size, count, out);
  }
}

__device__ __forceinline__ void sum_and_norm_row(const PerRank<const bf16>& inputs, unsigned world_size, unsigned row,
                                                 const bf16* residual, const float* weight, float epsilon, unsigned cols,
                                                 bf16* normed, bf16* sum) {
  const size_t start = static_cast<size_t>(row) * cols;
  const bf16* const residual_row = residual == nullptr ? nullptr : residual + start;
  if (cols % VECTOR == 0) {
    const SumOfRows<VECTOR> x = {inputs, world_size, start};
    add_and_norm_row<VECTOR>(x, residual_row, weight, epsilon, cols, normed + start, sum + start);
  } else {
    const SumOfRows<1> x = {inputs, world_size, start};
    add_and_norm_row<1>(x, residual_row, weight, epsilon, cols, normed + start, sum + start);
  }
}

// What ranks meet by: flags of each, [blocks, MAX_RANKS], in memory that the others write to; the number of each block's last
// call, [blocks]; a word of the host's that is not 0 when nothing is to be waited for any longer; and where it is noted that a
// wait was given up, which leaves results undefined.
struct Meeting {
  const PerRank<unsigned>& flags;
  unsigned rank;
  unsigned world_size;
  unsigned* epochs;
  const unsigned* abort;
  unsigned* status;

  // Tells each peer that this block has come to `epoch`. A thread for each.
  __device__ __forceinline__ void signal_peers(unsigned epoch) const {
    store_release(flags.at[threadIdx.x] + blockIdx.x * MAX_RANKS + rank, epoch);
  }

  // Waits for the same from each peer, a thread for each. False if that was given up.
  __device__ __forceinline__ bool wait_peers(unsigned epoch) const {
    const unsigned* const flag = flags.at[rank] + blockIdx.x * MAX_RANKS + threadIdx.x;
    // As a difference, for epochs begin anew after 2^32. A peer may be at the next call already, but not farther.
    for (unsigned looks = 1; static_cast<int>(load_acquire(flag) - epoch) < 0; ++looks) {
      if (looks % LOOKS_PER_ABORT == 0 && load_acquire(abort) != 0) {
        *status = 1;
        return false;
      }
      spin();
    }
    return true;
  }

  // Meets the blocks of all ranks that have this one's number. False, for all threads, if that was given up.
  __device__ __forceinline__ bool meet() const {
    const unsigned epoch = epochs[blockIdx.x] + 1;
    bool given_up = false;
    if (threadIdx.x < world_size) {
      signal_peers(epoch);
      given_up = !wait_peers(epoch);
    }
    // All threads have read the epoch, and see what the waiting ones saw.
    given_up = __syncthreads_or(given_up);
    if (threadIdx.x == 0) epochs[blockIdx.x] = epoch;
    return !given_up;
  }
};

// out = the sum of the ranks' inputs, `count` elements. inputs: `world_size` of them, 1 to 8.
// Grid: any number of blocks, which share the elements. Block: 256.
extern "C" __global__ void __launch_bounds__(ELEMENT_THREADS)
    sum_ranks(const __grid_constant__ PerRank<const bf16> inputs, unsigned world_size, unsigned long long count, bf16* out) {
  sum_of_any_width(inputs, world_size, count, out);
}

// The same bits as `sum_ranks` and then `residual_norm` (see rowwise.cu) of its result as x.
// inputs: `world_size` of [rows, cols]; residual, normed, sum: [rows, cols]; weight: [cols]. `sum` may be `residual`; neither
// it nor `normed` may be an input.
// Grid: rows. Block: 256.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    sum_ranks_residual_norm(const __grid_constant__ PerRank<const bf16> inputs, unsigned world_size, const bf16* residual,
                            const float* weight, float epsilon, unsigned cols, bf16* normed, bf16* sum) {
  sum_and_norm_row(inputs, world_size, blockIdx.x, residual, weight, epsilon, cols, normed, sum);
}

// `sum_ranks` of inputs in the memory of the ranks, with the meeting before it. `out` is no input.
// flags, epochs, abort, status: see `Meeting`; flags and epochs are 0 before the first call.
// Grid: any number of blocks, the same at all ranks and no more than flags has. Block: 256.
extern "C" __global__ void __launch_bounds__(ELEMENT_THREADS)
    one_shot_sum(const __grid_constant__ PerRank<const bf16> inputs, const __grid_constant__ PerRank<unsigned> flags,
                 unsigned rank, unsigned world_size, unsigned* epochs, const unsigned* abort, unsigned* status,
                 unsigned long long count, bf16* out) {
  wait_for_previous();
  const Meeting meeting = {flags, rank, world_size, epochs, abort, status};
  if (!meeting.meet()) return;
  sum_of_any_width(inputs, world_size, count, out);
}

// `sum_ranks_residual_norm` of inputs in the memory of the ranks, with the meeting before it.
// flags, epochs, abort, status: see `Meeting`; flags and epochs are 0 before the first call.
// Grid: any number of blocks, which share the rows, the same at all ranks and no more than flags has. Block: 256.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    one_shot_residual_norm(const __grid_constant__ PerRank<const bf16> inputs,
                           const __grid_constant__ PerRank<unsigned> flags, unsigned rank, unsigned world_size,
                           unsigned* epochs, const unsigned* abort, unsigned* status, const bf16* residual,
                           const float* weight, float epsilon, unsigned rows, unsigned cols, bf16* normed, bf16* sum) {
  wait_for_previous();
  const Meeting meeting = {flags, rank, world_size, epochs, abort, status};
  if (!meeting.meet()) return;
  for (unsigned row = blockIdx.x; row < rows; row += gridDim.x) {
    sum_and_norm_row(inputs, world_size, row, residual, weight, epsilon, cols, normed, sum);
    // The sums of warps are read before those of the next row are written.
    __syncthreads();
  }
}

// The words that each rank has, those of rank 0 first, at every rank: a rank copies its own to its part, where the others read them.
// parts: `world_size` of [words]; mine: [words]; out: [world_size, words].
// flags, epochs, abort, status: see `Meeting`; flags and epochs are 0 before the first call.
// Grid: 1. Block: 256.
extern "C" __global__ void __launch_bounds__(ELEMENT_THREADS)
    one_shot_gather(const __grid_constant__ PerRank<unsigned> parts, const __grid_constant__ PerRank<unsigned> flags,
                    unsigned rank, unsigned world_size, unsigned* epochs, const unsigned* abort, unsigned* status,
                    const unsigned* mine, unsigned words, unsigned* out) {
  wait_for_previous();
  for (unsigned i = threadIdx.x; i < words; i += ELEMENT_THREADS) parts.at[rank][i] = mine[i];
  // This kernel writes the part, and not one before it: who tells the peers of it has seen what all threads wrote.
  __syncthreads();
  const Meeting meeting = {flags, rank, world_size, epochs, abort, status};
  if (!meeting.meet()) return;
  for (unsigned i = threadIdx.x; i < world_size * words; i += ELEMENT_THREADS) out[i] = parts.at[i / words][i % words];
}

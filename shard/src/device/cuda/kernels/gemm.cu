// Products of any number of rows with a matrix of weights, on tensor cores: what the repeatable mode computes all products with,
// and what stands in for a library that is not installed.
//
// An output is the sum of its products in one order: an mma adds 16 at a time to the f32 that the one before left, from the first
// input to the last; then comes the bias. No tile splits the inputs, and mma computes rows and columns apart, so a row's bits
// depend neither on how many rows there are nor on which kernel computes it. They are not those of gemv.cu, which adds in
// another order.
//
// Tiles of both factors go to shared memory a few stages ahead of the products. There the 16-byte vectors of a row are put in
// another order, so that neither the copies nor the eight rows of a matrix that `load_matrices` reads meet in a bank. Where a
// tile reaches beyond a matrix it is zero, which adds nothing to a sum.
#include "types.cuh"

// What an mma multiplies: rows of x, columns of the product (of two mma, whose second factors are loaded at once), and inputs.
constexpr int MMA_ROWS = 16;
constexpr int MMA_COLUMNS = 8;
constexpr int PAIR_COLUMNS = 2 * MMA_COLUMNS;
constexpr int MMA_DEPTH = 16;

// ROWS rows of DEPTH elements of a matrix, copied by THREADS threads.
template <int ROWS, int DEPTH, int THREADS>
struct Panel {
  static constexpr int ROW_VECTORS = DEPTH / VECTOR;
  static constexpr int VECTORS = ROWS * ROW_VECTORS;
  static_assert(VECTORS % THREADS == 0, "threads share the vectors evenly");

  // Banks are 8 vectors wide: eight rows in turn, or as many as have a line of banks in common, take another order each.
  static constexpr int LINE_VECTORS = 8;
  static constexpr int ORDERS = ROW_VECTORS < LINE_VECTORS ? ROW_VECTORS : LINE_VECTORS;
  static constexpr int LINE_ROWS = LINE_VECTORS / ORDERS;
  static_assert(ROW_VECTORS % ORDERS == 0 && LINE_VECTORS % ORDERS == 0, "an order is a permutation of the row's vectors");

  static __device__ __forceinline__ unsigned place(unsigned row, unsigned vector) {
    return row * ROW_VECTORS + (vector ^ row / LINE_ROWS % ORDERS);
  }

  // Begins to copy the panel whose first element is [first_row, first_input] of `matrix`, [num_rows, num_inputs].
  static __device__ __forceinline__ void copy(uint4* to, const bf16* matrix, unsigned first_row, unsigned num_rows,
                                              unsigned first_input, unsigned num_inputs) {
#pragma unroll
    for (int i = 0; i < VECTORS / THREADS; ++i) {
      const unsigned index = i * THREADS + threadIdx.x;
      const unsigned row = index / ROW_VECTORS, vector = index % ROW_VECTORS;
      const unsigned input = first_input + vector * VECTOR;
      const bool exists = first_row + row < num_rows && input < num_inputs;
      const bf16* const from = matrix + (exists ? static_cast<size_t>(first_row + row) * num_inputs + input : 0);
      copy_async(to + place(row, vector), reinterpret_cast<const uint4*>(from), exists);
    }
  }
};

// Writes two neighbouring outputs of a row, or the one that there is. `whole` says that both exist wherever the first does, and
// that they are aligned as one.
__device__ __forceinline__ void write_pair(bf16* to, float first, float second, bool whole, bool has_second) {
  if (whole) {
    *reinterpret_cast<unsigned*>(to) = pack_bf16(first, second);
  } else {
    to[0] = to_bf16(first);
    if (has_second) to[1] = to_bf16(second);
  }
}

__device__ __forceinline__ void write_pair(float* to, float first, float second, bool whole, bool has_second) {
  if (whole) {
    *reinterpret_cast<float2*>(to) = make_float2(first, second);
  } else {
    to[0] = first;
    if (has_second) to[1] = second;
  }
}

// How the product is cut: a block computes ROWS x COLUMNS of it over DEPTH inputs at a time, each of its warps
// WARP_ROWS x WARP_COLUMNS, and STAGES tiles of the factors are in shared memory.
template <int ROWS_, int COLUMNS_, int DEPTH_, int WARP_ROWS_, int WARP_COLUMNS_, int STAGES_>
struct Shape {
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, DEPTH = DEPTH_;
  static constexpr int WARP_ROWS = WARP_ROWS_, WARP_COLUMNS = WARP_COLUMNS_, STAGES = STAGES_;
  // Warps side by side.
  static constexpr int WARPS_ACROSS = COLUMNS / WARP_COLUMNS;
  static constexpr int THREADS = ROWS / WARP_ROWS * WARPS_ACROSS * WARP_THREADS;
  using Inputs = Panel<ROWS, DEPTH, THREADS>;
  using Weights = Panel<COLUMNS, DEPTH, THREADS>;
  static constexpr int STAGE_VECTORS = Inputs::VECTORS + Weights::VECTORS;
  static_assert(STAGES >= 2, "one stage is read while another is written");
  static_assert(STAGES * STAGE_VECTORS * sizeof(uint4) <= 48 << 10, "a launch may ask for no more without further ado");
};

template <typename SHAPE, typename Output>
__device__ __forceinline__ void gemm(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                                     const float* __restrict__ bias, unsigned num_rows, unsigned num_inputs,
                                     unsigned num_outputs, Output* __restrict__ y) {
  using Inputs = typename SHAPE::Inputs;
  using Weights = typename SHAPE::Weights;
  DYNAMIC_SHARED(uint4, stages);
  // Neighbouring blocks share weights, of which there are more than of inputs: these are left to the second-level cache.
  const unsigned first_row = blockIdx.x * SHAPE::ROWS;
  const unsigned first_output = blockIdx.y * SHAPE::COLUMNS;
  const unsigned lane = threadIdx.x % WARP_THREADS, warp = threadIdx.x / WARP_THREADS;
  const unsigned warp_row = warp / SHAPE::WARPS_ACROSS * SHAPE::WARP_ROWS;
  const unsigned warp_column = warp % SHAPE::WARPS_ACROSS * SHAPE::WARP_COLUMNS;
  const unsigned num_tiles = (num_inputs + SHAPE::DEPTH - 1) / SHAPE::DEPTH;

  const auto copy_tile = [&](unsigned tile) {
    if (tile < num_tiles) {
      uint4* const stage = stages + tile % SHAPE::STAGES * SHAPE::STAGE_VECTORS;
      Inputs::copy(stage, x, first_row, num_rows, tile * SHAPE::DEPTH, num_inputs);
      Weights::copy(stage + Inputs::VECTORS, weight, first_output, num_outputs, tile * SHAPE::DEPTH, num_inputs);
    }
    // A tile is a group even where there is none, so that the number of groups to wait for is always the same.
    commit_copies();
  };
#pragma unroll
  for (int tile = 0; tile < SHAPE::STAGES - 1; ++tile) copy_tile(tile);

  float sums[SHAPE::WARP_ROWS / MMA_ROWS][SHAPE::WARP_COLUMNS / MMA_COLUMNS][4] = {};
  for (unsigned tile = 0; tile < num_tiles; ++tile) {
    wait_copies<SHAPE::STAGES - 2>();
    // What all threads copied of this tile is there, and all have read the tile before, whose stage the next copies go to.
    __syncthreads();
    copy_tile(tile + SHAPE::STAGES - 1);
    const uint4* const inputs = stages + tile % SHAPE::STAGES * SHAPE::STAGE_VECTORS;
    const uint4* const weights = inputs + Inputs::VECTORS;
#pragma unroll
    for (int step = 0; step < SHAPE::DEPTH / MMA_DEPTH; ++step) {
      unsigned a[SHAPE::WARP_ROWS / MMA_ROWS][4], b[SHAPE::WARP_COLUMNS / PAIR_COLUMNS][4];
#pragma unroll
      for (int i = 0; i < SHAPE::WARP_ROWS / MMA_ROWS; ++i) {
        // Rows 0-7 and 8-15 of the first 8 inputs, then of the other 8.
        const unsigned row = warp_row + i * MMA_ROWS + lane % 16;
        load_matrices(a[i], inputs + Inputs::place(row, 2 * step + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < SHAPE::WARP_COLUMNS / PAIR_COLUMNS; ++j) {
        // Both halves of the inputs of 8 columns, then of 8 more.
        const unsigned column = warp_column + j * PAIR_COLUMNS + lane / 16 * 8 + lane % 8;
        load_matrices(b[j], weights + Weights::place(column, 2 * step + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < SHAPE::WARP_ROWS / MMA_ROWS; ++i) {
#pragma unroll
        for (int j = 0; j < SHAPE::WARP_COLUMNS / PAIR_COLUMNS; ++j) {
          const unsigned near[2] = {b[j][0], b[j][1]}, far[2] = {b[j][2], b[j][3]};
          mma_m16n8k16_bf16(sums[i][2 * j], a[i], near);
          mma_m16n8k16_bf16(sums[i][2 * j + 1], a[i], far);
        }
      }
    }
  }

  const bool whole = num_outputs % 2 == 0;
#pragma unroll
  for (int j = 0; j < SHAPE::WARP_COLUMNS / MMA_COLUMNS; ++j) {
    const unsigned output = first_output + warp_column + j * MMA_COLUMNS + lane % 4 * 2;
    if (output >= num_outputs) continue;
    const bool has_second = output + 1 < num_outputs;
    const float first_bias = bias == nullptr ? 0.0f : bias[output];
    const float second_bias = bias == nullptr || !has_second ? 0.0f : bias[output + 1];
#pragma unroll
    for (int i = 0; i < SHAPE::WARP_ROWS / MMA_ROWS; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned row = first_row + warp_row + i * MMA_ROWS + half * 8 + lane / 4;
        if (row >= num_rows) continue;
        write_pair(y + static_cast<size_t>(row) * num_outputs + output, sums[i][j][2 * half] + first_bias,
                   sums[i][j][2 * half + 1] + second_bias, whole, has_second);
      }
    }
  }
}

// Up to 16 rows: narrow tiles make blocks enough for the few weights of a thin matrix, and the deep ones keep its memory busy.
using Few = Shape<16, 32, 128, 16, 16, 4>;
// Rows of a short prompt or of a large batch.
using Some = Shape<64, 64, 64, 32, 32, 3>;
// Rows enough for each weight to be used 128 times by a block.
using Many = Shape<128, 128, 32, 64, 32, 3>;

// gemm_16, gemm_64, gemm_128: y = x W^T + bias, the same bits; no bias if it is null. With _f32 results are not rounded.
// x: [num_rows, num_inputs]; weight: [num_outputs, num_inputs]; bias: [num_outputs] in f32; y: [num_rows, num_outputs].
// `num_inputs` is a multiple of 8; x and weight are aligned to 16 bytes, and y to two elements.
// Grid, block, dynamic shared memory:
//   gemm_16:  (ceil(num_rows / 16), ceil(num_outputs / 32)), 64, 49152 bytes.
//   gemm_64:  (ceil(num_rows / 64), ceil(num_outputs / 64)), 128, 49152 bytes.
//   gemm_128: (ceil(num_rows / 128), ceil(num_outputs / 128)), 256, 49152 bytes.
#define GEMM_ENTRIES(NAME, SHAPE)                                                                                       \
  extern "C" __global__ void __launch_bounds__(SHAPE::THREADS)                                                          \
      NAME(const bf16* x, const bf16* weight, const float* bias, unsigned num_rows, unsigned num_inputs,                \
           unsigned num_outputs, bf16* y) {                                                                             \
    gemm<SHAPE>(x, weight, bias, num_rows, num_inputs, num_outputs, y);                                                 \
  }                                                                                                                     \
  extern "C" __global__ void __launch_bounds__(SHAPE::THREADS)                                                          \
      NAME##_f32(const bf16* x, const bf16* weight, const float* bias, unsigned num_rows, unsigned num_inputs,          \
                 unsigned num_outputs, float* y) {                                                                      \
    gemm<SHAPE>(x, weight, bias, num_rows, num_inputs, num_outputs, y);                                                 \
  }

GEMM_ENTRIES(gemm_16, Few)
GEMM_ENTRIES(gemm_64, Some)
GEMM_ENTRIES(gemm_128, Many)

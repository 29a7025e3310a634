// Products of few rows with a matrix of weights, at the speed at which memory gives the weights.
//
// The threads of a block share the inputs: thread `t` has the vectors t, t + 128, ... and adds their products in this order; then
// come the sum over its warp, that over the warps in their order, and the bias. So an output's order depends on `num_inputs`
// alone: a row's bits depend neither on how many rows there are nor on which of these kernels computes them. They are not those of
// gemm.cu, which adds in another order.
//
// The first weights are on their way before the kernel before this one has ended: memory is not to rest between two kernels.
#include "types.cuh"

constexpr int GEMV_THREADS = 128;
constexpr int GEMV_WARPS = GEMV_THREADS / WARP_THREADS;
// Outputs of a block. A row's piece that was read is used for all of them, and a thread has as many reads of weights under way.
constexpr int GEMV_OUTPUTS = 4;
// Pairs of a gate and an up that these are where both are computed.
constexpr int GEMV_PAIRS = GEMV_OUTPUTS / 2;

// How a result is written.
__device__ __forceinline__ void write(bf16* to, float x) { *to = to_bf16(x); }
__device__ __forceinline__ void write(float* to, float x) { *to = x; }

// Sums of products of ROWS rows with the block's outputs: those of each warp, in shared memory.
template <int ROWS>
struct Sums {
  const float* partial;

  // One of them over all warps, with its bias unless that is null. `output` is counted in the block, `index` in the matrix.
  __device__ __forceinline__ float of(unsigned output, unsigned row, const float* bias, unsigned index) const {
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < GEMV_WARPS; ++part) sum += partial[(part * GEMV_OUTPUTS + output) * ROWS + row];
    return bias == nullptr ? sum : sum + bias[index];
  }
};

// Multiplies ROWS rows with the rows `outputs` of the weight; `num_inputs` is a multiple of 8.
template <int ROWS>
__device__ __forceinline__ Sums<ROWS> multiply(const bf16* x, const bf16* __restrict__ weight, unsigned num_inputs,
                                               const unsigned (&outputs)[GEMV_OUTPUTS]) {
  const unsigned num_vectors = num_inputs / VECTOR;
  const auto load = [&](uint4(&packed)[GEMV_OUTPUTS], unsigned vector) {
    if (vector >= num_vectors) return;
#pragma unroll
    for (int output = 0; output < GEMV_OUTPUTS; ++output) {
      const size_t place = static_cast<size_t>(outputs[output]) * num_vectors + vector;
      packed[output] = load_streaming(reinterpret_cast<const uint4*>(weight) + place);
    }
  };
  uint4 next[GEMV_OUTPUTS] = {};
  load(next, threadIdx.x);
  let_next_begin();
  wait_for_previous();

  float sums[GEMV_OUTPUTS][ROWS] = {};
  // Not unrolled: a thread has its next weights under way at all times, and with few registers there are many threads.
#pragma unroll 1
  for (unsigned vector = threadIdx.x; vector < num_vectors; vector += GEMV_THREADS) {
    uint4 packed[GEMV_OUTPUTS];
#pragma unroll
    for (int output = 0; output < GEMV_OUTPUTS; ++output) packed[output] = next[output];
    load(next, vector + GEMV_THREADS);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const auto inputs = Elements<VECTOR>::load(x + static_cast<size_t>(row) * num_inputs + vector * VECTOR);
#pragma unroll
      for (int output = 0; output < GEMV_OUTPUTS; ++output) {
        const auto weights = Elements<VECTOR>::unpack(packed[output]);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sums[output][row] = fmaf(weights.at[i], inputs.at[i], sums[output][row]);
      }
    }
  }

  SHARED_ARRAY(float, partial, GEMV_WARPS * GEMV_OUTPUTS * ROWS);
  const unsigned warp = threadIdx.x / WARP_THREADS;
#pragma unroll
  for (int output = 0; output < GEMV_OUTPUTS; ++output) {
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const float sum = warp_sum(sums[output][row]);
      if (threadIdx.x % WARP_THREADS == 0) partial[(warp * GEMV_OUTPUTS + output) * ROWS + row] = sum;
    }
  }
  __syncthreads();
  return {partial};
}

template <int ROWS, typename Output>
__device__ __forceinline__ void gemv(const bf16* x, const bf16* weight, const float* bias, unsigned num_inputs,
                                     unsigned num_outputs, Output* y) {
  const unsigned first_output = blockIdx.x * GEMV_OUTPUTS;
  unsigned outputs[GEMV_OUTPUTS];
  // Outputs beyond the last are computed as the last, and not written.
#pragma unroll
  for (int output = 0; output < GEMV_OUTPUTS; ++output) outputs[output] = min(first_output + output, num_outputs - 1);
  const Sums<ROWS> sums = multiply<ROWS>(x, weight, num_inputs, outputs);
  const unsigned output = threadIdx.x / ROWS, row = threadIdx.x % ROWS;
  if (output >= GEMV_OUTPUTS || first_output + output >= num_outputs) return;
  const size_t place = static_cast<size_t>(row) * num_outputs + first_output + output;
  write(y + place, sums.of(output, row, bias, first_output + output));
}

template <int ROWS>
__device__ __forceinline__ void gated_gemv(const bf16* x, const bf16* weight, const float* bias, unsigned num_inputs,
                                           unsigned num_columns, bf16* y) {
  const unsigned first_column = blockIdx.x * GEMV_PAIRS;
  unsigned outputs[GEMV_OUTPUTS];
  // As above: gates first, and then as many ups.
#pragma unroll
  for (int pair = 0; pair < GEMV_PAIRS; ++pair) {
    outputs[pair] = min(first_column + pair, num_columns - 1);
    outputs[GEMV_PAIRS + pair] = num_columns + outputs[pair];
  }
  const Sums<ROWS> sums = multiply<ROWS>(x, weight, num_inputs, outputs);
  const unsigned pair = threadIdx.x / ROWS, row = threadIdx.x % ROWS, column = first_column + pair;
  if (pair >= GEMV_PAIRS || column >= num_columns) return;
  // Rounded, as they would be had they been written in between.
  const bf16 gate = to_bf16(sums.of(pair, row, bias, column));
  const bf16 up = to_bf16(sums.of(GEMV_PAIRS + pair, row, bias, num_columns + column));
  write(y + static_cast<size_t>(row) * num_columns + column, gated(to_float(gate), to_float(up)));
}

// gemv_1 to gemv_8: y = x W^T + bias for so many rows, rounded once; a bias that is null is not added.
// gemv_f32_1 to gemv_f32_8: the same in f32, for logits.
// x: [ROWS, num_inputs]; weight: [num_outputs, num_inputs]; bias: [num_outputs] in f32; y: [ROWS, num_outputs].
// Grid: ceil(num_outputs / 4). Block: 128.
//
// gated_gemv_1 to gated_gemv_8: the bits of gemv and then `gated_silu` (see rowwise.cu) of its result.
// weight: [2 num_columns, num_inputs], gates first; bias: [2 num_columns] in f32; y: [ROWS, num_columns].
// Grid: ceil(num_columns / 2). Block: 128.
//
// `num_inputs` is a multiple of 8, all of x and weight aligned to 16 bytes. y is no input.
#define GEMV_ENTRIES(ROWS)                                                                                              \
  extern "C" __global__ void __launch_bounds__(GEMV_THREADS)                                                            \
      gemv_##ROWS(const bf16* x, const bf16* weight, const float* bias, unsigned num_inputs, unsigned num_outputs,      \
                  bf16* y) {                                                                                            \
    gemv<ROWS>(x, weight, bias, num_inputs, num_outputs, y);                                                            \
  }                                                                                                                     \
  extern "C" __global__ void __launch_bounds__(GEMV_THREADS)                                                            \
      gemv_f32_##ROWS(const bf16* x, const bf16* weight, const float* bias, unsigned num_inputs, unsigned num_outputs,  \
                      float* y) {                                                                                       \
    gemv<ROWS>(x, weight, bias, num_inputs, num_outputs, y);                                                            \
  }                                                                                                                     \
  extern "C" __global__ void __launch_bounds__(GEMV_THREADS)                                                            \
      gated_gemv_##ROWS(const bf16* x, const bf16* weight, const float* bias, unsigned num_inputs,                      \
                        unsigned num_columns, bf16* y) {                                                                \
    gated_gemv<ROWS>(x, weight, bias, num_inputs, num_columns, y);                                                      \
  }

GEMV_ENTRIES(1)
GEMV_ENTRIES(2)
GEMV_ENTRIES(3)
GEMV_ENTRIES(4)
GEMV_ENTRIES(5)
GEMV_ENTRIES(6)
GEMV_ENTRIES(7)
GEMV_ENTRIES(8)

// Products of few rows with a matrix of weights, at the speed at which memory gives the weights.
#include "types.cuh"

constexpr int GEMV_THREADS = 128;
constexpr int GEMV_WARPS = GEMV_THREADS / WARP_THREADS;
// Outputs of a block. A row's piece that was read is used for all of them, and a thread has as many reads of weights under way.
constexpr int GEMV_OUTPUTS = 4;

// y = x W^T + bias for ROWS rows, `num_inputs` a multiple of 8.
//
// The threads of a block share the inputs: thread `t` has the vectors t, t + 128, ... and adds their products in this order; then
// come the sum over its warp, that over the warps in their order, and the bias. So an output's order depends on `num_inputs`
// alone, and a row's bits do not depend on how many rows there are.
template <int ROWS>
__device__ __forceinline__ void gemv(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                                     const float* __restrict__ bias, unsigned num_inputs, unsigned num_outputs,
                                     bf16* __restrict__ y) {
  const unsigned first_output = blockIdx.x * GEMV_OUTPUTS;
  const uint4* rows_of_weight[GEMV_OUTPUTS];
#pragma unroll
  for (int output = 0; output < GEMV_OUTPUTS; ++output) {
    // Outputs beyond the last are computed as the last, and not written.
    const unsigned row = min(first_output + output, num_outputs - 1);
    rows_of_weight[output] = reinterpret_cast<const uint4*>(weight + static_cast<size_t>(row) * num_inputs);
  }

  float sums[GEMV_OUTPUTS][ROWS] = {};
  const unsigned num_vectors = num_inputs / VECTOR;
#pragma unroll 2
  for (unsigned vector = threadIdx.x; vector < num_vectors; vector += GEMV_THREADS) {
    uint4 packed[GEMV_OUTPUTS];
#pragma unroll
    for (int output = 0; output < GEMV_OUTPUTS; ++output) packed[output] = load_streaming(rows_of_weight[output] + vector);
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
  const unsigned output = threadIdx.x / ROWS;
  const unsigned row = threadIdx.x % ROWS;
  if (output >= GEMV_OUTPUTS || first_output + output >= num_outputs) return;
  float sum = 0.0f;
#pragma unroll
  for (int part = 0; part < GEMV_WARPS; ++part) sum += partial[(part * GEMV_OUTPUTS + output) * ROWS + row];
  if (bias != nullptr) sum += bias[first_output + output];
  y[static_cast<size_t>(row) * num_outputs + first_output + output] = to_bf16(sum);
}

// gemv_1 to gemv_8: y = x W^T + bias for so many rows; no bias if it is null.
// x: [ROWS, num_inputs]; weight: [num_outputs, num_inputs]; bias: [num_outputs] in f32; y: [ROWS, num_outputs].
// `num_inputs` is a multiple of 8, all of x and weight aligned to 16 bytes.
// Grid: ceil(num_outputs / 4). Block: 128.
#define GEMV_ENTRY(ROWS)                                                                                           \
  extern "C" __global__ void __launch_bounds__(GEMV_THREADS)                                                       \
      gemv_##ROWS(const bf16* x, const bf16* weight, const float* bias, unsigned num_inputs, unsigned num_outputs, \
                  bf16* y) {                                                                                       \
    gemv<ROWS>(x, weight, bias, num_inputs, num_outputs, y);                                                       \
  }

GEMV_ENTRY(1)
GEMV_ENTRY(2)
GEMV_ENTRY(3)
GEMV_ENTRY(4)
GEMV_ENTRY(5)
GEMV_ENTRY(6)
GEMV_ENTRY(7)
GEMV_ENTRY(8)

// Products of few rows with a matrix of weights, at the speed at which memory gives the weights.
#include "types.cuh"

constexpr int GEMV_THREADS = 128;
constexpr int GEMV_WARPS = GEMV_THREADS / WARP_THREADS;
// Outputs of a block. A row's piece that was read is used for all of them, and a thread has as many reads of weights under way.
constexpr int GEMV_OUTPUTS = 4;

// How a result is written.
__device__ __forceinline__ void write(bf16* to, float x) { *to = to_bf16(x); }
__device__ __forceinline__ void write(float* to, float x) { *to = x; }

// y = x W^T + bias + residual for ROWS rows, `num_inputs` a multiple of 8.
//
// The threads of a block share the inputs: thread `t` has the vectors t, t + 128, ... and adds their products in this order; then
// come the sum over its warp, that over the warps in their order, the bias, and the residual. So an output's order depends on
// `num_inputs` alone, and a row's bits do not depend on how many rows there are. They are not those of gemm.cu, which adds in
// another order.
template <int ROWS, typename Output>
__device__ __forceinline__ void gemv(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                                     const float* __restrict__ bias, const bf16* residual, unsigned num_inputs,
                                     unsigned num_outputs, Output* y) {
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
  const size_t place = static_cast<size_t>(row) * num_outputs + first_output + output;
  if (residual != nullptr) sum += to_float(residual[place]);
  write(y + place, sum);
}

// gemv_1 to gemv_8: y = x W^T + bias + residual for so many rows, rounded once; what is null is not added.
// x: [ROWS, num_inputs]; weight: [num_outputs, num_inputs]; bias: [num_outputs] in f32; residual, y: [ROWS, num_outputs], which
// may be the same. `num_inputs` is a multiple of 8, all of x and weight aligned to 16 bytes.
// gemv_f32_1 to gemv_f32_8: y = x W^T + bias in f32, for logits.
// Grid: ceil(num_outputs / 4). Block: 128.
#define GEMV_ENTRIES(ROWS)                                                                                              \
  extern "C" __global__ void __launch_bounds__(GEMV_THREADS)                                                            \
      gemv_##ROWS(const bf16* x, const bf16* weight, const float* bias, const bf16* residual, unsigned num_inputs,      \
                  unsigned num_outputs, bf16* y) {                                                                      \
    gemv<ROWS>(x, weight, bias, residual, num_inputs, num_outputs, y);                                                  \
  }                                                                                                                     \
  extern "C" __global__ void __launch_bounds__(GEMV_THREADS)                                                            \
      gemv_f32_##ROWS(const bf16* x, const bf16* weight, const float* bias, unsigned num_inputs, unsigned num_outputs,  \
                      float* y) {                                                                                       \
    gemv<ROWS>(x, weight, bias, nullptr, num_inputs, num_outputs, y);                                                   \
  }

GEMV_ENTRIES(1)
GEMV_ENTRIES(2)
GEMV_ENTRIES(3)
GEMV_ENTRIES(4)
GEMV_ENTRIES(5)
GEMV_ENTRIES(6)
GEMV_ENTRIES(7)
GEMV_ENTRIES(8)

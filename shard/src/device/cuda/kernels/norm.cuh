// RMS norm of a row by a block, for the kernels that norm what they read and for those that first add it up.
#pragma once

#include "types.cuh"

// Threads of a block that works on one row.
constexpr int ROW_THREADS = 256;

// A row that lies in memory.
template <int WIDTH>
struct Row {
  const bf16* elements;

  __device__ __forceinline__ Elements<WIDTH> load(unsigned col) const { return Elements<WIDTH>::load(elements + col); }
};

// The sum of squares of what a thread has of a row.
template <int WIDTH>
__device__ __forceinline__ float add_squares(const Elements<WIDTH>& v, float squares) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) squares = fmaf(v.at[i], v.at[i], squares);
  return squares;
}

// Norms a row, given the sum of squares of what each thread has of it.
template <int WIDTH>
__device__ __forceinline__ void scale_row(const bf16* from, float squares, const float* weight, float epsilon, unsigned cols,
                                          bf16* normed) {
  const float mean = block_sum<ROW_THREADS>(squares) / static_cast<float>(cols);
  const float factor = 1.0f / sqrtf(mean + epsilon);
  for (unsigned col = threadIdx.x * WIDTH; col < cols; col += ROW_THREADS * WIDTH) {
    Elements<WIDTH> v = Elements<WIDTH>::load(from + col);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) v.at[i] = v.at[i] * factor * weight[col + i];
    v.store(normed + col);
  }
}

template <int WIDTH>
__device__ __forceinline__ void norm_row(const bf16* x, const float* weight, float epsilon, unsigned cols, bf16* normed) {
  float squares = 0.0f;
  for (unsigned col = threadIdx.x * WIDTH; col < cols; col += ROW_THREADS * WIDTH) {
    squares = add_squares(Elements<WIDTH>::load(x + col), squares);
  }
  scale_row<WIDTH>(x, squares, weight, epsilon, cols, normed);
}

// Adds the residual, unless it is null, to what `x` loads, and norms the sum. The norm is that of the rounded sum, so that it is
// the same bits as that of `norm_row`, which finds only the rounded one. A thread reads back only what it wrote itself, so the
// two passes need no barrier of their own.
template <int WIDTH, typename X>
__device__ __forceinline__ void add_and_norm_row(const X& x, const bf16* residual, const float* weight, float epsilon,
                                                 unsigned cols, bf16* normed, bf16* sum) {
  float squares = 0.0f;
  for (unsigned col = threadIdx.x * WIDTH; col < cols; col += ROW_THREADS * WIDTH) {
    Elements<WIDTH> v = x.load(col);
    if (residual != nullptr) {
      const Elements<WIDTH> r = Elements<WIDTH>::load(residual + col);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) v.at[i] += r.at[i];
    }
    v.store(sum + col);
    v = Elements<WIDTH>::load(sum + col);
    squares = add_squares(v, squares);
  }
  scale_row<WIDTH>(sum, squares, weight, epsilon, cols, normed);
}

// Operations on rows of bf16 activations. The arithmetic is in f32; a result is rounded once.
//
// Any number of columns works. Rows of whole vectors (columns a multiple of 8, which those of the models are) are read and
// written 16 bytes at a time; their first elements must then be aligned to 16 bytes. Grids may not be empty: a call without
// rows is the caller's to leave out.
#include "norm.cuh"

// Threads of a block that works on elements, of any row.
constexpr int ELEMENT_THREADS = 256;

// sum = x + residual, or x if `residual` is null; normed = sum / sqrt(mean(sum^2) + epsilon) * weight, per row.
// x, residual, normed, sum: [rows, cols]; weight: [cols]. `sum` may be `x` or `residual`; `normed` may be neither of the three.
// Grid: rows. Block: 256.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    residual_norm(const bf16* x, const bf16* residual, const float* __restrict__ weight, float epsilon, unsigned cols,
                  bf16* normed, bf16* sum) {
  let_next_begin();
  wait_for_previous();
  const size_t start = static_cast<size_t>(blockIdx.x) * cols;
  const bf16* residual_row = residual == nullptr ? nullptr : residual + start;
  if (cols % VECTOR == 0) {
    add_and_norm_row<VECTOR>(Row<VECTOR>{x + start}, residual_row, weight, epsilon, cols, normed + start, sum + start);
  } else {
    add_and_norm_row<1>(Row<1>{x + start}, residual_row, weight, epsilon, cols, normed + start, sum + start);
  }
}

// normed = x / sqrt(mean(x^2) + epsilon) * weight, per row. x, normed: [rows, cols]; weight: [cols].
// Grid: rows. Block: 256.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    norm_rows(const bf16* __restrict__ x, const float* __restrict__ weight, float epsilon, unsigned cols,
              bf16* __restrict__ normed) {
  const size_t start = static_cast<size_t>(blockIdx.x) * cols;
  if (cols % VECTOR == 0) {
    norm_row<VECTOR>(x + start, weight, epsilon, cols, normed + start);
  } else {
    norm_row<1>(x + start, weight, epsilon, cols, normed + start);
  }
}

// Index of the thread among all threads of the grid, in units of WIDTH elements.
template <int WIDTH>
__device__ __forceinline__ size_t first_element() {
  return (static_cast<size_t>(blockIdx.x) * ELEMENT_THREADS + threadIdx.x) * WIDTH;
}

// Elements from one turn of a thread to its next.
template <int WIDTH>
__device__ __forceinline__ size_t element_stride() {
  return static_cast<size_t>(gridDim.x) * ELEMENT_THREADS * WIDTH;
}

template <int WIDTH>
__device__ __forceinline__ void gated_silu_elements(const bf16* gate_up, size_t rows, unsigned cols, bf16* out) {
  for (size_t i = first_element<WIDTH>(); i < rows * cols; i += element_stride<WIDTH>()) {
    // Row `i / cols` of `gate_up` begins at twice its place in `out`, and WIDTH divides `cols`.
    const bf16* gate = gate_up + i + i / cols * cols;
    Elements<WIDTH> g = Elements<WIDTH>::load(gate);
    const Elements<WIDTH> up = Elements<WIDTH>::load(gate + cols);
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) g.at[k] = gated(g.at[k], up.at[k]);
    g.store(out + i);
  }
}

// out = silu(gate) * up. gate_up: [rows, 2 cols], gates first; out: [rows, cols].
// Grid: any number of blocks, which share the elements. Block: 256.
extern "C" __global__ void __launch_bounds__(ELEMENT_THREADS)
    gated_silu(const bf16* gate_up, unsigned rows, unsigned cols, bf16* out) {
  let_next_begin();
  wait_for_previous();
  if (cols % VECTOR == 0) {
    gated_silu_elements<VECTOR>(gate_up, rows, cols, out);
  } else {
    gated_silu_elements<1>(gate_up, rows, cols, out);
  }
}

template <int WIDTH>
__device__ __forceinline__ void gelu_elements(bf16* x, size_t count) {
  for (size_t i = first_element<WIDTH>(); i < count; i += element_stride<WIDTH>()) {
    Elements<WIDTH> v = Elements<WIDTH>::load(x + i);
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) v.at[k] = 0.5f * v.at[k] * erfcf(v.at[k] * -0.70710678118654752f);
    v.store(x + i);
  }
}

// x = x / 2 (1 + erf(x / sqrt(2))), in place, of `count` elements. As the complement of erf, so that left of zero no small
// difference is taken of numbers near 1.
// Grid: any number of blocks, which share the elements. Block: 256.
extern "C" __global__ void __launch_bounds__(ELEMENT_THREADS) gelu(bf16* x, unsigned long long count) {
  if (count % VECTOR == 0) {
    gelu_elements<VECTOR>(x, count);
  } else {
    gelu_elements<1>(x, count);
  }
}

// Copies a row with all threads of a block, or writes zeros if `from` is null.
__device__ __forceinline__ void copy_row(bf16* to, const bf16* from, unsigned cols) {
  if (cols % VECTOR == 0) {
    uint4* to_vectors = reinterpret_cast<uint4*>(to);
    const uint4* from_vectors = reinterpret_cast<const uint4*>(from);
    for (unsigned i = threadIdx.x; i < cols / VECTOR; i += ROW_THREADS) {
      to_vectors[i] = from == nullptr ? make_uint4(0, 0, 0, 0) : from_vectors[i];
    }
  } else {
    for (unsigned i = threadIdx.x; i < cols; i += ROW_THREADS) to[i] = from == nullptr ? bf16(0) : from[i];
  }
}

// Row `i` of `out` is row `ids[i] - first_id` of `table`, or zeros where there is no such row: the id is another rank's.
// table: [num_ids, cols]; ids: [rows]; out: [rows, cols].
// Grid: rows. Block: 256.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    embedding(const bf16* __restrict__ table, unsigned first_id, unsigned num_ids, const unsigned* __restrict__ ids,
              unsigned cols, bf16* __restrict__ out) {
  let_next_begin();
  // Smaller ids wrap around to numbers beyond the table.
  const unsigned row = ids[blockIdx.x] - first_id;
  const bf16* from = row < num_ids ? table + static_cast<size_t>(row) * cols : nullptr;
  copy_row(out + static_cast<size_t>(blockIdx.x) * cols, from, cols);
}

// Overwrites rows of `x`: for each pair (row, slot), by that slot of the features, or by zeros if `features` is null.
// pairs: [grid], no row twice; features: [slots, cols]; x: [any, cols].
// Grid: pairs. Block: 256.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    insert_features(bf16* __restrict__ x, const bf16* __restrict__ features, const uint2* __restrict__ pairs,
                    unsigned cols) {
  const uint2 pair = pairs[blockIdx.x];
  const bf16* from = features == nullptr ? nullptr : features + static_cast<size_t>(pair.y) * cols;
  copy_row(x + static_cast<size_t>(pair.x) * cols, from, cols);
}

// Row `i` of `out` is row `rows[i]` of `x`. x: [any, cols]; rows: [grid]; out: [grid, cols].
// Grid: rows of `out`. Block: 256.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    gather_rows(const bf16* __restrict__ x, const unsigned* __restrict__ rows, unsigned cols, bf16* __restrict__ out) {
  let_next_begin();
  copy_row(out + static_cast<size_t>(blockIdx.x) * cols, x + static_cast<size_t>(rows[blockIdx.x]) * cols, cols);
}

// Row `slots[i]` of `out` becomes row `i` of `x`: features are written this way. x: [grid, cols]; slots: [grid], none twice;
// out: [any, cols].
// Grid: rows of `x`. Block: 256.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    scatter_rows(const bf16* __restrict__ x, const unsigned* __restrict__ slots, unsigned cols, bf16* __restrict__ out) {
  copy_row(out + static_cast<size_t>(slots[blockIdx.x]) * cols, x + static_cast<size_t>(blockIdx.x) * cols, cols);
}

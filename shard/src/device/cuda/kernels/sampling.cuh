// Rows of logits and what is done to them before a token is drawn: what draws and the best tokens share.
//
// logits: [rows, stride] in f32; the first `num_ids` columns, at least one, are those of tokens `first_id` and on. The rest is
// padding and is never read. A row is worked on in pieces of 2,048 columns, which the last kernel of each kind joins in one
// fixed order. Scores are made by the CPU's IEEE operations in the CPU's order, so that tokens, scores and orders are the CPU's,
// bit for bit; sums of exponentials are not. Grids may not be empty: a rank without vocabulary is the caller's to answer for.
#pragma once

#include "types.cuh"

#define NEGATIVE_INFINITY __uint_as_float(0xff800000u)
#define LARGEST_FLOAT __uint_as_float(0x7f7fffffu)

// Columns of a piece, and the threads that share them.
constexpr unsigned PIECE = 2048;
constexpr int PIECE_THREADS = 256;
constexpr int PER_THREAD = PIECE / PIECE_THREADS;

// Noise is added to the row's scaled logits: its draw is not greedy.
constexpr unsigned HAS_NOISE = 1;
// The row's scaled logits are offered: they are brought into the range of finite numbers.
constexpr unsigned IS_OFFERED = 2;

// How a token is drawn at one row. 40 bytes.
struct RowParameters {
  u64 noise_key;              // Byte 0.
  float factor;               // Byte 8: 1 / temperature, or 1.
  unsigned flags;             // Byte 12: HAS_NOISE, IS_OFFERED.
  float repetition_penalty;   // Byte 16.
  float presence_penalty;     // Byte 20.
  float frequency_penalty;    // Byte 24.
  unsigned first_adjustment;  // Byte 28: its own are consecutive in the array of all rows' adjustments, ascending by id, each
                              // token of the slice once.
  unsigned num_adjustments;   // Byte 32.
  unsigned unused;            // Byte 36.
};

// What the logit of one token of the slice meets. 16 bytes.
struct Adjustment {
  unsigned id;           // Byte 0.
  float bias;            // Byte 4.
  unsigned is_repeated;  // Byte 8: 0 or 1.
  unsigned count;        // Byte 12: occurrences in the answer.
};

__device__ __forceinline__ float adjusted(const RowParameters& row, const Adjustment& token, float logit) {
  logit = logit + token.bias;
  if (token.is_repeated != 0) logit = logit > 0.0f ? logit / row.repetition_penalty : logit * row.repetition_penalty;
  if (token.count > 0) logit -= row.frequency_penalty * static_cast<float>(token.count) + row.presence_penalty;
  return logit;
}

// The first of `count` adjustments whose token is not below `id`.
__device__ __forceinline__ unsigned first_not_below(const Adjustment* adjustments, unsigned count, unsigned id) {
  unsigned low = 0;
  while (count > 0) {
    const unsigned half = count / 2;
    if (adjustments[low + half].id < id) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

// One piece of a row. Element `k` of thread `t` is that of column `k * PIECE_THREADS + t` of the piece.
struct Piece {
  unsigned first_id;
  unsigned len;
  // As they are; negative infinity beyond the last.
  float logits[PER_THREAD];
};

__device__ __forceinline__ Piece load_piece(const float* row, unsigned first_id, unsigned num_ids) {
  Piece piece;
  const unsigned start = blockIdx.x * PIECE;
  piece.first_id = first_id + start;
  piece.len = min(num_ids - start, PIECE);
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) {
    const unsigned col = k * PIECE_THREADS + threadIdx.x;
    piece.logits[k] = col < piece.len ? row[start + col] : NEGATIVE_INFINITY;
  }
  return piece;
}

// The piece's logits after penalties and temperature; negative infinity beyond the last. To be called by all threads, once in a
// kernel.
__device__ __forceinline__ void scale_piece(const Piece& piece, const RowParameters& row, const Adjustment* adjustments,
                                            float (&scaled)[PER_THREAD]) {
  SHARED_ARRAY(float, values, PIECE);
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) scaled[k] = piece.logits[k];
  if (row.num_adjustments > 0) {
    // A thread's own columns change by the hands of others.
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) values[k * PIECE_THREADS + threadIdx.x] = scaled[k];
    __syncthreads();
    const Adjustment* const own = adjustments + row.first_adjustment;
    const unsigned first = first_not_below(own, row.num_adjustments, piece.first_id);
    for (unsigned i = first + threadIdx.x; i < row.num_adjustments; i += PIECE_THREADS) {
      const Adjustment token = own[i];
      const unsigned col = token.id - piece.first_id;
      if (col >= piece.len) break;
      values[col] = adjusted(row, token, values[col]);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) scaled[k] = values[k * PIECE_THREADS + threadIdx.x];
  }
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) {
    scaled[k] *= row.factor;
    if ((row.flags & IS_OFFERED) != 0 && k * PIECE_THREADS + threadIdx.x < piece.len) {
      // Numbers whose differences are numbers, and one zero only.
      scaled[k] = fminf(fmaxf(scaled[k] + 0.0f, -LARGEST_FLOAT), LARGEST_FLOAT);
    }
  }
}

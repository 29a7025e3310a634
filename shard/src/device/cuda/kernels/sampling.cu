// The token that a rank's slice of the vocabulary would draw at each row of logits, as the CPU device finds it.
#include "sampling.cuh"

#define NOT_A_NUMBER __uint_as_float(0x7fc00000u)

constexpr int PIECE_WARPS = PIECE_THREADS / WARP_THREADS;

// What one piece offers. All but the token are not numbers where one of its logits is not finite. 16 bytes.
struct PieceCandidate {
  float score;        // Byte 0.
  unsigned token_id;  // Byte 4.
  float max_logit;    // Byte 8.
  float sum_exp;      // Byte 12.
};

// 20 bytes.
struct RowCandidate {
  float score;        // Byte 0: not a number where a logit of the slice is not finite, and so are the last two.
  unsigned token_id;  // Byte 4.
  float logit;        // Byte 8: of that token, as it was.
  float max_logit;    // Byte 12.
  float sum_exp;      // Byte 16.
};

constexpr int FEED_THREADS = 64;

// The noise of crate::runner::noise, the same bits: integers, and additions, products and quotients in f64.

__device__ __forceinline__ u64 noise_bits(u64 noise_key, unsigned token_id) {
  return mix(noise_key + 0x9e3779b97f4a7c15ull * (static_cast<u64>(token_id) + 1));
}

// Natural logarithm of a positive, normal number.
__device__ __forceinline__ double natural_log(double x) {
  const u64 bits = static_cast<u64>(__double_as_longlong(x));
  const long long exponent = static_cast<long long>(bits - 0x3fe6a09e667f3bcdull) >> 52;
  const double m = __longlong_as_double(static_cast<long long>(bits - (static_cast<u64>(exponent) << 52)));
  const double s = (m - 1.0) / (m + 1.0);
  const double q = s * s;
  double series = 1.0 / 17.0;
  series = series * q + 1.0 / 15.0;
  series = series * q + 1.0 / 13.0;
  series = series * q + 1.0 / 11.0;
  series = series * q + 1.0 / 9.0;
  series = series * q + 1.0 / 7.0;
  series = series * q + 1.0 / 5.0;
  series = series * q + 1.0 / 3.0;
  return static_cast<double>(exponent) * 0.693147180559945309417232121458 + 2.0 * (s + s * q * series);
}

__device__ __forceinline__ float gumbel(u64 bits) {
  const double uniform = (static_cast<double>(bits >> 12) + 0.5) * __longlong_as_double((1023ll - 52) << 52);
  return static_cast<float>(-natural_log(-natural_log(uniform)));
}

// No noise is smaller: the uniform variable behind it is at least 2^-53.
constexpr float MIN_GUMBEL = -3.61f;

// The noise of these bits is smaller. The uniform variable u behind bits that begin with n ones is at most 1 - 2^-(n + 1), or
// 1 - 2^-53 if n is larger than 52; and -ln(u) > 1 - u, so that -ln(-ln(u)) < (n + 1) ln 2.
__device__ __forceinline__ float gumbel_bound(u64 bits) {
  return static_cast<float>(__clzll(static_cast<long long>(~bits)) + 1) * 0.6932f;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = WARP_THREADS / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, distance));
  }
  return x;
}

struct Scored {
  float score;
  unsigned id;
};

// The larger score, the smaller id on a tie; what is not a number loses.
__device__ __forceinline__ Scored better(Scored a, Scored b) {
  return b.score > a.score || (b.score == a.score && b.id < a.id) ? b : a;
}

__device__ __forceinline__ Scored warp_best(Scored mine) {
#pragma unroll
  for (int distance = WARP_THREADS / 2; distance > 0; distance /= 2) {
    const Scored other = {__shfl_xor_sync(WHOLE_WARP, mine.score, distance), __shfl_xor_sync(WHOLE_WARP, mine.id, distance)};
    mine = better(mine, other);
  }
  return mine;
}

// The best of a thread's tokens, with their noise. `largest` is the largest scaled logit of the piece.
__device__ __forceinline__ Scored best_of_thread(const Piece& piece, const RowParameters& row,
                                                 const float (&scaled)[PER_THREAD], float largest) {
  Scored best = {NEGATIVE_INFINITY, piece.first_id};
  // The token with the largest one has this score at least. Rounding keeps the order, so that what is skipped below could not
  // even have drawn level, and few tokens pay for two logarithms.
  const float least = largest + MIN_GUMBEL;
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) {
    const unsigned id = piece.first_id + k * PIECE_THREADS + threadIdx.x;
    float noise = 0.0f;
    if ((row.flags & HAS_NOISE) != 0) {
      const u64 bits = noise_bits(row.noise_key, id);
      if (scaled[k] + gumbel_bound(bits) < fmaxf(least, best.score)) continue;
      noise = gumbel(bits);
    }
    // Ids ascend. Beyond the last column there is negative infinity, which is never larger.
    const float score = scaled[k] + noise;
    if (score > best.score) best = {score, id};
  }
  return best;
}

// The candidate of each piece of each row. rows: [rows]; pieces: [rows, grid.x].
// Grid: pieces of a row (num_ids / 2048, rounded up), rows. Block: 256.
extern "C" __global__ void __launch_bounds__(PIECE_THREADS)
    candidate_pieces(const float* __restrict__ logits, u64 stride, unsigned first_id, unsigned num_ids,
                     const RowParameters* __restrict__ rows, const Adjustment* __restrict__ adjustments,
                     PieceCandidate* __restrict__ pieces) {
  let_next_begin();
  const RowParameters row = rows[blockIdx.y];
  const Piece piece = load_piece(logits + blockIdx.y * stride, first_id, num_ids);
  float scaled[PER_THREAD];
  scale_piece(piece, row, adjustments, scaled);

  bool is_finite = true;
  float max_logit = NEGATIVE_INFINITY, largest = NEGATIVE_INFINITY;
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) {
    // The difference is zero for finite numbers only; a maximum passes over what is not a number.
    const bool is_padding = k * PIECE_THREADS + threadIdx.x >= piece.len;
    is_finite = is_finite && (is_padding || piece.logits[k] - piece.logits[k] == 0.0f);
    max_logit = fmaxf(max_logit, piece.logits[k]);
    largest = fmaxf(largest, scaled[k]);
  }
  SHARED_ARRAY(unsigned, finite_of_warp, PIECE_WARPS);
  SHARED_ARRAY(float, max_logit_of_warp, PIECE_WARPS);
  SHARED_ARRAY(float, largest_of_warp, PIECE_WARPS);
  const unsigned warp = threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS;
  const unsigned finite_lanes = __ballot_sync(WHOLE_WARP, is_finite);
  max_logit = warp_max(max_logit);
  largest = warp_max(largest);
  if (lane == 0) {
    finite_of_warp[warp] = finite_lanes;
    max_logit_of_warp[warp] = max_logit;
    largest_of_warp[warp] = largest;
  }
  __syncthreads();
#pragma unroll
  for (int other = 0; other < PIECE_WARPS; ++other) {
    is_finite = is_finite && finite_of_warp[other] == WHOLE_WARP;
    max_logit = fmaxf(max_logit, max_logit_of_warp[other]);
    largest = fmaxf(largest, largest_of_warp[other]);
  }

  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) sum += expf(piece.logits[k] - max_logit);
  SHARED_ARRAY(float, score_of_warp, PIECE_WARPS);
  SHARED_ARRAY(unsigned, id_of_warp, PIECE_WARPS);
  Scored best = warp_best(best_of_thread(piece, row, scaled, largest));
  if (lane == 0) {
    score_of_warp[warp] = best.score;
    id_of_warp[warp] = best.id;
  }
  sum = block_sum<PIECE_THREADS>(sum);
  if (threadIdx.x != 0) return;
  for (int other = 1; other < PIECE_WARPS; ++other) best = better(best, {score_of_warp[other], id_of_warp[other]});
  PieceCandidate* const to = pieces + static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  *to = is_finite ? PieceCandidate{best.score, best.id, max_logit, sum}
                  : PieceCandidate{NOT_A_NUMBER, best.id, NOT_A_NUMBER, NOT_A_NUMBER};
}

// The token that is drawn of the ranks' candidates for a row, as the hosts find it (crate::layers::draw::best); token 0, which
// stands in the place of one that is not there, where a logit of any rank is not finite or no score is above negative infinity.
__device__ __forceinline__ unsigned token_of_ranks(const RowCandidate* of_row, unsigned num_ranks, unsigned num_rows) {
  // No score of negative infinity is better, for no id is smaller.
  Scored best = {NEGATIVE_INFINITY, 0};
  bool is_finite = true;
  for (unsigned rank = 0; rank < num_ranks; ++rank) {
    const RowCandidate& candidate = of_row[rank * num_rows];
    best = better(best, {candidate.score, candidate.token_id});
    is_finite = is_finite && candidate.max_logit == candidate.max_logit;
  }
  return is_finite ? best.id : 0;
}

// Rows of a step take the tokens of candidates, in place of those that they have. pairs: (row, row of candidates); candidates:
// [num_ranks, num_rows]; token_ids: [rows of the step]. Grid: 1. Block: 64.
extern "C" __global__ void __launch_bounds__(FEED_THREADS)
    feed_tokens(const uint2* __restrict__ pairs, unsigned num_pairs, const RowCandidate* __restrict__ candidates,
                unsigned num_ranks, unsigned num_rows, unsigned* __restrict__ token_ids) {
  for (unsigned i = threadIdx.x; i < num_pairs; i += FEED_THREADS) {
    token_ids[pairs[i].x] = token_of_ranks(candidates + pairs[i].y, num_ranks, num_rows);
  }
}

// The candidate of each row, from those of its pieces. pieces: [rows, num_pieces]; out: [rows].
// Grid: rows. Block: 32.
extern "C" __global__ void __launch_bounds__(WARP_THREADS)
    merge_candidates(const float* logits, u64 stride, unsigned first_id, const PieceCandidate* pieces, unsigned num_pieces,
                     RowCandidate* out) {
  wait_for_previous();
  const PieceCandidate* const own = pieces + static_cast<size_t>(blockIdx.x) * num_pieces;
  // The first token where no score is larger than negative infinity.
  Scored best = {NEGATIVE_INFINITY, first_id};
  float max_logit = NEGATIVE_INFINITY;
  bool is_finite = true;
  for (unsigned i = threadIdx.x; i < num_pieces; i += WARP_THREADS) {
    best = better(best, {own[i].score, own[i].token_id});
    max_logit = fmaxf(max_logit, own[i].max_logit);
    is_finite = is_finite && own[i].max_logit - own[i].max_logit == 0.0f;
  }
  best = warp_best(best);
  max_logit = warp_max(max_logit);
  is_finite = __ballot_sync(WHOLE_WARP, is_finite) == WHOLE_WARP;
  float sum = 0.0f;
  for (unsigned i = threadIdx.x; i < num_pieces; i += WARP_THREADS) sum += own[i].sum_exp * expf(own[i].max_logit - max_logit);
  sum = warp_sum(sum);
  if (threadIdx.x != 0) return;
  const float logit = logits[blockIdx.x * stride + (best.id - first_id)];
  out[blockIdx.x] = is_finite ? RowCandidate{best.score, best.id, logit, max_logit, sum}
                              : RowCandidate{NOT_A_NUMBER, best.id, logit, NOT_A_NUMBER, NOT_A_NUMBER};
}

// The best tokens of a rank's slice of the vocabulary, for the rows that ask: those to report, and those to draw from.
#include "sampling.cuh"

// Tokens in a list of the best: the most that a request may ask for. One for each thread of a piece.
constexpr unsigned LIST = 256;
// Lists are joined by groups of as many threads as a list has tokens, at the same time.
constexpr int MERGE_THREADS = 1024;
constexpr unsigned MERGE_GROUPS = MERGE_THREADS / LIST;

// A row whose best tokens are asked for. 12 bytes.
struct Request {
  unsigned row;     // Byte 0.
  unsigned count;   // Byte 4: tokens, 1 to 256; fewer come where the slice has fewer.
  unsigned scales;  // Byte 8: 0 orders by logits as they are; 1 by those after penalties and temperature, for a row IS_OFFERED.
};

// 12 bytes.
struct BestToken {
  unsigned token_id;  // Byte 0.
  float ordered_by;   // Byte 4: its logit after penalties and temperature, or as it was.
  float logit;        // Byte 8: as it was.
};

// A token and what it is ordered by, as a number that is larger for a better one: a larger value, then a smaller id. No
// key is 0, which stands for no token and comes last. Values are in the total order, where 0 is above -0.
__device__ __forceinline__ u64 key_of(float value, unsigned id) {
  const unsigned bits = __float_as_uint(value);
  const unsigned ascending = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<u64>(ascending) << 32 | ~id;
}

__device__ __forceinline__ float value_of_key(u64 key) {
  const unsigned ascending = static_cast<unsigned>(key >> 32);
  return __uint_as_float(ascending >> 31 != 0 ? ascending & 0x7fffffffu : ~ascending);
}

__device__ __forceinline__ unsigned id_of_key(u64 key) { return ~static_cast<unsigned>(key); }

// The part of a sum of exponentials that is this token's; 0 for none. In f32, as logits are, before sums in f64.
__device__ __forceinline__ double weight_of_key(u64 key, float largest) {
  return key == 0 ? 0.0 : static_cast<double>(expf(value_of_key(key) - largest));
}

// Sorts a piece's keys, the largest first: a bitonic network. To be called by all threads, with nothing written to the keys
// since the last barrier but by the thread itself at its own places (`k * PIECE_THREADS + thread`).
__device__ __forceinline__ void sort_keys(u64 (&keys)[PIECE]) {
  __syncthreads();
  for (unsigned run = 2; run <= PIECE; run *= 2) {
    for (unsigned distance = run / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (unsigned pair = threadIdx.x; pair < PIECE / 2; pair += PIECE_THREADS) {
        const unsigned low = 2 * pair - (pair & (distance - 1));
        const u64 a = keys[low], b = keys[low + distance];
        const bool descends = (low & run) == 0;
        if ((a < b) == descends) {
          keys[low] = b;
          keys[low + distance] = a;
        }
      }
      // Up to this distance the pairs of a warp are those of 64 neighbouring keys, the same for each distance, so that
      // it need not wait for others.
      const unsigned next = distance > 1 ? distance / 2 : run;
      if (max(distance, next) > WARP_THREADS) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
}

// The best tokens of each piece of each request's row. rows, adjustments: as for `candidate_pieces`; requests: [requests];
// lists: [requests, grid.x, 256], keys, the best first; tails: [requests, grid.x], the sum of exp(scaled - largest) over what is
// not in the list, where `largest` is that of the list's first; 0 where logits are not scaled.
// Grid: pieces of a row (num_ids / 2048, rounded up), requests. Block: 256.
extern "C" __global__ void __launch_bounds__(PIECE_THREADS)
    select_pieces(const float* __restrict__ logits, u64 stride, unsigned first_id, unsigned num_ids,
                  const RowParameters* __restrict__ rows, const Adjustment* __restrict__ adjustments,
                  const Request* __restrict__ requests, u64* __restrict__ lists, double* __restrict__ tails) {
  const Request request = requests[blockIdx.y];
  const RowParameters row = rows[request.row];
  const Piece piece = load_piece(logits + request.row * stride, first_id, num_ids);
  float values[PER_THREAD];
  if (request.scales != 0) {
    scale_piece(piece, row, adjustments, values);
  } else {
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) values[k] = piece.logits[k];
  }
  SHARED_ARRAY(u64, keys, PIECE);
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) {
    const unsigned col = k * PIECE_THREADS + threadIdx.x;
    keys[col] = col < piece.len ? key_of(values[k], piece.first_id + col) : 0;
  }
  sort_keys(keys);
  static_assert(LIST == PIECE_THREADS, "a thread for each token of a list");
  const size_t list = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  lists[list * LIST + threadIdx.x] = keys[threadIdx.x];
  double tail = 0.0;
  if (request.scales != 0) {
    const float largest = value_of_key(keys[0]);
    for (unsigned i = LIST + threadIdx.x; i < piece.len; i += PIECE_THREADS) tail += weight_of_key(keys[i], largest);
  }
  tail = block_sum<PIECE_THREADS>(tail);
  if (threadIdx.x == 0) tails[list] = tail;
}

// Sorts the keys of a group of LIST threads, one each, which rise once and fall once, or the other way around: the largest goes
// to the first thread. To be called by all threads of the block, with nothing left to be read from `exchange`.
__device__ __forceinline__ u64 sort_bitonic(u64 key, u64 (&exchange)[MERGE_THREADS]) {
  for (unsigned distance = LIST / 2; distance >= WARP_THREADS; distance /= 2) {
    exchange[threadIdx.x] = key;
    __syncthreads();
    const u64 other = exchange[threadIdx.x ^ distance];
    key = (threadIdx.x & distance) == 0 ? max(key, other) : min(key, other);
    __syncthreads();
  }
#pragma unroll
  for (unsigned distance = WARP_THREADS / 2; distance > 0; distance /= 2) {
    const u64 other = __shfl_xor_sync(WHOLE_WARP, key, distance);
    key = (threadIdx.x & distance) == 0 ? max(key, other) : min(key, other);
  }
  return key;
}

// The best tokens of each request, from those of its row's pieces. lists: [requests, num_pieces, 256]; tails:
// [requests, num_pieces]; best: [requests, 256], of which min(count, tokens of the slice) are written, the best first;
// best_tails: [requests], the sum of exp(scaled - largest) over what is not among them, where `largest` is that of the first; 0
// where logits are not scaled. Of no meaning where a logit of the slice is not finite.
// Grid: requests. Block: 1024.
extern "C" __global__ void __launch_bounds__(MERGE_THREADS)
    merge_lists(const float* __restrict__ logits, u64 stride, unsigned first_id, const Request* __restrict__ requests,
                const u64* __restrict__ lists, const double* __restrict__ tails, unsigned num_pieces,
                BestToken* __restrict__ best, double* __restrict__ best_tails) {
  const Request request = requests[blockIdx.x];
  const u64* const own = lists + static_cast<size_t>(blockIdx.x) * num_pieces * LIST;
  const double* const own_tails = tails + static_cast<size_t>(blockIdx.x) * num_pieces;
  const unsigned group = threadIdx.x / LIST, place = threadIdx.x % LIST;
  const bool scales = request.scales != 0;

  // Each warp finds the first of all.
  u64 first = 0;
  for (unsigned piece = threadIdx.x % WARP_THREADS; piece < num_pieces; piece += WARP_THREADS) {
    first = max(first, own[static_cast<size_t>(piece) * LIST]);
  }
#pragma unroll
  for (int distance = WARP_THREADS / 2; distance > 0; distance /= 2) {
    first = max(first, __shfl_xor_sync(WHOLE_WARP, first, distance));
  }
  const float largest = value_of_key(first);
  double tail = 0.0;
  for (unsigned piece = threadIdx.x; scales && piece < num_pieces; piece += MERGE_THREADS) {
    tail += own_tails[piece] * weight_of_key(own[static_cast<size_t>(piece) * LIST], largest);
  }

  // The larger of a list's keys and of another's backwards are the best of both, rising and falling once; the smaller ones join
  // the tail.
  SHARED_ARRAY(u64, exchange, MERGE_THREADS);
  u64 key = 0;
  for (unsigned start = 0; start < num_pieces; start += MERGE_GROUPS) {
    const unsigned piece = start + group;
    const u64 other = piece < num_pieces ? own[static_cast<size_t>(piece) * LIST + (LIST - 1 - place)] : 0;
    if (scales) tail += weight_of_key(min(key, other), largest);
    key = sort_bitonic(max(key, other), exchange);
  }
  for (unsigned distance = 1; distance < MERGE_GROUPS; distance *= 2) {
    exchange[threadIdx.x] = key;
    __syncthreads();
    const u64 other = exchange[(group ^ distance) * LIST + (LIST - 1 - place)];
    __syncthreads();
    // Both groups of a pair come to the same, and one of all that have the same counts it.
    if (scales && group % (2 * distance) == 0) tail += weight_of_key(min(key, other), largest);
    key = sort_bitonic(max(key, other), exchange);
  }
  if (group == 0 && key != 0) {
    if (place < request.count) {
      const unsigned id = id_of_key(key);
      const float logit = logits[request.row * stride + (id - first_id)];
      best[static_cast<size_t>(blockIdx.x) * LIST + place] = {id, value_of_key(key), logit};
    } else if (scales) {
      tail += weight_of_key(key, largest);
    }
  }
  tail = block_sum<MERGE_THREADS>(tail);
  if (threadIdx.x == 0) best_tails[blockIdx.x] = tail;
}

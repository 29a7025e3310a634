// What a warp of attention does with a tile: 16 rows, each a query of one head, that share keys and values, and 32 tokens.
//
// It carries the largest score, the sum of weights and the weighted values of its rows and holds no more scores than a tile's.
// Products are of bf16, accumulated in f32; weights are rounded to bf16 for the product with the values, not for their sum.
//
// Keys and values go to the registers of an mma as they lie in memory, in vectors. For that the columns of a head are dealt out
// to the threads in another order than PTX counts them in: the same one for queries and keys, whose product adds over them, and
// one that is undone where results are written for values. See `load_columns` and `load_values`.
//
// A row's numbers depend on its query and on the tokens that it sees, in their order, not on the rows beside it: mma computes
// rows apart. What it does not see has weight 0, and enters its products where a row beside it does: as long as that is finite,
// it changes nothing.
#pragma once

#include "types.cuh"

constexpr int TILE_ROWS = 16;
constexpr int TILE_TOKENS = KV_BLOCK_TOKENS;
// Scores of an mma are of so many tokens.
constexpr int SCORE_TOKENS = 8;
// Tokens and columns that an mma adds over.
constexpr int MMA_DEPTH = 16;
constexpr int ATTENTION_WARPS = 4;
constexpr int ATTENTION_THREADS = ATTENTION_WARPS * WARP_THREADS;

#define NEGATIVE_INFINITY __uint_as_float(0xff800000u)

// Reads 2 WORDS neighbouring elements, aligned to as many bytes as these take or to the largest power of two in them.
template <int WORDS>
__device__ __forceinline__ void load_words(const bf16* from, unsigned* words) {
  if (WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[i];
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  } else if (WORDS % 2 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS / 2; ++i) {
      const uint2 v = reinterpret_cast<const uint2*>(from)[i];
      words[2 * i] = v.x, words[2 * i + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = reinterpret_cast<const unsigned*>(from)[i];
  }
}

// The inverse of `load_words`.
template <int WORDS>
__device__ __forceinline__ void store_words(bf16* to, const unsigned* words) {
  if (WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
      reinterpret_cast<uint4*>(to)[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < WORDS / 2; ++i) reinterpret_cast<uint2*>(to)[i] = make_uint2(words[2 * i], words[2 * i + 1]);
  }
}

// What a thread holds of one row's queries or one token's keys: words 2 s and 2 s + 1 go into step s of the product. Of each 32
// columns the thread takes 8 neighbours, 8 pair.., for two steps; of 16 that are left over, 4.
template <int HEAD_DIM>
__device__ __forceinline__ void load_columns(const bf16* from, unsigned pair, unsigned (&words)[HEAD_DIM / 8]) {
  static_assert(HEAD_DIM % MMA_DEPTH == 0, "a head is whole steps of an mma");
  constexpr int LEFT_OVER = HEAD_DIM / 32 * 32;
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 32; ++i) load_words<4>(from + 32 * i + 8 * pair, words + 4 * i);
  if (HEAD_DIM % 32 != 0) load_words<2>(from + LEFT_OVER + 4 * pair, words + LEFT_OVER / 8);
}

// Words of a token's values that a thread holds at a time.
template <int HEAD_DIM>
constexpr int VALUE_WORDS = HEAD_DIM == 128 ? 4 : HEAD_DIM / 16;

// Part of a token's values: column `group` of mma `i` is column i of the head's `group`-th eighth, and a word is of two mmas.
template <int HEAD_DIM>
__device__ __forceinline__ void load_values(const bf16* from, unsigned group, int part,
                                            unsigned (&words)[VALUE_WORDS<HEAD_DIM>]) {
  load_words<VALUE_WORDS<HEAD_DIM>>(from + group * (HEAD_DIM / 8) + part * 2 * VALUE_WORDS<HEAD_DIM>, words);
}

// Keys and values of the tokens of a tile; token `i` is `stride` elements after token `i - 1`.
struct Tile {
  const bf16* keys;
  const bf16* values;
  size_t stride;
  // Tokens that may be read, at least 1.
  int num_tokens;

  // In place of tokens that may not be read the last one is, so that no branch is in the way of reading ahead: no row sees
  // them.
  __device__ __forceinline__ const bf16* keys_of(int token) const { return keys + min(token, num_tokens - 1) * stride; }
  __device__ __forceinline__ const bf16* values_of(int token) const { return values + min(token, num_tokens - 1) * stride; }
};

// Queries of a warp's rows. Here and below a thread's rows are `group` and `group + 8`, with group = lane / 4, pair = lane % 4.
template <int HEAD_DIM>
struct Queries {
  static constexpr int STEPS = HEAD_DIM / MMA_DEPTH;
  unsigned words[STEPS][4];

  // `first` and `second` are the heads of the thread's two rows.
  __device__ __forceinline__ void load(const bf16* first, const bf16* second, unsigned pair) {
    unsigned upper[HEAD_DIM / 8], lower[HEAD_DIM / 8];
    load_columns<HEAD_DIM>(first, pair, upper);
    load_columns<HEAD_DIM>(second, pair, lower);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      words[step][0] = upper[2 * step];
      words[step][1] = lower[2 * step];
      words[step][2] = upper[2 * step + 1];
      words[step][3] = lower[2 * step + 1];
    }
  }
};

// How two states of a row, of which one follows the other, become one. After a state of no tokens, a state stays what it is.
struct Merge {
  float largest;
  float first_factor;
  float second_factor;

  __device__ __forceinline__ Merge(float first_largest, float second_largest) {
    largest = fmaxf(first_largest, second_largest);
    // Where no token was seen yet, nothing is to be scaled, and infinities are not to be subtracted from one another.
    const float base = largest == NEGATIVE_INFINITY ? 0.0f : largest;
    first_factor = exp2_approx(first_largest - base);
    second_factor = exp2_approx(second_largest - base);
  }
  __device__ __forceinline__ float of(float first, float second) const {
    return fmaf(second, second_factor, first * first_factor);
  }
};

// What a warp carries for its rows.
template <int HEAD_DIM>
struct RowStates {
  static constexpr int COLUMN_TILES = HEAD_DIM / 8;
  static constexpr int WORDS = 4 * COLUMN_TILES + 4;
  // values[i][0] is column i of the head's eighth 2 pair, values[i][1] that of eighth 2 pair + 1, both of the first row; the
  // other two are the second row's.
  float values[COLUMN_TILES][4];
  // The largest score of each row, in powers of two.
  float largest[2];
  // The sum of weights.
  float sum[2];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < COLUMN_TILES; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) values[i][k] = 0.0f;
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) largest[row] = NEGATIVE_INFINITY, sum[row] = 0.0f;
  }

  // Attends to a tile that follows, of which the first `num_visible[row]` tokens are seen. `scale` turns products into powers
  // of two.
  __device__ __forceinline__ void attend(const Queries<HEAD_DIM>& queries, const Tile& tile, const int (&num_visible)[2],
                                         float scale, unsigned group, unsigned pair) {
    float scores[TILE_TOKENS / SCORE_TOKENS][4] = {};
#pragma unroll
    for (int part = 0; part < TILE_TOKENS / SCORE_TOKENS; ++part) {
      unsigned keys[HEAD_DIM / 8];
      load_columns<HEAD_DIM>(tile.keys_of(part * SCORE_TOKENS + group), pair, keys);
#pragma unroll
      for (int step = 0; step < Queries<HEAD_DIM>::STEPS; ++step) {
        const unsigned b[2] = {keys[2 * step], keys[2 * step + 1]};
        mma_m16n8k16_bf16(scores[part], queries.words[step], b);
      }
    }
    const Merge merges[2] = {weigh(0, scores, num_visible[0], scale, pair), weigh(1, scores, num_visible[1], scale, pair)};
    add_values(scores, tile, merges, group, pair);
  }

  // Turns the scores of a row into weights relative to the tile's largest, and adds their sum. Returns how values are added.
  __device__ __forceinline__ Merge weigh(int row, float (&scores)[TILE_TOKENS / SCORE_TOKENS][4], int num_visible, float scale,
                                         unsigned pair) {
    float tile_largest = NEGATIVE_INFINITY, tile_sum = 0.0f;
#pragma unroll
    for (int part = 0; part < TILE_TOKENS / SCORE_TOKENS; ++part) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float& score = scores[part][2 * row + k];
        score = part * SCORE_TOKENS + static_cast<int>(2 * pair) + k < num_visible ? score * scale : NEGATIVE_INFINITY;
        tile_largest = fmaxf(tile_largest, score);
      }
    }
    // The four lanes of a group have the other tokens of the row.
    tile_largest = fmaxf(tile_largest, __shfl_xor_sync(WHOLE_WARP, tile_largest, 1));
    tile_largest = fmaxf(tile_largest, __shfl_xor_sync(WHOLE_WARP, tile_largest, 2));
    const float base = tile_largest == NEGATIVE_INFINITY ? 0.0f : tile_largest;
#pragma unroll
    for (int part = 0; part < TILE_TOKENS / SCORE_TOKENS; ++part) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float& score = scores[part][2 * row + k];
        score = exp2_approx(score - base);
        tile_sum += score;
      }
    }
    tile_sum += __shfl_xor_sync(WHOLE_WARP, tile_sum, 1);
    tile_sum += __shfl_xor_sync(WHOLE_WARP, tile_sum, 2);
    const Merge merge(largest[row], tile_largest);
    largest[row] = merge.largest;
    sum[row] = merge.of(sum[row], tile_sum);
    return merge;
  }

  // Adds the values of a tile by the weights of its tokens.
  __device__ __forceinline__ void add_values(const float (&weights)[TILE_TOKENS / SCORE_TOKENS][4], const Tile& tile,
                                             const Merge (&merges)[2], unsigned group, unsigned pair) {
    constexpr int STEPS = TILE_TOKENS / MMA_DEPTH;
    // The weights of a row's tokens lie in a thread as the first factor of the product wants them.
    unsigned a[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&of_rows)[4] = weights[2 * step + i / 2];
        a[step][i] = pack_bf16(of_rows[i % 2 * 2], of_rows[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int part = 0; part < HEAD_DIM / 16 / VALUE_WORDS<HEAD_DIM>; ++part) {
      unsigned rows[STEPS][4][VALUE_WORDS<HEAD_DIM>];
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const int token = step * MMA_DEPTH + 2 * pair;
        load_values<HEAD_DIM>(tile.values_of(token), group, part, rows[step][0]);
        load_values<HEAD_DIM>(tile.values_of(token + 1), group, part, rows[step][1]);
        load_values<HEAD_DIM>(tile.values_of(token + 8), group, part, rows[step][2]);
        load_values<HEAD_DIM>(tile.values_of(token + 9), group, part, rows[step][3]);
      }
#pragma unroll
      for (int i = 0; i < 2 * VALUE_WORDS<HEAD_DIM>; ++i) {
        // The same column of two tokens, from words that hold two columns of one.
        const unsigned halves = i % 2 == 0 ? 0x5410 : 0x7632;
        float added[4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
          const unsigned(&of)[4][VALUE_WORDS<HEAD_DIM>] = rows[step];
          const unsigned b[2] = {permute_bytes(of[0][i / 2], of[1][i / 2], halves),
                                 permute_bytes(of[2][i / 2], of[3][i / 2], halves)};
          mma_m16n8k16_bf16(added, a[step], b);
        }
        float(&to)[4] = values[part * 2 * VALUE_WORDS<HEAD_DIM> + i];
#pragma unroll
        for (int k = 0; k < 4; ++k) to[k] = merges[k / 2].of(to[k], added[k]);
      }
    }
  }

  // Adds a state of tokens that follow.
  __device__ __forceinline__ void merge(const RowStates& next) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Merge merge(largest[row], next.largest[row]);
      largest[row] = merge.largest;
      sum[row] = merge.of(sum[row], next.sum[row]);
#pragma unroll
      for (int i = 0; i < COLUMN_TILES; ++i) {
#pragma unroll
        for (int k = 2 * row; k < 2 * row + 2; ++k) values[i][k] = merge.of(values[i][k], next.values[i][k]);
      }
    }
  }

  // Writes the head of one of the two rows, rounded.
  __device__ __forceinline__ void store(int row, bf16* head, unsigned pair) const {
    unsigned words[COLUMN_TILES];
#pragma unroll
    for (int i = 0; i < COLUMN_TILES / 2; ++i) {
#pragma unroll
      for (int eighth = 0; eighth < 2; ++eighth) {
        words[eighth * COLUMN_TILES / 2 + i] = pack_bf16(values[2 * i][2 * row + eighth] / sum[row],
                                                         values[2 * i + 1][2 * row + eighth] / sum[row]);
      }
    }
    store_words<COLUMN_TILES>(head + 2 * pair * COLUMN_TILES, words);
  }

  // Shows `visit` each word that a thread has, with its index.
  template <typename VISIT>
  __device__ __forceinline__ void each_word(const VISIT& visit) {
#pragma unroll
    for (int i = 0; i < COLUMN_TILES; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) visit(values[i][k], 4 * i + k);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) visit(largest[row], WORDS - 4 + row), visit(sum[row], WORDS - 2 + row);
  }

  // Writes the weighted values of one of the two rows as they are.
  __device__ __forceinline__ void store_partial(int row, float* head, unsigned pair) const {
#pragma unroll
    for (int i = 0; i < COLUMN_TILES; ++i) {
      head[2 * pair * COLUMN_TILES + i] = values[i][2 * row];
      head[(2 * pair + 1) * COLUMN_TILES + i] = values[i][2 * row + 1];
    }
  }
};

// Attention on tensor cores: causal over the paged cache, and without a mask inside windows of vision.
//
// A warp has 16 rows, each a query of one head, that share keys and values, and goes over these in tiles of 32 tokens. It
// carries the largest score, the sum of weights and the weighted values of its rows from tile to tile and never holds more
// scores than a tile's.
// Products are of bf16, accumulated in f32; weights are rounded to bf16 for the product with the values, not for their sum.
//
// Keys and values go from memory to the registers of an mma without a stop in shared memory. For that the columns of a head are
// dealt out to the threads in another order than PTX counts them in: the same one for queries and keys, whose product adds over
// them, and one that is undone where results are written for values. See `load_columns` and `load_values`.
//
// A row's numbers depend on its query and on the tokens that it sees, in their order, not on the rows beside it: mma computes
// rows apart. What it does not see has weight 0, and enters its products where a row beside it does: as long as that is finite,
// it changes nothing.
//
// The context is cut into splits of `split_tokens`, a multiple of 32, from token 0 on. Each split begins anew, and they are
// merged in their order: in memory where a split is a warp of its own (few rows: `split` and `combine`), in registers where a
// warp does all of them (many rows). Both do the same operations, so that with the same `split_tokens` a token's bits do not
// depend on whether it was decoded or computed again as a part of a prompt.
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

// A token's values that a thread holds: column `group` of mma `i` is column i of the head's `group`-th eighth.
template <int HEAD_DIM>
__device__ __forceinline__ void load_values(const bf16* from, unsigned group, unsigned (&words)[HEAD_DIM / 16]) {
  load_words<HEAD_DIM / 16>(from + group * (HEAD_DIM / 8), words);
}

// Keys and values of the tokens of a tile; token `i` is `stride` elements after token `i - 1`.
struct Tile {
  const bf16* keys;
  const bf16* values;
  size_t stride;
  // Tokens that may be read, at least 1.
  int num_tokens;

  // In place of tokens that may not be read the last one is, so that no branch is in the way of reading ahead: no row sees them.
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

// How two states of a row, of which one follows the other, become one.
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
  // values[i][0] is column i of the head's eighth 2 pair, values[i][1] that of eighth 2 pair + 1, both of the first row; the
  // other two are the second row's.
  float values[COLUMN_TILES][4];
  // The largest score of each row, in powers of two.
  float largest[2];
  // The sum of weights: over this thread's tokens until `finish`, over all of them after it.
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

  // Attends to a tile, of which the first `num_visible[row]` tokens are seen. `scale` turns products into powers of two.
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
    weigh(scores, num_visible, scale, pair);
    // The scores of a row's tokens lie in a thread as the first factor of the next product wants them.
#pragma unroll
    for (int step = 0; step < TILE_TOKENS / MMA_DEPTH; ++step) {
      const float(&near)[4] = scores[2 * step];
      const float(&far)[4] = scores[2 * step + 1];
      const unsigned a[4] = {pack_bf16(near[0], near[1]), pack_bf16(near[2], near[3]), pack_bf16(far[0], far[1]),
                             pack_bf16(far[2], far[3])};
      const int token = step * MMA_DEPTH + 2 * pair;
      unsigned rows[4][HEAD_DIM / 16];
      load_values<HEAD_DIM>(tile.values_of(token), group, rows[0]);
      load_values<HEAD_DIM>(tile.values_of(token + 1), group, rows[1]);
      load_values<HEAD_DIM>(tile.values_of(token + 8), group, rows[2]);
      load_values<HEAD_DIM>(tile.values_of(token + 9), group, rows[3]);
#pragma unroll
      for (int i = 0; i < COLUMN_TILES; ++i) {
        // The same column of two tokens, from words that hold two columns of one.
        const unsigned halves = i % 2 == 0 ? 0x5410 : 0x7632;
        const unsigned b[2] = {permute_bytes(rows[0][i / 2], rows[1][i / 2], halves),
                               permute_bytes(rows[2][i / 2], rows[3][i / 2], halves)};
        mma_m16n8k16_bf16(values[i], a, b);
      }
    }
  }

  // Turns scores into weights relative to the largest score so far, and scales down what was summed with another one.
  __device__ __forceinline__ void weigh(float (&scores)[TILE_TOKENS / SCORE_TOKENS][4], const int (&num_visible)[2],
                                        float scale, unsigned pair) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float tile_largest = NEGATIVE_INFINITY;
#pragma unroll
      for (int part = 0; part < TILE_TOKENS / SCORE_TOKENS; ++part) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& score = scores[part][2 * row + k];
          const int token = part * SCORE_TOKENS + 2 * pair + k;
          score = token < num_visible[row] ? score * scale : NEGATIVE_INFINITY;
          tile_largest = fmaxf(tile_largest, score);
        }
      }
      // The four lanes of a group have the other tokens of the row.
      tile_largest = fmaxf(tile_largest, __shfl_xor_sync(WHOLE_WARP, tile_largest, 1));
      tile_largest = fmaxf(tile_largest, __shfl_xor_sync(WHOLE_WARP, tile_largest, 2));
      const Merge merge(largest[row], tile_largest);
      largest[row] = merge.largest;
      const float base = merge.largest == NEGATIVE_INFINITY ? 0.0f : merge.largest;
      sum[row] *= merge.first_factor;
#pragma unroll
      for (int part = 0; part < TILE_TOKENS / SCORE_TOKENS; ++part) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& score = scores[part][2 * row + k];
          score = exp2_approx(score - base);
          sum[row] += score;
        }
      }
#pragma unroll
      for (int i = 0; i < COLUMN_TILES; ++i) {
        values[i][2 * row] *= merge.first_factor;
        values[i][2 * row + 1] *= merge.first_factor;
      }
    }
  }

  // Sums the weights over the threads that share a row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sum[row] += __shfl_xor_sync(WHOLE_WARP, sum[row], 1);
      sum[row] += __shfl_xor_sync(WHOLE_WARP, sum[row], 2);
    }
  }

  // Adds a finished state of tokens that follow.
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

  // Writes the weighted values of one of the two rows as they are.
  __device__ __forceinline__ void store_partial(int row, float* head, unsigned pair) const {
#pragma unroll
    for (int i = 0; i < COLUMN_TILES; ++i) {
      head[2 * pair * COLUMN_TILES + i] = values[i][2 * row];
      head[(2 * pair + 1) * COLUMN_TILES + i] = values[i][2 * row + 1];
    }
  }
};

// The arguments of attention over the cache, and what they mean to a warp.
template <int HEAD_DIM>
struct PagedRows {
  const bf16* keys;
  const unsigned* block_table;
  // Elements of a block, of all heads.
  size_t block_len;
  // Row of activations and query head of the thread's two rows, and how many tokens of the sequence they see. Where there is no
  // row, those of the last one, which then sees none.
  unsigned rows[2];
  unsigned heads[2];
  int visible[2];
  // The largest `visible` of the warp; 0 where it has no row.
  int num_tokens;

  __device__ __forceinline__ PagedRows(const bf16* cache, const unsigned* block_tables, const uint4& sequence,
                                       unsigned first_pair, unsigned kv_head, unsigned num_kv,
                                       const unsigned* query_offsets, unsigned lane) {
    const unsigned first_query = query_offsets[kv_head];
    const unsigned sharing = query_offsets[kv_head + 1] - first_query;
    const unsigned num_pairs = sequence.y * sharing;
    keys = cache + static_cast<size_t>(kv_head) * 2 * KV_BLOCK_TOKENS * HEAD_DIM;
    block_table = block_tables + sequence.w;
    block_len = static_cast<size_t>(num_kv) * 2 * KV_BLOCK_TOKENS * HEAD_DIM;
    num_tokens = 0;
    if (first_pair >= num_pairs) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned pair = first_pair + lane / 4 + 8 * i;
      const unsigned existing = min(pair, num_pairs - 1);
      rows[i] = sequence.x + existing / sharing;
      heads[i] = first_query + existing % sharing;
      visible[i] = pair < num_pairs ? static_cast<int>(sequence.z + existing / sharing + 1) : 0;
    }
    const unsigned last_pair = min(first_pair + TILE_ROWS, num_pairs) - 1;
    num_tokens = static_cast<int>(sequence.z + last_pair / sharing + 1);
  }

  // The thread's two rows are rows `rows_of_qkv` of qkv.
  __device__ __forceinline__ void load_queries(const bf16* qkv, const unsigned (&rows_of_qkv)[2], unsigned qkv_cols,
                                               unsigned pair, Queries<HEAD_DIM>& queries) const {
    queries.load(qkv + static_cast<size_t>(rows_of_qkv[0]) * qkv_cols + heads[0] * HEAD_DIM,
                 qkv + static_cast<size_t>(rows_of_qkv[1]) * qkv_cols + heads[1] * HEAD_DIM, pair);
  }

  // Attends to tokens `first..end`, `first` a multiple of 32.
  __device__ __forceinline__ void attend(const Queries<HEAD_DIM>& queries, int first, int end, float scale, unsigned lane,
                                         RowStates<HEAD_DIM>& states) const {
    states.reset();
    for (int start = first; start < end; start += TILE_TOKENS) {
      const bf16* block = keys + block_table[start / KV_BLOCK_TOKENS] * block_len;
      const Tile tile = {block, block + KV_BLOCK_TOKENS * HEAD_DIM, HEAD_DIM, min(end - start, TILE_TOKENS)};
      const int num_visible[2] = {visible[0] - start, visible[1] - start};
      states.attend(queries, tile, num_visible, scale, lane / 4, lane % 4);
    }
    states.finish();
  }
};

template <int HEAD_DIM>
__device__ __forceinline__ void paged_attention_split(const bf16* qkv, const bf16* cache, const unsigned* block_tables,
                                                      const uint4* sequences, const uint2* tiles,
                                                      const unsigned* split_rows, const unsigned* query_offsets,
                                                      unsigned num_query, unsigned num_kv, unsigned split_tokens, float scale,
                                                      float* partial, float2* stats) {
  let_next_begin();
  wait_for_previous();
  const unsigned lane = threadIdx.x;
  const uint2 tile = tiles[blockIdx.x];
  const PagedRows<HEAD_DIM> rows(cache, block_tables, sequences[tile.x], tile.y, blockIdx.y, num_kv, query_offsets, lane);
  const int first = static_cast<int>(blockIdx.z * split_tokens);
  if (first >= rows.num_tokens) return;
  Queries<HEAD_DIM> queries;
  const unsigned rows_of_qkv[2] = {split_rows[rows.rows[0]], split_rows[rows.rows[1]]};
  rows.load_queries(qkv, rows_of_qkv, (num_query + 2 * num_kv) * HEAD_DIM, lane % 4, queries);
  RowStates<HEAD_DIM> states;
  rows.attend(queries, first, min(first + static_cast<int>(split_tokens), rows.num_tokens), scale, lane, states);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (rows.visible[i] <= first) continue;
    const size_t place = (static_cast<size_t>(rows.rows[i]) * num_query + rows.heads[i]) * gridDim.z + blockIdx.z;
    states.store_partial(i, partial + place * HEAD_DIM, lane % 4);
    if (lane % 4 == 0) stats[place] = make_float2(states.largest[i], states.sum[i]);
  }
}

template <int HEAD_DIM>
__device__ __forceinline__ void paged_attention_combine(const float* partial, const float2* stats,
                                                        const unsigned* split_rows, const unsigned* visible,
                                                        unsigned num_splits, unsigned split_tokens, bf16* out) {
  let_next_begin();
  wait_for_previous();
  const size_t head = static_cast<size_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  const unsigned splits = (visible[blockIdx.x] + split_tokens - 1) / split_tokens;
  float largest = NEGATIVE_INFINITY, sum = 0.0f, value = 0.0f;
  for (unsigned split = 0; split < splits; ++split) {
    const size_t place = head * num_splits + split;
    const float2 next = stats[place];
    const Merge merge(largest, next.x);
    largest = merge.largest;
    sum = merge.of(sum, next.y);
    value = merge.of(value, partial[place * HEAD_DIM + threadIdx.x]);
  }
  const size_t head_of_out = static_cast<size_t>(split_rows[blockIdx.x]) * gridDim.y + blockIdx.y;
  out[head_of_out * HEAD_DIM + threadIdx.x] = to_bf16(value / sum);
}

template <int HEAD_DIM>
__device__ __forceinline__ void paged_attention(const bf16* qkv, const bf16* cache, const unsigned* block_tables,
                                                const uint4* sequences, const uint2* tiles, unsigned num_tiles,
                                                const unsigned* query_offsets, unsigned num_query, unsigned num_kv,
                                                unsigned split_tokens, float scale, bf16* out) {
  const unsigned lane = threadIdx.x % WARP_THREADS;
  const unsigned index = blockIdx.x * ATTENTION_WARPS + threadIdx.x / WARP_THREADS;
  if (index >= num_tiles) return;
  const uint2 tile = tiles[index];
  const PagedRows<HEAD_DIM> rows(cache, block_tables, sequences[tile.x], tile.y, blockIdx.y, num_kv, query_offsets, lane);
  if (rows.num_tokens == 0) return;
  Queries<HEAD_DIM> queries;
  rows.load_queries(qkv, rows.rows, (num_query + 2 * num_kv) * HEAD_DIM, lane % 4, queries);
  RowStates<HEAD_DIM> total;
  total.reset();
  const int length = static_cast<int>(split_tokens);
  for (int first = 0; first < rows.num_tokens; first += length) {
    RowStates<HEAD_DIM> split;
    rows.attend(queries, first, min(first + length, rows.num_tokens), scale, lane, split);
    total.merge(split);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (rows.visible[i] == 0) continue;
    total.store(i, out + (static_cast<size_t>(rows.rows[i]) * num_query + rows.heads[i]) * HEAD_DIM, lane % 4);
  }
}

template <int HEAD_DIM>
__device__ __forceinline__ void vision_attention(const bf16* qkv, const uint4* tiles, unsigned num_tiles,
                                                 unsigned first_row, float scale, bf16* out) {
  const unsigned lane = threadIdx.x % WARP_THREADS;
  const unsigned group = lane / 4, pair = lane % 4;
  const unsigned index = blockIdx.x * ATTENTION_WARPS + threadIdx.x / WARP_THREADS;
  if (index >= num_tiles) return;
  const uint4 tile = tiles[index];
  const size_t cols = static_cast<size_t>(gridDim.y) * HEAD_DIM;
  const bf16* const head = qkv + blockIdx.y * HEAD_DIM;
  const unsigned rows[2] = {tile.z + group, tile.z + group + 8};
  Queries<HEAD_DIM> queries;
  queries.load(head + min(rows[0], tile.w - 1) * 3 * cols, head + min(rows[1], tile.w - 1) * 3 * cols, pair);
  RowStates<HEAD_DIM> states;
  states.reset();
  for (unsigned start = tile.x; start < tile.y; start += TILE_TOKENS) {
    const bf16* const keys = head + start * 3 * cols + cols;
    const int num_tokens = static_cast<int>(min(tile.y - start, static_cast<unsigned>(TILE_TOKENS)));
    const int num_visible[2] = {num_tokens, num_tokens};
    states.attend(queries, {keys, keys + cols, 3 * cols, num_tokens}, num_visible, scale, group, pair);
  }
  states.finish();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (rows[i] >= tile.w) continue;
    states.store(i, out + (rows[i] - first_row) * cols + blockIdx.y * HEAD_DIM, pair);
  }
}

// Attention of the rotated queries of `qkv` over a layer's cache (see rotary.cu for its form), for heads of D columns:
//
// paged_attention_D writes the results. Grid: (ceil(num_tiles / 4), num_kv). Block: 128.
// paged_attention_split_D writes what each split of the context gives, for few rows, where splits are the work to share. These
//   rows are counted apart, and `split_rows` says which rows of qkv and out they are: `sequences` has the places of the
//   sequences' rows among them. Grid: (tiles, num_kv, num_splits), with enough splits for the longest context. Block: 32.
// paged_attention_combine_D makes results of that. Grid: (split rows, num_query). Block: D.
//
// qkv: [rows, (num_query + 2 num_kv) D]. out: [rows, num_query D].
// query_offsets: [num_kv + 1]; queries `query_offsets[i]..query_offsets[i + 1]` share kv head i.
// block_tables: the blocks of all sequences, those of one side by side.
// sequences: for each its first row, its rows, its tokens before the first row, and the place of its first block in
// `block_tables`.
// tiles: the work of a warp, (sequence, first pair). Pairs of a row and a query are counted row by row over the queries that
//   share a kv head, and a tile is 16 of them: there are tiles enough for the kv head with the most queries.
// split_tokens: a multiple of 32. scale: log2(e) / sqrt(D).
// split_rows: [split rows]. partial: [split rows, num_query, num_splits, D], weighted values; stats: [split rows, num_query,
// num_splits], largest score and sum of weights.
// visible: [split rows], how many tokens of its sequence a row sees: those before it, and itself.
#define PAGED_ATTENTION_ENTRIES(D)                                                                                        \
  extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS) paged_attention_##D(                                    \
      const bf16* __restrict__ qkv, const bf16* __restrict__ cache, const unsigned* __restrict__ block_tables,            \
      const uint4* __restrict__ sequences, const uint2* __restrict__ tiles, unsigned num_tiles,                           \
      const unsigned* __restrict__ query_offsets, unsigned num_query, unsigned num_kv, unsigned split_tokens, float scale, \
      bf16* __restrict__ out) {                                                                                           \
    paged_attention<D>(qkv, cache, block_tables, sequences, tiles, num_tiles, query_offsets, num_query, num_kv,           \
                       split_tokens, scale, out);                                                                         \
  }                                                                                                                       \
  extern "C" __global__ void __launch_bounds__(WARP_THREADS) paged_attention_split_##D(                                   \
      const bf16* qkv, const bf16* cache, const unsigned* block_tables,                                                   \
      const uint4* sequences, const uint2* tiles, const unsigned* split_rows,                                             \
      const unsigned* query_offsets, unsigned num_query, unsigned num_kv, unsigned split_tokens,                          \
      float scale, float* partial, float2* stats) {                                                                       \
    paged_attention_split<D>(qkv, cache, block_tables, sequences, tiles, split_rows, query_offsets, num_query, num_kv,    \
                             split_tokens, scale, partial, stats);                                                        \
  }                                                                                                                       \
  extern "C" __global__ void __launch_bounds__(D) paged_attention_combine_##D(                                            \
      const float* partial, const float2* stats, const unsigned* split_rows,                                              \
      const unsigned* visible, unsigned num_splits, unsigned split_tokens, bf16* out) {                                   \
    paged_attention_combine<D>(partial, stats, split_rows, visible, num_splits, split_tokens, out);                       \
  }

PAGED_ATTENTION_ENTRIES(32)
PAGED_ATTENTION_ENTRIES(64)
PAGED_ATTENTION_ENTRIES(80)
PAGED_ATTENTION_ENTRIES(128)

// vision_attention_D: attention without a mask inside windows, for heads of D columns.
// qkv: [rows, 3 num_heads D], rotated. tiles: the work of a warp: first row and end of a window, then the first of 16 rows and
// the end of the window's rows whose queries attend. out: [_, num_heads D], beginning with row `first_row` of qkv; rows in no
// tile are left as they are.
// scale: log2(e) / sqrt(D). Grid: (ceil(num_tiles / 4), num_heads). Block: 128.
#define VISION_ATTENTION_ENTRY(D)                                                                                  \
  extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)                                                  \
      vision_attention_##D(const bf16* __restrict__ qkv, const uint4* __restrict__ tiles, unsigned num_tiles,      \
                           unsigned first_row, float scale, bf16* __restrict__ out) {                              \
    vision_attention<D>(qkv, tiles, num_tiles, first_row, scale, out);                                             \
  }

VISION_ATTENTION_ENTRY(32)
VISION_ATTENTION_ENTRY(64)
VISION_ATTENTION_ENTRY(80)
VISION_ATTENTION_ENTRY(128)

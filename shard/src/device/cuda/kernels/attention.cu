// Attention on tensor cores: causal over the paged cache, and without a mask inside windows of vision.
//
// The context is cut from token 0 on into runs of `run_tokens`, these into splits of `split_tokens`, and these into tiles. Each
// tile begins anew. The tiles of a split are merged in their order, so are the splits of a run, and the runs. A warp may do all
// of that (`paged_attention`, for many rows), or there are pieces of work (`split`, for few rows), each a run, a split or a
// tile, whose results are merged in memory (`combine`). The same operations are done whichever it is, so that a token's bits do
// not depend on how its context was cut into pieces, nor on whether it was decoded or computed again as a part of a prompt.
#include "attention.cuh"

constexpr int MAX_COMBINE_THREADS = 512;
// Runs whose results are in shared memory at a time.
constexpr unsigned COMBINE_RUNS = 32;

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

  // Where keys and values of the 32 tokens from `start` on are.
  __device__ __forceinline__ const bf16* block_of(int start) const {
    return keys + block_table[start / KV_BLOCK_TOKENS] * block_len;
  }

  // Attends to tokens `first..end` of a run, which are some of its splits, or a tile of one. `tile_from` gives the tile that
  // begins with a token; it is asked once for each, in their order. `add` gets the state of each split.
  template <typename TILE_FROM, typename ADD>
  __device__ __forceinline__ void attend(const Queries<HEAD_DIM>& queries, int first, int end, int split_tokens, float scale,
                                         unsigned lane, const TILE_FROM& tile_from, const ADD& add) const {
    for (int split = first; split < end; split += split_tokens) {
      RowStates<HEAD_DIM> states;
      states.reset();
      const int split_end = min(split + split_tokens, end);
      for (int start = split; start < split_end; start += TILE_TOKENS) {
        const Tile tile = tile_from(start);
        const int num_visible[2] = {visible[0] - start, visible[1] - start};
        states.attend(queries, tile, num_visible, scale, lane / 4, lane % 4);
      }
      add(states);
    }
  }
};

// A state that waits in shared memory, where only its thread looks, since registers are for what is needed for each tile.
template <int HEAD_DIM, unsigned THREADS>
struct KeptStates {
  static constexpr unsigned WORDS = RowStates<HEAD_DIM>::WORDS * THREADS;
  float* words;

  __device__ __forceinline__ void keep(RowStates<HEAD_DIM>& states) const {
    states.each_word([&](float& word, unsigned index) { words[index * THREADS + threadIdx.x] = word; });
  }
  __device__ __forceinline__ void load(RowStates<HEAD_DIM>& states) const {
    states.each_word([&](float& word, unsigned index) { word = words[index * THREADS + threadIdx.x]; });
  }
};

// Tiles of keys and values that a warp copies to shared memory: one is used while the next is on its way.
template <int HEAD_DIM>
struct StagedTiles {
  static constexpr unsigned STAGES = 2;
  static constexpr unsigned VECTORS = HEAD_DIM / VECTOR;
  // A vector more than a token has, so that tokens begin at different banks.
  static constexpr unsigned ROW_VECTORS = VECTORS + 1;
  static constexpr unsigned STAGE_VECTORS = 2 * TILE_TOKENS * ROW_VECTORS;
  uint4* shared;

  __device__ __forceinline__ uint4* stage_of(int start) const {
    return shared + start / TILE_TOKENS % STAGES * STAGE_VECTORS;
  }

  // Begins to copy the tile from token `start` on: `block` has its keys and after them its values. Zeros stand for tokens that
  // may not be read.
  __device__ __forceinline__ void copy(int start, const bf16* block, int num_tokens, unsigned lane) const {
    uint4* const stage = stage_of(start);
#pragma unroll
    for (unsigned i = 0; i < 2 * VECTORS; ++i) {
      const unsigned vector = i * WARP_THREADS + lane, row = vector / VECTORS;
      copy_async(stage + row * ROW_VECTORS + vector % VECTORS, reinterpret_cast<const uint4*>(block) + vector,
                 static_cast<int>(row % TILE_TOKENS) < num_tokens);
    }
  }

  // The tile from token `start` on, which all lanes have waited for.
  __device__ __forceinline__ Tile tile(int start) const {
    const bf16* const keys = reinterpret_cast<const bf16*>(stage_of(start));
    return {keys, keys + TILE_TOKENS * ROW_VECTORS * VECTOR, ROW_VECTORS * VECTOR, TILE_TOKENS};
  }
};

template <int HEAD_DIM>
__device__ __forceinline__ void paged_attention_split(const bf16* qkv, const bf16* cache, const unsigned* block_tables,
                                                      const uint4* sequences, const uint4* pieces, const uint4* split_rows,
                                                      const unsigned* query_offsets, unsigned num_query, unsigned num_kv,
                                                      unsigned split_tokens, float scale, float* partial, float2* stats) {
  let_next_begin();
  wait_for_previous();
  const unsigned lane = threadIdx.x;
  const uint4 piece = pieces[blockIdx.x];
  const PagedRows<HEAD_DIM> rows(cache, block_tables, sequences[piece.x], piece.y, blockIdx.y, num_kv, query_offsets, lane);
  const int first = static_cast<int>(piece.z), end = min(static_cast<int>(piece.z + piece.w), rows.num_tokens);
  if (first >= end) return;
  SHARED_ARRAY(uint4, stages, StagedTiles<HEAD_DIM>::STAGES * StagedTiles<HEAD_DIM>::STAGE_VECTORS);
  const StagedTiles<HEAD_DIM> staged = {stages};
  const auto copy = [&](int start) {
    if (start < end) staged.copy(start, rows.block_of(start), min(end - start, TILE_TOKENS), lane);
    commit_copies();
  };
  copy(first);
  Queries<HEAD_DIM> queries;
  const uint4 of_rows[2] = {split_rows[rows.rows[0]], split_rows[rows.rows[1]]};
  const unsigned rows_of_qkv[2] = {of_rows[0].x, of_rows[1].x};
  rows.load_queries(qkv, rows_of_qkv, (num_query + 2 * num_kv) * HEAD_DIM, lane % 4, queries);
  SHARED_ARRAY(float, kept_words, (KeptStates<HEAD_DIM, WARP_THREADS>::WORDS));
  const KeptStates<HEAD_DIM, WARP_THREADS> kept = {kept_words};
  RowStates<HEAD_DIM> run;
  run.reset();
  kept.keep(run);
  rows.attend(
      queries, first, end, static_cast<int>(split_tokens), scale, lane,
      [&](int start) {
        // To where the tile before was, which all lanes have read.
        __syncwarp();
        copy(start + TILE_TOKENS);
        wait_copies<1>();
        __syncwarp();
        return staged.tile(start);
      },
      [&](const RowStates<HEAD_DIM>& split) {
        kept.load(run);
        run.merge(split);
        kept.keep(run);
      });
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (rows.visible[i] <= first) continue;
    const size_t place = (static_cast<size_t>(of_rows[i].z) + piece.z / piece.w) * num_query + rows.heads[i];
    run.store_partial(i, partial + place * HEAD_DIM, lane % 4);
    if (lane % 4 == 0) stats[place] = make_float2(run.largest[i], run.sum[i]);
  }
}

// How a lane's state joins those of the lanes before it, in groups of `size` lanes. In the last lane of a group `largest` and
// `sum` are the group's. A lane computes the factors of its state, which all columns have in common.
struct Fold {
  float largest;
  float sum;
  float first_factor;
  float second_factor;

  __device__ __forceinline__ Fold(const float2 own, unsigned size, unsigned lane) {
    const unsigned index = lane % size;
    largest = own.x;
    for (unsigned distance = 1; distance < size; distance *= 2) {
      const float other = __shfl_up_sync(WHOLE_WARP, largest, distance);
      if (index >= distance) largest = fmaxf(largest, other);
    }
    const float before = __shfl_up_sync(WHOLE_WARP, largest, 1);
    const Merge merge(index == 0 ? NEGATIVE_INFINITY : before, own.x);
    first_factor = merge.first_factor, second_factor = merge.second_factor;
    sum = merge.of(0.0f, own.y);
    for (unsigned i = 1; i < size; ++i) {
      const float of_others = __shfl_up_sync(WHOLE_WARP, sum, 1);
      if (index == i) sum = merge.of(of_others, own.y);
    }
  }
  // A column of the state of lane `of`, added to that of those before it.
  __device__ __forceinline__ float add(float value, float next, unsigned of) const {
    return fmaf(next, __shfl_sync(WHOLE_WARP, second_factor, of), value * __shfl_sync(WHOLE_WARP, first_factor, of));
  }
};

// A column of the state of a run, which is made of `count` pieces, `per_split` of them a split, at the places that `place_of`
// gives. Lanes have different columns; `of_run` becomes what these have in common.
template <int HEAD_DIM, typename PLACE_OF>
__device__ __forceinline__ float combine_run(const float* partial, const float2* stats, unsigned count, unsigned per_split,
                                             unsigned column, unsigned lane, const PLACE_OF& place_of, float2& of_run) {
  const float2 nothing = make_float2(NEGATIVE_INFINITY, 0.0f);
  float columns[WARP_THREADS];
#pragma unroll
  for (unsigned i = 0; i < WARP_THREADS; ++i) {
    columns[i] = i < count && column < HEAD_DIM ? partial[place_of(i) * HEAD_DIM + column] : 0.0f;
  }
  const Fold pieces(lane < count ? stats[place_of(lane)] : nothing, per_split, lane);
  const unsigned num_splits = (count + per_split - 1) / per_split, last = lane * per_split + per_split - 1;
  const float2 of_split = make_float2(__shfl_sync(WHOLE_WARP, pieces.largest, last), __shfl_sync(WHOLE_WARP, pieces.sum, last));
  const Fold splits(lane < num_splits ? of_split : nothing, num_splits, lane);
  of_run = make_float2(__shfl_sync(WHOLE_WARP, splits.largest, num_splits - 1),
                       __shfl_sync(WHOLE_WARP, splits.sum, num_splits - 1));
  float value = 0.0f, value_of_split = 0.0f;
#pragma unroll
  for (unsigned i = 0; i < WARP_THREADS; ++i) {
    if (i >= count) break;
    value_of_split = pieces.add(value_of_split, columns[i], i);
    if ((i + 1) % per_split != 0 && i + 1 != count) continue;
    value = splits.add(value, value_of_split, i / per_split);
    value_of_split = 0.0f;
  }
  return value;
}

template <int HEAD_DIM>
__device__ __forceinline__ void paged_attention_combine(const float* partial, const float2* stats, const uint4* split_rows,
                                                        unsigned split_tokens, unsigned run_tokens, bf16* out) {
  let_next_begin();
  wait_for_previous();
  const unsigned lane = threadIdx.x % WARP_THREADS, warp = threadIdx.x / WARP_THREADS, num_warps = blockDim.x / WARP_THREADS;
  const unsigned column = blockIdx.z * WARP_THREADS + lane;
  const uint4 row = split_rows[blockIdx.x];
  const unsigned per_split = max(split_tokens / row.w, 1u), per_run = max(run_tokens / row.w, 1u);
  const unsigned num_pieces = (row.y + row.w - 1) / row.w, num_runs = (num_pieces + per_run - 1) / per_run;
  SHARED_ARRAY(float2, stats_of_runs, COMBINE_RUNS);
  SHARED_ARRAY(float, columns_of_runs, COMBINE_RUNS * WARP_THREADS);
  float largest = NEGATIVE_INFINITY, sum = 0.0f, value = 0.0f;
  for (unsigned first_run = 0; first_run < num_runs; first_run += COMBINE_RUNS) {
    const unsigned count = min(num_runs - first_run, COMBINE_RUNS);
    for (unsigned run = warp; run < count; run += num_warps) {
      const unsigned first = (first_run + run) * per_run;
      const auto place_of = [&](unsigned piece) {
        return (static_cast<size_t>(row.z) + first + piece) * gridDim.y + blockIdx.y;
      };
      float2 of_run;
      const unsigned pieces = min(num_pieces - first, per_run);
      const float of_column = combine_run<HEAD_DIM>(partial, stats, pieces, per_split, column, lane, place_of, of_run);
      columns_of_runs[run * WARP_THREADS + lane] = of_column;
      if (lane == 0) stats_of_runs[run] = of_run;
    }
    __syncthreads();
    if (warp == 0) {
#pragma unroll 8
      for (unsigned run = 0; run < count; ++run) {
        const float2 next = stats_of_runs[run];
        const Merge merge(largest, next.x);
        largest = merge.largest;
        sum = merge.of(sum, next.y);
        value = merge.of(value, columns_of_runs[run * WARP_THREADS + lane]);
      }
    }
    __syncthreads();
  }
  if (warp != 0 || column >= HEAD_DIM) return;
  out[(static_cast<size_t>(row.x) * gridDim.y + blockIdx.y) * HEAD_DIM + column] = to_bf16(value / sum);
}

template <int HEAD_DIM>
__device__ __forceinline__ void paged_attention(const bf16* qkv, const bf16* cache, const unsigned* block_tables,
                                                const uint4* sequences, const uint2* tiles, unsigned num_tiles,
                                                const unsigned* query_offsets, unsigned num_query, unsigned num_kv,
                                                unsigned split_tokens, unsigned run_tokens, float scale, bf16* out) {
  const unsigned lane = threadIdx.x % WARP_THREADS;
  const unsigned index = blockIdx.x * ATTENTION_WARPS + threadIdx.x / WARP_THREADS;
  if (index >= num_tiles) return;
  const uint2 tile = tiles[index];
  const PagedRows<HEAD_DIM> rows(cache, block_tables, sequences[tile.x], tile.y, blockIdx.y, num_kv, query_offsets, lane);
  if (rows.num_tokens == 0) return;
  Queries<HEAD_DIM> queries;
  rows.load_queries(qkv, rows.rows, (num_query + 2 * num_kv) * HEAD_DIM, lane % 4, queries);
  const int length = static_cast<int>(run_tokens);
  RowStates<HEAD_DIM> total;
  total.reset();
  SHARED_ARRAY(float, kept_words, (KeptStates<HEAD_DIM, ATTENTION_THREADS>::WORDS));
  const KeptStates<HEAD_DIM, ATTENTION_THREADS> kept = {kept_words};
  for (int first = 0; first < rows.num_tokens; first += length) {
    kept.keep(total);
    RowStates<HEAD_DIM> run;
    run.reset();
    const int end = min(first + length, rows.num_tokens);
    rows.attend(
        queries, first, end, static_cast<int>(split_tokens), scale, lane,
        [&](int start) -> Tile {
          const bf16* const block = rows.block_of(start);
          return {block, block + KV_BLOCK_TOKENS * HEAD_DIM, HEAD_DIM, min(end - start, TILE_TOKENS)};
        },
        [&](const RowStates<HEAD_DIM>& split) { run.merge(split); });
    kept.load(total);
    total.merge(run);
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
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (rows[i] >= tile.w) continue;
    states.store(i, out + (rows[i] - first_row) * cols + blockIdx.y * HEAD_DIM, pair);
  }
}

// Attention of the rotated queries of `qkv` over a layer's cache (see rotary.cu for its form), for heads of D columns:
//
// paged_attention_D writes the results. Grid: (ceil(num_tiles / 4), num_kv). Block: 128.
// paged_attention_split_D writes what each piece of the context gives, for few rows, where pieces are the work to share. These
//   rows are counted apart, and `split_rows` says which rows of qkv and out they are: `sequences` has the places of the
//   sequences' rows among them. Grid: (pieces, num_kv). Block: 32.
// paged_attention_combine_D makes results of that. Grid: (split rows, num_query, ceil(D / 32)). Block: 32 to 512,
//   a warp for each run at best; results do not depend on it.
//
// qkv: [rows, (num_query + 2 num_kv) D]. out: [rows, num_query D].
// query_offsets: [num_kv + 1]; queries `query_offsets[i]..query_offsets[i + 1]` share kv head i.
// block_tables: the blocks of all sequences, those of one side by side.
// sequences: for each its first row, its rows, its tokens before the first row, and the place of its first block in
// `block_tables`.
// tiles: the work of a warp, (sequence, first pair). Pairs of a row and a query are counted row by row over the queries that
//   share a kv head, and a tile is 16 of them: there are tiles enough for the kv head with the most queries.
// pieces: such a tile (sequence, first pair), the first token that it attends to, and how many at most: 32, split_tokens or
//   run_tokens, of which the first token is a multiple. Where there are 0, there is nothing to do.
// split_rows: for each the row of qkv and out; how many tokens of its sequence it sees, those before it, and itself; the place
//   of its first piece; and how many tokens its pieces have. Further pieces of a row have the places after it.
// split_tokens and run_tokens: 32 times a power of two; run_tokens is split_tokens or more, and at most 1024.
// scale: log2(e) / sqrt(D).
// partial: [places, num_query, D], weighted values; stats: [places, num_query], largest score and sum of weights.
#define PAGED_ATTENTION_ENTRIES(D)                                                                                         \
  extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS) paged_attention_##D(                                     \
      const bf16* __restrict__ qkv, const bf16* __restrict__ cache, const unsigned* __restrict__ block_tables,             \
      const uint4* __restrict__ sequences, const uint2* __restrict__ tiles, unsigned num_tiles,                            \
      const unsigned* __restrict__ query_offsets, unsigned num_query, unsigned num_kv, unsigned split_tokens,              \
      unsigned run_tokens, float scale, bf16* __restrict__ out) {                                                          \
    paged_attention<D>(qkv, cache, block_tables, sequences, tiles, num_tiles, query_offsets, num_query, num_kv,            \
                       split_tokens, run_tokens, scale, out);                                                              \
  }                                                                                                                        \
  extern "C" __global__ void __launch_bounds__(WARP_THREADS) paged_attention_split_##D(                                    \
      const bf16* qkv, const bf16* cache, const unsigned* block_tables,                                                    \
      const uint4* sequences, const uint4* pieces, const uint4* split_rows,                                                \
      const unsigned* query_offsets, unsigned num_query, unsigned num_kv, unsigned split_tokens,                           \
      float scale, float* partial, float2* stats) {                                                                        \
    paged_attention_split<D>(qkv, cache, block_tables, sequences, pieces, split_rows, query_offsets, num_query, num_kv,    \
                             split_tokens, scale, partial, stats);                                                         \
  }                                                                                                                        \
  extern "C" __global__ void __launch_bounds__(MAX_COMBINE_THREADS) paged_attention_combine_##D(                           \
      const float* partial, const float2* stats, const uint4* split_rows,                                                  \
      unsigned split_tokens, unsigned run_tokens, bf16* out) {                                                             \
    paged_attention_combine<D>(partial, stats, split_rows, split_tokens, run_tokens, out);                                 \
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
#define VISION_ATTENTION_ENTRY(D)                                                                                          \
  extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)                                                          \
      vision_attention_##D(const bf16* __restrict__ qkv, const uint4* __restrict__ tiles, unsigned num_tiles,              \
                           unsigned first_row, float scale, bf16* __restrict__ out) {                                      \
    vision_attention<D>(qkv, tiles, num_tiles, first_row, scale, out);                                                     \
  }

VISION_ATTENTION_ENTRY(32)
VISION_ATTENTION_ENTRY(64)
VISION_ATTENTION_ENTRY(80)
VISION_ATTENTION_ENTRY(128)

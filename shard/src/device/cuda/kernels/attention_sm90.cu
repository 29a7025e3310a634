// Attention of many rows with the tensor cores of Hopper: causal over the paged cache, and without a mask inside windows of
// vision. What is computed is that of attention.cu; the products are those of warpgroups (wgmma.cuh), which alone bring these
// tensor cores to their rate.
//
// A warpgroup has 64 rows, each a query of one head, that share keys and values with those of the block's other warpgroup. Keys
// and values come to shared memory tile by tile, two tiles ahead of the product of weights and values. The scores of a tile are
// begun before the weighted values of the tile before it, so that the tensor cores have these to do while scores are turned
// into weights.
//
// Products are of bf16, accumulated in f32; weights are rounded to bf16 for the product with the values, not for their sum. A
// row's numbers depend on its query and on the tokens that it sees, not on the rows beside it; what it does not see has weight 0.
// They are not the bits that attention.cu gives: the context is not cut into splits but gone over in one run, and the hardware
// adds in another order. Where a token's bits must be those that it had when it was decoded, attention.cu computes it.
#include "wgmma.cuh"

#define NEGATIVE_INFINITY __uint_as_float(0xff800000u)

// How work is cut: a block has 64 rows for each of its warpgroups and goes over TOKENS tokens at a time.
template <int HEAD_DIM_, int WARPGROUPS, int TOKENS_>
struct Shape {
  static constexpr int HEAD_DIM = HEAD_DIM_, TOKENS = TOKENS_;
  static constexpr int ROWS = WARPGROUPS * WGMMA_ROWS;
  static constexpr int THREADS = WARPGROUPS * WARPGROUP_THREADS;
  // One tile's values and the next one's keys are read while a third is copied.
  static constexpr int STAGES = 3;
  using Queries = Panels<ROWS, HEAD_DIM>;
  using Tile = Panels<TOKENS, HEAD_DIM>;
  static constexpr int STAGE_VECTORS = 2 * Tile::VECTORS;
  // With as many as lie before the first that a matrix may begin at.
  static constexpr int SHARED_VECTORS = WGMMA_REPEAT_VECTORS + Queries::VECTORS + STAGES * STAGE_VECTORS;
  static_assert(SHARED_VECTORS * sizeof(uint4) <= 227 << 10, "a block has no more");

  // Threads share the vectors of rows in passes of so many rows: eight neighbours write one line of banks.
  static constexpr int PASS_ROWS = THREADS / Tile::ROW_VECTORS;
  static constexpr int PASSES = TOKENS / PASS_ROWS;
  static_assert(TOKENS % PASS_ROWS == 0 && ROWS % PASS_ROWS == 0, "passes are whole");
  static __device__ __forceinline__ unsigned pass_row() { return threadIdx.x / Tile::ROW_VECTORS; }
  static __device__ __forceinline__ unsigned pass_vector() { return threadIdx.x % Tile::ROW_VECTORS; }
};

// A warpgroup's state for its rows. A thread's rows are `group` and `group + 8` of its warp's 16, with group = lane / 4 and
// pair = lane % 4.
template <typename SHAPE>
struct RowStates {
  static constexpr int SCORES = SHAPE::TOKENS / 2;
  static constexpr int STEPS = SHAPE::TOKENS / WGMMA_DEPTH;
  // Of a tile: sums of a product, then weights in f32.
  float scores[SCORES];
  // Weights of a tile, rounded: the first factor of the product with the values.
  unsigned weights[STEPS][4];
  float values[SHAPE::HEAD_DIM / 2];
  // The largest score of each row, before it is scaled.
  float largest[2];
  // The sum of weights over this thread's tokens.
  float sum[2];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < SCORES; ++i) scores[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < SHAPE::HEAD_DIM / 2; ++i) values[i] = 0.0f;
#pragma unroll
    for (int row = 0; row < 2; ++row) largest[row] = NEGATIVE_INFINITY, sum[row] = 0.0f;
  }

  // Begins the products of the warpgroup's queries with the keys of a tile.
  __device__ __forceinline__ void begin_scores(u64 queries, const uint4* keys) {
    const u64 factor = SHAPE::Tile::over_columns(keys);
    wgmma<false>(scores, queries, factor);
#pragma unroll
    for (int step = 1; step < SHAPE::HEAD_DIM / WGMMA_DEPTH; ++step) {
      wgmma<true>(scores, queries + SHAPE::Queries::columns_of(step), factor + SHAPE::Tile::columns_of(step));
    }
    wgmma_commit();
  }

  // Begins to add what the weights make of a tile's values.
  __device__ __forceinline__ void begin_values(const uint4* tile_values) {
    const u64 factor = SHAPE::Tile::over_rows(tile_values);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) wgmma(values, weights[step], factor + SHAPE::Tile::rows_of(step));
    wgmma_commit();
  }

  // Turns scores into weights relative to the largest score so far; `factor` scales down what was summed with another one. Of a
  // tile's tokens a row sees the first `num_visible[row]`; `scale` turns products into powers of two.
  __device__ __forceinline__ void weigh(const int (&num_visible)[2], bool all_visible, float scale, unsigned pair,
                                        float (&factor)[2]) {
    if (!all_visible) {
#pragma unroll
      for (int i = 0; i < SCORES; ++i) {
        const int token = i / 4 * 8 + 2 * static_cast<int>(pair) + i % 2;
        if (token >= num_visible[i / 2 % 2]) scores[i] = NEGATIVE_INFINITY;
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float next = largest[row];
#pragma unroll
      for (int i = 2 * row; i < SCORES; i += 4) next = fmaxf(next, fmaxf(scores[i], scores[i + 1]));
      // The four lanes of a group have the other tokens of the row.
      next = fmaxf(next, __shfl_xor_sync(WHOLE_WARP, next, 1));
      next = fmaxf(next, __shfl_xor_sync(WHOLE_WARP, next, 2));
      // Infinities are not to be subtracted from one another.
      const float base = next == NEGATIVE_INFINITY ? 0.0f : next * scale;
      factor[row] = exp2_approx(fmaf(largest[row], scale, -base));
      largest[row] = next;
      sum[row] *= factor[row];
#pragma unroll
      for (int i = 2 * row; i < SCORES; i += 4) {
        scores[i] = exp2_approx(fmaf(scores[i], scale, -base));
        scores[i + 1] = exp2_approx(fmaf(scores[i + 1], scale, -base));
        sum[row] += scores[i] + scores[i + 1];
      }
    }
  }

  // The scores of a row's tokens lie in a thread as the first factor of the next product wants them.
  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[step][i] = pack_bf16(scores[8 * step + 2 * i], scores[8 * step + 2 * i + 1]);
    }
  }

  __device__ __forceinline__ void scale_values(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < SHAPE::HEAD_DIM / 2; ++i) values[i] *= factor[i / 2 % 2];
  }

  // Writes the head of one of the two rows, rounded, when the last product has come.
  __device__ __forceinline__ void store(int row, bf16* head, unsigned pair) const {
    const float inverse = 1.0f / sum[row];
#pragma unroll
    for (int i = 0; i < SHAPE::HEAD_DIM / 8; ++i) {
      *reinterpret_cast<unsigned*>(head + 8 * i + 2 * pair) =
          pack_bf16(values[4 * i + 2 * row] * inverse, values[4 * i + 2 * row + 1] * inverse);
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
};

// A block's work. ROWS says which rows it has and which tokens these see: see `CachedRows` and `WindowRows`.
template <typename SHAPE, typename ROWS>
__device__ __forceinline__ void attend(ROWS& rows, float scale) {
  using Tile = typename SHAPE::Tile;
  using Queries = typename SHAPE::Queries;
  DYNAMIC_SHARED(uint4, shared);
  const unsigned before = shared_address(shared) / sizeof(uint4) % WGMMA_REPEAT_VECTORS;
  uint4* const queries = shared + (WGMMA_REPEAT_VECTORS - before) % WGMMA_REPEAT_VECTORS;
  uint4* const stages = queries + Queries::VECTORS;
  const int num_tiles = (rows.num_tokens + SHAPE::TOKENS - 1) / SHAPE::TOKENS;

#pragma unroll
  for (int pass = 0; pass < SHAPE::ROWS / SHAPE::PASS_ROWS; ++pass) {
    const unsigned row = pass * SHAPE::PASS_ROWS + SHAPE::pass_row();
    const bf16* const from = rows.query(row) + SHAPE::pass_vector() * VECTOR;
#pragma unroll
    for (int panel = 0; panel < Queries::NUM_PANELS; ++panel) {
      copy_async(queries + Queries::place(panel, row, SHAPE::pass_vector()),
                 reinterpret_cast<const uint4*>(from + panel * Queries::PANEL_COLUMNS), true);
    }
  }
  const auto keys_of = [&](int tile) { return stages + tile % SHAPE::STAGES * SHAPE::STAGE_VECTORS; };
  const auto values_of = [&](int tile) { return keys_of(tile) + Tile::VECTORS; };
  rows.find_tokens(0);
  const auto copy_tile = [&](int tile) {
    if (tile < num_tiles) {
      uint4* const keys = keys_of(tile);
#pragma unroll
      for (int pass = 0; pass < SHAPE::PASSES; ++pass) {
        const unsigned row = pass * SHAPE::PASS_ROWS + SHAPE::pass_row();
        const int token = tile * SHAPE::TOKENS + static_cast<int>(row);
        // In place of tokens that no row sees the last one is: what lies there may be no number, and a weight of 0 would not hide
        // it.
        const bf16* const from = rows.keys(pass, min(token, rows.num_tokens - 1)) + SHAPE::pass_vector() * VECTOR;
#pragma unroll
        for (int panel = 0; panel < Tile::NUM_PANELS; ++panel) {
          uint4* const to = keys + Tile::place(panel, row, SHAPE::pass_vector());
          const bf16* const key = from + panel * Tile::PANEL_COLUMNS;
          copy_async(to, reinterpret_cast<const uint4*>(key), true);
          copy_async(to + Tile::VECTORS, reinterpret_cast<const uint4*>(key + rows.values_after_keys), true);
        }
      }
      // Read now, so that they are there when the next tile is to be copied.
      rows.find_tokens((tile + 1) * SHAPE::TOKENS);
    }
    commit_copies();
  };
  copy_tile(0);
  copy_tile(1);

  // All lanes of a warp name the same factor, and the compiler is to see that they do.
  const unsigned warpgroup = __shfl_sync(WHOLE_WARP, threadIdx.x / WARPGROUP_THREADS, 0), pair = threadIdx.x % 4;
  const u64 first_factor = Queries::over_columns(queries + warpgroup * WGMMA_ROWS * Queries::ROW_VECTORS);
  RowStates<SHAPE> states;
  states.reset();
  float factor[2];
  const auto weigh = [&](int tile) {
    const int start = tile * SHAPE::TOKENS;
    const int num_visible[2] = {rows.visible[0] - start, rows.visible[1] - start};
    states.weigh(num_visible, start + SHAPE::TOKENS <= rows.least_visible, scale, pair, factor);
  };

  wait_copies<1>();
  fence_shared_for_wgmma();
  __syncthreads();
  hold(states.scores);
  wgmma_fence();
  states.begin_scores(first_factor, keys_of(0));
  wgmma_wait<0>();
  hold(states.scores);
  // Nothing was summed yet that a factor would scale.
  weigh(0);
  states.round_weights();
  for (int tile = 0; tile + 1 < num_tiles; ++tile) {
    wait_copies<0>();
    fence_shared_for_wgmma();
    // What all threads copied of the next tile is there, and all have done with the tile before this one, whose stage the next
    // copies go to.
    __syncthreads();
    copy_tile(tile + 2);
    hold(states.scores);
    hold(states.values);
    hold(states.weights);
    wgmma_fence();
    states.begin_scores(first_factor, keys_of(tile + 1));
    states.begin_values(values_of(tile));
    wgmma_wait<1>();
    hold(states.scores);
    weigh(tile + 1);
    // The weights are to be computed while the tensor cores have work.
    finish_before_wait(states.sum[0] + states.sum[1]);
    wgmma_wait<0>();
    hold(states.values);
    hold(states.weights);
    states.scale_values(factor);
    states.round_weights();
  }
  hold(states.values);
  hold(states.weights);
  wgmma_fence();
  states.begin_values(values_of(num_tiles - 1));
  states.finish();
  wgmma_wait<0>();
  hold(states.values);
  hold(states.weights);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    bf16* const head = rows.head(i);
    if (head != nullptr) states.store(i, head, pair);
  }
}

// Which of the block's rows is the first of the thread's two; the other one is 8 below.
__device__ __forceinline__ unsigned row_of_thread() {
  return threadIdx.x / WARP_THREADS * 16 + threadIdx.x % WARP_THREADS / 4;
}

// The rows of a tile of attention over the cache.
template <typename SHAPE>
struct CachedRows {
  // Tokens that some row sees, that all rows see, and that the thread's two rows see.
  int num_tokens;
  int least_visible;
  int visible[2];
  // Elements from a token's keys to its values.
  int values_after_keys;

  const bf16* qkv;
  size_t qkv_cols;
  const bf16* cache;
  size_t block_len;
  const unsigned* block_table;
  bf16* out;
  size_t out_cols;
  uint4 sequence;
  unsigned first_query, sharing, first_pair, num_pairs;
  // Where the tokens of the next tile are that this thread copies.
  unsigned blocks[SHAPE::PASSES];

  // Pairs beyond the last are the last one once more, which nobody writes.
  __device__ __forceinline__ unsigned existing(unsigned row) const { return min(first_pair + row, num_pairs - 1); }

  // Whether there are any.
  __device__ __forceinline__ bool set() {
    if (first_pair >= num_pairs) return false;
    const unsigned last_pair = min(first_pair + SHAPE::ROWS, num_pairs) - 1;
    num_tokens = static_cast<int>(sequence.z + last_pair / sharing + 1);
    least_visible = static_cast<int>(sequence.z + first_pair / sharing + 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      visible[i] = static_cast<int>(sequence.z + existing(row_of_thread() + 8 * i) / sharing + 1);
    }
    values_after_keys = KV_BLOCK_TOKENS * SHAPE::HEAD_DIM;
    return true;
  }

  __device__ __forceinline__ const bf16* query(unsigned row) const {
    const unsigned pair = existing(row);
    return qkv + (sequence.x + pair / sharing) * qkv_cols + (first_query + pair % sharing) * SHAPE::HEAD_DIM;
  }

  __device__ __forceinline__ void find_tokens(int first) {
#pragma unroll
    for (int pass = 0; pass < SHAPE::PASSES; ++pass) {
      const int token = first + pass * SHAPE::PASS_ROWS + static_cast<int>(SHAPE::pass_row());
      blocks[pass] = block_table[min(token, num_tokens - 1) / KV_BLOCK_TOKENS];
    }
  }

  __device__ __forceinline__ const bf16* keys(int pass, int token) const {
    return cache + blocks[pass] * block_len + static_cast<unsigned>(token) % KV_BLOCK_TOKENS * SHAPE::HEAD_DIM;
  }

  __device__ __forceinline__ bf16* head(int i) const {
    const unsigned pair = first_pair + row_of_thread() + 8 * i;
    if (pair >= num_pairs) return nullptr;
    return out + (sequence.x + pair / sharing) * out_cols + (first_query + pair % sharing) * SHAPE::HEAD_DIM;
  }
};

// The rows of a tile of attention inside a window.
template <typename SHAPE>
struct WindowRows {
  // As of `CachedRows`. All rows see all tokens.
  int num_tokens;
  int least_visible;
  int visible[2];
  int values_after_keys;

  // The head's columns of qkv, and where the tile's first row is written.
  const bf16* qkv;
  bf16* out;
  size_t cols;
  uint4 tile;

  __device__ __forceinline__ void set() {
    num_tokens = static_cast<int>(tile.y - tile.x);
    visible[0] = visible[1] = least_visible = num_tokens;
    values_after_keys = static_cast<int>(cols);
  }

  __device__ __forceinline__ const bf16* query(unsigned row) const { return qkv + min(tile.z + row, tile.w - 1) * 3 * cols; }

  __device__ __forceinline__ void find_tokens(int) {}

  __device__ __forceinline__ const bf16* keys(int, int token) const { return qkv + (tile.x + token) * 3 * cols + cols; }

  __device__ __forceinline__ bf16* head(int i) const {
    const unsigned row = row_of_thread() + 8 * i;
    return tile.z + row < tile.w ? out + row * cols : nullptr;
  }
};

template <int HEAD_DIM>
using WideShape = Shape<HEAD_DIM, 2, 128>;
template <int HEAD_DIM>
using WindowShape = Shape<HEAD_DIM, 1, 64>;

template <typename SHAPE>
__device__ __forceinline__ void attend_cached(const bf16* qkv, const bf16* cache, const unsigned* block_tables,
                                              const uint4* sequences, const uint2* tiles, const unsigned* query_offsets,
                                              unsigned num_query, unsigned num_kv, float scale, bf16* out) {
  constexpr size_t PART = KV_BLOCK_TOKENS * SHAPE::HEAD_DIM;
  const uint2 tile = tiles[blockIdx.x];
  CachedRows<SHAPE> rows;
  rows.qkv = qkv;
  rows.qkv_cols = static_cast<size_t>(num_query + 2 * num_kv) * SHAPE::HEAD_DIM;
  rows.sequence = sequences[tile.x];
  rows.cache = cache + blockIdx.y * 2 * PART;
  rows.block_len = num_kv * 2 * PART;
  rows.block_table = block_tables + rows.sequence.w;
  rows.out = out;
  rows.out_cols = static_cast<size_t>(num_query) * SHAPE::HEAD_DIM;
  rows.first_query = query_offsets[blockIdx.y];
  rows.sharing = query_offsets[blockIdx.y + 1] - rows.first_query;
  rows.first_pair = tile.y;
  rows.num_pairs = rows.sequence.y * rows.sharing;
  if (rows.set()) attend<SHAPE>(rows, scale);
}

template <typename SHAPE>
__device__ __forceinline__ void attend_window(const bf16* qkv, const uint4* tiles, unsigned first_row, float scale, bf16* out) {
  const size_t column = blockIdx.y * SHAPE::HEAD_DIM;
  WindowRows<SHAPE> rows;
  rows.tile = tiles[blockIdx.x];
  rows.cols = static_cast<size_t>(gridDim.y) * SHAPE::HEAD_DIM;
  rows.qkv = qkv + column;
  rows.out = out + (rows.tile.z - first_row) * rows.cols + column;
  rows.set();
  attend<SHAPE>(rows, scale);
}

// For heads of D columns, and with the arguments that attention.cu explains:
//
// sm90_paged_attention_D: grid (tiles, num_kv), block 256. A tile, the work of a block, is 128 pairs of a row and a query head.
// sm90_vision_attention_D: grid (tiles, num_heads), block 256. A tile is 128 rows of a window.
// sm90_window_attention_D: the same for windows of few tokens: grid (tiles, num_heads), block 128. A tile is 64 rows of a window.
//
// Dynamic shared memory: 1792 D + 1024 bytes, of sm90_window_attention_D 896 D + 1024.
#define SM90_ATTENTION_ENTRIES(D)                                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 1) sm90_paged_attention_##D(                                             \
      const bf16* __restrict__ qkv, const bf16* __restrict__ cache, const unsigned* __restrict__ block_tables,               \
      const uint4* __restrict__ sequences, const uint2* __restrict__ tiles, const unsigned* __restrict__ query_offsets,      \
      unsigned num_query, unsigned num_kv, float scale, bf16* __restrict__ out) {                                            \
    attend_cached<WideShape<D>>(qkv, cache, block_tables, sequences, tiles, query_offsets, num_query, num_kv, scale, out);   \
  }                                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256, 1)                                                                       \
      sm90_vision_attention_##D(const bf16* __restrict__ qkv, const uint4* __restrict__ tiles, unsigned first_row,           \
                                float scale, bf16* __restrict__ out) {                                                       \
    attend_window<WideShape<D>>(qkv, tiles, first_row, scale, out);                                                          \
  }                                                                                                                          \
  extern "C" __global__ void __launch_bounds__(128, 2)                                                                       \
      sm90_window_attention_##D(const bf16* __restrict__ qkv, const uint4* __restrict__ tiles, unsigned first_row,           \
                                float scale, bf16* __restrict__ out) {                                                       \
    attend_window<WindowShape<D>>(qkv, tiles, first_row, scale, out);                                                        \
  }

SM90_ATTENTION_ENTRIES(32)
SM90_ATTENTION_ENTRIES(64)
SM90_ATTENTION_ENTRIES(80)
SM90_ATTENTION_ENTRIES(128)

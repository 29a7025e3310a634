// Blocks of a launch, one after the other, each with its threads: see cuda_emulation.h.
#pragma once

#include "fibers.h"

namespace emulation {

inline void prepare_block() {
  state.block_number = ++num_blocks;
#ifdef EMULATION_ASAN
  std::free(state.dynamic_shared);
  state.dynamic_shared = static_cast<char*>(std::malloc(state.launch.shared_bytes));
#endif
  if (state.launch.shared_bytes > 0) std::memset(state.dynamic_shared, 0xff, state.launch.shared_bytes);
  state.is_unfenced.assign(state.launch.shared_bytes / COPY_BYTES, false);
  state.num_waiting = state.num_ended = state.num_waited = state.num_ready = state.vote = 0;
  hide(true);
  state.slow = static_cast<unsigned>(state.random.below(state.num_threads));
  for (unsigned thread = 0; thread < state.num_threads; ++thread) release(thread);
  for (unsigned first = 0; first < state.num_threads; first += LANES) {
    Warp& warp = state.warps[first / LANES];
    const unsigned lanes = state.num_threads - first;
    warp.lanes = lanes < LANES ? (1u << lanes) - 1 : 0xffffffffu;
    warp.ended = warp.num_groups = warp.turn = warp.num_awaiting = 0;
    warp.num_products = warp.factors = 0;
  }
}

// The warps of a warpgroup are to have begun the same products.
inline void check_warpgroups() {
  constexpr unsigned WARPS = 4;
  for (unsigned warp = 0; warp * LANES < state.num_threads; ++warp) {
    const Warp &mine = state.warps[warp], &first = state.warps[warp / WARPS * WARPS];
    if (mine.num_products == first.num_products && mine.factors == first.factors) continue;
    fail("the warps of a warpgroup begin different products");
  }
}

// Runs threads of the block until none can go on.
inline void run_ready() {
  unsigned& drawn = state.ready[state.random.below(state.num_ready)];
  Fiber& first = state.fibers[drawn];
  drawn = state.ready[--state.num_ready];
  state.running = &first;
#ifdef EMULATION_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, first.stack, STACK_BYTES);
#endif
  Context::change(state.scheduler, first.context);
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  if (state.failure == nullptr) return;
  const Failure failure{state.failure};
  state.failure = nullptr;
  throw failure;
}

// Takes the next block.
inline void begin_block() {
  const dim3 grid = state.launch.grid;
  const size_t block = state.blocks[state.num_begun++];
  state.block_index = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                       static_cast<unsigned>(block / grid.x / grid.y)};
  prepare_block();
  run_ready();
}

inline void end_block() {
  if (state.num_ended != state.num_threads) fail("threads wait for others that do not come");
  check_warpgroups();
}

inline void add_fibers(size_t count) {
  const size_t existing = state.fibers.size();
  if (count <= existing) return;
  // Stacks are never given back.
  const size_t bytes = (count - existing) * STACK_BYTES;
  void* const stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for the stacks");
  state.fibers.resize(count);
  for (size_t i = existing; i < count; ++i) {
    state.fibers[i].index = static_cast<unsigned>(i);
    state.fibers[i].stack = static_cast<char*>(stacks) + (i - existing) * STACK_BYTES;
  }
}

// Makes fibers begin anew. Their stacks begin at different places of a page: at the same place of many pages, they would
// push one another out of the cache.
inline void prepare_fibers(size_t first) {
  constexpr size_t LINES = 64, LINE_BYTES = 64, STRIDE = 7;
  for (size_t i = first; i < state.fibers.size(); ++i) {
    Fiber& fiber = state.fibers[i];
    fiber.forget();
    fiber.context.prepare(fiber.stack, STACK_BYTES - i * STRIDE % LINES * LINE_BYTES, run_fiber);
  }
}

inline void start_fibers() {
  const dim3 block = state.launch.block;
  const size_t count = static_cast<size_t>(block.x) * block.y * block.z;
  if (count == 0 || count > MAX_THREADS) fail("a block has 1 to 1024 threads");
  const size_t existing = state.fibers.size();
  add_fibers(count);
  prepare_fibers(state.finished ? existing : 0);
  state.finished = false;
  state.num_threads = static_cast<unsigned>(count);
  for (unsigned index = 0; index < state.num_threads; ++index) {
    state.fibers[index].thread = {index % block.x, index / block.x % block.y, index / block.x / block.y};
  }
}

inline void prepare_launch(const Launch& launch, std::function<void()> kernel) {
  state.launch = launch;
  state.kernel = std::move(kernel);
  const dim3 grid = launch.grid;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) fail("no grid of a GPU is of this size");
  start_fibers();
#ifndef EMULATION_ASAN
  std::free(state.dynamic_shared);
  state.dynamic_shared = static_cast<char*>(std::malloc(launch.shared_bytes));
#endif
  state.random = Random(launch.seed);
  state.num_spins = 0;
  state.num_begun = 0;
  state.has_previous_ended = true;
  state.blocks.resize(static_cast<size_t>(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < state.blocks.size(); ++i) {
    state.blocks[i] = i;
    std::swap(state.blocks[i], state.blocks[state.random.below(i + 1)]);
  }
}

inline void run_blocks() {
  while (state.num_begun < state.blocks.size()) {
    begin_block();
    end_block();
  }
  state.finished = true;
}

// Runs a kernel over a grid.
inline void run(const Launch& launch, std::function<void()> kernel) {
  prepare_launch(launch, std::move(kernel));
  run_blocks();
}

}  // namespace emulation

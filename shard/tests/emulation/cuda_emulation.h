// Runs CUDA kernels on a CPU, so that a sanitizer and a test can look at them where there is no GPU.
//
// The kernels' own sources are compiled by a C++ compiler behind this header. Each thread of a block is a fiber with a stack of
// its own. A fiber runs until it meets others (at a barrier, in a shuffle, in an mma); which one runs next is drawn from a
// seed, so that a kernel that lacks a barrier reads what is not written yet under most seeds. Blocks run one after the other,
// in an order drawn from the seed too. A block finds its shared memory filled with NaN, so that a comparison sees an element
// that was never written; with AddressSanitizer it is also allocated for each block, exactly as large as it was declared, so
// that an index beyond it shows.
//
// Copies that a thread begins land in shared memory when it waits for them and not before; until then NaN is there. Products of
// a warpgroup come when they are waited for (wgmma_emulation.h). What a peer or the host would write while a kernel runs is
// written, piece by piece, while threads spin.
//
// A kernel that may begin before the one before it has ended must have all its threads wait for that. Until all threads of a block
// do, AddressSanitizer sees whatever they read or write of the buffers that others may write.
//
// Stricter than a GPU: all threads of a block must reach a barrier, and all lanes of a warp that a mask names must reach the same
// operation. What does neither, or waits for a thread that has ended, is a failure: it ends the process with status 3, or the
// launch where the process is to survive it. Not shown are races between blocks, and between threads that meet nowhere: a fiber
// is not interrupted between two meetings.
//
// A process may run any number of launches, from any of its threads, one at a time.
#pragma once

#define CUDA_EMULATION 1

#include "context.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <sched.h>
#include <string>
#include <sys/mman.h>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATION_ASAN 1
#endif
#endif
#ifdef EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define SHARED_ARRAY(type, name, count)                           \
  static emulation::SharedArray<type, (count)> name##_of_block; \
  type(&name)[count] = name##_of_block.get()

#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulation::state.dynamic_shared)

// Vectors, aligned as CUDA's are: UndefinedBehaviorSanitizer reports one that is read from elsewhere.
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

constexpr unsigned LANES = 32;
constexpr size_t STACK_BYTES = 256 << 10;
constexpr unsigned MAX_THREADS = 1024;
constexpr int FAILED = 3;

// What lanes of a warp wait for. Those that meet must wait for the same.
enum class Meeting { Warp, Shuffle, Ballot, Matrix, Mma, Wgmma, WgmmaWait };

// What a lane shows to the others of its warp when they meet.
struct Shown {
  unsigned words[6];
};

// A copy to shared memory that was begun. Nothing is copied from a null pointer: zeros are written.
struct Copy {
  char* to;
  const char* from;
};

constexpr size_t COPY_BYTES = 16;

// A thread's part of a product of its warpgroup that was begun and not waited for: see wgmma_emulation.h.
struct Product {
  // Half as many as the product has columns.
  float* sums = nullptr;
  unsigned num_sums = 0;
  bool accumulates = true;
  // The first factor, in registers or in shared memory, and the second one.
  const unsigned* registers = nullptr;
  uint64_t first = 0;
  uint64_t second = 0;
  bool is_transposed = false;
  // What the sums were, of the first product that was begun with them.
  std::vector<float> initial;
  bool is_first = false;
};

// Registers that products are made with, and what is in them.
struct Registers {
  const void* at;
  std::string bytes;
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  dim3 thread;
  unsigned index = 0;
  // What it shows where only some lanes of its warp meet, and what each of them showed at the last such meeting. A copy of its
  // own, since others may be at their next meeting before it has read.
  Shown mine;
  Shown seen[LANES];
  // Copies that it began since its last group, and the groups that have not landed, oldest first.
  std::vector<Copy> begun;
  std::vector<std::vector<Copy>> groups;
  // What it copied to dynamic shared memory, in units of a copy, and the tensor cores do not see yet.
  std::vector<size_t> unfenced;
  // Products that it began since its last group, and the groups that it has not waited for, oldest first.
  std::vector<Product> begun_products;
  std::vector<std::vector<Product>> product_groups;
  // Whether it has fenced its registers since the last wait; those that are held; and those that came from a wait and were not
  // held since.
  bool is_fenced = false;
  std::vector<Registers> held, come;
  // Whether it has waited for the kernel before.
  bool has_waited = false;

  void forget() {
    begun.clear();
    groups.clear();
    unfenced.clear();
    begun_products.clear();
    product_groups.clear();
    held.clear();
    come.clear();
    is_fenced = has_waited = false;
  }
};

// Lanes that wait for one another.
struct Group {
  Meeting meeting;
  unsigned mask;
  unsigned arrived;
};

struct Warp {
  // Lanes that the block has, and those whose thread has ended.
  unsigned lanes = 0;
  unsigned ended = 0;
  unsigned num_groups = 0;
  Group groups[LANES];
  // What lanes show where all of them meet, in two arrays by turns: a lane that shows again in the same array has met all
  // others in between, so that they have read what was in it.
  unsigned turn = 0;
  Shown shown[2][LANES];
  // Lanes that wait for products, and how many products the warp began and what they multiply.
  unsigned num_awaiting = 0;
  uint64_t num_products = 0;
  uint64_t factors = 0;
};

// What somebody else writes while a kernel runs.
struct Write {
  char* to;
  std::string bytes;
};

// What the kernel before may still read or write.
struct Hidden {
  char* from;
  size_t bytes;
};

struct Launch {
  dim3 grid, block;
  unsigned shared_bytes = 0;
  uint64_t seed = 0;
  // Whether the kernel may begin before the one before it has ended, and what it may not touch before it waits.
  bool begins_early = false;
  std::vector<Hidden> hidden;
  // One of them happens after each SPINS_PER_WRITE times that a thread spins.
  std::vector<Write> writes;
};

constexpr unsigned SPINS_PER_WRITE = 20;
// So often threads spin, all together, before nothing more is expected to come where the emulation plays the others.
constexpr unsigned MAX_SPINS = 100000;
// So long they do where the others are processes, whose kernels take their time.
constexpr std::chrono::seconds MAX_SPIN_TIME{20};
// Spins between two looks at the clock, and between two offers of the processor, which take a while where it is busy.
constexpr unsigned SPINS_PER_CLOCK = 256;
constexpr unsigned SPINS_PER_YIELD = 16;

// Draws numbers: xorshift64*.
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_((seed + 1) * 0x9e3779b97f4a7c15u | 1) {}
  // Below `bound`, which is less than 2^32.
  uint64_t below(uint64_t bound) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return (state_ * 0x2545f4914f6cdd1du >> 32) * bound >> 32;
  }

 private:
  uint64_t state_;
};

struct State {
  Launch launch;
  // The blocks in the order in which they run, and how many have begun.
  std::vector<size_t> blocks;
  size_t num_begun = 0;
  dim3 block_index;
  uint64_t block_number = 0;
  std::function<void()> kernel;
  Random random;
  unsigned num_threads = 0;
  unsigned num_waiting = 0;
  // Whether the threads that wait for all others vote, what any of them voted, and what came of the last vote.
  bool is_voting = false;
  unsigned vote = 0;
  unsigned last_vote = 0;
  // One thread lags behind, and shows what the others do before its turn; an even order would keep all close together.
  unsigned slow = 0;
  unsigned num_spins = 0;
  // When the launch first spun.
  std::chrono::steady_clock::time_point first_spin;
  unsigned num_ended = 0;
  // Threads that have waited for the kernel before, and whether it has ended.
  unsigned num_waited = 0;
  bool has_previous_ended = true;
  unsigned num_ready = 0;
  unsigned ready[MAX_THREADS];
  Warp warps[MAX_THREADS / LANES];
  // Those of the largest block so far; fibers keep their stacks.
  std::vector<Fiber> fibers;
  char* dynamic_shared = nullptr;
  // Of each unit of a copy in it, whether the tensor cores do not see what is there.
  std::vector<char> is_unfenced;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  Fiber* running = nullptr;
  // Whether the last launch ran to its end, so that all fibers wait for the next.
  bool finished = true;
  // Whether a failure ends the launch, not the process; and the failure that did so.
  bool survives = false;
  const char* failure = nullptr;
};

// Kept until the end of the process, whose threads may still run a kernel when it ends.
union Kept {
  State state;
  Kept() { new (&state) State; }
  ~Kept() {}
};

inline Kept kept;
inline State& state = kept.state;

// Blocks of all launches.
inline uint64_t num_blocks = 0;

// A launch that failed, where the process survives it.
struct Failure {
  const char* why;
};

[[noreturn]] inline void fail(const char* why) {
  if (!state.survives) {
    std::fprintf(stderr, "emulation: %s\n", why);
    std::_Exit(FAILED);
  }
  Fiber* const fiber = state.running;
  if (fiber == nullptr) throw Failure{why};
  state.failure = why;
  state.running = nullptr;
  for (;;) Context::change(fiber->context, state.scheduler);
}

template <typename T, size_t COUNT>
class SharedArray {
 public:
  using Array = T[COUNT];
  // This block's array; the first thread that asks prepares it.
  Array& get() {
    if (state.launch.begins_early && !state.running->has_waited) fail("shared memory before the kernel before is waited for");
    if (block_ != state.block_number) prepare();
    return *reinterpret_cast<Array*>(elements_);
  }

 private:
  void prepare() {
    block_ = state.block_number;
#ifdef EMULATION_ASAN
    std::free(elements_);
    elements_ = nullptr;
#endif
    if (elements_ == nullptr) elements_ = std::malloc(sizeof(Array));
    std::memset(elements_, 0xff, sizeof(Array));
  }

  void* elements_ = nullptr;
  uint64_t block_ = 0;
};

inline void release(unsigned thread) { state.ready[state.num_ready++] = thread; }

// Goes on with a fiber drawn from those that can run, or with the scheduler if there is none. Returns when `fiber` is drawn.
inline void leave(Fiber& fiber) {
  Fiber* next = nullptr;
  if (state.num_ready > 0) {
    unsigned place = state.random.below(state.num_ready);
    if (state.ready[place] == state.slow && state.random.below(64) != 0) place = (place + 1) % state.num_ready;
    unsigned& drawn = state.ready[place];
    next = &state.fibers[drawn];
    drawn = state.ready[--state.num_ready];
  }
  if (next == &fiber) return;
  state.running = next;
#ifdef EMULATION_ASAN
  const void* const stack = next == nullptr ? state.scheduler_stack : next->stack;
  __sanitizer_start_switch_fiber(&fiber.fake_stack, stack, next == nullptr ? state.scheduler_stack_bytes : STACK_BYTES);
#endif
  Context::change(fiber.context, next == nullptr ? state.scheduler : next->context);
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

inline void end_thread(const Fiber& fiber) {
  const unsigned bit = 1u << fiber.index % LANES;
  Warp& warp = state.warps[fiber.index / LANES];
  warp.ended |= bit;
  ++state.num_ended;
  if (state.num_waiting > 0) fail("a barrier of the block waits for a thread that has ended");
  for (unsigned i = 0; i < warp.num_groups; ++i) {
    if (warp.groups[i].mask & bit) fail("a warp waits for a thread that has ended");
  }
}

// A fiber is never left: when its thread has ended it waits for the next block, so that no stack is used twice by
// AddressSanitizer's count.
inline void run_fiber() {
#ifdef EMULATION_ASAN
  const void* stack;
  size_t stack_bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &stack_bytes);
  // The first fiber of all comes from the scheduler.
  if (state.scheduler_stack == nullptr) state.scheduler_stack = stack, state.scheduler_stack_bytes = stack_bytes;
#endif
  for (;;) {
    Fiber& fiber = *state.running;
    state.kernel();
    if (state.launch.begins_early && !fiber.has_waited) fail("a thread ends and has not waited for the kernel before it");
    if (!fiber.begun_products.empty() || !fiber.product_groups.empty()) fail("a thread ends before products that it began");
    if (!fiber.come.empty()) fail("a thread ends and has not held the registers of a product that came");
    // What was not waited for lands nowhere: the block's memory may be gone by then.
    fiber.forget();
    end_thread(fiber);
    leave(fiber);
  }
}

// Waits for all threads of the block, which all vote or none. Returns whether any of them voted for it: no later vote can end
// before it was read.
inline unsigned wait_for_block(bool is_voting = false, unsigned vote = 0) {
  Fiber& fiber = *state.running;
  if (state.num_ended > 0) fail("a barrier of the block waits for a thread that has ended");
  if (state.num_waiting > 0 && state.is_voting != is_voting) fail("threads of a block wait at different barriers");
  state.is_voting = is_voting;
  state.vote |= vote;
  if (++state.num_waiting == state.num_threads) {
    state.num_waiting = 0;
    state.last_vote = state.vote;
    state.vote = 0;
    for (unsigned thread = 0; thread < state.num_threads; ++thread) release(thread);
  }
  leave(fiber);
  return state.last_vote;
}

inline void hide(bool is_hidden) {
#ifdef EMULATION_ASAN
  for (const Hidden& hidden : state.launch.hidden) {
    if (is_hidden) {
      __asan_poison_memory_region(hidden.from, hidden.bytes);
    } else {
      __asan_unpoison_memory_region(hidden.from, hidden.bytes);
    }
  }
#else
  static_cast<void>(is_hidden);
#endif
}

// Lets the threads of a block go on that wait for the kernel before.
inline void release_waited() {
  hide(false);
  for (unsigned thread = 0; thread < state.num_threads; ++thread) release(thread);
}

// Waits for the kernel before, if it may still run, and until all threads of the block do so.
inline void wait_for_previous() {
  Fiber& fiber = *state.running;
  if (!state.launch.begins_early || fiber.has_waited) return;
  fiber.has_waited = true;
  if (++state.num_waited == state.num_threads && state.has_previous_ended) release_waited();
  leave(fiber);
}

// Whether threads have spun for too long.
inline bool waits_in_vain() {
  if (!state.survives) return state.num_spins > MAX_SPINS;
  if (state.num_spins % SPINS_PER_CLOCK != 1) return false;
  const auto now = std::chrono::steady_clock::now();
  if (state.num_spins == 1) state.first_spin = now;
  return now - state.first_spin > MAX_SPIN_TIME;
}

// Lets others go on, and write meanwhile.
inline void spin() {
  Fiber& fiber = *state.running;
  ++state.num_spins;
  if (waits_in_vain()) fail("threads wait for what nobody writes");
  // What is waited for may be another process, which needs the processor.
  if (state.survives && state.num_spins % SPINS_PER_YIELD == 0) sched_yield();
  const size_t next = state.num_spins / SPINS_PER_WRITE - 1;
  if (state.num_spins % SPINS_PER_WRITE == 0 && next < state.launch.writes.size()) {
    const Write& write = state.launch.writes[next];
    std::memcpy(write.to, write.bytes.data(), write.bytes.size());
  }
  release(fiber.index);
  leave(fiber);
}

// Lets lanes go on that have all arrived.
inline void release_group(unsigned first, const Group& group, bool shows) {
  if (shows) {
    Shown shown[LANES];
    for (unsigned lane = 0; lane < LANES; ++lane) {
      if (group.mask >> lane & 1) shown[lane] = state.fibers[first + lane].mine;
    }
    for (unsigned lane = 0; lane < LANES; ++lane) {
      if (group.mask >> lane & 1) std::memcpy(state.fibers[first + lane].seen, shown, sizeof shown);
    }
  }
  for (unsigned lane = 0; lane < LANES; ++lane) {
    if (group.mask >> lane & 1) release(first + lane);
  }
}

// Waits for the lanes of `mask`. Lanes that meet elsewhere first may come later; if they never come, all are found waiting in
// the end.
inline void wait_for_lanes(Fiber& fiber, Meeting meeting, unsigned mask) {
  const unsigned first = fiber.index / LANES * LANES;
  const unsigned bit = 1u << (fiber.index - first);
  Warp& warp = state.warps[fiber.index / LANES];
  if (!(mask & bit)) fail("a thread meets others of its warp, and its mask does not name it");
  if (mask & ~warp.lanes) fail("a mask names a lane beyond the block");
  if (mask & warp.ended) fail("a warp waits for a thread that has ended");
  unsigned place = 0;
  while (place < warp.num_groups && (warp.groups[place].meeting != meeting || warp.groups[place].mask != mask)) ++place;
  Group& group = warp.groups[place];
  if (place == warp.num_groups) group = {meeting, mask, 0}, ++warp.num_groups;
  group.arrived |= bit;
  if (group.arrived == mask) {
    const bool whole = mask == warp.lanes;
    const Group complete = group;
    group = warp.groups[--warp.num_groups];
    if (whole && meeting != Meeting::Warp) warp.turn ^= 1;
    release_group(first, complete, !whole && meeting != Meeting::Warp);
  }
  leave(fiber);
}

// Shows `words` to the lanes of `mask` and returns what all of them showed, to be read before the next meeting.
template <size_t COUNT>
inline const Shown* exchange(Meeting meeting, unsigned mask, const unsigned (&words)[COUNT]) {
  Fiber& fiber = *state.running;
  Warp& warp = state.warps[fiber.index / LANES];
  const bool whole = mask == warp.lanes;
  Shown* const shown = warp.shown[warp.turn];
  std::memcpy(whole ? shown[fiber.index % LANES].words : fiber.mine.words, words, sizeof words);
  wait_for_lanes(fiber, meeting, mask);
  return whole ? shown : fiber.seen;
}

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

inline float bf16_to_float(unsigned bits) {
  bits <<= 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline unsigned float_to_bf16(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  // As the instruction does: there is one NaN.
  if (std::isnan(x)) return 0x7fff;
  return static_cast<unsigned>((static_cast<uint64_t>(bits) + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulation

#define threadIdx (emulation::state.running->thread)
#define blockIdx (emulation::state.block_index)
#define blockDim (emulation::state.launch.block)
#define gridDim (emulation::state.launch.grid)

inline void __syncthreads() { emulation::wait_for_block(); }

inline int __syncthreads_or(int predicate) { return static_cast<int>(emulation::wait_for_block(true, predicate != 0)); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::wait_for_lanes(*emulation::state.running, emulation::Meeting::Warp, mask);
}

template <typename T>
T emulation_shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) == sizeof(unsigned) || sizeof(T) == 2 * sizeof(unsigned));
  unsigned mine[sizeof(T) / sizeof(unsigned)];
  std::memcpy(mine, &value, sizeof value);
  const emulation::Shown* shown = emulation::exchange(emulation::Meeting::Shuffle, mask, mine);
  if (source >= emulation::LANES) return value;
  if (!(mask >> source & 1)) emulation::fail("a shuffle reads from a lane that its mask does not name");
  std::memcpy(&value, shown[source].words, sizeof value);
  return value;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned source) {
  return emulation_shuffle(mask, value, source % emulation::LANES);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned distance) {
  return emulation_shuffle(mask, value, (emulation::state.running->index % emulation::LANES) ^ distance);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  return emulation_shuffle(mask, value, emulation::state.running->index % emulation::LANES + distance);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  return emulation_shuffle(mask, value, emulation::state.running->index % emulation::LANES - distance);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const unsigned mine[1] = {predicate};
  const emulation::Shown* shown = emulation::exchange(emulation::Meeting::Ballot, mask, mine);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < emulation::LANES; ++lane) {
    if (mask >> lane & 1) ballot |= shown[lane].words[0] << lane;
  }
  return ballot;
}

// Fibers are not interrupted, so that an atomic operation is a plain one.
template <typename T>
T atomicAdd(T* to, T value) {
  const T old = *to;
  *to = old + value;
  return old;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Leading zeros; 64 of 0.
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }

using std::max;
using std::min;

inline unsigned pack_bf16(float low, float high) {
  return emulation::float_to_bf16(low) | emulation::float_to_bf16(high) << 16;
}

inline uint4 load_streaming(const uint4* from) { return *from; }

// A lane's row is read when it comes here: another that writes to it must have been waited for.
inline void load_matrices(unsigned (&words)[4], const uint4* row) {
  const uint4 mine = *row;
  const unsigned shown[4] = {mine.x, mine.y, mine.z, mine.w};
  const emulation::Shown* rows = emulation::exchange(emulation::Meeting::Matrix, 0xffffffffu, shown);
  const unsigned lane = emulation::state.running->index % emulation::LANES;
  for (unsigned matrix = 0; matrix < 4; ++matrix) words[matrix] = rows[matrix * 8 + lane / 4].words[lane % 4];
}

inline void copy_async(uint4* to, const uint4* from, bool exists) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (addresses % emulation::COPY_BYTES != 0) emulation::fail("a copy from or to a misaligned address");
  std::memset(static_cast<void*>(to), 0xff, emulation::COPY_BYTES);
  const char* const source = exists ? reinterpret_cast<const char*>(from) : nullptr;
  emulation::state.running->begun.push_back({reinterpret_cast<char*>(to), source});
}

inline void commit_copies() {
  emulation::Fiber& fiber = *emulation::state.running;
  fiber.groups.push_back(std::move(fiber.begun));
  fiber.begun.clear();
}

template <int PENDING>
void wait_copies() {
  std::vector<std::vector<emulation::Copy>>& groups = emulation::state.running->groups;
  while (groups.size() > PENDING) {
    for (const emulation::Copy& copy : groups.front()) {
      if (copy.from == nullptr) {
        std::memset(copy.to, 0, emulation::COPY_BYTES);
      } else {
        std::memcpy(copy.to, copy.from, emulation::COPY_BYTES);
      }
      const size_t offset = copy.to - emulation::state.dynamic_shared;
      if (offset >= emulation::state.launch.shared_bytes) continue;
      emulation::state.is_unfenced[offset / emulation::COPY_BYTES] = true;
      emulation::state.running->unfenced.push_back(offset / emulation::COPY_BYTES);
    }
    groups.erase(groups.begin());
  }
  // Where what landed is also to be what did not land yet, it may be either.
  for (const std::vector<emulation::Copy>& pending : groups) {
    for (const emulation::Copy& copy : pending) std::memset(copy.to, 0xff, emulation::COPY_BYTES);
  }
}

inline void store_release(unsigned* to, unsigned value) {
  std::atomic_ref<unsigned>(*to).store(value, std::memory_order_release);
}

inline unsigned load_acquire(const unsigned* from) {
  return std::atomic_ref<unsigned>(*const_cast<unsigned*>(from)).load(std::memory_order_acquire);
}

inline void spin() { emulation::spin(); }

inline void wait_for_previous() { emulation::wait_for_previous(); }

inline void let_next_begin() {}

inline float exp2_approx(float x) { return std::exp2(x); }

inline unsigned permute_bytes(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned byte = selector >> 4 * i & 7;
    result |= static_cast<unsigned>(bytes >> 8 * byte & 0xff) << 8 * i;
  }
  return result;
}

// The layout of the fragments is PTX's, as types.cuh describes it. Which order and precision a tensor core adds in is not
// told: here the products of an element are added in double precision and rounded once.
inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const emulation::Shown* lanes = emulation::exchange(emulation::Meeting::Mma, 0xffffffffu, mine);
  const unsigned group = emulation::state.running->index % emulation::LANES / 4;
  const unsigned pair = emulation::state.running->index % 4;
  double sums[4] = {d[0], d[1], d[2], d[3]};
  for (unsigned k = 0; k < 16; k += 2) {
    // Word `k / 8` of the registers, of lane `k % 8 / 2` of the row's or column's four.
    const unsigned place = k % 8 / 2, high = k / 8;
    const unsigned* const of_rows = lanes[group * 4 + place].words + high * 2;
    const unsigned words_of_b[2] = {lanes[pair * 8 + place].words[4 + high], lanes[pair * 8 + 4 + place].words[4 + high]};
    for (unsigned half = 0; half < 2; ++half) {
      const auto element = [half](unsigned word) {
        return static_cast<double>(emulation::bf16_to_float(word >> 16 * half & 0xffff));
      };
      for (unsigned i = 0; i < 4; ++i) sums[i] += element(of_rows[i / 2]) * element(words_of_b[i % 2]);
    }
  }
  for (unsigned i = 0; i < 4; ++i) d[i] = static_cast<float>(sums[i]);
}

#include "wgmma_emulation.h"

// Fibers that stand for the threads of a block: how they meet, and what each of them sees. cuda_emulation.h says what for.
#pragma once

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

}  // namespace emulation

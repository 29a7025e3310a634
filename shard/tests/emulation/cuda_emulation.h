// Runs CUDA kernels on a CPU, so that a sanitizer and a test can look at them where there is no GPU.
//
// The kernels' own sources are compiled by a C++ compiler behind this header. Each thread of a block is a fiber with a stack of
// its own. A fiber runs until it meets others (at a barrier, in a shuffle, in an mma); which one runs next is drawn from a
// seed, so that a kernel that lacks a barrier reads what is not written yet under most seeds. Blocks run one after the other,
// in an order drawn from the seed too. Shared memory is allocated for each block, exactly as large as it was declared and
// filled with NaN, so that AddressSanitizer sees an index beyond it and a comparison sees an element that was never written.
//
// Stricter than a GPU: all threads of a block must reach a barrier, and all lanes of a warp that a mask names must reach the same
// operation. What does neither, or waits for a thread that has ended, ends the process with status 3. Not shown are races
// between blocks, and between threads that meet nowhere: a fiber is not interrupted between two meetings.
#pragma once

#define CUDA_EMULATION 1

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <sys/mman.h>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATION_ASAN 1
#endif
#endif
#ifdef EMULATION_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define SHARED_ARRAY(type, name, count)                           \
  static emulation::SharedArray<type, (count)> name##_of_block; \
  type(&name)[count] = name##_of_block.get()

#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulation::state.dynamic_shared.get())

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

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulation: %s\n", why);
  std::_Exit(FAILED);
}

#if defined(__x86_64__)

// Pushes the registers that a call preserves, keeps the stack pointer in `*save`, and goes on where `load` was kept.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

class Context {
 public:
  void prepare(char* stack, void (*entry)()) {
    constexpr int SAVED_REGISTERS = 6;
    // A function is entered with the stack pointer eight bytes off a multiple of 16; the word above the entry is the address to
    // which it never returns.
    void** top = reinterpret_cast<void**>(stack + STACK_BYTES) - 2;
    *top = reinterpret_cast<void*>(entry);
    pointer_ = top - SAVED_REGISTERS;
  }
  static void change(Context& from, Context& to) { emulation_switch(&from.pointer_, to.pointer_); }

 private:
  void* pointer_ = nullptr;
};

#else

class Context {
 public:
  void prepare(char* stack, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = STACK_BYTES;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};

#endif

// What a fiber waits for. Lanes of a warp that meet must wait for the same.
enum class Meeting { None, Block, Warp, Shuffle, Ballot, Mma, Ended };

// What a lane shows to the others of its warp when they meet.
struct Shown {
  unsigned words[6];
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  dim3 thread;
  unsigned index = 0;
  Meeting meeting = Meeting::None;
  unsigned mask = 0;
  // What it shows at a meeting of its warp, and what each lane showed at the last one. A copy of its own, since others may be
  // at their next meeting before it has read.
  Shown mine{};
  Shown seen[LANES]{};
};

struct Launch {
  dim3 grid, block;
  unsigned shared_bytes = 0;
  uint64_t seed = 0;
};

struct State {
  Launch launch;
  dim3 block_index;
  uint64_t block_number = 0;
  std::function<void()> kernel;
  std::vector<Fiber> fibers;
  std::vector<unsigned> ready;
  std::unique_ptr<char[]> dynamic_shared;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  Fiber* running = nullptr;
};

inline State state;

template <typename T, size_t COUNT>
class SharedArray {
 public:
  using Array = T[COUNT];
  // This block's array; the first thread that asks allocates it.
  Array& get() {
    if (block_ != state.block_number) {
      block_ = state.block_number;
      elements_.reset(static_cast<T*>(std::malloc(sizeof(Array))));
      std::memset(static_cast<void*>(elements_.get()), 0xff, sizeof(Array));
    }
    return *reinterpret_cast<Array*>(elements_.get());
  }

 private:
  struct Free {
    void operator()(T* elements) const { std::free(elements); }
  };
  std::unique_ptr<T, Free> elements_;
  uint64_t block_ = 0;
};

inline void switch_to_scheduler() {
  Fiber* fiber = state.running;
#ifdef EMULATION_ASAN
  __sanitizer_start_switch_fiber(&fiber->fake_stack, state.scheduler_stack, state.scheduler_stack_bytes);
#endif
  Context::change(fiber->context, state.scheduler);
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr);
#endif
}

// A fiber is never left: when its thread has ended it waits for the next block, so that no stack is used twice by
// AddressSanitizer's count.
inline void run_fiber() {
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &state.scheduler_stack, &state.scheduler_stack_bytes);
#endif
  for (;;) {
    state.kernel();
    state.running->meeting = Meeting::Ended;
    switch_to_scheduler();
  }
}

inline void resume(Fiber& fiber) {
  state.running = &fiber;
#ifdef EMULATION_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, STACK_BYTES);
#endif
  Context::change(state.scheduler, fiber.context);
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

inline void release(Fiber& fiber) {
  fiber.meeting = Meeting::None;
  state.ready.push_back(fiber.index);
}

// Lets all threads go on if `fiber` was the last that the others waited for.
inline void meet_block() {
  for (const Fiber& other : state.fibers) {
    if (other.meeting == Meeting::Ended) fail("a barrier of the block waits for a thread that has ended");
    if (other.meeting != Meeting::Block) return;
  }
  for (Fiber& other : state.fibers) release(other);
}

// Lets the lanes that `fiber` meets go on, if it was the last of them.
inline void meet_warp(const Fiber& fiber) {
  const unsigned first = fiber.index / LANES * LANES;
  if (!(fiber.mask >> (fiber.index - first) & 1)) fail("a thread meets others of its warp, and its mask does not name it");
  for (unsigned lane = 0; lane < LANES; ++lane) {
    if (!(fiber.mask >> lane & 1)) continue;
    if (first + lane >= state.fibers.size()) fail("a mask names a lane beyond the block");
    const Fiber& other = state.fibers[first + lane];
    if (other.meeting == Meeting::Ended) fail("a warp waits for a thread that has ended");
    // It runs, or meets others first. If it never comes here, all are found waiting in the end.
    if (other.meeting != fiber.meeting || other.mask != fiber.mask) return;
  }
  const unsigned mask = fiber.mask;
  Shown shown[LANES]{};
  for (unsigned lane = 0; lane < LANES; ++lane) {
    if (mask >> lane & 1) shown[lane] = state.fibers[first + lane].mine;
  }
  for (unsigned lane = 0; lane < LANES; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fiber& other = state.fibers[first + lane];
    std::memcpy(other.seen, shown, sizeof shown);
    release(other);
  }
}

inline void wait(Meeting meeting, unsigned mask) {
  Fiber& fiber = *state.running;
  fiber.meeting = meeting;
  fiber.mask = mask;
  switch_to_scheduler();
}

// Shows `mine` to the lanes of `mask` and returns what all of them showed.
inline const Shown* exchange(Meeting meeting, unsigned mask, const Shown& mine) {
  Fiber& fiber = *state.running;
  fiber.mine = mine;
  wait(meeting, mask);
  return fiber.seen;
}

inline void run_block(std::mt19937_64& random) {
  ++state.block_number;
  state.dynamic_shared.reset(new char[state.launch.shared_bytes]);
  std::memset(state.dynamic_shared.get(), 0xff, state.launch.shared_bytes);
  state.ready.clear();
  for (Fiber& fiber : state.fibers) release(fiber);
  while (!state.ready.empty()) {
    std::swap(state.ready[random() % state.ready.size()], state.ready.back());
    Fiber& fiber = state.fibers[state.ready.back()];
    state.ready.pop_back();
    resume(fiber);
    if (fiber.meeting == Meeting::Block) {
      meet_block();
    } else if (fiber.meeting != Meeting::Ended) {
      meet_warp(fiber);
    }
  }
  for (const Fiber& fiber : state.fibers) {
    if (fiber.meeting != Meeting::Ended) fail("threads wait for others that do not come");
  }
}

inline void start_fibers() {
  const dim3 block = state.launch.block;
  const size_t count = static_cast<size_t>(block.x) * block.y * block.z;
  if (count == 0 || count > MAX_THREADS) fail("a block has 1 to 1024 threads");
  state.fibers.resize(count);
  // Stacks are never given back: the process ends after its launch.
  void* stacks = mmap(nullptr, count * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for the stacks");
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = state.fibers[i];
    const unsigned index = static_cast<unsigned>(i);
    fiber.index = index;
    fiber.thread = {index % block.x, index / block.x % block.y, index / block.x / block.y};
    fiber.stack = static_cast<char*>(stacks) + i * STACK_BYTES;
    fiber.context.prepare(fiber.stack, run_fiber);
  }
}

// Runs a kernel over a grid. Once in a process.
inline void run(const Launch& launch, std::function<void()> kernel) {
  state.launch = launch;
  state.kernel = std::move(kernel);
  const dim3 grid = launch.grid;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) fail("no grid of a GPU is of this size");
  start_fibers();
  std::mt19937_64 random(launch.seed);
  std::vector<size_t> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) {
    blocks[i] = i;
    std::swap(blocks[i], blocks[random() % (i + 1)]);
  }
  for (const size_t block : blocks) {
    state.block_index = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                         static_cast<unsigned>(block / grid.x / grid.y)};
    run_block(random);
  }
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

inline void __syncthreads() { emulation::wait(emulation::Meeting::Block, 0); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::wait(emulation::Meeting::Warp, mask); }

template <typename T>
T emulation_shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) == sizeof(unsigned));
  emulation::Shown mine{};
  std::memcpy(mine.words, &value, sizeof value);
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
  emulation::Shown mine{};
  mine.words[0] = predicate;
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

using std::max;
using std::min;

inline unsigned pack_bf16(float low, float high) {
  return emulation::float_to_bf16(low) | emulation::float_to_bf16(high) << 16;
}

inline uint4 load_streaming(const uint4* from) { return *from; }

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
  const emulation::Shown mine{{a[0], a[1], a[2], a[3], b[0], b[1]}};
  const emulation::Shown* lanes = emulation::exchange(emulation::Meeting::Mma, 0xffffffffu, mine);
  const auto half = [](unsigned word, unsigned index) { return emulation::bf16_to_float(word >> 16 * index & 0xffff); };
  const auto element_a = [&](unsigned row, unsigned k) {
    const unsigned lane = row % 8 * 4 + k % 8 / 2;
    return half(lanes[lane].words[row / 8 + k / 8 * 2], k % 2);
  };
  const auto element_b = [&](unsigned k, unsigned column) {
    const unsigned lane = column * 4 + k % 8 / 2;
    return half(lanes[lane].words[4 + k / 8], k % 2);
  };
  const unsigned lane = emulation::state.running->index % emulation::LANES;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8;
    const unsigned column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (unsigned k = 0; k < 16; ++k) sum += static_cast<double>(element_a(row, k)) * element_b(k, column);
    d[i] = static_cast<float>(sum);
  }
}

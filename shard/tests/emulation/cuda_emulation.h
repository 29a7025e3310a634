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

#include "blocks.h"

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

namespace emulation {

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

// The products of a warpgroup, four warps, on the tensor cores of Hopper: wgmma, and what it wants of shared memory.
//
// A warpgroup begins products, goes on, and waits for them later. Between the two their sums and the registers of their factors
// belong to the tensor cores: what is read of them is undefined, and they may not be written. What the thread wrote to such
// registers before is seen after a fence. The compiler knows nothing of this: for it a product is over when it is begun. So
// registers are held before that fence, and once more after the wait, before anything else touches them. Factors in shared memory
// are read through another proxy than the one that copies and stores write through, so that a fence of its own is between these
// and a product.
#pragma once

#include "types.cuh"

constexpr int WARPGROUP_THREADS = 4 * WARP_THREADS;

// Rows of a product, and what it adds over.
constexpr int WGMMA_ROWS = 64;
constexpr int WGMMA_DEPTH = 16;

// Vectors that a repeat of the widest order of shared memory has: a matrix begins at a multiple of so many.
constexpr int WGMMA_REPEAT_VECTORS = 64;

#ifndef CUDA_EMULATION

// Where shared memory has it.
__device__ __forceinline__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// Has products see the registers that this thread wrote.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes a group of the products that were begun since the last one.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for the groups of products but the last PENDING.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving what reads or writes these registers beyond this place: sums, and first factors.
template <int COUNT>
__device__ __forceinline__ void hold(float (&sums)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void hold(unsigned (&factors)[COUNT][4]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    asm volatile("" : "+r"(factors[i][0]), "+r"(factors[i][1]), "+r"(factors[i][2]), "+r"(factors[i][3])::"memory");
  }
}

// Has everything computed that makes up `x`, which is not negative, before the next wait. The assembler begins to wait as soon as
// nothing stands before it: it moves a wait up before arithmetic, but not before a branch that depends on it.
__device__ __forceinline__ void finish_before_wait(float x) {
  if (__any_sync(WHOLE_WARP, x < 0.0f)) asm volatile("trap;");
}

// Has the tensor cores see what this thread wrote or copied to shared memory, once others know that it has done so.
__device__ __forceinline__ void fence_shared_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define WGMMA_LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_LIST_32 \
  WGMMA_LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_LIST_40 WGMMA_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_LIST_64                                                                                \
  WGMMA_LIST_40 ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
                "%56, %57, %58, %59, %60, %61, %62, %63"

#define WGMMA_EIGHT_SUMS(i)                                                                                     \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define WGMMA_SUMS_16 WGMMA_EIGHT_SUMS(0), WGMMA_EIGHT_SUMS(8)
#define WGMMA_SUMS_32 WGMMA_SUMS_16, WGMMA_EIGHT_SUMS(16), WGMMA_EIGHT_SUMS(24)
#define WGMMA_SUMS_40 WGMMA_SUMS_32, WGMMA_EIGHT_SUMS(32)
#define WGMMA_SUMS_64 WGMMA_SUMS_40, WGMMA_EIGHT_SUMS(40), WGMMA_EIGHT_SUMS(48), WGMMA_EIGHT_SUMS(56)

// Begins sums = a b, or sums += a b: `a`, [64, 16], and the transpose of `b`, [COLUMNS, 16], lie in shared memory row by row.
//
// A warp has 16 rows of the sums. With group = lane / 4 and pair = lane % 4 a thread holds of each eight columns i
//   sums[4 i], sums[4 i + 1] = [16 warp + group][8 i + 2 pair + {0, 1}],  sums[4 i + 2], sums[4 i + 3] = 8 rows below.
#define WGMMA_OF_SHARED(COLUMNS, COUNT, A, B, ADDS)                                                               \
  template <bool ACCUMULATES>                                                                                     \
  __device__ __forceinline__ void wgmma(float(&sums)[COUNT], u64 a, u64 b) {                                      \
    asm volatile(                                                                                                 \
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\n"                                                   \
        "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" WGMMA_LIST_##COUNT "}, " A ", " B      \
        ", adds, 1, 1, 0, 0;\n}"                                                                                  \
        : WGMMA_SUMS_##COUNT                                                                                      \
        : "l"(a), "l"(b), "n"(static_cast<int>(ACCUMULATES)));                                                    \
  }

// Begins sums += a b: `a`, [64, 16], lies in registers, of each warp its 16 rows as the first factor of `mma_m16n8k16_bf16`, and
// `b`, [16, COLUMNS], in shared memory row by row.
#define WGMMA_OF_REGISTERS(COLUMNS, COUNT, A0, A1, A2, A3, B)                                                        \
  __device__ __forceinline__ void wgmma(float(&sums)[COUNT], const unsigned(&a)[4], u64 b) {                         \
    asm volatile(                                                                                                    \
        "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" WGMMA_LIST_##COUNT "}, {" A0 ", " A1 ", " \
        A2 ", " A3 "}, " B ", 1, 1, 1, 1;"                                                                           \
        : WGMMA_SUMS_##COUNT                                                                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                       \
  }

WGMMA_OF_SHARED(64, 32, "%32", "%33", "%34")
WGMMA_OF_SHARED(128, 64, "%64", "%65", "%66")

WGMMA_OF_REGISTERS(32, 16, "%16", "%17", "%18", "%19", "%20")
WGMMA_OF_REGISTERS(64, 32, "%32", "%33", "%34", "%35", "%36")
WGMMA_OF_REGISTERS(80, 40, "%40", "%41", "%42", "%43", "%44")
WGMMA_OF_REGISTERS(128, 64, "%64", "%65", "%66", "%67", "%68")

#endif

// A matrix of bf16 in shared memory, [ROWS, COLUMNS], as a product takes it: in panels of as many columns as make 128, 64 or 32
// bytes, one panel after the other. In a panel the vectors of a row are in another order than in the next rows, so that eight
// rows of one vector lie in different banks. The order follows from a vector's address: a matrix begins at a multiple of
// WGMMA_REPEAT_VECTORS.
template <int ROWS_, int COLUMNS>
struct Panels {
  static constexpr int ROWS = ROWS_;
  static constexpr int PANEL_COLUMNS = COLUMNS % 64 == 0 ? 64 : COLUMNS % 32 == 0 ? 32 : 16;
  static constexpr int NUM_PANELS = COLUMNS / PANEL_COLUMNS;
  // Of a row of a panel, of eight of them, of a panel, and of all.
  static constexpr int ROW_VECTORS = PANEL_COLUMNS / VECTOR;
  static constexpr int GROUP_VECTORS = 8 * ROW_VECTORS;
  static constexpr int PANEL_VECTORS = ROWS * ROW_VECTORS;
  static constexpr int VECTORS = NUM_PANELS * PANEL_VECTORS;
  static_assert(COLUMNS % PANEL_COLUMNS == 0 && ROWS % WGMMA_DEPTH == 0, "panels, rows and columns are whole");
  static_assert(VECTORS % WGMMA_REPEAT_VECTORS == 0, "the next matrix begins where it may");

  // Lines of banks are eight vectors wide.
  static __device__ __forceinline__ unsigned place(unsigned panel, unsigned row, unsigned vector) {
    return panel * PANEL_VECTORS + row * ROW_VECTORS + (vector ^ row * ROW_VECTORS / 8 % ROW_VECTORS);
  }

  // The matrix, or rows of it from a multiple of eight on, as a factor whose columns are added over; and how far from the first
  // the 16 columns of a step are.
  static __device__ __forceinline__ u64 over_columns(const uint4* matrix) { return factor(matrix, 1); }
  static __device__ __forceinline__ u64 columns_of(int step) {
    const int column = step * WGMMA_DEPTH;
    return column / PANEL_COLUMNS * PANEL_VECTORS + column % PANEL_COLUMNS / VECTOR;
  }

  // The matrix as a factor whose rows are added over; and how far from the first the 16 rows of a step are.
  static __device__ __forceinline__ u64 over_rows(const uint4* matrix) { return factor(matrix, PANEL_VECTORS); }
  static __device__ __forceinline__ u64 rows_of(int step) { return step * WGMMA_DEPTH * ROW_VECTORS; }

 private:
  // What PTX calls a matrix descriptor, with all lengths in vectors: the address, the leading and the stride offset, and the
  // order. The leading offset, from one panel to the next, has no meaning where columns are added over: a step is within one.
  static __device__ __forceinline__ u64 factor(const uint4* matrix, unsigned leading) {
    constexpr u64 ORDER = ROW_VECTORS == 8 ? 1 : ROW_VECTORS == 4 ? 2 : 3;
    constexpr unsigned FIELD = (1 << 14) - 1;
    return ORDER << 62 | static_cast<u64>(GROUP_VECTORS) << 32 | static_cast<u64>(leading) << 16 |
           (shared_address(matrix) / sizeof(uint4) & FIELD);
  }
};

// What all kernels share: bf16, 16-byte vectors of it, sums over warps and blocks, and the hardware's instructions behind
// wrappers.
//
// The sources are compiled by NVRTC without any header of the toolkit. They are also compiled by a C++ compiler and run on a CPU,
// one fiber per thread (shard/tests/emulation): CUDA_EMULATION is then defined, and the emulation supplies what stands behind
// `#ifndef CUDA_EMULATION` here, with the semantics that PTX gives it.
//
// They are to be compiled with --fmad=false: a product and a sum are fused where fmaf says so and nowhere else, so that one
// expression gives the same bits in every kernel that it is inlined in.
//
// Rows times columns may exceed 32 bits: offsets of rows are size_t.
#pragma once

// The bits of a bfloat16.
typedef unsigned short bf16;

typedef unsigned long long u64;

constexpr int WARP_THREADS = 32;
constexpr unsigned WHOLE_WARP = 0xffffffffu;

// Elements of a 16-byte vector of bf16.
constexpr int VECTOR = 8;

// Tokens in a block of the cache of keys and values, and in a tile of attention.
constexpr int KV_BLOCK_TOKENS = 32;

// Ranks that may take part in a reduction.
constexpr unsigned MAX_RANKS = 8;

// A pointer for each rank, those of ranks that there are. Passed to a kernel by value: reading it costs no trip to memory.
template <typename T>
struct PerRank {
  T* at[MAX_RANKS];
};

#ifndef CUDA_EMULATION

// An array in the block's shared memory. A macro, so that the emulation can give each block an array of its own, with
// guarded ends and without the numbers of the block before.
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]

// The block's shared memory beyond that, as much as the launch asks for, aligned to 16 bytes.
#define DYNAMIC_SHARED(type, name)                               \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)

// Rounds two numbers to bf16, to nearest even, `low` into the lower half.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Reads 16 bytes that no thread reads again and that nobody writes meanwhile: weights are passed by the first-level cache, which
// is left to the activations.
__device__ __forceinline__ uint4 load_streaming(const uint4* from) {
  uint4 v;
  // Where it is written, also before a wait for the kernel before.
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(__cvta_generic_to_global(from)));
  return v;
}

// 2^x, to about two units in the last place; 0 for negative infinity.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Bytes `selector` (four hexadecimal digits, the lowest byte last) of the eight bytes of `low` and `high`.
__device__ __forceinline__ unsigned permute_bytes(unsigned low, unsigned high, unsigned selector) {
  return __byte_perm(low, high, selector);
}

// d += a b on a warp's tensor core: `a` is [16, 16], `b` is [16, 8], `d` is [16, 8] in f32.
//
// With group = lane / 4 and pair = lane % 4 a thread holds, the lower half of a register first,
//   a[0] = A[group][2 pair + {0, 1}],      a[1] = A[group + 8][2 pair + {0, 1}],
//   a[2] = A[group][2 pair + 8 + {0, 1}],  a[3] = A[group + 8][2 pair + 8 + {0, 1}],
//   b[0] = B[2 pair + {0, 1}][group],      b[1] = B[2 pair + 8 + {0, 1}][group],
//   d[0], d[1] = D[group][2 pair + {0, 1}],  d[2], d[3] = D[group + 8][2 pair + {0, 1}].
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices out of shared memory: lane `8 i + r` gives the address of row r of matrix i, 16 bytes, and gets in word i
// the elements [lane / 4][2 (lane % 4) + {0, 1}] of matrix i, the lower half first.
__device__ __forceinline__ void load_matrices(unsigned (&words)[4], const uint4* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Begins to copy 16 bytes to shared memory, past the first-level cache. If they do not exist, zeros are written in their place
// and `from` is not read. Until the copy was waited for, what is in shared memory is undefined.
__device__ __forceinline__ void copy_async(uint4* to, const uint4* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from)), "r"(exists ? 16 : 0)
               : "memory");
}

// Makes a group of the copies that the thread began since the last one. It may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for the groups of this thread but the last PENDING. What other threads copied is there after their wait and a barrier.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Writes a word that other devices read. Who sees it with `load_acquire` sees all that this thread saw or wrote before.
__device__ __forceinline__ void store_release(unsigned* to, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(value) : "memory");
}

// Reads a word that another device or the host writes meanwhile.
__device__ __forceinline__ unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(from)) : "memory");
  return value;
}

// What a thread does between two looks at a word that another device writes. Nothing: a sleep would outlast most waits.
__device__ __forceinline__ void spin() {}

// A kernel may be launched so that its blocks begin before the kernel before it on the stream has ended (the host says which are:
// `begins_early` in kernels.rs). All threads of such a kernel wait, and before they do they touch no memory but weights, which
// nobody writes: what they would read may not be written yet, and what they would write may still be read, by any earlier kernel.
// After it all that earlier kernels wrote is seen. What is read so is no `const __restrict__`: that says it never changes while
// the kernel runs, and the compiler may read it before the wait.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin, if it may do so early, when all blocks of this one have come here or ended: so none of them is left
// without room by those of the next. It may be called before the wait.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#endif

__device__ __forceinline__ float low_bf16(unsigned packed) { return __uint_as_float(packed << 16); }

__device__ __forceinline__ float high_bf16(unsigned packed) { return __uint_as_float(packed & 0xffff0000u); }

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }

__device__ __forceinline__ bf16 to_bf16(float x) { return static_cast<bf16>(pack_bf16(x, 0.0f)); }

// WIDTH neighbouring elements, read and written as one: eight where rows are whole vectors, or a single one.
template <int WIDTH>
struct Elements;

template <>
struct Elements<VECTOR> {
  using Packed = uint4;
  float at[VECTOR];

  static __device__ __forceinline__ Packed load_packed(const bf16* from) { return *reinterpret_cast<const uint4*>(from); }

  static __device__ __forceinline__ Elements load(const bf16* from) { return unpack(load_packed(from)); }

  static __device__ __forceinline__ Elements unpack(uint4 v) {
    return {{low_bf16(v.x), high_bf16(v.x), low_bf16(v.y), high_bf16(v.y), low_bf16(v.z), high_bf16(v.z), low_bf16(v.w),
             high_bf16(v.w)}};
  }

  // Rounds.
  __device__ __forceinline__ Packed pack() const {
    return make_uint4(pack_bf16(at[0], at[1]), pack_bf16(at[2], at[3]), pack_bf16(at[4], at[5]), pack_bf16(at[6], at[7]));
  }

  // Rounds.
  __device__ __forceinline__ void store(bf16* to) const { *reinterpret_cast<uint4*>(to) = pack(); }
};

template <>
struct Elements<1> {
  using Packed = bf16;
  float at[1];

  static __device__ __forceinline__ Packed load_packed(const bf16* from) { return *from; }

  static __device__ __forceinline__ Elements load(const bf16* from) { return unpack(load_packed(from)); }

  static __device__ __forceinline__ Elements unpack(Packed v) { return {{to_float(v)}}; }

  // Rounds.
  __device__ __forceinline__ Packed pack() const { return to_bf16(at[0]); }

  // Rounds.
  __device__ __forceinline__ void store(bf16* to) const { *to = pack(); }
};

// silu(gate) * up, with silu(g) = g / (1 + exp(-g)).
__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// The sum over a warp, the same bits in every lane: at each level two lanes add the same two numbers.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int distance = WARP_THREADS / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, distance);
  return x;
}

// The sum over a block of THREADS threads, in every thread: over each warp, then over the warps in their order. To be called by
// all threads; before a second call the caller puts a barrier, for nothing else guards the array.
template <int THREADS, typename T>
__device__ __forceinline__ T block_sum(T x) {
  constexpr int WARPS = THREADS / WARP_THREADS;
  SHARED_ARRAY(T, partial, WARPS);
  x = warp_sum(x);
  if (threadIdx.x % WARP_THREADS == 0) partial[threadIdx.x / WARP_THREADS] = x;
  __syncthreads();
  T sum = partial[0];
#pragma unroll
  for (int warp = 1; warp < WARPS; ++warp) sum += partial[warp];
  return sum;
}

// The finalizer of SplitMix64: one to one, and every bit of `z` changes about half of the result's.
__device__ __forceinline__ u64 mix(u64 z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

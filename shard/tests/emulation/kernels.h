// The kernels of one source file behind the emulation, chosen with -DEMULATE_<FILE>, and the list of their names.
//
// They are in a namespace without a name: several files, of which each has its own helpers, may be linked into one library.
#pragma once

#include "cuda_emulation.h"

namespace {

#if defined(EMULATE_ROWWISE)
#include "rowwise.cu"
#define KERNELS(KERNEL)                                                             \
  KERNEL(residual_norm) KERNEL(norm_rows) KERNEL(gated_silu) KERNEL(gelu)           \
  KERNEL(embedding) KERNEL(insert_features) KERNEL(gather_rows) KERNEL(scatter_rows)
#elif defined(EMULATE_ROTARY)
#include "rotary.cu"
#define KERNELS(KERNEL) KERNEL(rotary_angles) KERNEL(rotary_append) KERNEL(vision_rotary) KERNEL(copy_blocks)
#elif defined(EMULATE_GEMV)
#include "gemv.cu"
#define KERNELS(KERNEL)                                     \
  KERNEL(gemv_1) KERNEL(gemv_2) KERNEL(gemv_3) KERNEL(gemv_4) \
  KERNEL(gemv_5) KERNEL(gemv_6) KERNEL(gemv_7) KERNEL(gemv_8) \
  KERNEL(gemv_f32_1) KERNEL(gemv_f32_2) KERNEL(gemv_f32_3) KERNEL(gemv_f32_4) \
  KERNEL(gemv_f32_5) KERNEL(gemv_f32_6) KERNEL(gemv_f32_7) KERNEL(gemv_f32_8) \
  KERNEL(gated_gemv_1) KERNEL(gated_gemv_2) KERNEL(gated_gemv_3) KERNEL(gated_gemv_4) \
  KERNEL(gated_gemv_5) KERNEL(gated_gemv_6) KERNEL(gated_gemv_7) KERNEL(gated_gemv_8)
#elif defined(EMULATE_GEMM)
#include "gemm.cu"
#define KERNELS(KERNEL)                               \
  KERNEL(gemm_16) KERNEL(gemm_64) KERNEL(gemm_128)    \
  KERNEL(gemm_16_f32) KERNEL(gemm_64_f32) KERNEL(gemm_128_f32)
#elif defined(EMULATE_REDUCE)
#include "reduce.cu"
#define KERNELS(KERNEL) \
  KERNEL(sum_ranks) KERNEL(sum_ranks_residual_norm) KERNEL(one_shot_sum) KERNEL(one_shot_residual_norm) \
  KERNEL(one_shot_gather)
#elif defined(EMULATE_SAMPLING)
#include "sampling.cu"
#define KERNELS(KERNEL) KERNEL(candidate_pieces) KERNEL(merge_candidates) KERNEL(feed_tokens)
#elif defined(EMULATE_SELECTION)
#include "selection.cu"
#define KERNELS(KERNEL) KERNEL(select_pieces) KERNEL(merge_lists)
#elif defined(EMULATE_HASH)
#include "hash.cu"
#define KERNELS(KERNEL) KERNEL(hash_words) KERNEL(hash_finish)
#elif defined(EMULATE_ATTENTION)
#include "attention.cu"
#define KERNELS_OF_HEADS(KERNEL, D)                                        \
  KERNEL(paged_attention_split_##D) KERNEL(paged_attention_combine_##D) \
  KERNEL(paged_attention_##D) KERNEL(vision_attention_##D)
#define KERNELS(KERNEL) \
  KERNELS_OF_HEADS(KERNEL, 32) KERNELS_OF_HEADS(KERNEL, 64) KERNELS_OF_HEADS(KERNEL, 80) KERNELS_OF_HEADS(KERNEL, 128)
#elif defined(EMULATE_ATTENTION_SM90)
#include "attention_sm90.cu"
#define KERNELS_OF_HEADS(KERNEL, D) \
  KERNEL(sm90_paged_attention_##D) KERNEL(sm90_vision_attention_##D) KERNEL(sm90_window_attention_##D)
#define KERNELS(KERNEL) \
  KERNELS_OF_HEADS(KERNEL, 32) KERNELS_OF_HEADS(KERNEL, 64) KERNELS_OF_HEADS(KERNEL, 80) KERNELS_OF_HEADS(KERNEL, 128)
#elif defined(EMULATE_PATCHES)
#include "patches.cu"
#define KERNELS(KERNEL) KERNEL(patches)
#elif defined(EMULATE_PROBES)
#include "probes.cu"
#define KERNELS(KERNEL)                                                                      \
  KERNEL(reverse) KERNEL(read_shared) KERNEL(read_dynamic_shared) KERNEL(read_global)        \
  KERNEL(barrier_in_branch) KERNEL(early_end) KERNEL(shuffle_in_branch) KERNEL(read_vector)  \
  KERNEL(write_input) KERNEL(votes) KERNEL(meet_in_halves) KERNEL(product) KERNEL(count_threads) \
  KERNEL(matrices) KERNEL(copies) KERNEL(any_of_block) KERNEL(wait_for_flag)           \
  KERNEL(warpgroup_products) KERNEL(product_of_three_warps) KERNEL(copy_word)
#else
#error "which source file is to be emulated?"
#endif

}  // namespace

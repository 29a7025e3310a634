//! Faults that are planted in the kernels' sources. The comparisons that the kernels pass must fail on each, or the emulation
//! or a sanitizer must end the process.

use anyhow::Result;

use super::{
    attention, attention_sm90,
    emulator::{Program, Source},
    gemm, gemv,
    gpu::is_left_out,
    hash, patches, reduce, rotary, rowwise, sampling,
};

/// What is replaced, in which file, and by what.
type Fault = (&'static str, &'static str, &'static str);

fn assert_seen(source: Source, faults: &[Fault], check: impl Fn(&Program) -> Result<()>) {
    // There is nothing on a GPU that ends a launch for an index beyond a buffer, or a missing barrier.
    if is_left_out("faults that are planted") {
        return;
    }
    for &(file, from, to) in faults {
        let program = Program::changed(source, file, from, to).expect("a source that compiles");
        assert!(check(&program).is_err(), "{file} passes with {to:?} in place of {from:?}");
    }
}

#[test]
fn faults_of_rows_are_seen() {
    let faults = [
        // No barrier between the sums of warps and the sum over them.
        ("types.cuh", "  __syncthreads();\n", ""),
        // A sum without the last warp.
        ("types.cuh", "warp < WARPS; ++warp", "warp < WARPS - 1; ++warp"),
        // The norm of what was not rounded.
        ("norm.cuh", "    v = Elements<WIDTH>::load(sum + col);\n", ""),
        // A vector beside the right one.
        ("rowwise.cu", "load(gate + cols)", "load(gate + cols + WIDTH)"),
        // A row beyond the table.
        ("rowwise.cu", "row < num_ids ?", "row <= num_ids ?"),
        // The kernel before is not waited for; or what it reads is written first.
        ("rowwise.cu", "bf16* out) {\n  let_next_begin();\n  wait_for_previous();\n", "bf16* out) {\n"),
        (
            "rowwise.cu",
            "bf16* sum) {\n  let_next_begin();\n  wait_for_previous();\n",
            "bf16* sum) {\n  if (threadIdx.x == 0) sum[blockIdx.x * cols] = 0;\n  wait_for_previous();\n",
        ),
    ];
    assert_seen(Source::Rowwise, &faults, |program| {
        rowwise::check_norms(program, 1)?;
        rowwise::check_activations(program, 1)?;
        rowwise::check_copies(program, 1)
    });
}

#[test]
fn faults_of_the_cache_are_seen() {
    let faults = [
        // The axis before.
        ("rotary.cu", "i / half * 3 + frequency.axis", "i / half * 3 + (frequency.axis + 2) % 3"),
        ("rotary.cu", "x * cos[i] - y * sin[i]", "x * cos[i] + y * sin[i]"),
        // Values where keys belong.
        ("rotary.cu", "(head * 2 + 1) * part", "head * 2 * part"),
        // A vector beyond the block.
        ("rotary.cu", "place >= block_vectors", "place > block_vectors"),
        // The kernel before is not waited for.
        ("rotary.cu", "  wait_for_previous();\n", ""),
    ];
    assert_seen(Source::Rotary, &faults, |program| {
        rotary::check_angles(program, 1)?;
        rotary::check_append(program, 1)?;
        rotary::check_copies(program, 1)
    });
}

#[test]
fn faults_of_products_are_seen() {
    let faults = [
        ("gemv.cu", "  __syncthreads();\n", ""),
        // The kernel before is not waited for, or too late, or what is no weight is read before it has ended.
        ("gemv.cu", "  wait_for_previous();\n", ""),
        (
            "gemv.cu",
            "  load(next, threadIdx.x);\n",
            "  load(next, threadIdx.x);\n  next[0].x ^= x[0] == 1 ? 1 : 0;\n",
        ),
        // A gate that is not rounded, a bias of another one, and columns beyond the last.
        ("gemv.cu", "gated(to_float(gate), ", "gated(sums.of(pair, row, bias, column), "),
        ("gemv.cu", "bias, num_columns + column)", "bias, column)"),
        ("gemv.cu", "min(first_column + pair, num_columns - 1)", "first_column + pair"),
        // The place of another row's sum.
        ("gemv.cu", "* ROWS + row] = sum", "* ROWS + row + 1] = sum"),
        // Outputs beyond the last are read.
        ("gemv.cu", "min(first_output + output, num_outputs - 1)", "first_output + output"),
    ];
    assert_seen(Source::Gemv, &faults, |program| gemv::check(program, 1));
}

#[test]
fn faults_of_tiles_are_seen() {
    let faults = [
        // What other threads copied is read before it is there; then, written over while they still read it.
        ("gemm.cu", "    __syncthreads();\n", ""),
        (
            "gemm.cu",
            "    __syncthreads();\n    copy_tile(tile + SHAPE::STAGES - 1);\n",
            "    copy_tile(tile + SHAPE::STAGES - 1);\n    __syncthreads();\n",
        ),
        // What the thread itself copied is not waited for, or one group too few, or fewer at the end.
        ("gemm.cu", "    wait_copies<SHAPE::STAGES - 2>();\n", ""),
        ("gemm.cu", "wait_copies<SHAPE::STAGES - 2>", "wait_copies<SHAPE::STAGES - 1>"),
        ("gemm.cu", "    commit_copies();\n", "    if (tile < num_tiles) commit_copies();\n"),
        // Halves of the second factor that belong to others, and rows of the first in the place of inputs.
        ("gemm.cu", "near[2] = {b[j][0], b[j][1]}", "near[2] = {b[j][0], b[j][2]}"),
        ("gemm.cu", "2 * step + lane / 16)", "2 * step + lane / 8 % 2)"),
        // Written in another order than it is read.
        ("gemm.cu", "copy_async(to + place(row, vector)", "copy_async(to + row * ROW_VECTORS + vector"),
        // The next row in place of zeros.
        ("gemm.cu", " && input < num_inputs", ""),
        // The neighbour's bias.
        ("gemm.cu", "0.0f : bias[output + 1]", "0.0f : bias[output]"),
    ];
    assert_seen(Source::Gemm, &faults, |program| gemm::check(program, 1));
}

#[test]
fn faults_of_sums_over_ranks_are_seen() {
    let faults = [
        // The other ranks from the last to the second.
        ("reduce.cu", "::unpack(packed[rank])", "::unpack(packed[world_size - rank])"),
        // A flag that is not waited for, or taken for that of the call before; and threads that do not wait for those who wait.
        ("reduce.cu", "      given_up = !wait_peers(epoch);\n", ""),
        ("reduce.cu", "- epoch) < 0", "- epoch) < -1"),
        ("reduce.cu", "    given_up = __syncthreads_or(given_up);\n", ""),
        // A peer is told by the wrong flag.
        ("reduce.cu", "* MAX_RANKS + rank, epoch", "* MAX_RANKS + threadIdx.x, epoch"),
        // The kernel that writes this rank's part is not waited for.
        ("reduce.cu", "count, bf16* out) {\n  wait_for_previous();\n", "count, bf16* out) {\n"),
        // The next row's sums of warps overtake the reading of this one's.
        ("reduce.cu", "    __syncthreads();\n", ""),
    ];
    assert_seen(Source::Reduce, &faults, |program| {
        reduce::check_sums(program, 1)?;
        reduce::check_one_shot(program, 1)
    });
}

#[test]
fn faults_of_gathers_are_seen() {
    let faults = [
        // Nobody is waited for, or the waiting ones are not; what is there was not written for the others, or not all of it.
        ("reduce.cu", "      given_up = !wait_peers(epoch);\n", ""),
        ("reduce.cu", "    given_up = __syncthreads_or(given_up);\n", ""),
        ("reduce.cu", "unsigned* out) {\n  wait_for_previous();\n", "unsigned* out) {\n"),
        ("reduce.cu", "parts.at[rank][i] = mine[i]", "out[i] = mine[i]"),
        ("reduce.cu", "i < words; i += ELEMENT_THREADS", "i < words - 1; i += ELEMENT_THREADS"),
        // Another rank's, and a word beside the right one.
        ("reduce.cu", "parts.at[i / words]", "parts.at[(i + 1) / words % world_size]"),
        ("reduce.cu", "[i % words]", "[i % (words - 1)]"),
    ];
    assert_seen(Source::Reduce, &faults, |program| reduce::check_gather(program, 1));
}

#[test]
fn faults_of_agreement_are_seen() {
    let faults = [
        // One rank too few, and the candidates of another row.
        ("sampling.cu", "rank < num_ranks", "rank + 1 < num_ranks"),
        ("sampling.cu", "of_row[rank * num_rows]", "of_row[rank]"),
        // The larger id on a tie, and what is not a number where there are numbers.
        ("sampling.cu", "b.id < a.id", "b.id > a.id"),
        ("sampling.cu", "b.score > a.score ||", "!(b.score <= a.score) ||"),
        // A row that one rank's logits spoil, and one of which no score is a number.
        ("sampling.cu", "is_finite && candidate.max_logit == candidate.max_logit", "is_finite"),
        ("sampling.cu", "{NEGATIVE_INFINITY, 0}", "{NEGATIVE_INFINITY, 1}"),
    ];
    assert_seen(Source::Sampling, &faults, |program| sampling::check_feed(program, 1));
}

#[test]
fn faults_of_attention_are_seen() {
    let faults = [
        // Two halves of a register of the second factor, two registers of it, and two of the first factor.
        (
            "attention.cuh",
            "permute_bytes(of[0][i / 2], of[1][i / 2], halves)",
            "permute_bytes(of[1][i / 2], of[0][i / 2], halves)",
        ),
        ("attention.cuh", "{keys[2 * step], keys[2 * step + 1]}", "{keys[2 * step + 1], keys[2 * step]}"),
        ("attention.cuh", "words[step][1] = lower[2 * step];", "words[step][1] = upper[2 * step];"),
        // A token that is not seen yet.
        ("attention.cuh", "+ k < num_visible ?", "+ k <= num_visible ?"),
        // The second row of a thread is where the first one is.
        ("attention.cu", "split_rows[rows.rows[1]]", "split_rows[rows.rows[0]]"),
        // Results go where the rows are counted, not where they are.
        (
            "attention.cu",
            "static_cast<size_t>(row.x) * gridDim.y",
            "static_cast<size_t>(blockIdx.x) * gridDim.y",
        ),
        // Values of slots that no token is in: their weights are 0, but they are not numbers.
        ("attention.cuh", "values + min(token, num_tokens - 1) * stride", "values + token * stride"),
        ("attention.cu", "static_cast<int>(row % TILE_TOKENS) < num_tokens", "true"),
        // What was summed with another largest score is left as it was.
        (
            "attention.cuh",
            "return fmaf(second, second_factor, first * first_factor);",
            "return fmaf(second, second_factor, first);",
        ),
        // The kernel before is not waited for: by those that split, by those that have nothing to do, and by those that combine.
        (
            "attention.cu",
            "  wait_for_previous();\n  const unsigned lane = threadIdx.x;",
            "  const unsigned lane = threadIdx.x;",
        ),
        (
            "attention.cu",
            "  wait_for_previous();\n  const unsigned lane = threadIdx.x;",
            "  if (blockIdx.x > 0) return;\n  wait_for_previous();\n  const unsigned lane = threadIdx.x;",
        ),
        (
            "attention.cu",
            "  wait_for_previous();\n  const unsigned lane = threadIdx.x %",
            "  const unsigned lane = threadIdx.x %",
        ),
    ];
    assert_seen(Source::Attention, &faults, |program| attention::check_paged(program, 32, 1));
}

#[test]
fn faults_of_pieces_are_seen() {
    let faults = [
        // A tile that is not waited for: by the thread that copies it, early enough, and by the others (of heads of 32 columns a
        // thread reads the keys that it copied).
        ("attention.cu", "        wait_copies<1>();\n", ""),
        ("attention.cu", "wait_copies<1>", "wait_copies<2>"),
        ("attention.cu", "wait_copies<1>();\n        __syncwarp();\n", "wait_copies<1>();\n"),
        // Where there is no next tile, the last one is not waited for.
        ("attention.cu", "lane);\n    commit_copies();", "lane), commit_copies();"),
        // The tile that is used is written over.
        ("attention.cu", "STAGES = 2;", "STAGES = 1;"),
        // Splits and runs that are merged as if they were one, or a part of one that is forgotten.
        ("attention.cu", "max(split_tokens / row.w, 1u)", "1u"),
        ("attention.cu", "max(run_tokens / row.w, 1u)", "max(split_tokens / row.w, 1u)"),
        ("attention.cu", " && i + 1 != count) continue;", ") continue;"),
        ("attention.cu", "index == 0 ? NEGATIVE_INFINITY : before", "before"),
        ("attention.cu", "split + split_tokens, end)", "end, end)"),
        // The place of another piece, and an empty one that is taken for one.
        ("attention.cu", "+ piece.z / piece.w)", "+ 0)"),
        ("attention.cu", "  if (first >= end) return;\n", ""),
        // Warps that do not wait for one another.
        ("attention.cu", "    }\n    __syncthreads();\n    if (warp == 0)", "    }\n    if (warp == 0)"),
        // What was before a split or a run is not kept.
        ("attention.cu", "words[index * THREADS + threadIdx.x] = word;", ""),
    ];
    assert_seen(Source::Attention, &faults, |program| attention::check_paged(program, 64, 1));
}

#[test]
fn faults_of_warpgroups_are_seen() {
    let faults = [
        // What was summed with another largest score is left as it was.
        ("attention_sm90.cu", "values[i] *= factor[i / 2 % 2];", ";"),
        // Scores, and what weights make of values, that are not waited for.
        ("attention_sm90.cu", "    wgmma_wait<1>();\n", ""),
        (
            "attention_sm90.cu",
            "    wgmma_wait<0>();\n    hold(states.values);\n    hold(states.weights);\n    states.scale_values(factor);\n",
            "    states.scale_values(factor);\n    wgmma_wait<0>();\n    hold(states.values);\n    hold(states.weights);\n",
        ),
        // Weights that are changed while they are multiplied.
        (
            "attention_sm90.cu",
            "    finish_before_wait(states.sum[0] + states.sum[1]);\n",
            "    states.round_weights();\n",
        ),
        // Registers that the compiler does not hold: before a product, and after it.
        ("attention_sm90.cu", "    hold(states.weights);\n    wgmma_fence();\n", "    wgmma_fence();\n"),
        (
            "attention_sm90.cu",
            "    hold(states.weights);\n    states.scale_values(factor);\n",
            "    states.scale_values(factor);\n",
        ),
        (
            "attention_sm90.cu",
            "    hold(states.values);\n    hold(states.weights);\n    wgmma_fence();\n",
            "    hold(states.weights);\n    wgmma_fence();\n",
        ),
        ("attention_sm90.cu", "  wgmma_wait<0>();\n  hold(states.scores);\n", "  wgmma_wait<0>();\n"),
        // Registers that are not fenced, and tiles that the tensor cores do not see.
        (
            "attention_sm90.cu",
            "    wgmma_fence();\n    states.begin_scores(first_factor, keys_of(tile + 1));\n",
            "    states.begin_scores(first_factor, keys_of(tile + 1));\n",
        ),
        (
            "attention_sm90.cu",
            "    wait_copies<0>();\n    fence_shared_for_wgmma();\n",
            "    wait_copies<0>();\n",
        ),
        // Tiles that are not there yet: this thread's part, and that of the others.
        ("attention_sm90.cu", "    wait_copies<0>();\n", ""),
        (
            "attention_sm90.cu",
            "    __syncthreads();\n    copy_tile(tile + 2);\n",
            "    copy_tile(tile + 2);\n",
        ),
        // A stage that is written before all have read it.
        (
            "attention_sm90.cu",
            "    __syncthreads();\n    copy_tile(tile + 2);\n",
            "    copy_tile(tile + 2);\n    __syncthreads();\n",
        ),
        ("attention_sm90.cu", "STAGES = 3;", "STAGES = 2;"),
        // Eight rows that are not where the products look for them, panels that are not, and a matrix that begins anywhere.
        ("wgmma.cuh", "static_cast<u64>(GROUP_VECTORS) << 32", "static_cast<u64>(ROW_VECTORS) << 32"),
        ("wgmma.cuh", "factor(matrix, PANEL_VECTORS)", "factor(matrix, GROUP_VECTORS)"),
        ("attention_sm90.cu", "(WGMMA_REPEAT_VECTORS - before) % WGMMA_REPEAT_VECTORS", "0 * before"),
        // Written in another order than it is read.
        ("wgmma.cuh", "(vector ^ row * ROW_VECTORS / 8 % ROW_VECTORS)", "vector"),
        // A token that is not seen yet, in a tile that is looked at and in one that is not.
        ("attention_sm90.cu", "token >= num_visible[", "token > num_visible["),
        ("attention_sm90.cu", "start + SHAPE::TOKENS <= rows", "start + SHAPE::TOKENS - 1 <= rows"),
        // Slots that no token is in: their weights are 0, but they are not numbers.
        ("attention_sm90.cu", "rows.keys(pass, min(token, rows.num_tokens - 1))", "rows.keys(pass, token)"),
        // The blocks of the tile before.
        ("attention_sm90.cu", "find_tokens((tile + 1) * SHAPE::TOKENS)", "find_tokens(tile * SHAPE::TOKENS)"),
    ];
    assert_seen(Source::AttentionSm90, &faults, |program| attention_sm90::check_paged(program, 80, 1));
}

#[test]
fn faults_of_patches_are_seen() {
    let faults = [("patches.cu", "num_frames - 1);", "num_frames);")];
    assert_seen(Source::Patches, &faults, |program| patches::check(program, 1));
}

#[test]
fn faults_of_draws_are_seen() {
    let faults = [
        // No barrier between what the warps find and what is made of it.
        (
            "sampling.cu",
            "    largest_of_warp[warp] = largest;\n  }\n  __syncthreads();",
            "    largest_of_warp[warp] = largest;\n  }",
        ),
        // Nor after the adjustments.
        (
            "sampling.cuh",
            "    __syncthreads();\n#pragma unroll\n    for (int k = 0; k < PER_THREAD; ++k) scaled[k] = values",
            "    for (int k = 0; k < PER_THREAD; ++k) scaled[k] = values",
        ),
        // The larger id on a tie.
        ("sampling.cu", "b.id < a.id", "b.id > a.id"),
        // Padding is looked at.
        ("sampling.cuh", "min(num_ids - start, PIECE)", "PIECE"),
        // The last token of a piece keeps its logit, and so does the first.
        ("sampling.cuh", "if (col >= piece.len) break;", "if (col + 1 >= piece.len) break;"),
        ("sampling.cuh", "adjustments[low + half].id < id", "adjustments[low + half].id <= id"),
        // A row without its last piece.
        ("sampling.cu", "i < num_pieces; i += WARP_THREADS) {", "i < num_pieces - 1; i += WARP_THREADS) {"),
        // A sum that is not brought to the row's largest logit.
        ("sampling.cu", "own[i].sum_exp * expf(own[i].max_logit - max_logit)", "own[i].sum_exp"),
        // Tokens are passed over that their noise would lift.
        ("sampling.cu", "* 0.6932f", "* 0.1f"),
        // A logarithm with a term less.
        ("sampling.cu", "  series = series * q + 1.0 / 7.0;\n", ""),
        // The kernel before is not waited for.
        ("sampling.cu", "  wait_for_previous();\n", ""),
    ];
    assert_seen(Source::Sampling, &faults, |program| {
        sampling::check_candidates(program, 1)?;
        sampling::check_noise(program, 1)
    });
}

#[test]
fn faults_of_infinite_logits_are_seen() {
    let faults = [
        // Threads see their own columns only, and a row its first pieces only.
        ("sampling.cu", "is_finite && finite_of_warp[other] == WHOLE_WARP", "is_finite"),
        ("sampling.cu", "__ballot_sync(WHOLE_WARP, is_finite) == WHOLE_WARP;", "is_finite;"),
    ];
    assert_seen(Source::Sampling, &faults, |program| sampling::check_not_finite(program, 1));
}

#[test]
fn faults_of_the_best_tokens_are_seen() {
    let faults = [
        // Any order among equal logits.
        ("selection.cu", "(a < b) == descends", "(a >> 32 < b >> 32) == descends"),
        // Negative numbers in the order of their bits.
        ("selection.cu", "bits >> 31 != 0 ? ~bits :", "bits >> 31 != 0 ? bits ^ 0x80000000u :"),
        // Pairs of other warps are not waited for.
        ("selection.cu", "max(distance, next) > WARP_THREADS", "distance > WARP_THREADS"),
        // A place is written before it was read.
        (
            "selection.cu",
            "max(key, other) : min(key, other);\n    __syncthreads();",
            "max(key, other) : min(key, other);",
        ),
        // Lists that are not merged: the last one, and those of other groups.
        ("selection.cu", "piece < num_pieces ? own", "piece < num_pieces - 1 ? own"),
        (
            "selection.cu",
            "distance < MERGE_GROUPS; distance *= 2",
            "distance < MERGE_GROUPS / 2; distance *= 2",
        ),
        // What both groups of a pair dropped is counted twice, or what was not asked for not at all.
        ("selection.cu", "scales && group % (2 * distance) == 0", "scales"),
        ("selection.cu", "    } else if (scales) {\n      tail", "    } else if (false) {\n      tail"),
        // The penalties in another order.
        (
            "sampling.cuh",
            "row.frequency_penalty * static_cast<float>(token.count) + row.presence_penalty",
            "row.presence_penalty * static_cast<float>(token.count) + row.frequency_penalty",
        ),
        // Infinite logits.
        ("sampling.cuh", "fminf(fmaxf(scaled[k] + 0.0f, -LARGEST_FLOAT), LARGEST_FLOAT)", "scaled[k] + 0.0f"),
    ];
    assert_seen(Source::Selection, &faults, |program| sampling::check_selections(program, 1));
}

#[test]
fn faults_of_hashes_are_seen() {
    let faults = [
        // The place of a word does not count.
        ("hash.cu", "mix(word ^ mix(HASH_FACTOR * (index + 1)))", "mix(word)"),
        // Neither do the last bytes.
        ("hash.cu", "i * sizeof(u64) < num_bytes", "(i + 1) * sizeof(u64) <= num_bytes"),
        // Another thread's sum is read before it is there.
        ("types.cuh", "  __syncthreads();\n", ""),
        ("hash.cu", "join_halves(v.z, v.w)", "join_halves(v.w, v.z)"),
        // The kernel before is not waited for.
        ("hash.cu", "  wait_for_previous();\n", ""),
    ];
    assert_seen(Source::Hash, &faults, |program| hash::check(program, 1));
}

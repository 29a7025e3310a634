//! Faults that are planted in the kernels' sources. The comparisons that the kernels pass must fail on each, or the emulation
//! or a sanitizer must end the process.

use anyhow::Result;

use super::{
    attention,
    emulator::{Program, Source},
    gemv, patches, rotary, rowwise,
};

/// What is replaced, in which file, and by what.
type Fault = (&'static str, &'static str, &'static str);

fn assert_seen(source: Source, faults: &[Fault], check: impl Fn(&Program) -> Result<()>) {
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
        ("rowwise.cu", "      v = Elements<WIDTH>::load(sum + col);\n", ""),
        // A vector beside the right one.
        ("rowwise.cu", "load(gate + cols)", "load(gate + cols + WIDTH)"),
        // A row beyond the table.
        ("rowwise.cu", "row < num_ids ?", "row <= num_ids ?"),
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
        ("rotary.cu", "x * cos[i] - y * sin[i]", "x * cos[i] + y * sin[i]"),
        // Values where keys belong.
        ("rotary.cu", "(head * 2 + 1) * part", "head * 2 * part"),
        // A vector beyond the block.
        ("rotary.cu", "place >= block_vectors", "place > block_vectors"),
    ];
    assert_seen(Source::Rotary, &faults, |program| {
        rotary::check_append(program, 1)?;
        rotary::check_copies(program, 1)
    });
}

#[test]
fn faults_of_products_are_seen() {
    let faults = [
        ("gemv.cu", "  __syncthreads();\n", ""),
        // The place of another row's sum.
        ("gemv.cu", "* ROWS + row] = sum", "* ROWS + row + 1] = sum"),
        // Outputs beyond the last are read.
        ("gemv.cu", "min(first_output + output, num_outputs - 1)", "first_output + output"),
    ];
    assert_seen(Source::Gemv, &faults, |program| gemv::check(program, 1));
}

#[test]
fn faults_of_attention_are_seen() {
    let faults = [
        // Two halves of a register of the second factor, two registers of it, and two of the first factor.
        (
            "attention.cu",
            "permute_bytes(rows[0][i / 2], rows[1][i / 2], halves)",
            "permute_bytes(rows[1][i / 2], rows[0][i / 2], halves)",
        ),
        ("attention.cu", "{keys[2 * step], keys[2 * step + 1]}", "{keys[2 * step + 1], keys[2 * step]}"),
        ("attention.cu", "words[step][1] = lower[2 * step];", "words[step][1] = upper[2 * step];"),
        // A token that is not seen yet.
        ("attention.cu", "token < num_visible[row] ?", "token <= num_visible[row] ?"),
        // Values of slots that no token is in: their weights are 0, but they are not numbers.
        ("attention.cu", "values + min(token, num_tokens - 1) * stride", "values + token * stride"),
        // What was summed with another largest score is left as it was.
        ("attention.cu", "values[i][2 * row] *= merge.first_factor;", ""),
    ];
    assert_seen(Source::Attention, &faults, |program| attention::check_paged(program, 32, 1));
}

#[test]
fn faults_of_patches_are_seen() {
    let faults = [("patches.cu", "num_frames - 1);", "num_frames);")];
    assert_seen(Source::Patches, &faults, |program| patches::check(program, 1));
}

//! `rotary.cu`.

use anyhow::{Result, ensure};
use half::bf16;
use lockstep_shard::device::Angles;

use super::{
    emulator::{Launch, Program, Source},
    numbers::{Numbers, ROUNDING, compare, same_bits, to_f64, unwritten},
};

const BLOCK: usize = 256;
/// Tokens in a block of the cache.
const BLOCK_TOKENS: usize = 32;

/// Rows, heads of queries and of keys, and columns of a head.
const SHAPES: [(usize, usize, usize, usize); 7] = [
    (3, 7, 1, 128),
    (5, 3, 3, 80),
    (1, 28, 4, 128),
    (4, 0, 0, 16),
    (2, 0, 2, 16),
    (6, 2, 1, 32),
    (2, 4, 2, 64),
];

/// Angles' cosines and sines.
fn angles(numbers: &mut Numbers, len: usize) -> (Vec<f32>, Vec<f32>) {
    numbers.f32(len, 3.0).into_iter().map(|angle| (angle.cos(), angle.sin())).unzip()
}

/// The first `num_rotated` heads of each row rotated, the others as they are.
fn rotated(
    x: &[bf16],
    cols: usize,
    num_rotated: usize,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
) -> Vec<f64> {
    let half = head_dim / 2;
    let mut expected = to_f64(x);
    for (row, values) in expected.chunks_mut(cols.max(1)).enumerate() {
        for head in values.chunks_mut(head_dim).take(num_rotated) {
            for i in 0..half {
                let (cos, sin) = (f64::from(cos[row * half + i]), f64::from(sin[row * half + i]));
                let (a, b) = (head[i], head[i + half]);
                (head[i], head[i + half]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }
    expected
}

/// Cosines and sines of three axes, at positions up to where neighbouring angles are hardly apart.
pub fn check_angles(program: &Program, seed: u64) -> Result<()> {
    let frequencies: Vec<(f32, usize)> =
        (0..64_usize).map(|i| (1e6_f32.powf(-(i as f32) / 64.0), [0, 1, 2][i * 3 / 64])).collect();
    for (rows, cols) in [(1, 64), (7, 64), (300, 40)] {
        let mut numbers = Numbers::new(seed);
        let positions: Vec<[u32; 3]> = numbers
            .u32(3 * rows)
            .chunks(3)
            .map(|three| [three[0] % 131_072, three[1] % 77, three[2] % 9])
            .collect();
        let angles = Angles { frequencies: &frequencies[..cols], scale: 1.25, positions: &positions };
        let (mut cos, mut sin) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
        angles.fill(&mut cos, &mut sin);
        let words: Vec<u32> =
            frequencies.iter().flat_map(|(frequency, axis)| [frequency.to_bits(), *axis as u32]).collect();
        let mut outputs = Launch::new("rotary_angles", [3, 1, 1], BLOCK, seed)
            .input(positions.as_flattened())
            .input(&words)
            .u32(cols)
            .f32(1.25)
            .u64(rows * cols)
            .output(&vec![f32::NAN; rows * cols])
            .output(&vec![f32::NAN; rows * cols])
            .run(program)?;
        for (what, expected) in [("cosines", cos), ("sines", sin)] {
            let got: Vec<f32> = outputs.take();
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                // The last bit of a function in f64 may differ, and be the one that a rounding to f32 turns on.
                let error = (got - expected).abs();
                ensure!(
                    error <= 2.0 * f32::EPSILON,
                    "{what} of {rows} x {cols}: element {i}: {got}, not {expected}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn angles_are_those_of_the_host() {
    check_angles(Program::of(Source::Rotary), 1).unwrap();
}

/// Rotation, and what lies in the cache afterwards: what was written, and all else as it was.
pub fn check_append(program: &Program, seed: u64) -> Result<()> {
    for (rows, num_query, num_kv, head_dim) in SHAPES {
        let what = format!("{rows} rows of {num_query} and {num_kv} heads of {head_dim}");
        let mut numbers = Numbers::new(seed);
        let cols = (num_query + 2 * num_kv) * head_dim;
        let qkv = numbers.bf16(rows * cols, 1.0);
        let (cos, sin) = angles(&mut numbers, rows * head_dim / 2);
        let num_blocks = 4;
        let part = BLOCK_TOKENS * head_dim;
        let cache = numbers.bf16(num_blocks * num_kv * 2 * part, 1.0);
        let slots = &numbers.order(num_blocks * BLOCK_TOKENS)[..rows];
        let mut outputs = Launch::new("rotary_append", [rows, 1, 1], BLOCK, seed)
            .output(&qkv)
            .input(&cos)
            .input(&sin)
            .input(slots)
            .u32(num_query)
            .u32(num_kv)
            .u32(head_dim)
            .output(&cache)
            .run(program)?;
        let got: Vec<bf16> = outputs.take();
        let expected = rotated(&qkv, cols, num_query + num_kv, head_dim, &cos, &sin);
        compare(&what, &got, &expected, |i| ROUNDING * expected[i].abs() + 3e-7)?;

        let mut filled = cache.clone();
        for (row, &slot) in slots.iter().enumerate() {
            let (block, offset) = (slot as usize / BLOCK_TOKENS, slot as usize % BLOCK_TOKENS);
            for head in 0..num_kv {
                for (kind, first_head) in [num_query, num_query + num_kv].into_iter().enumerate() {
                    let from = row * cols + (first_head + head) * head_dim;
                    let to = ((block * num_kv + head) * 2 + kind) * part + offset * head_dim;
                    filled[to..to + head_dim].copy_from_slice(&got[from..from + head_dim]);
                }
            }
        }
        same_bits(&format!("the cache after {what}"), &outputs.take(), &filled)?;
    }
    Ok(())
}

/// Rotation in place.
pub fn check_vision(program: &Program, seed: u64) -> Result<()> {
    for (rows, num_heads, head_dim) in [(3, 16, 80), (1, 5, 16), (2, 3, 128)] {
        let mut numbers = Numbers::new(seed);
        let cols = 3 * num_heads * head_dim;
        let qkv = numbers.bf16(rows * cols, 1.0);
        let (cos, sin) = angles(&mut numbers, rows * head_dim / 2);
        let mut outputs = Launch::new("vision_rotary", [rows, 1, 1], BLOCK, seed)
            .output(&qkv)
            .input(&cos)
            .input(&sin)
            .u32(num_heads)
            .u32(head_dim)
            .run(program)?;
        let expected = rotated(&qkv, cols, 2 * num_heads, head_dim, &cos, &sin);
        let what = format!("vision: {rows} rows of {num_heads} heads of {head_dim}");
        compare(&what, &outputs.take::<bf16>(), &expected, |i| ROUNDING * expected[i].abs() + 3e-7)?;
    }
    Ok(())
}

/// Copies in their order: block 0 reaches block 2 by way of block 1.
pub fn check_copies(program: &Program, seed: u64) -> Result<()> {
    let (num_layers, num_blocks) = (3, 6);
    let copies = [(0, 1), (1, 2), (5, 0), (2, 5)];
    for block_vectors in [1, 256, 300] {
        let words = block_vectors * 4;
        let cache = Numbers::new(seed).u32(num_layers * num_blocks * words);
        let pairs: Vec<u32> = copies.iter().flat_map(|&(source, target)| [source, target]).collect();
        let mut outputs =
            Launch::new("copy_blocks", [block_vectors.div_ceil(256), num_layers, 1], BLOCK, seed)
                .output(&cache)
                .u32(num_blocks)
                .u32(block_vectors)
                .input(&pairs)
                .u32(copies.len())
                .run(program)?;
        let mut expected = cache;
        for layer in expected.chunks_mut(num_blocks * words) {
            for (source, target) in copies {
                let source = source as usize * words;
                layer.copy_within(source..source + words, target as usize * words);
            }
        }
        anyhow::ensure!(outputs.take::<u32>() == expected, "blocks of {block_vectors} vectors");
    }
    Ok(())
}

#[test]
fn queries_and_keys_are_rotated_and_the_cache_is_filled() {
    for seed in 0..2 {
        check_append(Program::of(Source::Rotary), seed).unwrap();
    }
}

#[test]
fn vision_is_rotated() {
    check_vision(Program::of(Source::Rotary), 1).unwrap();
}

#[test]
fn blocks_are_copied_in_order() {
    check_copies(Program::of(Source::Rotary), 1).unwrap();
}

#[test]
fn many_rows_fill_one_block() {
    // All slots of a block, by as many rows in any order.
    let (num_kv, head_dim) = (2, 16);
    let mut numbers = Numbers::new(5);
    let values = numbers.bf16(BLOCK_TOKENS * 2 * num_kv * head_dim, 1.0);
    let (cos, sin) = (vec![1.0_f32; BLOCK_TOKENS * head_dim / 2], vec![0.0_f32; BLOCK_TOKENS * head_dim / 2]);
    let mut outputs = Launch::new("rotary_append", [BLOCK_TOKENS, 1, 1], BLOCK, 5)
        .output(&values)
        .input(&cos)
        .input(&sin)
        .input(&numbers.order(BLOCK_TOKENS))
        .u32(0)
        .u32(num_kv)
        .u32(head_dim)
        .output(&unwritten(values.len()))
        .run(Program::of(Source::Rotary))
        .unwrap();
    let _: Vec<bf16> = outputs.take();
    let cache: Vec<bf16> = outputs.take();
    assert!(cache.iter().all(|x| !x.is_nan()), "every slot is written");
}

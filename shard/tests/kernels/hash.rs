//! `hash.cu`.

use anyhow::{Result, ensure};

use super::{
    emulator::{Launch, Program, Source},
    numbers::Numbers,
};

const BLOCK: usize = 256;
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut z: u64) -> u64 {
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The formula at the head of the source, one word after the other.
fn expected(bytes: &[u8]) -> u64 {
    let mut sum = mix((bytes.len() as u64).wrapping_add(FACTOR));
    for (index, chunk) in bytes.chunks(8).enumerate() {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        let place = mix(FACTOR.wrapping_mul(index as u64 + 1));
        sum = sum.wrapping_add(mix(u64::from_le_bytes(word) ^ place));
    }
    mix(sum)
}

fn hash(program: &Program, bytes: &[u8], num_blocks: usize, seed: u64) -> Result<u64> {
    let mut outputs = Launch::new("hash_words", [num_blocks, 1, 1], BLOCK, seed)
        .input(bytes)
        .u64(bytes.len())
        .output(&vec![u64::MAX; num_blocks])
        .run(program)?;
    let mut outputs = Launch::new("hash_finish", [1, 1, 1], BLOCK, seed)
        .input(&outputs.take::<u64>())
        .u32(num_blocks)
        .u64(bytes.len())
        .output(&[u64::MAX])
        .run(program)?;
    Ok(outputs.take::<u64>()[0])
}

/// The formula, whatever the grid; lengths that are and are not whole words and vectors, of bf16 and of f32.
pub fn check(program: &Program, seed: u64) -> Result<()> {
    let bytes = Numbers::new(seed).u8(40_000);
    for len in [0, 2, 4, 8, 14, 16, 18, 30, 32, 8192, 39_998, 40_000] {
        for num_blocks in [1, 3, 300] {
            let got = hash(program, &bytes[..len], num_blocks, seed)?;
            let expected = expected(&bytes[..len]);
            ensure!(got == expected, "{len} bytes, {num_blocks} blocks: {got:x}, not {expected:x}");
        }
    }
    Ok(())
}

#[test]
fn a_hash_is_the_formula() {
    for seed in 0..2 {
        check(Program::of(Source::Hash), seed).unwrap();
    }
}

#[test]
fn what_is_not_aligned_is_read_in_words() {
    // The emulation's buffers are all aligned: here no alignment is good enough.
    let aligned = "reinterpret_cast<size_t>(bytes) % sizeof(uint4) == 0";
    let program = Program::changed(Source::Hash, "hash.cu", aligned, "false").unwrap();
    check(&program, 1).unwrap();
}

#[test]
fn any_bit_and_any_place_counts() {
    let bytes = Numbers::new(3).u8(30);
    let whole = expected(&bytes);
    for bit in 0..8 * bytes.len() {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert_ne!(expected(&changed), whole, "bit {bit}");
    }
    let mut turned = bytes.clone();
    turned[..16].rotate_left(8);
    assert_ne!(expected(&turned), whole);
    assert_ne!(expected(&[0; 8]), expected(&[0; 7]));
    assert_ne!(expected(&[]), expected(&[0]));
}

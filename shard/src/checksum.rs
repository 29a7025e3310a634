//! A fast checksum: of what all ranks must have alike, and of weights that must stay as they are.
//!
//! It finds accidents, not forgers. Each lane takes every eighth word by a step that is one to one in the word and in the lane,
//! so that a change within one word always changes its lane; any other change is missed once in about 2^64 times.

const LANES: usize = 8;
const BLOCK_BYTES: usize = LANES * size_of::<u64>();
/// Odd, so that multiplying is one to one.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// A checksum of bytes that come in runs. Where runs begin and end counts.
#[derive(Clone, Copy, Debug)]
pub struct Checksum {
    lanes: [u64; LANES],
    runs: u64,
}

impl Default for Checksum {
    fn default() -> Self {
        Self { lanes: std::array::from_fn(|lane| FACTOR.rotate_left(8 * lane as u32)), runs: 0 }
    }
}

impl Checksum {
    /// The checksum of one run.
    pub fn of(bytes: &[u8]) -> u64 {
        let mut checksum = Self::default();
        checksum.update(bytes);
        checksum.finish()
    }

    /// Takes a run of bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        let (blocks, rest) = bytes.as_chunks::<BLOCK_BYTES>();
        let mut lanes = self.lanes;
        blocks.iter().for_each(|block| take(&mut lanes, block));
        let mut last = [0; BLOCK_BYTES];
        last[..rest.len()].copy_from_slice(rest);
        take(&mut lanes, &last);
        self.lanes = lanes;
        self.runs = mix(self.runs, bytes.len() as u64);
    }

    /// The checksum of all runs so far.
    pub fn finish(&self) -> u64 {
        self.lanes.iter().fold(self.runs, |sum, lane| mix(sum, *lane))
    }
}

fn take(lanes: &mut [u64; LANES], block: &[u8; BLOCK_BYTES]) {
    let (words, _) = block.as_chunks::<8>();
    for (lane, word) in lanes.iter_mut().zip(words) {
        *lane = (*lane ^ u64::from_le_bytes(*word)).wrapping_mul(FACTOR).rotate_left(29);
    }
}

/// A 128-bit product folded: every bit of the word changes many of the result.
fn mix(sum: u64, word: u64) -> u64 {
    let product = u128::from(sum ^ FACTOR) * u128::from(word ^ 0xd1b5_4a32_d192_ed03);
    ((product >> 64) as u64 ^ product as u64).wrapping_add(sum.rotate_left(29))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bit_that_changes_is_seen() {
        for len in [1, 7, 8, 63, 64, 65, 200] {
            let mut bytes: Vec<u8> = (0..len).map(|i| (i * 37 % 251) as u8).collect();
            let whole = Checksum::of(&bytes);
            for bit in 0..8 * len {
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert_ne!(Checksum::of(&bytes), whole, "bit {bit} of {len} bytes");
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            assert_eq!(Checksum::of(&bytes), whole);
        }
    }

    #[test]
    fn order_length_and_runs_count() {
        let of = |runs: &[&[u8]]| {
            let mut checksum = Checksum::default();
            runs.iter().for_each(|run| checksum.update(run));
            checksum.finish()
        };
        let (zeros, ones) = ([0; 64], [1; 64]);
        let all = [
            of(&[]),
            of(&[&[]]),
            of(&[&zeros]),
            of(&[&zeros[..8]]),
            of(&[&zeros, &ones]),
            of(&[&ones, &zeros]),
            of(&[&[zeros, ones].concat()]),
        ];
        for (i, one) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|other| other != one), "{i}");
        }
    }
}

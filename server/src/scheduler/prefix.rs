//! Names of blocks: what the keys and values in them depend on.

use super::types::{Medium, PrefixKey};

/// Name of a full block of a sequence. It stands for all tokens up to the block's end and everything else that their keys and values
/// depend on, so that blocks of one name are one another's equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct BlockName([u8; 32]);

/// Names the blocks of a sequence, one after the other.
#[derive(Debug)]
pub(super) struct Names {
    root: PrefixKey,
    /// Of its first blocks.
    names: Vec<BlockName>,
}

impl Names {
    /// Of a sequence under `root`: sequences of different roots share nothing.
    pub fn new(root: PrefixKey) -> Self {
        Self { root, names: Vec::new() }
    }

    /// Of the blocks that `token_ids` fill. `token_ids` only grow from call to call.
    pub fn of(&mut self, token_ids: &[u32], media: &[Medium], block_tokens: u32) -> &[BlockName] {
        let full = token_ids.len() / block_tokens as usize;
        for index in self.names.len()..full {
            let start = index * block_tokens as usize;
            let tokens = &token_ids[start..start + block_tokens as usize];
            let before = self.names.last().map_or(self.root.0, |name| name.0);
            self.names.push(name(&before, start as u32, tokens, media));
        }
        &self.names[..full]
    }
}

/// The name of a block that begins with token `start`, after the one named `before`.
fn name(before: &[u8; 32], start: u32, tokens: &[u32], media: &[Medium]) -> BlockName {
    let mut hasher = blake3::Hasher::new_keyed(before);
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    let end = start + tokens.len() as u32;
    for medium in media.iter().filter(|medium| medium.first_token < end && start < medium.end_token()) {
        // Pad tokens say nothing: what they stand for are the pixels, by their hash, and the positions, which follow from grid and
        // times. The bits of the times: frames that are shown at another rate are another video.
        hasher.update(&medium.hash.0);
        hasher.update(&medium.first_token.to_le_bytes());
        for side in medium.grid {
            hasher.update(&side.to_le_bytes());
        }
        hasher.update(&medium.seconds_per_grid_t.to_bits().to_le_bytes());
    }
    BlockName(hasher.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::MediaHash;

    const ROOT: PrefixKey = PrefixKey([1; 32]);

    fn names(root: PrefixKey, token_ids: &[u32], media: &[Medium]) -> Vec<BlockName> {
        Names::new(root).of(token_ids, media, 4).to_vec()
    }

    fn video() -> Medium {
        let hash = MediaHash([7; 32]);
        Medium { hash, first_token: 5, num_tokens: 4, grid: [2, 2, 4], seconds_per_grid_t: 0.5 }
    }

    #[test]
    fn a_name_depends_on_all_tokens_until_the_blocks_end() {
        let tokens: Vec<u32> = (0..14).collect();
        let all = names(ROOT, &tokens, &[]);
        assert_eq!(all.len(), 3, "only full blocks have names");
        assert_eq!(names(ROOT, &tokens[..9], &[]), all[..2]);
        for changed in 0..12 {
            let mut other = tokens.clone();
            other[changed] = 99;
            let equal = names(ROOT, &other, &[]).iter().zip(&all).filter(|(a, b)| a == b).count();
            assert_eq!(equal, changed / 4);
        }
        assert!(names(PrefixKey([2; 32]), &tokens, &[]).iter().zip(&all).all(|(a, b)| a != b));
    }

    #[test]
    fn names_can_be_asked_for_while_tokens_come() {
        let tokens: Vec<u32> = (0..20).collect();
        let mut growing = Names::new(ROOT);
        for end in 0..=20 {
            let so_far = growing.of(&tokens[..end], &[video()], 4).to_vec();
            assert_eq!(so_far, names(ROOT, &tokens[..end], &[video()]));
        }
    }

    #[test]
    fn a_video_is_its_frames_its_place_and_its_times() {
        let tokens = [1; 16];
        let all = names(ROOT, &tokens, &[video()]);
        let differs_from = |medium: Medium| {
            let other = names(ROOT, &tokens, &[medium]);
            all.iter().zip(&other).position(|(a, b)| a != b)
        };
        assert_eq!(differs_from(video()), None);
        assert_eq!(differs_from(Medium { seconds_per_grid_t: 0.500_000_1, ..video() }), Some(1));
        assert_eq!(differs_from(Medium { grid: [2, 4, 2], ..video() }), Some(1));
        assert_eq!(differs_from(Medium { hash: MediaHash([8; 32]), ..video() }), Some(1));
        assert_eq!(differs_from(Medium { first_token: 6, ..video() }), Some(1));
        assert_eq!(differs_from(Medium { first_token: 9, ..video() }), Some(1));
    }
}

//! Where the vision features of each medium lie.

use std::collections::HashMap;

use super::{
    blocks::TakenBlocks,
    sequence::slot_in_blocks,
    step::{Fault, Grid, MediaHash, count},
};
use crate::device::FEATURE_BLOCK_TOKENS;

/// Media that are encoded or in work, and the blocks of the feature cache that they own. All ranks hold the same.
#[derive(Debug)]
pub struct FeatureTable {
    media: HashMap<MediaHash, EncodedMedium>,
    taken: TakenBlocks,
}

/// A medium with blocks for its features.
#[derive(Debug)]
pub struct EncodedMedium {
    /// Its shape in patches.
    pub grid: Grid,
    /// Whether all its features are there.
    pub is_complete: bool,
    blocks: Vec<u32>,
}

impl EncodedMedium {
    /// Slot of token `index` of the medium.
    pub fn slot(&self, index: usize) -> u32 {
        slot_in_blocks(&self.blocks, index, FEATURE_BLOCK_TOKENS)
    }
}

impl FeatureTable {
    /// A cache of `num_blocks` free blocks.
    pub fn new(num_blocks: usize) -> Self {
        Self { media: HashMap::new(), taken: TakenBlocks::new(num_blocks) }
    }

    /// A medium that has blocks.
    pub fn get(&self, hash: &MediaHash) -> Option<&EncodedMedium> {
        self.media.get(hash)
    }

    /// Gives `blocks` to a medium of `num_tokens` tokens.
    ///
    /// # Errors
    /// The wrong number of blocks, or one that is not there or not free. The fault is of the list of blocks.
    pub fn insert(
        &mut self,
        hash: MediaHash,
        grid: Grid,
        num_tokens: usize,
        blocks: Vec<u32>,
    ) -> Result<(), Fault> {
        let needed = num_tokens.div_ceil(FEATURE_BLOCK_TOKENS);
        count(blocks.len(), needed, needed)?;
        self.taken.take(&blocks).map_err(|(_, fault)| fault)?;
        self.media.insert(hash, EncodedMedium { grid, is_complete: false, blocks });
        Ok(())
    }

    /// Notes that all features of a medium are there.
    pub fn complete(&mut self, hash: &MediaHash) {
        if let Some(medium) = self.media.get_mut(hash) {
            medium.is_complete = true;
        }
    }

    /// Frees the blocks of a medium. False if it has none.
    pub fn remove(&mut self, hash: &MediaHash) -> bool {
        let Some(medium) = self.media.remove(hash) else { return false };
        self.taken.free(&medium.blocks);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_one_owner_at_a_time() {
        let grid = Grid { t: 1, h: 20, w: 16 };
        let (a, b) = (MediaHash([1; 32]), MediaHash([2; 32]));
        let mut table = FeatureTable::new(4);
        table.insert(a, grid, 80, vec![3, 1]).unwrap();
        let slot = |token| table.get(&a).unwrap().slot(token);
        assert_eq!((slot(0), slot(63), slot(64)), (192, 255, 64));
        assert_eq!(table.insert(b, grid, 64, vec![1]), Err(Fault::TakenBlock(1)));
        assert_eq!(table.insert(b, grid, 80, vec![0, 0]), Err(Fault::TakenBlock(0)));
        assert_eq!(table.insert(b, grid, 64, vec![4]), Err(Fault::OutOfRange { value: 4, bound: 4 }));
        assert!(table.insert(b, grid, 80, vec![0]).is_err());
        assert!(table.remove(&a) && !table.remove(&a));
        table.insert(b, grid, 80, vec![1, 3]).unwrap();
    }
}

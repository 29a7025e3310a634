//! Which blocks of a cache have an owner.

use super::step::{Fault, below};

/// The blocks of one cache. Each has one owner at a time, or none.
#[derive(Debug)]
pub struct TakenBlocks(Vec<bool>);

impl TakenBlocks {
    /// `num_blocks` free blocks.
    pub fn new(num_blocks: usize) -> Self {
        Self(vec![false; num_blocks])
    }

    /// Takes `blocks`, all or none.
    ///
    /// # Errors
    /// The index of the first block that is not there, not free, or given before in the same list, and what is wrong.
    pub fn take(&mut self, blocks: &[u32]) -> Result<(), (usize, Fault)> {
        for (i, block) in blocks.iter().enumerate() {
            let fault = match below(u64::from(*block), self.0.len() as u64) {
                Err(fault) => fault,
                Ok(()) if self.0[*block as usize] => Fault::TakenBlock(*block),
                Ok(()) => {
                    self.0[*block as usize] = true;
                    continue;
                }
            };
            self.free(&blocks[..i]);
            return Err((i, fault));
        }
        Ok(())
    }

    /// Frees blocks that were taken.
    pub fn free(&mut self, blocks: &[u32]) {
        blocks.iter().for_each(|block| self.0[*block as usize] = false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_taken_once_and_a_list_whole_or_not_at_all() {
        let mut blocks = TakenBlocks::new(4);
        blocks.take(&[3, 1]).unwrap();
        assert_eq!(blocks.take(&[0, 2, 1]), Err((2, Fault::TakenBlock(1))));
        assert_eq!(blocks.take(&[0, 0]), Err((1, Fault::TakenBlock(0))));
        assert_eq!(blocks.take(&[2, 4]), Err((1, Fault::OutOfRange { value: 4, bound: 4 })));
        blocks.take(&[0, 2]).unwrap();
        blocks.free(&[3, 0]);
        assert_eq!(blocks.take(&[2]), Err((0, Fault::TakenBlock(2))));
        blocks.take(&[0, 3]).unwrap();
    }
}

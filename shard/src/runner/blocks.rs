//! Which blocks of a cache have an owner, and which of them several sequences share.

use std::ops::Range;

use super::step::{Fault, below};
use crate::device::KV_BLOCK_TOKENS;

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

/// The blocks of the cache of keys and values: who holds each, and how much of it is computed.
///
/// Sequences whose first tokens are the same may share the blocks of these. Only full blocks are shared, and only blocks of
/// one holder are written, so that nobody's keys and values change under another. What a block holds stays until it is
/// taken again: it may be shared also when whoever computed it has left.
#[derive(Debug)]
pub struct KvBlocks(Vec<KvBlock>);

#[derive(Clone, Copy, Debug, Default)]
struct KvBlock {
    /// Block tables that it is in.
    holders: u32,
    /// Tokens whose keys and values are in it, from its first slot.
    computed: u32,
}

impl KvBlocks {
    /// `num_blocks` free blocks.
    pub fn new(num_blocks: usize) -> Self {
        Self(vec![KvBlock::default(); num_blocks])
    }

    /// Takes free `blocks` for one holder. What was in them is gone.
    ///
    /// # Errors
    /// The index of the first block that is not there or not free, and what is wrong.
    pub fn take(&mut self, blocks: &[u32]) -> Result<(), (usize, Fault)> {
        for (i, block) in blocks.iter().enumerate() {
            let known = self.block_mut(*block).map_err(|fault| (i, fault))?;
            if known.holders > 0 {
                return Err((i, Fault::TakenBlock(*block)));
            }
            *known = KvBlock { holders: 1, computed: 0 };
        }
        Ok(())
    }

    /// Adds a holder to each of `blocks`, which are full.
    ///
    /// # Errors
    /// The index of the first block that is not there or not full, or that occurs twice, and what is wrong.
    pub fn share(&mut self, blocks: &[u32]) -> Result<(), (usize, Fault)> {
        for (i, block) in blocks.iter().enumerate() {
            if blocks[..i].contains(block) {
                return Err((i, Fault::TakenBlock(*block)));
            }
            let known = self.block_mut(*block).map_err(|fault| (i, fault))?;
            computed(*block, known, KV_BLOCK_TOKENS as u32).map_err(|fault| (i, fault))?;
            known.holders += 1;
        }
        Ok(())
    }

    /// Takes a holder from each of `blocks`.
    pub fn free(&mut self, blocks: &[u32]) {
        blocks.iter().for_each(|block| self.0[*block as usize].holders -= 1);
    }

    /// Notes that `source` is copied to `target`.
    ///
    /// # Errors
    /// Whether the fault is the target's, and what it is: a block that is not there, a source with nothing in it, a target
    /// that nobody holds, or several do.
    pub fn copy(&mut self, source: u32, target: u32) -> Result<(), (bool, Fault)> {
        let known = *self.block_mut(source).map_err(|fault| (false, fault))?;
        computed(source, &known, 1).map_err(|fault| (false, fault))?;
        let copied = self.block_mut(target).map_err(|fault| (true, fault))?;
        match copied.holders {
            1 => copied.computed = known.computed,
            0 => return Err((true, Fault::FreeBlock(target))),
            _ => return Err((true, Fault::SharedBlock(target))),
        }
        Ok(())
    }

    /// Checks that `tokens` of a sequence can be computed into its blocks: those before them are there, and nobody else
    /// holds a block that is written.
    ///
    /// # Errors
    /// What is wrong with the first block at fault.
    pub fn check_write(&self, block_table: &[u32], tokens: &Range<usize>) -> Result<(), Fault> {
        for index in block_indices(tokens) {
            let block = block_table[index];
            let known = &self.0[block as usize];
            if known.holders != 1 {
                return Err(Fault::SharedBlock(block));
            }
            let before = tokens.start.saturating_sub(index * KV_BLOCK_TOKENS);
            computed(block, known, before as u32)?;
        }
        Ok(())
    }

    /// Notes that `tokens` of a sequence are computed.
    pub fn write(&mut self, block_table: &[u32], tokens: &Range<usize>) {
        for index in block_indices(tokens) {
            let end = tokens.end - index * KV_BLOCK_TOKENS;
            self.0[block_table[index] as usize].computed = end.min(KV_BLOCK_TOKENS) as u32;
        }
    }

    fn block_mut(&mut self, block: u32) -> Result<&mut KvBlock, Fault> {
        below(u64::from(block), self.0.len() as u64)?;
        Ok(&mut self.0[block as usize])
    }
}

/// Checks that so many tokens are computed in a block.
fn computed(block: u32, known: &KvBlock, needed: u32) -> Result<(), Fault> {
    let actual = known.computed;
    if actual >= needed { Ok(()) } else { Err(Fault::NotComputed { block, actual, needed }) }
}

/// Places in a block table of the blocks that `tokens` lie in.
fn block_indices(tokens: &Range<usize>) -> Range<usize> {
    tokens.start / KV_BLOCK_TOKENS..tokens.end.div_ceil(KV_BLOCK_TOKENS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_blocks_are_shared_and_not_written_by_then() {
        let mut blocks = KvBlocks::new(6);
        let table = [3, 1];
        blocks.take(&table).unwrap();
        blocks.check_write(&table, &(0..40)).unwrap();
        blocks.write(&table, &(0..40));
        let partial = Fault::NotComputed { block: 1, actual: 8, needed: 32 };
        assert_eq!(blocks.share(&[3, 1]), Err((1, partial)));
        assert_eq!(blocks.take(&[0, 3]), Err((1, Fault::TakenBlock(3))));

        // The one above has added a holder to block 3 already: a step with a fault is the last.
        assert_eq!(blocks.check_write(&table, &(31..33)), Err(Fault::SharedBlock(3)));
        blocks.check_write(&table, &(40..41)).unwrap();
        blocks.free(&[3]);
        blocks.check_write(&table, &(31..33)).unwrap();
        assert_eq!(blocks.share(&[3, 3]), Err((1, Fault::TakenBlock(3))));
    }

    #[test]
    fn a_copy_has_what_its_source_has_and_is_written_apart() {
        let mut blocks = KvBlocks::new(6);
        blocks.take(&[0, 1]).unwrap();
        blocks.write(&[0, 1], &(0..40));
        blocks.share(&[0]).unwrap();
        blocks.take(&[5]).unwrap();
        let fork = [0, 5];
        let missing = Fault::NotComputed { block: 5, actual: 0, needed: 7 };
        assert_eq!(blocks.check_write(&fork, &(39..40)), Err(missing));
        blocks.copy(1, 5).unwrap();
        blocks.check_write(&fork, &(39..40)).unwrap();
        assert_eq!(blocks.copy(2, 5), Err((false, Fault::NotComputed { block: 2, actual: 0, needed: 1 })));
        assert_eq!(blocks.copy(1, 2), Err((true, Fault::FreeBlock(2))));
        assert_eq!(blocks.copy(1, 0), Err((true, Fault::SharedBlock(0))));
        assert_eq!(blocks.copy(6, 0), Err((false, Fault::OutOfRange { value: 6, bound: 6 })));
        assert_eq!(blocks.copy(1, 6), Err((true, Fault::OutOfRange { value: 6, bound: 6 })));
    }

    #[test]
    fn what_was_computed_can_be_shared_until_its_block_is_taken_again() {
        let mut blocks = KvBlocks::new(2);
        blocks.take(&[0, 1]).unwrap();
        blocks.write(&[0, 1], &(0..64));
        blocks.free(&[0, 1]);
        blocks.share(&[0]).unwrap();
        blocks.take(&[1]).unwrap();
        assert!(blocks.share(&[1]).is_err());
    }

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

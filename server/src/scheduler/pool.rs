//! A fixed number of blocks that are free or taken.

use super::types::BlockId;

/// The free list of the cache of features. It says who may use a block, and holds no data.
#[derive(Debug)]
pub(super) struct BlockPool {
    free: Vec<BlockId>,
    total: u32,
}

impl BlockPool {
    /// All of `total` blocks free.
    pub fn new(total: u32) -> Self {
        // Low ids are given out first, which keeps a short run in a small part of the cache.
        Self { free: (0..total).rev().map(BlockId).collect(), total }
    }

    /// Blocks that are free.
    pub fn num_free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Blocks that there are.
    pub fn total(&self) -> u32 {
        self.total
    }

    /// Blocks that are not free.
    pub fn num_held(&self) -> u32 {
        self.total - self.num_free()
    }

    /// Takes `count` blocks, or none if there are fewer.
    pub fn allocate(&mut self, count: u32) -> Option<Vec<BlockId>> {
        let rest = self.free.len().checked_sub(count as usize)?;
        let mut blocks = self.free.split_off(rest);
        blocks.reverse();
        Some(blocks)
    }

    /// Frees blocks that were taken.
    pub fn release(&mut self, blocks: Vec<BlockId>) {
        self.free.extend(blocks);
        debug_assert!(self.num_free() <= self.total, "a block is released twice");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_every_block_once() {
        let mut pool = BlockPool::new(5);
        let mut all = pool.allocate(2).unwrap();
        all.extend(pool.allocate(3).unwrap());
        assert_eq!(pool.allocate(1), None);
        assert_eq!(pool.allocate(0), Some(vec![]));
        all.sort();
        assert_eq!(all, (0..5).map(BlockId).collect::<Vec<_>>());
        pool.release(all);
        assert_eq!((pool.num_free(), pool.num_held(), pool.total()), (5, 0, 5));
    }

    #[test]
    fn refuses_more_than_there_is_and_keeps_the_rest() {
        let mut pool = BlockPool::new(2);
        assert_eq!(pool.allocate(3), None);
        assert_eq!(pool.num_free(), 2);
    }
}

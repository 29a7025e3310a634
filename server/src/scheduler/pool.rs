//! A fixed number of blocks that are free or held, by one or by several.

use super::types::BlockId;

/// The free list of one cache. It says who may use a block, and holds no data.
#[derive(Debug)]
pub(super) struct BlockPool {
    free: Vec<BlockId>,
    /// How many hold each block.
    holders: Vec<u32>,
}

impl BlockPool {
    /// All of `total` blocks free.
    pub fn new(total: u32) -> Self {
        // Low ids are given out first, which keeps a short run in a small part of the cache.
        Self { free: (0..total).rev().map(BlockId).collect(), holders: vec![0; total as usize] }
    }

    /// Blocks that are free.
    pub fn num_free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Blocks that there are.
    pub fn total(&self) -> u32 {
        self.holders.len() as u32
    }

    /// Blocks that are not free.
    pub fn num_held(&self) -> u32 {
        self.total() - self.num_free()
    }

    /// Takes `count` blocks, or none if there are fewer.
    pub fn allocate(&mut self, count: u32) -> Option<Vec<BlockId>> {
        let rest = self.free.len().checked_sub(count as usize)?;
        let mut blocks = self.free.split_off(rest);
        blocks.reverse();
        for block in &blocks {
            self.holders[block.0 as usize] = 1;
        }
        Some(blocks)
    }

    /// Adds a holder to each of `blocks`.
    ///
    /// # Panics
    /// If one of them is free.
    pub fn share(&mut self, blocks: &[BlockId]) {
        for block in blocks {
            let holders = &mut self.holders[block.0 as usize];
            assert!(*holders > 0, "block {} is shared, and free", block.0);
            *holders += 1;
        }
    }

    /// How many hold a block.
    pub fn num_holders(&self, block: BlockId) -> u32 {
        self.holders[block.0 as usize]
    }

    /// Takes a holder from each of `blocks`, which are free when they have none.
    ///
    /// # Panics
    /// If one of them is free already: a block would then be given out twice.
    pub fn release(&mut self, blocks: impl IntoIterator<Item = BlockId>) {
        for block in blocks {
            let holders = &mut self.holders[block.0 as usize];
            assert!(*holders > 0, "block {} is released twice", block.0);
            *holders -= 1;
            if *holders == 0 {
                self.free.push(block);
            }
        }
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

    #[test]
    fn a_shared_block_is_free_when_its_last_holder_is_gone() {
        let mut pool = BlockPool::new(3);
        let blocks = pool.allocate(2).unwrap();
        pool.share(&blocks[..1]);
        pool.release(blocks.clone());
        assert_eq!((pool.num_holders(blocks[0]), pool.num_holders(blocks[1]), pool.num_free()), (1, 0, 2));
        assert!(!pool.allocate(2).unwrap().contains(&blocks[0]));
        pool.release([blocks[0]]);
        assert_eq!(pool.allocate(1), Some(vec![blocks[0]]));
    }

    #[test]
    #[should_panic(expected = "block 0 is released twice")]
    fn notices_a_double_release() {
        let mut pool = BlockPool::new(2);
        let blocks = pool.allocate(1).unwrap();
        pool.release(blocks.clone());
        pool.release(blocks);
    }
}

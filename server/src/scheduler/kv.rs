//! The cache of keys and values: who holds which block, and what free blocks still hold.

use std::collections::{BTreeMap, HashMap};

use super::{prefix::BlockName, types::BlockId};

/// Blocks of keys and values. Each is held, by one sequence or by several, or free. A free block that has a name is kept, for whoever
/// comes with the same beginning, until it is needed for something else: then the one that was left first goes first.
#[derive(Debug)]
pub(super) struct KvCache {
    blocks: Vec<Block>,
    /// Free blocks with nothing in them that could be found.
    empty: Vec<BlockId>,
    /// Free blocks with a name, by the time when they were left.
    kept: BTreeMap<u64, BlockId>,
    by_name: HashMap<BlockName, BlockId>,
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct Block {
    holders: u32,
    name: Option<BlockName>,
    left_at: u64,
}

impl KvCache {
    /// All of `total` blocks free and empty.
    pub fn new(total: u32) -> Self {
        Self {
            blocks: vec![Block::default(); total as usize],
            // Low ids are given out first, which keeps a short run in a small part of the cache.
            empty: (0..total).rev().map(BlockId).collect(),
            kept: BTreeMap::new(),
            by_name: HashMap::new(),
            clock: 0,
        }
    }

    /// Blocks that nobody holds.
    pub fn num_free(&self) -> u32 {
        (self.empty.len() + self.kept.len()) as u32
    }

    /// Those of them that can be found by their names.
    pub fn num_kept(&self) -> u32 {
        self.kept.len() as u32
    }

    /// Blocks that there are.
    pub fn total(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Blocks that are not free.
    pub fn num_held(&self) -> u32 {
        self.total() - self.num_free()
    }

    /// How many hold a block.
    pub fn num_holders(&self, block: BlockId) -> u32 {
        self.blocks[block.0 as usize].holders
    }

    /// Takes `count` blocks, or none if there are fewer. What was in them cannot be found any more.
    pub fn allocate(&mut self, count: u32) -> Option<Vec<BlockId>> {
        if self.num_free() < count {
            return None;
        }
        let take = |_| {
            let block = self.empty.pop().unwrap_or_else(|| {
                let (_, block) = self.kept.pop_first().expect("enough free blocks were counted");
                let name = self.blocks[block.0 as usize].name.take().expect("what is kept has a name");
                self.by_name.remove(&name);
                block
            });
            self.blocks[block.0 as usize].holders = 1;
            block
        };
        Some((0..count).map(take).collect())
    }

    /// Adds a holder to each of `blocks`, which are held, or kept.
    ///
    /// # Panics
    /// If one of them is empty.
    pub fn share(&mut self, blocks: &[BlockId]) {
        for block in blocks {
            let known = &mut self.blocks[block.0 as usize];
            if known.holders == 0 {
                let kept = self.kept.remove(&known.left_at);
                assert_eq!(kept, Some(*block), "block {} is shared, and empty", block.0);
            }
            known.holders += 1;
        }
    }

    /// Takes a holder from each block of a table. Of those that are free then the last are given out first again: the beginning of
    /// a sequence is found more often than its end, and the end without the beginning is of no use.
    ///
    /// # Panics
    /// If one of them is free already: a block would then be given out twice.
    pub fn release(&mut self, blocks: Vec<BlockId>) {
        for block in blocks.into_iter().rev() {
            let known = &mut self.blocks[block.0 as usize];
            assert!(known.holders > 0, "block {} is released twice", block.0);
            known.holders -= 1;
            if known.holders > 0 {
                continue;
            }
            if known.name.is_some() {
                self.clock += 1;
                known.left_at = self.clock;
                self.kept.insert(self.clock, block);
            } else {
                self.empty.push(block);
            }
        }
    }

    /// Names a held block, now that it is computed. Of two that hold the same the first is found.
    pub fn name(&mut self, block: BlockId, name: BlockName) {
        let known = &mut self.blocks[block.0 as usize];
        assert!(known.holders > 0, "block {} is named, and free", block.0);
        if known.name.is_none() && !self.by_name.contains_key(&name) {
            known.name = Some(name);
            self.by_name.insert(name, block);
        }
    }

    /// Lets nobody find the blocks of these names any more.
    pub fn forget(&mut self, names: &[BlockName]) {
        for block in names.iter().filter_map(|name| self.by_name.remove(name)) {
            let known = &mut self.blocks[block.0 as usize];
            known.name = None;
            if known.holders == 0 {
                self.kept.remove(&known.left_at);
                self.empty.push(block);
            }
        }
    }

    /// The blocks of the longest beginning of `names` that there is.
    pub fn find(&self, names: &[BlockName]) -> Vec<BlockId> {
        names.iter().map_while(|name| self.by_name.get(name).copied()).collect()
    }
}

#[cfg(test)]
impl KvCache {
    /// Panics unless every block is in one place, and names find the blocks that have them.
    pub fn check(&self) {
        let mut free: Vec<BlockId> = self.empty.iter().chain(self.kept.values()).copied().collect();
        free.sort();
        let without_holders = (0..).map(BlockId).zip(&self.blocks).filter(|(_, block)| block.holders == 0);
        assert!(without_holders.map(|(id, _)| id).eq(free), "free blocks are those that nobody holds");
        for block in self.empty.iter() {
            assert_eq!(self.blocks[block.0 as usize].name, None, "an empty block has a name");
        }
        let named = self.blocks.iter().filter(|block| block.name.is_some()).count();
        assert_eq!(named, self.by_name.len());
        for (name, block) in &self.by_name {
            assert_eq!(self.blocks[block.0 as usize].name, Some(*name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::{prefix::Names, types::PrefixKey};

    fn names(count: usize) -> Vec<BlockName> {
        let tokens: Vec<u32> = (0..count as u32).collect();
        Names::new(PrefixKey([0; 32])).of(&tokens, &[], 1).to_vec()
    }

    #[test]
    fn gives_every_block_once() {
        let mut cache = KvCache::new(5);
        let mut all = cache.allocate(2).unwrap();
        all.extend(cache.allocate(3).unwrap());
        assert_eq!((cache.allocate(1), cache.allocate(0)), (None, Some(vec![])));
        all.sort();
        assert_eq!(all, (0..5).map(BlockId).collect::<Vec<_>>());
        cache.release(all);
        assert_eq!((cache.num_free(), cache.num_held(), cache.total()), (5, 0, 5));
        assert_eq!(cache.allocate(6), None);
        cache.check();
    }

    #[test]
    fn a_shared_block_is_free_when_its_last_holder_is_gone() {
        let mut cache = KvCache::new(3);
        let blocks = cache.allocate(2).unwrap();
        cache.share(&blocks[..1]);
        cache.release(blocks.clone());
        assert_eq!((cache.num_holders(blocks[0]), cache.num_holders(blocks[1]), cache.num_free()), (1, 0, 2));
        assert!(!cache.allocate(2).unwrap().contains(&blocks[0]));
        cache.release(vec![blocks[0]]);
        assert_eq!(cache.allocate(1), Some(vec![blocks[0]]));
    }

    #[test]
    #[should_panic(expected = "block 0 is released twice")]
    fn notices_a_double_release() {
        let mut cache = KvCache::new(2);
        let blocks = cache.allocate(1).unwrap();
        cache.release(blocks.clone());
        cache.release(blocks);
    }

    #[test]
    fn what_is_named_is_found_until_its_block_is_needed() {
        let (mut cache, names) = (KvCache::new(4), names(3));
        let blocks = cache.allocate(3).unwrap();
        for (block, name) in blocks.iter().zip(&names) {
            cache.name(*block, *name);
        }
        assert_eq!(cache.find(&names), blocks, "also while it is held");
        cache.release(blocks.clone());
        assert_eq!((cache.num_kept(), cache.num_free()), (3, 4));
        cache.allocate(2).unwrap();
        assert_eq!(cache.find(&names), blocks[..2], "first what is empty, then the end of what is kept");
        cache.share(&blocks[..2]);
        cache.check();
        assert_eq!((cache.allocate(1), cache.num_kept()), (None, 0));
        cache.release(blocks[..2].to_vec());
        cache.allocate(2).unwrap();
        assert!(cache.find(&names).is_empty());
        cache.check();
    }

    #[test]
    fn what_was_left_first_goes_first() {
        let (mut cache, names) = (KvCache::new(2), names(2));
        let blocks = cache.allocate(2).unwrap();
        cache.name(blocks[0], names[0]);
        cache.name(blocks[1], names[1]);
        cache.release(vec![blocks[1]]);
        cache.release(vec![blocks[0]]);
        assert_eq!(cache.allocate(1), Some(vec![blocks[1]]));
        assert_eq!(cache.find(&names), blocks[..1]);
    }

    #[test]
    fn what_is_forgotten_is_not_found_and_not_lost() {
        let (mut cache, names) = (KvCache::new(3), names(3));
        let blocks = cache.allocate(3).unwrap();
        blocks.iter().zip(&names).for_each(|(block, name)| cache.name(*block, *name));
        cache.release(blocks[1..].to_vec());
        cache.forget(&names[..2]);
        assert!(cache.find(&names).is_empty());
        cache.check();
        assert_eq!((cache.num_free(), cache.num_kept(), cache.num_holders(blocks[0])), (2, 1, 1));
    }

    #[test]
    fn of_two_equal_blocks_one_is_found() {
        let (mut cache, names) = (KvCache::new(2), names(1));
        let blocks = cache.allocate(2).unwrap();
        blocks.iter().for_each(|block| cache.name(*block, names[0]));
        assert_eq!(cache.find(&names), blocks[..1]);
        cache.release(blocks);
        assert_eq!((cache.num_kept(), cache.num_free()), (1, 2));
        cache.check();
    }
}

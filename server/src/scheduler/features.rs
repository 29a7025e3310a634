//! Which media have features on the shards, and who needs them.

use std::collections::{BTreeMap, HashMap};

use super::{
    pool::BlockPool,
    types::{BlockId, MediaHash, Medium},
};

/// The shards' cache of vision features, by the hash of the medium.
///
/// A medium is held while a sequence refers to it, and kept afterwards for a later turn of the conversation, until its
/// blocks are needed: then the one that was left first goes first.
#[derive(Debug)]
pub(super) struct FeatureCache {
    pool: BlockPool,
    block_tokens: u32,
    entries: HashMap<MediaHash, Entry>,
    /// Media that nobody refers to, by the time when the last one left.
    unheld: BTreeMap<u64, MediaHash>,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    blocks: Vec<BlockId>,
    references: u32,
    encoded: bool,
    left_at: u64,
}

impl FeatureCache {
    pub fn new(blocks: u32, block_tokens: u32) -> Self {
        Self {
            pool: BlockPool::new(blocks),
            block_tokens,
            entries: HashMap::new(),
            unheld: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Blocks that these media need together, each different one counted once.
    pub fn blocks_needed(&self, media: &[Medium]) -> u32 {
        distinct(media).values().map(|&tokens| tokens.div_ceil(self.block_tokens)).sum()
    }

    /// Refers to all of these media, with blocks for those that are new, or to none if the blocks do not suffice.
    /// Media that had to go are appended to `evictions`.
    pub fn reserve(&mut self, media: &[Medium], evictions: &mut Vec<MediaHash>) -> bool {
        let wanted = distinct(media);
        let missing: u32 = wanted
            .iter()
            .filter(|(hash, _)| !self.entries.contains_key(hash))
            .map(|(_, tokens)| tokens.div_ceil(self.block_tokens))
            .sum();
        let evictable: u32 = self
            .unheld
            .values()
            .filter(|hash| !wanted.contains_key(hash))
            .map(|hash| self.entries[hash].blocks.len() as u32)
            .sum();
        if missing > self.pool.num_free() + evictable {
            return false;
        }
        // Those that are there are held first, so that none of them is evicted for the others.
        for hash in wanted.keys() {
            if let Some(entry) = self.entries.get_mut(hash) {
                if entry.references == 0 {
                    self.unheld.remove(&entry.left_at);
                }
                entry.references += 1;
            }
        }
        while self.pool.num_free() < missing {
            evictions.push(self.evict_oldest());
        }
        for (hash, tokens) in wanted {
            if !self.entries.contains_key(&hash) {
                let count = tokens.div_ceil(self.block_tokens);
                let blocks = self.pool.allocate(count).expect("blocks for all media are free by now");
                self.entries.insert(hash, Entry { blocks, references: 1, encoded: false, left_at: 0 });
            }
        }
        true
    }

    /// Ends one reservation of these media.
    pub fn release(&mut self, media: &[Medium]) {
        for hash in distinct(media).into_keys() {
            let entry = self.entries.get_mut(&hash).expect("a reserved medium has an entry");
            entry.references -= 1;
            if entry.references > 0 {
                continue;
            }
            if entry.encoded {
                self.clock += 1;
                entry.left_at = self.clock;
                self.unheld.insert(self.clock, hash);
            } else {
                let entry = self.entries.remove(&hash).expect("the entry was there just now");
                self.pool.release(entry.blocks);
            }
        }
    }

    /// Whether the medium's features are there, or will be when the chunks of the plan under way run.
    pub fn is_encoded(&self, hash: &MediaHash) -> bool {
        self.entries.get(hash).is_some_and(|entry| entry.encoded)
    }

    /// Notes that a reserved medium is encoded by the plan under way, and says where to.
    pub fn encode(&mut self, hash: &MediaHash) -> Vec<BlockId> {
        let entry = self.entries.get_mut(hash).expect("a medium is reserved before it is encoded");
        assert!(!entry.encoded, "medium {hash:?} is encoded twice");
        entry.encoded = true;
        entry.blocks.clone()
    }

    /// Blocks that nobody uses.
    pub fn num_free(&self) -> u32 {
        self.pool.num_free()
    }

    /// Blocks of media that are kept though nobody refers to them.
    pub fn num_cached(&self) -> u32 {
        self.unheld.values().map(|hash| self.entries[hash].blocks.len() as u32).sum()
    }

    /// Blocks of media that sequences refer to.
    pub fn num_held(&self) -> u32 {
        self.pool.num_held() - self.num_cached()
    }

    /// Blocks that there are.
    pub fn total(&self) -> u32 {
        self.pool.total()
    }

    fn evict_oldest(&mut self) -> MediaHash {
        let (_, hash) = self.unheld.pop_first().expect("enough blocks were counted as evictable");
        let entry = self.entries.remove(&hash).expect("an unheld medium has an entry");
        self.pool.release(entry.blocks);
        hash
    }
}

/// The different media and their tokens, in the order of their hashes, so that nothing depends on a hash map's order.
fn distinct(media: &[Medium]) -> BTreeMap<MediaHash, u32> {
    media.iter().map(|medium| (medium.hash, medium.num_tokens)).collect()
}

#[cfg(test)]
impl FeatureCache {
    /// Panics unless the blocks of all media are different and none of them is free, and the counts agree.
    pub fn check(&self) {
        let mut seen = std::collections::BTreeSet::new();
        for entry in self.entries.values() {
            for block in &entry.blocks {
                assert!(seen.insert(*block), "feature block {} belongs to two media", block.0);
            }
            assert!(entry.references > 0 || entry.encoded, "a medium without features is kept for nobody");
        }
        assert_eq!(seen.len() as u32, self.pool.num_held());
        let held: u32 = self
            .entries
            .values()
            .filter(|entry| entry.references > 0)
            .map(|entry| entry.blocks.len() as u32)
            .sum();
        assert_eq!(held, self.num_held());
        assert_eq!(self.num_free() + self.num_cached() + self.num_held(), self.total());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn medium(name: u8, num_tokens: u32) -> Medium {
        let hash = MediaHash([name; 32]);
        Medium { hash, first_token: 0, num_tokens, grid: [1, 2, 2], seconds_per_grid_t: 0.0 }
    }

    /// Reserves, encodes and releases, as a request that comes and goes.
    fn visit(cache: &mut FeatureCache, medium: Medium, evictions: &mut Vec<MediaHash>) {
        let media = [medium];
        assert!(cache.reserve(&media, evictions));
        if !cache.is_encoded(&media[0].hash) {
            cache.encode(&media[0].hash);
        }
        cache.release(&media);
        cache.check();
    }

    #[test]
    fn evicts_what_was_left_first() {
        let mut cache = FeatureCache::new(3, 4);
        let mut evictions = vec![];
        for name in [1, 2, 3, 1] {
            visit(&mut cache, medium(name, 4), &mut evictions);
        }
        assert_eq!((evictions.len(), cache.num_cached()), (0, 3));
        visit(&mut cache, medium(4, 5), &mut evictions);
        assert_eq!(evictions, [MediaHash([2; 32]), MediaHash([3; 32])]);
        assert!(cache.is_encoded(&MediaHash([1; 32])));
    }

    #[test]
    fn shares_by_hash_and_counts_a_medium_once() {
        let mut cache = FeatureCache::new(2, 4);
        let twice = [medium(1, 8), medium(1, 8)];
        assert_eq!(cache.blocks_needed(&twice), 2);
        assert!(cache.reserve(&twice, &mut vec![]));
        assert!(cache.reserve(&[medium(1, 8)], &mut vec![]));
        cache.release(&twice);
        assert_eq!(cache.num_held(), 2);
        assert!(!cache.reserve(&[medium(2, 1)], &mut vec![]), "held features must not be evicted");
        cache.release(&[medium(1, 8)]);
        assert_eq!(cache.num_free(), 2, "features that never came to be are not kept");
        cache.check();
    }

    #[test]
    fn a_refused_reservation_changes_nothing() {
        let mut cache = FeatureCache::new(3, 4);
        let mut evictions = vec![];
        visit(&mut cache, medium(1, 4), &mut evictions);
        assert!(!cache.reserve(&[medium(1, 4), medium(2, 12)], &mut evictions));
        assert_eq!((evictions.len(), cache.num_cached(), cache.num_free()), (0, 1, 2));
    }
}

//! Which media have features on the shards, and who needs them.

use std::collections::{BTreeMap, HashMap};

use super::{
    pool::BlockPool,
    types::{BlockId, MediaHash, Medium},
    vision::{MediumWork, VisionCosts},
};

/// The shards' cache of vision features, by the hash of the medium.
///
/// A medium is held while a sequence refers to it, and kept afterwards for a later turn of the conversation, until its
/// blocks are needed: then the one that was left first goes first. One medium is in work at a time: the shards keep what is
/// half done of one.
#[derive(Debug)]
pub(super) struct FeatureCache {
    pool: BlockPool,
    block_tokens: u32,
    costs: VisionCosts,
    entries: HashMap<MediaHash, Entry>,
    /// Media that nobody refers to, by the time when the last one left.
    unheld: BTreeMap<u64, MediaHash>,
    /// Blocks of these.
    unheld_blocks: u32,
    /// The medium of which some work is done, but not all.
    in_work: Option<MediaHash>,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    blocks: Vec<BlockId>,
    references: u32,
    work: MediumWork,
    /// Work that is done when the plans given out so far have run.
    done: u64,
    left_at: u64,
}

impl Entry {
    fn is_encoded(&self) -> bool {
        self.done == self.work.total
    }
}

/// A piece of work on a medium.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub from: u64,
    pub to: u64,
    /// What it takes of a step's budget.
    pub tokens: u32,
    /// Blocks that the medium's features go to, with the first piece.
    pub feature_blocks: Vec<BlockId>,
}

impl FeatureCache {
    pub fn new(blocks: u32, block_tokens: u32, costs: VisionCosts) -> Self {
        Self {
            pool: BlockPool::new(blocks),
            block_tokens,
            costs,
            entries: HashMap::new(),
            unheld: BTreeMap::new(),
            unheld_blocks: 0,
            in_work: None,
            clock: 0,
        }
    }

    /// Forgets all media, held or not.
    pub fn clear(&mut self) {
        *self = Self::new(self.pool.total(), self.block_tokens, self.costs.clone());
    }

    /// Blocks that these media need together, each different one counted once.
    pub fn blocks_needed(&self, media: &[Medium]) -> u32 {
        distinct(media).values().map(|medium| medium.num_tokens.div_ceil(self.block_tokens)).sum()
    }

    /// Refers to all of these media, with blocks for those that are new, or to none if the blocks do not suffice.
    /// Media that had to go are appended to `evictions`.
    pub fn reserve(&mut self, media: &[Medium], evictions: &mut Vec<MediaHash>) -> bool {
        let wanted = distinct(media);
        let missing: u32 = wanted
            .iter()
            .filter(|(hash, _)| !self.entries.contains_key(hash))
            .map(|(_, medium)| medium.num_tokens.div_ceil(self.block_tokens))
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
                    self.unheld_blocks -= entry.blocks.len() as u32;
                }
                entry.references += 1;
            }
        }
        while self.pool.num_free() < missing {
            evictions.push(self.evict_oldest());
        }
        for (hash, medium) in wanted {
            if !self.entries.contains_key(&hash) {
                let count = medium.num_tokens.div_ceil(self.block_tokens);
                let blocks = self.pool.allocate(count).expect("blocks for all media are free by now");
                let work = self.costs.work(medium);
                self.entries.insert(hash, Entry { blocks, references: 1, work, done: 0, left_at: 0 });
            }
        }
        true
    }

    /// Ends one reservation of these media. A medium in work that nobody needs any more is appended to `evictions`.
    pub fn release(&mut self, media: &[Medium], evictions: &mut Vec<MediaHash>) {
        for hash in distinct(media).into_keys() {
            let entry = self.entries.get_mut(&hash).expect("a reserved medium has an entry");
            entry.references -= 1;
            if entry.references > 0 {
                continue;
            }
            if entry.is_encoded() {
                self.clock += 1;
                entry.left_at = self.clock;
                self.unheld.insert(self.clock, hash);
                self.unheld_blocks += entry.blocks.len() as u32;
            } else {
                let entry = self.entries.remove(&hash).expect("the entry was there just now");
                self.pool.release(entry.blocks);
                evictions.extend(self.in_work.take_if(|in_work| *in_work == hash));
            }
        }
    }

    /// Whether the medium's features are there, or will be when the chunks of the plan under way run.
    pub fn is_encoded(&self, hash: &MediaHash) -> bool {
        self.entries.get(hash).is_some_and(Entry::is_encoded)
    }

    /// The medium of which some work is done, but not all.
    pub fn in_work(&self) -> Option<MediaHash> {
        self.in_work
    }

    /// Goes on with the work on a reserved medium in the plan under way, as far as `tokens` of its budget go; none without
    /// any.
    pub fn advance(&mut self, hash: &MediaHash, tokens: u32) -> Option<Piece> {
        assert!(self.in_work.is_none_or(|in_work| in_work == *hash), "another medium is in work");
        let entry = self.entries.get_mut(hash).expect("a medium is reserved before it is encoded");
        assert!(!entry.is_encoded(), "medium {hash:?} is encoded twice");
        let (to, tokens) = self.costs.advance(entry.work, entry.done, tokens);
        let from = std::mem::replace(&mut entry.done, to);
        if from == to {
            return None;
        }
        self.in_work = (!entry.is_encoded()).then_some(*hash);
        let feature_blocks = if from == 0 { entry.blocks.clone() } else { vec![] };
        Some(Piece { from, to, tokens, feature_blocks })
    }

    /// Blocks that nobody uses.
    pub fn num_free(&self) -> u32 {
        self.pool.num_free()
    }

    /// Blocks of media that are kept though nobody refers to them.
    pub fn num_cached(&self) -> u32 {
        self.unheld_blocks
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
        self.unheld_blocks -= entry.blocks.len() as u32;
        self.pool.release(entry.blocks);
        hash
    }
}

/// The different media, in the order of their hashes, so that nothing depends on a hash map's order.
fn distinct(media: &[Medium]) -> BTreeMap<MediaHash, &Medium> {
    media.iter().map(|medium| (medium.hash, medium)).collect()
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
            assert!(
                entry.references > 0 || entry.is_encoded(),
                "a medium without features is kept for nobody"
            );
        }
        let half_done = self.entries.iter().filter(|(_, entry)| entry.done > 0 && !entry.is_encoded());
        assert!(half_done.map(|(hash, _)| hash).eq(&self.in_work), "what is half done is in work");
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

    fn cache(blocks: u32) -> FeatureCache {
        let costs = VisionCosts { num_stages: 3, attending_stages: vec![2], attention_tokens: 10 };
        FeatureCache::new(blocks, 4, costs)
    }

    fn medium(name: u8, num_tokens: u32) -> Medium {
        let hash = MediaHash([name; 32]);
        Medium { hash, first_token: 0, num_tokens, grid: [1, 2, 2], seconds_per_grid_t: 0.0 }
    }

    /// Reserves, encodes and releases, as a request that comes and goes.
    fn visit(cache: &mut FeatureCache, medium: Medium, evictions: &mut Vec<MediaHash>) {
        let media = [medium];
        assert!(cache.reserve(&media, evictions));
        if !cache.is_encoded(&media[0].hash) {
            cache.advance(&media[0].hash, 100).expect("a budget for all of it");
        }
        cache.release(&media, evictions);
        cache.check();
    }

    #[test]
    fn evicts_what_was_left_first() {
        let mut cache = cache(3);
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
        let mut cache = cache(2);
        let twice = [medium(1, 8), medium(1, 8)];
        assert_eq!(cache.blocks_needed(&twice), 2);
        assert!(cache.reserve(&twice, &mut vec![]));
        assert!(cache.reserve(&[medium(1, 8)], &mut vec![]));
        cache.release(&twice, &mut vec![]);
        assert_eq!(cache.num_held(), 2);
        assert!(!cache.reserve(&[medium(2, 1)], &mut vec![]), "held features must not be evicted");
        let mut evictions = vec![];
        cache.release(&[medium(1, 8)], &mut evictions);
        assert_eq!(cache.num_free(), 2, "features that never came to be are not kept");
        assert_eq!(evictions, [], "and the shards have never heard of them");
        cache.check();
    }

    #[test]
    fn what_is_half_done_goes_on_for_others_and_is_evicted_with_the_last() {
        let mut cache = cache(2);
        let (hash, media) = (MediaHash([1; 32]), [medium(1, 8)]);
        let mut evictions = vec![];
        for _ in 0..2 {
            assert!(cache.reserve(&media, &mut evictions));
        }
        // 8 + 8 units of 10 and 8 of 18; a token is 30.
        let piece = cache.advance(&hash, 2).unwrap();
        assert_eq!((piece.from, piece.to, piece.tokens, piece.feature_blocks.len()), (0, 6, 2, 2));
        assert_eq!((cache.in_work(), cache.is_encoded(&hash)), (Some(hash), false));
        cache.release(&media, &mut evictions);
        assert_eq!(evictions, []);
        let piece = cache.advance(&hash, 5).unwrap();
        assert_eq!((piece.from, piece.to, piece.tokens, piece.feature_blocks.len()), (6, 18, 5, 0));
        assert_eq!(cache.advance(&hash, 0), None);
        cache.check();
        cache.release(&media, &mut evictions);
        assert_eq!((evictions, cache.in_work(), cache.num_free()), (vec![hash], None, 2));
        cache.check();
    }

    #[test]
    fn a_refused_reservation_changes_nothing() {
        let mut cache = cache(3);
        let mut evictions = vec![];
        visit(&mut cache, medium(1, 4), &mut evictions);
        assert!(!cache.reserve(&[medium(1, 4), medium(2, 12)], &mut evictions));
        assert_eq!((evictions.len(), cache.num_cached(), cache.num_free()), (0, 1, 2));
    }
}

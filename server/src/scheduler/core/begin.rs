//! What a sequence begins with: blocks that others have computed, and the features that it needs beside them.

use std::ops::Range;

use super::{Draft, Scheduler};
use crate::scheduler::{
    sequence::Sequence,
    types::{BlockId, Medium, SeqId},
};

/// What a waiting sequence can begin with.
pub(super) struct Beginning {
    /// Whether it begins with the prompt of its leader.
    pub is_fork: bool,
    /// Full blocks that others have computed, where it is not.
    pub found: Vec<BlockId>,
    /// Tokens that are computed then.
    pub num_tokens: u32,
    /// Free blocks that it takes, for all tokens that it has.
    pub missing: u32,
}

impl Scheduler {
    /// What there is of a waiting sequence.
    pub(super) fn beginning(&mut self, id: SeqId) -> Beginning {
        let block_tokens = self.config.kv_block_tokens;
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence exists");
        let all = sequence.blocks_missing(sequence.num_tokens(), block_tokens);
        if let Some(prompt) = self.forks.prompt_of(sequence) {
            let (num_tokens, missing) = (prompt.num_tokens, all - prompt.full_blocks(block_tokens));
            return Beginning { is_fork: true, found: vec![], num_tokens, missing };
        }
        let found = if self.config.prefix_cache {
            let names = sequence.names.of(&sequence.token_ids, &sequence.media, block_tokens);
            // The last token is computed in any case, to draw after it.
            let most = (sequence.token_ids.len() - 1) / block_tokens as usize;
            self.kv.find(&names[..names.len().min(most)])
        } else {
            vec![]
        };
        let held = found.iter().filter(|block| self.kv.num_holders(**block) > 0).count() as u32;
        let num_tokens = found.len() as u32 * block_tokens;
        Beginning { is_fork: false, found, num_tokens, missing: all - held }
    }

    /// Reserves the features of the media that a sequence computes if it begins so, in place of those that it had reserved.
    /// Whether there is room; where somebody else with media did not have any, only what is there already has.
    pub(super) fn reserve_media(
        &mut self,
        beginning: &Beginning,
        id: SeqId,
        exhausted: bool,
        draft: &mut Draft,
    ) -> bool {
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence exists");
        let needed = sequence.media.iter().filter(|medium| medium.end_token() > beginning.num_tokens);
        let needed: Vec<Medium> = needed.cloned().collect();
        let is_held = beginning.is_fork || needed.iter().all(|medium| sequence.reserved.contains(medium));
        if exhausted && !is_held || !self.features.reserve(&needed, &mut draft.plan.evictions) {
            return false;
        }
        let before = std::mem::replace(&mut sequence.reserved, needed);
        self.features.release(&before, &mut draft.plan.evictions);
        true
    }

    /// Lets go of the features that sequences without blocks hold, but for one, and for those that this plan works on. Whether
    /// there were any.
    pub(super) fn give_up_features(&mut self, but: SeqId, draft: &mut Draft) -> bool {
        let mut given_up = false;
        for order in &self.waiting {
            let sequence = self.sequences.get_mut(&order.id).expect("a waiting sequence exists");
            let is_worked_on =
                |medium: &Medium| draft.plan.encodes.iter().any(|encode| encode.hash == medium.hash);
            if order.id == but || sequence.reserved.is_empty() || sequence.reserved.iter().any(is_worked_on) {
                continue;
            }
            self.features.release(&std::mem::take(&mut sequence.reserved), &mut draft.plan.evictions);
            given_up = true;
        }
        given_up
    }

    /// Lets nobody find the blocks of a sequence for which no token could be drawn: what is in them may be why.
    pub(super) fn forget_blocks(&mut self, id: SeqId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            let Sequence { names, token_ids, media, .. } = sequence;
            self.kv.forget(names.of(token_ids, media, self.config.kv_block_tokens));
        }
    }

    /// Names the blocks that are full with `tokens`, which are computed now, so that they can be found.
    pub(super) fn name_blocks(&mut self, id: SeqId, tokens: Range<u32>) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        // One that has lost its blocks meanwhile has none to name.
        if !self.config.prefix_cache || !sequence.admitted {
            return;
        }
        let block_tokens = self.config.kv_block_tokens;
        let names = sequence.names.of(&sequence.token_ids, &sequence.media, block_tokens);
        let filled = (tokens.start / block_tokens) as usize..(tokens.end / block_tokens) as usize;
        for (block, name) in sequence.block_table[filled.clone()].iter().zip(&names[filled]) {
            self.kv.name(*block, *name);
        }
    }
}

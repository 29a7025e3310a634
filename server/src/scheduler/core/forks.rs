//! Several answers to one prompt: the first computes it, the others begin with its blocks.

use std::collections::BTreeMap;

use super::Scheduler;
use crate::scheduler::{
    plan::{BlockCopy, StepPlan},
    sequence::{Order, Sequence},
    types::{BlockId, Medium, Millis, NewSequence, SeqId},
};

/// Forks: sequences that wait for another one, their leader, to compute the prompt that they share with it.
///
/// When the leader has drawn its first token, the blocks of its prompt, and the features of its media, are kept until all
/// its forks have begun, whatever becomes of it meanwhile. A fork that begins shares the full ones of these blocks, gets a copy
/// of the last one, and computes the prompt's last token again, to draw its own first token after it. From then on it is a
/// sequence like any other. A leader that leaves before its prompt is computed is followed by the first of its forks.
#[derive(Debug, Default)]
pub(super) struct Forks {
    /// Forks that have not begun, in their order, by leader. No list is empty.
    waiting: BTreeMap<SeqId, Vec<Order>>,
    /// Computed prompts of leaders in `waiting`.
    prompts: BTreeMap<SeqId, SharedPrompt>,
    /// Prompts that nobody waits for any more. The step in flight may still copy from their blocks.
    retired: Vec<SharedPrompt>,
}

/// A computed prompt, but for its last token.
#[derive(Debug)]
pub(super) struct SharedPrompt {
    pub num_tokens: u32,
    /// As many as these tokens need.
    blocks: Vec<BlockId>,
    media: Vec<Medium>,
}

impl SharedPrompt {
    /// Blocks that are full, which are shared as they are.
    pub fn full_blocks(&self, block_tokens: u32) -> u32 {
        self.num_tokens / block_tokens
    }
}

impl Forks {
    /// Whether a sequence would have to wait for its leader.
    pub fn must_wait(&self, sequence: &Sequence) -> bool {
        sequence.leader.is_some_and(|leader| !self.prompts.contains_key(&leader))
    }

    /// The computed prompt that a sequence can begin with.
    pub fn prompt_of(&self, sequence: &Sequence) -> Option<&SharedPrompt> {
        self.prompts.get(&sequence.leader?)
    }

    /// Takes a fork out of the list of its leader, and lets the prompt go with the last one.
    fn remove(&mut self, leader: SeqId, fork: Order) {
        let waiting = self.waiting.get_mut(&leader).expect("a leader has its forks in a list");
        waiting.retain(|order| *order != fork);
        if waiting.is_empty() {
            self.waiting.remove(&leader);
            self.retired.extend(self.prompts.remove(&leader));
        }
    }
}

impl Scheduler {
    /// Puts a new sequence and its forks into the queue.
    pub(super) fn enqueue(&mut self, now: Millis, new: NewSequence) {
        let (leader, capacity_tokens) = (new.id, self.config.capacity_tokens());
        let forks = new.forks.iter().zip(1..).map(|(&id, nth)| {
            let mut fork = NewSequence { id, forks: vec![], ..new.clone() };
            fork.sampling.branch += nth;
            fork
        });
        let forks: Vec<NewSequence> = forks.collect();
        let mut orders = vec![];
        for new in std::iter::once(new).chain(forks) {
            let mut sequence = Sequence::new(new, now, self.next_arrival, capacity_tokens);
            self.next_arrival += 1;
            self.waiting.insert(sequence.order);
            if sequence.order.id != leader {
                sequence.leader = Some(leader);
                orders.push(sequence.order);
            }
            self.sequences.insert(sequence.order.id, sequence);
        }
        if !orders.is_empty() {
            self.forks.waiting.insert(leader, orders);
        }
    }

    /// Keeps the prompt of a sequence that has just drawn a token for the forks that wait for it, if any do.
    pub(super) fn keep_prompt(&mut self, leader: SeqId) {
        if !self.forks.waiting.contains_key(&leader) || self.forks.prompts.contains_key(&leader) {
            return;
        }
        let sequence = &self.sequences[&leader];
        if sequence.num_computed_tokens < sequence.num_prompt_tokens {
            // The next plan has its blocks already, and a later one computes the prompt again.
            return;
        }
        let num_tokens = sequence.num_prompt_tokens - 1;
        let num_blocks = num_tokens.div_ceil(self.config.kv_block_tokens);
        let blocks = sequence.block_table[..num_blocks as usize].to_vec();
        let media = sequence.reserved.clone();
        self.kv.share(&blocks);
        let reserved = self.features.reserve(&media, &mut vec![]);
        assert!(reserved, "the leader holds the features of its media");
        self.forks.prompts.insert(leader, SharedPrompt { num_tokens, blocks, media });
    }

    /// Sees to the forks of a sequence that is gone, or that was a fork itself.
    pub(super) fn leave_forks(&mut self, gone: &Sequence) {
        if let Some(leader) = gone.leader {
            self.forks.remove(leader, gone.order);
        }
        if !self.forks.prompts.contains_key(&gone.order.id) {
            self.follow(gone.order.id);
        }
    }

    /// Lets the first fork compute the prompt itself, and the others wait for it.
    fn follow(&mut self, leader: SeqId) {
        let Some(mut waiting) = self.forks.waiting.remove(&leader) else { return };
        let first = waiting.remove(0).id;
        for (id, leader) in
            std::iter::once((first, None)).chain(waiting.iter().map(|fork| (fork.id, Some(first))))
        {
            self.sequences.get_mut(&id).expect("a waiting fork exists").leader = leader;
        }
        if !waiting.is_empty() {
            self.forks.waiting.insert(first, waiting);
        }
    }

    /// Gives up a prompt that is kept for forks: one that frees blocks if there is one, and otherwise any, since several may hold the
    /// same. Whether there was one.
    pub(super) fn give_up_any_prompt(&mut self) -> bool {
        if self.give_up_prompt() {
            return true;
        }
        let Some((leader, prompt)) = self.forks.prompts.pop_last() else { return false };
        self.release_prompt(prompt);
        self.follow(leader);
        true
    }

    /// Gives up a prompt that is kept for forks, the last one of which nobody else holds all blocks. Whether there was one.
    pub(super) fn give_up_prompt(&mut self) -> bool {
        let is_held = |block: &BlockId| self.kv.num_holders(*block) > 1;
        let frees = |prompt: &SharedPrompt| prompt.blocks.is_empty() || !prompt.blocks.iter().all(is_held);
        let last = self.forks.prompts.iter().rev().find(|(_, prompt)| frees(prompt));
        let Some((&leader, _)) = last else { return false };
        let prompt = self.forks.prompts.remove(&leader).expect("it was found just now");
        self.release_prompt(prompt);
        self.follow(leader);
        true
    }

    /// Forgets all prompts that are kept. Forks wait until their leader has computed the prompt again; where it is gone, the first
    /// of them does.
    pub(super) fn forget_prompts(&mut self) {
        self.forks.retired.clear();
        for leader in std::mem::take(&mut self.forks.prompts).into_keys() {
            if !self.sequences.contains_key(&leader) {
                self.follow(leader);
            }
        }
    }

    /// Frees what was kept for forks that have all begun or gone by the last step.
    pub(super) fn release_retired(&mut self) {
        for prompt in std::mem::take(&mut self.forks.retired) {
            self.release_prompt(prompt);
        }
    }

    fn release_prompt(&mut self, prompt: SharedPrompt) {
        self.kv.release(prompt.blocks);
        let mut evictions = vec![];
        self.features.release(&prompt.media, &mut evictions);
        assert!(evictions.is_empty(), "the media of a prompt that was computed are encoded");
    }

    /// Gives a fork that begins the blocks of its prompt, for which there is room: full ones to share, and a copy of the last.
    pub(super) fn begin_fork(&mut self, fork: Order, plan: &mut StepPlan) {
        let sequence = self.sequences.get_mut(&fork.id).expect("a waiting sequence exists");
        let leader = sequence.leader.take().expect("a fork has a leader until it begins");
        let prompt = &self.forks.prompts[&leader];
        let (full, rest) = prompt.blocks.split_at(prompt.full_blocks(self.config.kv_block_tokens) as usize);
        self.kv.share(full);
        sequence.block_table = full.to_vec();
        if let [source] = *rest {
            let target = self.kv.allocate(1).expect("the caller counted the free blocks")[0];
            plan.copies.push(BlockCopy { source, target });
            sequence.block_table.push(target);
        }
        sequence.num_computed_tokens = prompt.num_tokens;
        self.forks.remove(leader, fork);
    }
}

#[cfg(test)]
impl Scheduler {
    /// Blocks that are kept for forks, as often as they are. Panics unless leaders and forks know each other.
    pub(super) fn check_forks(&self) -> Vec<BlockId> {
        for (leader, forks) in &self.forks.waiting {
            let kept = self.forks.prompts.contains_key(leader);
            assert!(kept || self.sequences.contains_key(leader), "forks wait for a sequence that is gone");
            assert!(!forks.is_empty() && forks.is_sorted());
            for fork in forks {
                assert_eq!(self.sequences[&fork.id].leader, Some(*leader));
                assert!(self.waiting.contains(fork), "a fork that has begun waits for its leader");
            }
        }
        let listed: usize = self.forks.waiting.values().map(Vec::len).sum();
        assert_eq!(listed, self.sequences.values().filter(|sequence| sequence.leader.is_some()).count());
        assert!(self.forks.prompts.keys().all(|leader| self.forks.waiting.contains_key(leader)));
        let kept = self.forks.prompts.values().chain(&self.forks.retired);
        kept.flat_map(|prompt| prompt.blocks.clone()).collect()
    }
}

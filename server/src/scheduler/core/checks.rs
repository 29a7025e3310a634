//! What must hold of a scheduler at any time.

use std::collections::BTreeMap;

use super::Scheduler;

impl Scheduler {
    /// Panics unless every block has as many holders as there are tables and kept prompts that it is in, and every sequence
    /// is in exactly one queue.
    pub(in crate::scheduler) fn check_conservation(&self) {
        let mut seen: BTreeMap<_, u32> = BTreeMap::new();
        let tables = self.sequences.values().chain(&self.leaving).flat_map(|sequence| &sequence.block_table);
        for block in tables.copied().chain(self.check_forks()) {
            *seen.entry(block).or_default() += 1;
        }
        for (block, holders) in &seen {
            assert_eq!(self.kv.num_holders(*block), *holders, "holders of block {}", block.0);
        }
        assert_eq!(seen.len() as u32, self.kv.num_held());
        assert_eq!(self.kv.num_free() + self.kv.num_held(), self.kv.total());
        self.features.check();
        self.kv.check();
        for (id, sequence) in &self.sequences {
            let runs = self.running.contains(&sequence.order);
            assert!(
                runs != self.waiting.contains(&sequence.order),
                "sequence {id} is in no queue, or in two"
            );
            assert!(runs || sequence.block_table.is_empty(), "sequence {id} waits with blocks");
            assert_eq!(runs, sequence.admitted, "sequence {id} is where the shards do not know it");
        }
        assert_eq!(self.sequences.len(), self.running.len() + self.waiting.len());
        assert!(self.running.len() as u32 <= self.config.max_step_sequences);
        let most = self.config.max_waiting + self.config.max_step_sequences;
        assert!(self.sequences.len() as u32 <= most, "the queue is not bounded");
    }
}

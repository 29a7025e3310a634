//! What the steps of a shard were made of. `src/bin/watched-shard.rs` counts it and writes it to a file, so that a test of what a
//! scheduler may do can tell that it did it.

use std::path::Path;

use anyhow::Context;
use lockstep_shard::runner::Step;
use serde::{Deserialize, Serialize};

/// The variable with the file's name, which a server hands on to its shards.
pub const FILE: &str = "LOCKSTEP_WATCHED";

/// Counts over all steps of a group. They only grow, and so does what is written of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Watched {
    /// Steps.
    pub steps: u64,
    /// Sequences that entered again with tokens that they had drawn: they had lost their blocks, or their group.
    pub returned: u64,
    /// Sequences that entered with blocks that another one computed.
    pub shared_prompts: u64,
    /// Chunks that did not reach the end of what was known of their sequence.
    pub partial_chunks: u64,
    /// The most sequences in one step.
    pub most_sequences: u64,
    /// Media that were encoded.
    pub media: u64,
    /// Pieces of encoding that went on with a medium.
    pub resumed: u64,
    /// Media that were no longer kept.
    pub evictions: u64,
}

impl Watched {
    /// Counts a step.
    pub fn note(&mut self, step: &Step) {
        let count = |items: usize| items as u64;
        self.steps += 1;
        let returned = step
            .admissions
            .iter()
            .filter(|admission| admission.token_ids.len() > admission.num_prompt_tokens);
        self.returned += count(returned.count());
        self.shared_prompts +=
            count(step.admissions.iter().filter(|admission| admission.num_computed_tokens > 0).count());
        self.partial_chunks += count(step.chunks.iter().filter(|chunk| chunk.max_new_tokens == 0).count());
        self.most_sequences = self.most_sequences.max(count(step.chunks.len()));
        self.media += count(step.encodes.iter().filter(|encode| encode.from == 0).count());
        self.resumed += count(step.encodes.iter().filter(|encode| encode.from > 0).count());
        self.evictions += count(step.evictions.len());
    }

    /// Adds those of another group.
    pub fn add(&mut self, other: &Watched) {
        self.steps += other.steps;
        self.returned += other.returned;
        self.shared_prompts += other.shared_prompts;
        self.partial_chunks += other.partial_chunks;
        self.most_sequences = self.most_sequences.max(other.most_sequences);
        self.media += other.media;
        self.resumed += other.resumed;
        self.evictions += other.evictions;
    }

    /// Those of a group that has ended.
    ///
    /// # Errors
    /// When it has written nothing.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Ok(serde_json::from_str(&text)?)
    }
}

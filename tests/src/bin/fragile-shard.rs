//! A shard that panics whenever it is about to reach the end of a prompt of LOCKSTEP_TOO_LONG tokens or more, each time anew.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use lockstep_shard::runner::step::{Chunk, SeqId};
use lockstep_shard::runner::{Step, StepError, StepResult};
use lockstep_shard::service::load::load;
use lockstep_shard::service::worker::{LoadError, Rank};
use lockstep_tests::{number, shard};

fn main() -> anyhow::Result<()> {
    let too_long = number("LOCKSTEP_TOO_LONG", u64::MAX)? as usize;
    shard::main(Arc::new(move |options, gate, tell| {
        let mut loaded = load(options, gate, tell)?;
        loaded.rank = Box::new(Fragile { rank: loaded.rank, too_long, ends: HashMap::new() });
        Ok(loaded)
    }))
}

struct Fragile {
    rank: Box<dyn Rank>,
    too_long: usize,
    /// Where prompts end that are too long.
    ends: HashMap<SeqId, usize>,
}

impl Rank for Fragile {
    fn run(&mut self, step: Step) -> Result<StepResult, StepError> {
        let prompts = step.admissions.iter().map(|admission| (admission.id, admission.num_prompt_tokens));
        self.ends.extend(prompts.filter(|(_, length)| *length >= self.too_long));
        let ends = |chunk: &Chunk| self.ends.get(&chunk.id) == Some(&(chunk.start + chunk.length));
        assert!(!step.chunks.iter().any(ends), "a prompt that is too long");
        self.rank.run(step)
    }

    fn regroup(&mut self, epoch: u64, collective_path: &Path) -> Result<(), LoadError> {
        self.ends.clear();
        self.rank.regroup(epoch, collective_path)
    }
}

//! A shard that writes what its steps are made of to the file that LOCKSTEP_WATCHED names, if it is rank 0: [`Watched`].

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use lockstep_shard::runner::{Step, StepError, StepResult};
use lockstep_shard::service::load::load;
use lockstep_shard::service::worker::{LoadError, Rank};
use lockstep_tests::shard;
use lockstep_tests::watched::{FILE, Watched};

fn main() -> anyhow::Result<()> {
    shard::main(Arc::new(|options, gate, tell| {
        let mut loaded = load(options, gate, tell)?;
        if options.rank == 0 {
            let watching = Watching::new(loaded.rank);
            loaded.rank = Box::new(watching.map_err(|error| LoadError::Unsupported(error.to_string()))?);
        }
        Ok(loaded)
    }))
}

struct Watching {
    rank: Box<dyn Rank>,
    watched: Watched,
    file: File,
}

impl Watching {
    fn new(rank: Box<dyn Rank>) -> anyhow::Result<Self> {
        let path = std::env::var(FILE)?;
        // A rank that is started again goes on counting.
        let watched = Watched::read(Path::new(&path)).unwrap_or_default();
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        Ok(Self { rank, watched, file })
    }
}

impl Rank for Watching {
    fn run(&mut self, step: Step) -> Result<StepResult, StepError> {
        self.watched.note(&step);
        // What is written never gets shorter, so that it may be written over itself. A file that cannot be written is found by
        // whoever reads it.
        let _ = serde_json::to_vec(&self.watched).map(|text| self.file.write_all_at(&text, 0));
        self.rank.run(step)
    }

    fn regroup(&mut self, epoch: u64, collective_path: &Path) -> Result<(), LoadError> {
        self.rank.regroup(epoch, collective_path)
    }
}

//! A shard that writes what its steps are made of to the file that LOCKSTEP_WATCHED names, if it is rank 0: [`Watched`].

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use lockstep_shard::runner::Step;
use lockstep_shard::service::load::load;
use lockstep_shard::service::options::LoadOptions;
use lockstep_shard::service::worker::{LoadError, LoadEvent, Loaded, RunStep};
use lockstep_tests::shard;
use lockstep_tests::watched::{FILE, Watched};

fn main() -> anyhow::Result<()> {
    shard::main(Arc::new(|options: &LoadOptions, tell: &mut dyn FnMut(LoadEvent)| {
        let mut loaded = load(options, tell)?;
        if options.rank == 0 {
            loaded.run = watching(loaded.run).map_err(|error| LoadError::Unsupported(error.to_string()))?;
        }
        Ok::<Loaded, LoadError>(loaded)
    }))
}

fn watching(mut run: RunStep) -> anyhow::Result<RunStep> {
    let file = File::create(std::env::var(FILE)?)?;
    let mut watched = Watched::default();
    Ok(Box::new(move |step: Step| {
        watched.note(&step);
        // What is written never gets shorter, so that it may be written over itself. A file that cannot be written is found by
        // whoever reads it.
        let _ = serde_json::to_vec(&watched).map(|text| file.write_all_at(&text, 0));
        run(step)
    }))
}

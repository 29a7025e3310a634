//! A shard that answers at once: it describes the checkpoint's model, and draws tokens without computing anything. What is left of
//! a step is the server's.

#![forbid(unsafe_code)]

use std::sync::Arc;

use lockstep_shard::runner::step::{Sampled, SampledToken};
use lockstep_shard::runner::{MediaStore, Step, StepResult};
use lockstep_shard::service::load::load;
use lockstep_shard::service::options::LoadOptions;
use lockstep_shard::service::worker::{LoadError, LoadEvent, Loaded, RunStep};
use lockstep_tests::shard;

fn main() -> anyhow::Result<()> {
    shard::main(Arc::new(|options: &LoadOptions, tell: &mut dyn FnMut(LoadEvent)| {
        let mut loaded = load(options, tell)?;
        loaded.run = instant(loaded.media.clone());
        Ok::<Loaded, LoadError>(loaded)
    }))
}

fn instant(media: Arc<MediaStore>) -> RunStep {
    Box::new(move |step: Step| {
        for encode in &step.encodes {
            media.discard(&encode.hash);
        }
        let drawing = step.chunks.iter().filter(|chunk| chunk.max_new_tokens > 0);
        let sampled = drawing.map(|chunk| {
            // Bytes in the vocabulary of the checkpoints, which are neither control tokens nor ends.
            let token_id = (chunk.id.0.wrapping_mul(31) + (chunk.start + chunk.length) as u64 * 7) % 256;
            let token = SampledToken { token_id: token_id as u32, logprob: None, top: Vec::new() };
            Sampled { id: chunk.id, tokens: vec![token], failure: None }
        });
        Ok(StepResult { state_hash: 0, sampled: sampled.collect(), vision_us: 0, step_us: 0 })
    })
}

//! One step on one rank: the state says what to compute, the model computes it, the state takes what was drawn.

use std::{sync::Arc, time::Instant};

use super::{
    media::MediaStore,
    state::{Limits, State, StepBatch},
    step::{
        Chunk, DrawFailure, Encode, Fault, InField, Sampled, SampledToken, SeqId, Step, StepError, StepResult,
    },
};
use crate::{
    device::{Activations, Device, Result as DeviceResult},
    model::{Drawn, Model},
};

/// A loaded model with its caches, and what it remembers between steps.
pub struct Runner<D: Device> {
    parts: Parts<D>,
    state: State,
    media: Arc<MediaStore>,
    /// Pixels of the medium in work. Its memory is kept for the next one.
    pixels: Vec<u8>,
}

/// What a runner is made of.
pub struct Parts<D: Device> {
    /// The device.
    pub device: D,
    /// The model's slices.
    pub model: Model<D>,
    /// Keys and values, of [`Limits::kv_blocks`] blocks.
    pub kv_cache: D::KvCache,
    /// Vision features, of [`Limits::feature_blocks`] blocks.
    pub features: D::Features,
}

impl<D: Device> Runner<D> {
    /// A runner without sequences. `pixels` is a buffer for the pixels of one medium.
    pub fn new(parts: Parts<D>, limits: Limits, media: Arc<MediaStore>, pixels: Vec<u8>) -> Self {
        Self { parts, state: State::new(limits), media, pixels }
    }

    /// Runs a step.
    ///
    /// # Errors
    /// The step is wrong, or the device or another rank failed. The runner is then of no more use: part of the step may
    /// be done.
    pub fn run(&mut self, step: Step) -> Result<StepResult, StepError> {
        let started = Instant::now();
        self.state.forget(&step, |hash| self.media.discard(hash))?;
        let Step { admissions, encodes, copies, chunks, .. } = step;
        self.state.admit(admissions)?;
        let encoding = Instant::now();
        for (i, encode) in encodes.into_iter().enumerate() {
            self.encode(i, encode)?;
        }
        let vision_us = micros(encoding);
        self.state.copy(&copies)?;
        if !copies.is_empty() {
            self.parts.device.copy_blocks(&mut self.parts.kv_cache, &copies)?;
        }
        let (hidden_hash, sampled) = self.compute(&chunks)?;
        let state_hash = state_hash(hidden_hash, &sampled, self.state.lengths());
        Ok(StepResult { state_hash, sampled, vision_us, step_us: micros(started) })
    }

    /// Turns the waiting pixels of a medium into features.
    fn encode(&mut self, index: usize, encode: Encode) -> Result<(), StepError> {
        let hash = encode.hash;
        self.state.check_not_encoded(hash).in_field(|| format!("encodes[{index}].hash"))?;
        let grid = self.media.grid(&hash).filter(|_| self.media.take(&hash, &mut self.pixels));
        let grid = grid.ok_or(Fault::UnknownMedium(hash)).in_field(|| format!("encodes[{index}].hash"))?;
        let slots = self.state.begin_encode(index, encode, grid, self.pixels.len())?;
        let Parts { device, model, features, .. } = &mut self.parts;
        model.encode(device, &self.pixels, grid.to_array().map(|n| n as usize), features, &slots)?;
        Ok(())
    }

    /// Computes the rows of all chunks and draws what they ask for: a hash of their last rows, and the tokens.
    fn compute(&mut self, chunks: &[Chunk]) -> Result<(u64, Vec<Sampled>), StepError> {
        let StepBatch { batch, draws } = self.state.batch(chunks)?;
        if chunks.is_empty() {
            return Ok((0, Vec::new()));
        }
        let Parts { device, model, kv_cache, features } = &mut self.parts;
        let hidden = model.forward(device, &batch, kv_cache, features)?;
        let hash = device.hash(&hidden)?;
        let ids: Vec<SeqId> = draws.iter().map(|chunk| chunks[*chunk].id).collect();
        let drawn = self.draw(hidden, &draws, &ids)?;
        self.state.commit(chunks);
        let sampled = ids.into_iter().zip(drawn).map(|(id, drawn)| {
            let Some(Drawn { token_id, logprob, top }) = drawn else {
                return Sampled { id, tokens: Vec::new(), failure: Some(DrawFailure::LogitsNotFinite) };
            };
            self.state.push(id, token_id);
            Sampled { id, tokens: vec![SampledToken { token_id, logprob, top }], failure: None }
        });
        Ok((hash, sampled.collect()))
    }

    /// Draws a token after each of the rows `draws` of `hidden`, for the sequences `ids`; none where logits are not finite.
    fn draw(&self, hidden: D::Tensor, draws: &[usize], ids: &[SeqId]) -> DeviceResult<Vec<Option<Drawn>>> {
        if draws.is_empty() {
            return Ok(Vec::new());
        }
        let Parts { device, model, .. } = &self.parts;
        let hidden = if draws.len() == hidden.rows() {
            hidden
        } else {
            let rows: Vec<u32> = draws.iter().map(|row| *row as u32).collect();
            device.gather_rows(&hidden, &rows)?
        };
        let rows: Vec<_> = ids.iter().map(|id| self.state.row_sampling(*id)).collect();
        model.sample(device, &hidden, &rows)
    }
}

fn micros(since: Instant) -> u64 {
    since.elapsed().as_micros() as u64
}

/// Hash of what all ranks must agree on after a step.
fn state_hash(hidden: u64, sampled: &[Sampled], lengths: impl Iterator<Item = [u64; 3]>) -> u64 {
    let mut hash = blake3::Hasher::new();
    hash.update(&hidden.to_le_bytes());
    for Sampled { id, tokens, failure } in sampled {
        hash.update(&id.0.to_le_bytes());
        hash.update(&[u8::from(failure.is_some())]);
        for token in tokens {
            hash.update(&token.token_id.to_le_bytes());
        }
    }
    for number in lengths.flatten() {
        hash.update(&number.to_le_bytes());
    }
    let mut first = [0; 8];
    hash.finalize_xof().fill(&mut first);
    u64::from_le_bytes(first)
}

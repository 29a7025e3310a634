//! One step on one rank: the state says what to compute, the model computes it, the state takes what was drawn.

use std::{sync::Arc, time::Instant};

use super::{
    media::MediaStore,
    state::{EncodePiece, Limits, State, StepBatch},
    step::{Chunk, DrawFailure, Encode, Sampled, SampledToken, SeqId, Step, StepError, StepResult},
};
use crate::{
    device::{Activations, Device, DeviceError, Result as DeviceResult},
    model::{Drawn, FramePiece, Model, VisionFrame, stages::by_frame, windows::WindowOrder},
};

/// A loaded model with its caches, and what it remembers between steps.
pub struct Runner<D: Device> {
    parts: Parts<D>,
    state: State,
    media: Arc<MediaStore>,
    limits: Limits,
    /// Pixels of the temporal patch in work. Their memory is kept for the next one.
    pixels: Vec<u8>,
    /// The order of the temporal patches of the medium in work.
    order: WindowOrder,
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
    /// The temporal patch in work, of up to [`Limits::max_frame_patches`] patches.
    pub frame: VisionFrame<D>,
}

impl<D: Device> Runner<D> {
    /// A runner without sequences. `pixels` is a buffer for the pixels of one temporal patch.
    pub fn new(parts: Parts<D>, limits: Limits, media: Arc<MediaStore>, pixels: Vec<u8>) -> Self {
        let order = parts.model.window_order([0, 0]);
        Self { parts, state: State::new(limits), media, limits, pixels, order }
    }

    /// Runs a step.
    ///
    /// # Errors
    /// The step is wrong, or the device or another rank failed. The runner is then of no more use until it has forgotten
    /// everything: part of the step may be done.
    pub fn run(&mut self, step: Step) -> Result<StepResult, StepError> {
        let started = Instant::now();
        self.state.forget(&step, |hash| self.media.discard(hash))?;
        let Step { admissions, encodes, copies, chunks, .. } = step;
        self.state.admit(admissions)?;
        let encoding = Instant::now();
        let mut hash = 0_u64;
        for (i, encode) in encodes.into_iter().enumerate() {
            hash = hash.rotate_left(1) ^ self.encode(i, encode)?;
        }
        let vision_us = micros(encoding);
        self.state.copy(&copies)?;
        if !copies.is_empty() {
            self.parts.device.copy_blocks(&mut self.parts.kv_cache, &copies)?;
        }
        let (hidden_hash, sampled) = self.compute(&chunks)?;
        let state_hash = state_hash([hash, hidden_hash], &sampled, self.state.lengths());
        Ok(StepResult { state_hash, sampled, vision_us, step_us: micros(started) })
    }

    /// Forgets sequences, blocks, features and pixels, and takes pixels of `epoch`. Weights stay, and all memory: what caches hold
    /// now is nobody's.
    pub fn forget(&mut self, epoch: u64) {
        self.state = State::new(self.limits);
        self.media.clear(epoch);
    }

    /// The device.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.parts.device
    }

    /// Does a piece of turning the waiting pixels of a medium into features. Returns a hash of what it made.
    fn encode(&mut self, index: usize, encode: Encode) -> Result<u64, StepError> {
        let mut hash = 0_u64;
        let waiting = self.media.shape(&encode.hash);
        let piece = self.state.encode(index, encode, waiting)?;
        let grid = [piece.grid.h as usize, piece.grid.w as usize];
        if piece.work.start == 0 {
            self.order = self.parts.model.window_order(grid);
        }
        let frame_units = piece.frame_tokens as u64 * self.limits.vision_stages as u64;
        for (t, work) in by_frame(piece.work.clone(), frame_units) {
            if work.start == 0 {
                self.read_pixels(&piece, t)?;
            }
            let slots = self.state.frame_slots(&piece, t);
            let piece = FramePiece { pixels: &self.pixels, grid, order: &self.order, work, slots: &slots };
            let Parts { device, model, features, frame, .. } = &mut self.parts;
            hash = hash.rotate_left(1) ^ model.encode(device, frame, &piece, features)?;
        }
        if piece.is_last {
            self.media.discard(&piece.hash);
        }
        Ok(hash)
    }

    /// Reads the frames of temporal patch `t`. Where the last one lacks a frame, the device repeats the frame before.
    fn read_pixels(&mut self, piece: &EncodePiece, t: usize) -> Result<(), StepError> {
        let Limits { patch_size, temporal_patch_size, .. } = self.limits;
        let frame_bytes = piece.grid.h as usize * piece.grid.w as usize * patch_size * patch_size * 3;
        let first = t * temporal_patch_size * frame_bytes;
        let end = (first + temporal_patch_size * frame_bytes).min(piece.num_bytes);
        self.media.read(&piece.hash, first..end, &mut self.pixels).map_err(|error| {
            DeviceError::Failed(format!("cannot read the pixels of medium {}: {error}", piece.hash)).into()
        })
    }

    /// Computes the rows of all chunks and draws what they ask for: a hash of all rows, and the tokens.
    fn compute(&mut self, chunks: &[Chunk]) -> Result<(u64, Vec<Sampled>), StepError> {
        let StepBatch { batch, draws } = self.state.batch(chunks)?;
        if chunks.is_empty() {
            return Ok((0, Vec::new()));
        }
        let Parts { device, model, kv_cache, features, .. } = &mut self.parts;
        let (hidden, hash) = model.forward(device, &batch, kv_cache, features)?;
        let ids: Vec<SeqId> = draws.iter().map(|chunk| chunks[*chunk].id).collect();
        let drawn = self.draw(hidden, &draws, &ids)?;
        self.state.commit(chunks);
        let sampled = ids.into_iter().zip(drawn).map(|(id, drawn)| {
            let Some(Drawn { token_id, logprob, top }) = drawn else {
                // A step on its way may go on from this token, before the sequence is released.
                self.state.push(id, 0);
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
fn state_hash(computed: [u64; 2], sampled: &[Sampled], lengths: impl Iterator<Item = [u64; 3]>) -> u64 {
    let mut hash = blake3::Hasher::new();
    for computed in computed {
        hash.update(&computed.to_le_bytes());
    }
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

//! One step on one rank: the state says what to compute, the model computes it, the state takes what was drawn.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use super::{
    media::MediaStore,
    state::{EncodePiece, Limits, State, StepBatch},
    step::{Chunk, DrawFailure, Encode, Sampled, SampledToken, SeqId, Step, StepError, StepResult},
};
use crate::{
    device::{Activations, Device, DeviceError, Result as DeviceResult, RowSampling},
    layers::Drawing,
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
    /// The step that was begun and is not told yet. While one is being told, the next is under way too.
    under_way: VecDeque<UnderWay<D>>,
}

/// A step whose result is not told yet.
struct UnderWay<D: Device> {
    started: Instant,
    vision_us: u64,
    /// Hash of what vision encoding made.
    encoded: u64,
    /// None of a step without rows.
    computed: Option<Computed<D>>,
    /// The lengths of all sequences after the step, where the next one has begun since and waits for its tokens.
    awaited: Option<Vec<[u64; 3]>>,
}

/// What becomes of the rows of a step.
struct Computed<D: Device> {
    /// Of all rows.
    hash: D::Hash,
    /// The sequences that draw.
    ids: Vec<SeqId>,
    /// None where nothing is drawn.
    drawing: Option<Drawing<D>>,
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
        Self { parts, state: State::new(limits), media, limits, pixels, order, under_way: VecDeque::new() }
    }

    /// Runs a step.
    ///
    /// # Errors
    /// The step is wrong, or the device or another rank failed. The runner is then of no more use until it has forgotten
    /// everything: part of the step may be done.
    pub fn run(&mut self, step: Step) -> Result<StepResult, StepError> {
        self.begin(step)?;
        self.finish()
    }

    /// Whether a step can be begun while the one before is under way: one that only goes on, from tokens that the device can take
    /// before they are told.
    pub fn may_begin(&self, step: &Step) -> bool {
        let Some(before) = self.under_way.back() else { return true };
        let Step { releases, evictions, admissions, encodes, copies, chunks } = step;
        let only_goes_on = releases.is_empty()
            && evictions.is_empty()
            && admissions.is_empty()
            && encodes.is_empty()
            && copies.is_empty();
        let Some(Computed { drawing: Some(drawing), ids, .. }) = &before.computed else { return false };
        only_goes_on
            && drawing.feeds(&self.parts.device)
            && ids.iter().all(|id| self.state.draws_plainly(*id))
            && chunks.iter().all(|chunk| !ids.contains(&chunk.id) || chunk.length == 1)
    }

    /// Begins a step. If one is under way, [`Runner::may_begin`] has to allow it.
    ///
    /// # Errors
    /// As of [`Runner::run`].
    pub fn begin(&mut self, step: Step) -> Result<(), StepError> {
        let started = Instant::now();
        assert!(self.under_way.len() < 2, "a step is told before the next but one is begun");
        let before = self.await_tokens();
        self.state.forget(&step, |hash| self.media.discard(hash))?;
        let Step { admissions, encodes, copies, chunks, .. } = step;
        self.state.admit(admissions)?;
        let encoding = Instant::now();
        let mut encoded = 0_u64;
        for (i, encode) in encodes.into_iter().enumerate() {
            encoded = encoded.rotate_left(1) ^ self.encode(i, encode)?;
        }
        let vision_us = micros(encoding);
        self.state.copy(&copies)?;
        if !copies.is_empty() {
            self.parts.device.copy_blocks(&mut self.parts.kv_cache, &copies)?;
        }
        let computed = self.compute(&chunks, &before)?;
        self.under_way.push_back(UnderWay { started, vision_us, encoded, computed, awaited: None });
        Ok(())
    }

    /// Whether the result of the step that was begun first can be told without waiting for this rank's device.
    ///
    /// # Errors
    /// The device or another rank failed.
    pub fn has_finished(&self) -> Result<bool, StepError> {
        let computed = self.under_way.front().and_then(|step| step.computed.as_ref());
        match computed.and_then(|computed| computed.drawing.as_ref()) {
            Some(drawing) => Ok(drawing.has_come(&self.parts.device)?),
            None => Ok(true),
        }
    }

    /// The result of the step that was begun first.
    ///
    /// # Errors
    /// As of [`Runner::run`].
    ///
    /// # Panics
    /// None is under way.
    pub fn finish(&mut self) -> Result<StepResult, StepError> {
        let UnderWay { started, vision_us, encoded, computed, awaited } =
            self.under_way.pop_front().expect("a step is under way");
        let (mut hidden_hash, mut sampled) = (0, Vec::new());
        if let Some(Computed { hash, ids, drawing }) = computed {
            let drawn = match drawing {
                Some(drawing) => self.drawn(drawing, &ids, awaited.is_some())?,
                None => Vec::new(),
            };
            hidden_hash = self.parts.device.read_hash(hash)?;
            sampled = self.take(&ids, drawn, awaited.is_some());
        }
        let lengths = awaited.unwrap_or_else(|| self.state.lengths().collect());
        let state_hash = state_hash([encoded, hidden_hash], &sampled, &lengths);
        Ok(StepResult { state_hash, sampled, vision_us, step_us: micros(started) })
    }

    /// Forgets sequences, blocks, features and pixels, and takes pixels of `epoch`. Weights stay, and all memory: what caches hold
    /// now is nobody's.
    pub fn forget(&mut self, epoch: u64) {
        self.state = State::new(self.limits);
        self.under_way.clear();
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

    /// Has the sequences that the step under way draws for go on as if their tokens were there. Returns these sequences, in the
    /// order of the candidates.
    fn await_tokens(&mut self) -> Vec<SeqId> {
        let Some(before) = self.under_way.back_mut() else { return Vec::new() };
        let ids = before.computed.as_ref().map_or(Vec::new(), |computed| computed.ids.clone());
        ids.iter().for_each(|id| self.state.await_token(*id));
        before.awaited = Some(self.state.lengths().collect());
        ids
    }

    /// Computes the rows of all chunks and begins to draw what they ask for. The tokens of sequences `before` are those that are
    /// drawn just now.
    fn compute(&mut self, chunks: &[Chunk], before: &[SeqId]) -> Result<Option<Computed<D>>, StepError> {
        let StepBatch { mut batch, draws } = self.state.batch(chunks)?;
        if chunks.is_empty() {
            return Ok(None);
        }
        for (sequence, chunk) in batch.sequences.iter().zip(chunks) {
            if let Some(candidate) = before.iter().position(|id| *id == chunk.id) {
                batch.drawn.push((sequence.rows.start as u32, candidate as u32));
            }
        }
        let Parts { device, model, kv_cache, features, .. } = &mut self.parts;
        let (hidden, hash) = model.forward(device, &batch, kv_cache, features)?;
        let ids: Vec<SeqId> = draws.iter().map(|chunk| chunks[*chunk].id).collect();
        let drawing = self.draw(hidden, &draws, &ids)?;
        self.state.commit(chunks);
        Ok(Some(Computed { hash, ids, drawing }))
    }

    /// Begins to draw a token after each of the rows `draws` of `hidden`, for the sequences `ids`.
    fn draw(&self, hidden: D::Tensor, draws: &[usize], ids: &[SeqId]) -> DeviceResult<Option<Drawing<D>>> {
        if draws.is_empty() {
            return Ok(None);
        }
        let Parts { device, model, .. } = &self.parts;
        let hidden = if draws.len() == hidden.rows() {
            hidden
        } else {
            let rows: Vec<u32> = draws.iter().map(|row| *row as u32).collect();
            device.gather_rows(&hidden, &rows)?
        };
        let rows: Vec<_> = ids.iter().map(|id| self.state.row_sampling(*id)).collect();
        Ok(Some(model.begin(device, &hidden, &rows)?))
    }

    /// What was drawn for the sequences `ids`; none where logits are not finite.
    fn drawn(
        &self,
        drawing: Drawing<D>,
        ids: &[SeqId],
        is_awaited: bool,
    ) -> DeviceResult<Vec<Option<Drawn>>> {
        let rows = ids.iter().map(|id| {
            let row = self.state.row_sampling(*id);
            // Its sequence has gone on, but it was drawn plainly: of that, only this is looked at.
            if is_awaited { RowSampling { logprobs: row.logprobs, ..RowSampling::default() } } else { row }
        });
        let Parts { device, model, .. } = &self.parts;
        model.finish(device, drawing, &rows.collect::<Vec<_>>())
    }

    /// Gives sequences the tokens that were drawn for them.
    fn take(&mut self, ids: &[SeqId], drawn: Vec<Option<Drawn>>, is_awaited: bool) -> Vec<Sampled> {
        let mut give = |id, token_id| {
            if is_awaited { self.state.settle(id, token_id) } else { self.state.push(id, token_id) }
        };
        let sampled = ids.iter().zip(drawn).map(|(&id, drawn)| {
            let Some(Drawn { token_id, logprob, top }) = drawn else {
                // A step on its way may go on from this token, before the sequence is released.
                give(id, 0);
                return Sampled { id, tokens: Vec::new(), failure: Some(DrawFailure::LogitsNotFinite) };
            };
            give(id, token_id);
            Sampled { id, tokens: vec![SampledToken { token_id, logprob, top }], failure: None }
        });
        sampled.collect()
    }
}

fn micros(since: Instant) -> u64 {
    since.elapsed().as_micros() as u64
}

/// Hash of what all ranks must agree on after a step.
fn state_hash(computed: [u64; 2], sampled: &[Sampled], lengths: &[[u64; 3]]) -> u64 {
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
    for number in lengths.as_flattened() {
        hash.update(&number.to_le_bytes());
    }
    let mut first = [0; 8];
    hash.finalize_xof().fill(&mut first);
    u64::from_le_bytes(first)
}

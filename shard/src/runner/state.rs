//! What a rank remembers between steps, and how a step changes it: sequences and features, no device.
//!
//! Every number of a step is checked here before anything is done with it. A step is wrong on all ranks or on none, since
//! all hold the same state.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
};

use super::{
    blocks::KvBlocks,
    features::FeatureTable,
    noise,
    sequence::{Sequence, SequenceLimits},
    step::{Admission, Chunk, Encode, Fault, Grid, InField, MediaHash, SeqId, Step, StepError, below, count},
};
use crate::{
    device::{FEATURE_BLOCK_TOKENS, KV_BLOCK_TOKENS, RowSampling, SequenceRows},
    model::Batch,
};

/// What steps must keep within.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Of each sequence.
    pub sequence: SequenceLimits,
    /// Tokens that one step computes.
    pub max_step_tokens: usize,
    /// Sequences in one step.
    pub max_step_sequences: usize,
    /// Patches of one temporal patch of a medium.
    pub max_frame_patches: usize,
    /// Stages of vision encoding.
    pub vision_stages: usize,
    /// Blocks of keys and values.
    pub kv_blocks: usize,
    /// Blocks of vision features.
    pub feature_blocks: usize,
    /// Pixels on a side of a patch.
    pub patch_size: usize,
    /// Frames in a patch.
    pub temporal_patch_size: usize,
}

/// Sequences and features. All ranks hold the same.
#[derive(Debug)]
pub struct State {
    limits: Limits,
    sequences: BTreeMap<SeqId, Sequence>,
    blocks: KvBlocks,
    features: FeatureTable,
    in_work: Option<InWork>,
}

/// The medium that is being encoded.
#[derive(Clone, Copy, Debug)]
struct InWork {
    hash: MediaHash,
    num_bytes: usize,
    done: u64,
    total: u64,
}

/// A piece of encoding that may be done.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodePiece {
    /// The medium.
    pub hash: MediaHash,
    /// Its shape.
    pub grid: Grid,
    /// Bytes of its pixels.
    pub num_bytes: usize,
    /// What to do, in the units of [`crate::model::stages`].
    pub work: Range<u64>,
    /// Tokens of a temporal patch.
    pub frame_tokens: usize,
    /// Whether the medium is complete with this piece.
    pub is_last: bool,
}

/// A step's chunks as the model takes them.
pub struct StepBatch {
    /// Rows of all chunks; `sample_rows` are the last rows of each, whether or not a token is drawn there.
    pub batch: Batch,
    /// For each draw, the index of its chunk.
    pub draws: Vec<usize>,
}

impl State {
    /// An empty state.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            sequences: BTreeMap::new(),
            blocks: KvBlocks::new(limits.kv_blocks),
            features: FeatureTable::new(limits.feature_blocks),
            in_work: None,
        }
    }

    /// Lets sequences leave, and features go, with what is in work of them. `had_pixels` says whether pixels of a medium waited,
    /// and drops them.
    pub fn forget(&mut self, step: &Step, had_pixels: impl Fn(&MediaHash) -> bool) -> Result<(), StepError> {
        for (i, id) in step.releases.iter().enumerate() {
            let left = self.sequences.remove(id).ok_or(Fault::UnknownSequence(*id));
            self.blocks.free(&left.in_field(|| format!("releases[{i}]"))?.block_table);
        }
        for (i, hash) in step.evictions.iter().enumerate() {
            let (pixels, features) = (had_pixels(hash), self.features.remove(hash));
            if !pixels && !features {
                return Err(StepError::invalid(format!("evictions[{i}]"), Fault::UnknownMedium(*hash)));
            }
            self.in_work.take_if(|in_work| in_work.hash == *hash);
        }
        Ok(())
    }

    /// Takes sequences in.
    pub fn admit(&mut self, admissions: Vec<Admission>) -> Result<(), StepError> {
        for (i, admission) in admissions.into_iter().enumerate() {
            let (id, field) = (admission.id, format!("admissions[{i}]"));
            if self.sequences.contains_key(&id) {
                return Err(StepError::invalid(format!("{field}.sequence_id"), Fault::RepeatedSequence(id)));
            }
            let sequence = Sequence::admit(admission, &self.limits.sequence, &field)?;
            let num_shared = sequence.num_computed_tokens / KV_BLOCK_TOKENS;
            let (shared, own) = sequence.block_table.split_at(num_shared);
            let held = self.blocks.share(shared);
            let held =
                held.and_then(|()| self.blocks.take(own).map_err(|(j, fault)| (num_shared + j, fault)));
            held.map_err(|(j, fault)| StepError::invalid(format!("{field}.blocks[{j}]"), fault))?;
            self.sequences.insert(id, sequence);
        }
        Ok(())
    }

    /// Checks `encodes[index]`, and counts it as done. The first piece of a medium gives it its feature blocks; `waiting` is
    /// the grid of its pixels, and their bytes.
    pub fn encode(
        &mut self,
        index: usize,
        encode: Encode,
        waiting: Option<(Grid, usize)>,
    ) -> Result<EncodePiece, StepError> {
        let Encode { hash, feature_blocks, from, to } = encode;
        let field = |name: &str| format!("encodes[{index}].{name}");
        if from == 0 {
            self.begin_encode(hash, feature_blocks, waiting, field)?;
        } else {
            count(feature_blocks.len(), 0, 0).in_field(|| field("feature_blocks"))?;
        }
        let in_work = self.in_work.as_mut().filter(|in_work| in_work.hash == hash);
        let in_work = in_work.ok_or(Fault::NotInWork(hash)).in_field(|| field("hash"))?;
        if from != in_work.done {
            let fault = Fault::Mismatch { actual: from, expected: in_work.done };
            return Err(StepError::invalid(field("from"), fault));
        }
        if to <= from || to > in_work.total {
            let fault = Fault::Count { actual: to, least: from + 1, most: in_work.total };
            return Err(StepError::invalid(field("to"), fault));
        }
        in_work.done = to;
        let InWork { num_bytes, total, .. } = *in_work;
        let is_last = to == total;
        if is_last {
            self.in_work = None;
            self.features.complete(&hash);
        }
        let grid = self.features.get(&hash).expect("a medium in work has blocks").grid;
        let frame_tokens = self.num_tokens(Grid { t: 1, ..grid });
        Ok(EncodePiece { hash, grid, num_bytes, work: from..to, frame_tokens, is_last })
    }

    fn begin_encode(
        &mut self,
        hash: MediaHash,
        feature_blocks: Vec<u32>,
        waiting: Option<(Grid, usize)>,
        field: impl Fn(&str) -> String,
    ) -> Result<(), StepError> {
        if let Some(other) = &self.in_work {
            return Err(StepError::invalid(field("hash"), Fault::StillInWork(other.hash)));
        }
        if self.features.get(&hash).is_some() {
            return Err(StepError::invalid(field("hash"), Fault::RepeatedMedium(hash)));
        }
        let waiting = waiting.ok_or(Fault::UnknownMedium(hash)).in_field(|| field("hash"));
        let (grid, num_bytes) = waiting?;
        self.check_pixels(grid, num_bytes).in_field(|| field("hash"))?;
        let num_tokens = self.num_tokens(grid);
        let taken = self.features.insert(hash, grid, num_tokens, feature_blocks);
        taken.in_field(|| field("feature_blocks"))?;
        let total = num_tokens as u64 * self.limits.vision_stages as u64;
        self.in_work = Some(InWork { hash, num_bytes, done: 0, total });
        Ok(())
    }

    fn num_tokens(&self, grid: Grid) -> usize {
        let merge = self.limits.sequence.geometry.merge_size;
        grid.num_patches() as usize / (merge * merge) as usize
    }

    /// The slots of the features of temporal patch `frame` of a medium, row by row.
    pub fn frame_slots(&self, piece: &EncodePiece, frame: usize) -> Vec<u32> {
        let medium = self.features.get(&piece.hash).expect("a medium in work has blocks");
        let first = frame * piece.frame_tokens;
        (first..first + piece.frame_tokens).map(|token| medium.slot(token)).collect()
    }

    /// Checks that pixels are whole frames of a shape that can be encoded.
    fn check_pixels(&self, grid: Grid, num_bytes: usize) -> Result<(), Fault> {
        let Limits { patch_size, temporal_patch_size, max_frame_patches, feature_blocks, .. } = self.limits;
        let merge = self.limits.sequence.geometry.merge_size;
        below(Grid { t: 1, ..grid }.num_patches(), max_frame_patches as u64 + 1)?;
        // More than all features could never be encoded; below that, no product overflows.
        let most_patches = feature_blocks as u64 * FEATURE_BLOCK_TOKENS as u64 * u64::from(merge * merge);
        below(grid.num_patches(), most_patches + 1)?;
        if grid.num_patches() == 0 || !grid.h.is_multiple_of(merge) || !grid.w.is_multiple_of(merge) {
            return Err(Fault::UnevenGrid { grid, merge_size: merge });
        }
        // Fewer frames than the patches need are made up for by the last one, but only within the last patch.
        let frame_bytes = grid.h as usize * grid.w as usize * patch_size * patch_size * 3;
        let most = grid.t as usize * temporal_patch_size;
        let least = most - (temporal_patch_size - 1);
        if !num_bytes.is_multiple_of(frame_bytes) {
            return Err(Fault::Mismatch { actual: num_bytes as u64, expected: (most * frame_bytes) as u64 });
        }
        count(num_bytes / frame_bytes, least, most)
    }

    /// Notes that blocks are copied, one after the other.
    pub fn copy(&mut self, copies: &[(u32, u32)]) -> Result<(), StepError> {
        for (i, (source, target)) in copies.iter().enumerate() {
            self.blocks.copy(*source, *target).map_err(|(of_target, fault)| {
                let end = if of_target { "target" } else { "source" };
                StepError::invalid(format!("copies[{i}].{end}"), fault)
            })?;
        }
        Ok(())
    }

    /// Grows block tables, and lays the rows of all chunks one after the other.
    pub fn batch(&mut self, chunks: &[Chunk]) -> Result<StepBatch, StepError> {
        count(chunks.len(), 0, self.limits.max_step_sequences).in_field(|| "chunks".into())?;
        let mut seen = HashSet::new();
        let mut step = StepBatch { batch: Batch::default(), draws: Vec::new() };
        for (i, chunk) in chunks.iter().enumerate() {
            let field = format!("chunks[{i}]");
            if !seen.insert(chunk.id) {
                return Err(StepError::invalid(
                    format!("{field}.sequence_id"),
                    Fault::RepeatedSequence(chunk.id),
                ));
            }
            self.check_chunk(chunk, step.batch.token_ids.len(), &field)?;
            self.push_rows(chunk, &mut step.batch, &field)?;
            if chunk.max_new_tokens > 0 {
                step.draws.push(i);
            }
        }
        Ok(step)
    }

    /// Checks a chunk that comes after `num_rows` rows, and grows its sequence's block table.
    fn check_chunk(&mut self, chunk: &Chunk, num_rows: usize, field: &str) -> Result<(), StepError> {
        let limits = self.limits;
        let sequence = self.sequences.get_mut(&chunk.id).ok_or(Fault::UnknownSequence(chunk.id));
        let sequence = sequence.in_field(|| format!("{field}.sequence_id"))?;
        let (num_tokens, num_computed) = (sequence.token_ids.len(), sequence.num_computed_tokens);
        if chunk.start != num_computed {
            let fault = Fault::Mismatch { actual: chunk.start as u64, expected: num_computed as u64 };
            return Err(StepError::invalid(format!("{field}.start"), fault));
        }
        let most = (num_tokens - num_computed).min(limits.max_step_tokens.saturating_sub(num_rows));
        count(chunk.length, 1, most).in_field(|| format!("{field}.length"))?;
        let end = chunk.start + chunk.length;
        // One token is drawn where all known tokens are computed and another one fits.
        let may_draw = end == num_tokens && num_tokens < limits.sequence.max_context_tokens;
        count(chunk.max_new_tokens, 0, usize::from(may_draw))
            .in_field(|| format!("{field}.max_new_tokens"))?;
        let table = sequence.block_table.len();
        let least = end.div_ceil(KV_BLOCK_TOKENS).saturating_sub(table);
        let most = limits.sequence.max_context_tokens.div_ceil(KV_BLOCK_TOKENS).saturating_sub(table);
        count(chunk.new_blocks.len(), least, most).in_field(|| format!("{field}.new_blocks"))?;
        let taken = self.blocks.take(&chunk.new_blocks);
        taken.map_err(|(j, fault)| StepError::invalid(format!("{field}.new_blocks[{j}]"), fault))?;
        sequence.block_table.extend_from_slice(&chunk.new_blocks);
        self.blocks.check_write(&sequence.block_table, &(chunk.start..end)).in_field(|| field.into())
    }

    /// Appends the rows of a checked chunk.
    fn push_rows(&self, chunk: &Chunk, batch: &mut Batch, field: &str) -> Result<(), StepError> {
        let sequence = &self.sequences[&chunk.id];
        let tokens = chunk.start..chunk.start + chunk.length;
        let first_row = batch.token_ids.len();
        batch.token_ids.extend_from_slice(&sequence.token_ids[tokens.clone()]);
        batch.positions.extend(tokens.clone().map(|token| sequence.position(token)));
        batch.slots.extend(sequence.slots(tokens.clone()));
        let media = sequence
            .spans
            .iter()
            .filter(|span| span.tokens.start < tokens.end && tokens.start < span.tokens.end);
        for span in media {
            let medium = self
                .features
                .get(&span.hash)
                .filter(|medium| medium.is_complete)
                .ok_or(Fault::NotEncoded(span.hash))
                .in_field(|| field.into())?;
            if medium.grid != span.grid {
                return Err(StepError::invalid(
                    field,
                    Fault::OtherGrid { hash: span.hash, actual: medium.grid },
                ));
            }
            let within = span.tokens.start.max(tokens.start)..span.tokens.end.min(tokens.end);
            batch.features.extend(within.map(|token| {
                let row = first_row + token - tokens.start;
                (row as u32, medium.slot(token - span.tokens.start))
            }));
        }
        let rows = first_row..batch.token_ids.len();
        batch.sample_rows.push(rows.end as u32 - 1);
        batch.sequences.push(SequenceRows {
            rows,
            num_computed_tokens: chunk.start,
            block_table: sequence.block_table.clone(),
        });
        Ok(())
    }

    /// How the next token of a sequence of this step is drawn.
    pub fn row_sampling(&self, id: SeqId) -> RowSampling<'_> {
        let sequence = &self.sequences[&id];
        let sampling = &sequence.sampling;
        RowSampling {
            logit_bias: &sampling.logit_bias,
            penalized_ids: sequence.penalized_ids(),
            repetition_penalty: sampling.repetition_penalty,
            answer_counts: sequence.answer_counts(),
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            temperature: sampling.temperature,
            truncation: sampling.truncation,
            num_offered: sampling.truncation.map_or(0, |truncation| truncation.num_offered()),
            // The index of the token to be drawn: the same in a replay, where earlier draws come as known tokens.
            noise_key: noise::noise_key(sampling.seed, sampling.branch, sequence.token_ids.len() as u32),
            logprobs: sampling.logprobs,
        }
    }

    /// Counts the tokens of chunks as computed.
    pub fn commit(&mut self, chunks: &[Chunk]) {
        for chunk in chunks {
            if let Some(sequence) = self.sequences.get_mut(&chunk.id) {
                sequence.num_computed_tokens += chunk.length;
                self.blocks.write(&sequence.block_table, &(chunk.start..chunk.start + chunk.length));
            }
        }
    }

    /// Appends a token that is drawn just now and not known yet.
    pub fn await_token(&mut self, id: SeqId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.await_token();
        }
    }

    /// Appends a drawn token.
    pub fn push(&mut self, id: SeqId, token_id: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.push(token_id);
        }
    }

    /// Says which token it is that was awaited.
    pub fn settle(&mut self, id: SeqId, token_id: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.settle(token_id);
        }
    }

    /// Whether the tokens of a sequence are drawn without regard to those before, and from all.
    pub fn draws_plainly(&self, id: SeqId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| {
            let sampling = &sequence.sampling;
            sampling.truncation.is_none()
                && sampling.repetition_penalty == 1.0
                && sampling.presence_penalty == 0.0
                && sampling.frequency_penalty == 0.0
        })
    }

    /// Id, tokens and computed tokens of every sequence, by id.
    pub fn lengths(&self) -> impl Iterator<Item = [u64; 3]> + '_ {
        self.sequences.iter().map(|(id, sequence)| {
            [id.0, sequence.token_ids.len() as u64, sequence.num_computed_tokens as u64]
        })
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;

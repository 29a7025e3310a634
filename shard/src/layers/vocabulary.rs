//! The two ends of the model that are as tall as the vocabulary: embedding and head.

use std::sync::Arc;

use crate::device::{Activations, Candidate, Device, Offer, Result, RowSampling, Told};
use crate::layers::draw::{self, Choice, Drawn, Places};
use crate::layers::partition::{self, ColumnRange, Parallel};
use crate::weights::{Loader, RowSlice};

/// A rank's slice of a matrix of `[vocabulary, hidden]`.
pub struct VocabSlice<D: Device> {
    linear: D::Linear,
    first_id: u32,
    num_ids: usize,
}

impl<D: Device> VocabSlice<D> {
    /// Loads this rank's tokens of `{prefix}.weight`.
    pub fn load(
        loader: &mut Loader<'_, D>,
        prefix: &str,
        [vocab_size, hidden_size]: [usize; 2],
        parallel: Parallel,
    ) -> Result<Self> {
        let ColumnRange { cols: ids, padded } = partition::vocabulary(vocab_size, parallel);
        let (first_id, num_ids) = (ids.start as u32, ids.len());
        let name = format!("{prefix}.weight");
        let slice =
            RowSlice { name: &name, shape: &[vocab_size, hidden_size], rows: ids, padded_rows: padded };
        let matrix = loader.matrix(&[slice], 0..hidden_size, hidden_size)?;
        Ok(Self { linear: loader.device.pack_linear(matrix, None)?, first_id, num_ids })
    }
}

/// Embeddings of tokens, of which each rank has a slice.
pub struct VocabParallelEmbedding<D: Device> {
    slice: Arc<VocabSlice<D>>,
    parallel: Parallel,
}

impl<D: Device> VocabParallelEmbedding<D> {
    /// An embedding over this rank's slice of the table.
    pub fn new(slice: Arc<VocabSlice<D>>, parallel: Parallel) -> Self {
        Self { slice, parallel }
    }

    /// Embeddings of the tokens of `rows`, but vision features in the rows that `feature_rows` (`(row, slot)`) names:
    /// `-> [rows, hidden]`, one addend of as many as there are ranks. One rank gives a row and the others
    /// zeros, so that the sum is exact.
    pub fn forward(
        &self,
        device: &D,
        rows: &D::Rows,
        features: &D::Features,
        feature_rows: &[(u32, u32)],
    ) -> Result<D::Tensor> {
        let mut x = device.embedding(&self.slice.linear, self.slice.first_id, rows)?;
        if !feature_rows.is_empty() {
            device.insert_features(&mut x, features, feature_rows, self.parallel.rank != 0)?;
        }
        Ok(x)
    }
}

/// Tokens that are being drawn.
pub struct Drawing<D: Device> {
    /// Kept where a row's offers may not suffice.
    logits: Option<D::Tensor>,
    candidates: D::Candidates,
}

impl<D: Device> Drawing<D> {
    /// Whether rows of the next step can take these tokens before it is finished.
    pub fn feeds(&self, device: &D) -> bool {
        self.logits.is_none() && device.feeds(&self.candidates)
    }

    /// Whether it can be finished without waiting for this rank's own candidates.
    pub fn has_come(&self, device: &D) -> Result<bool> {
        device.has_come(&self.candidates)
    }
}

/// The head, of which each rank has a slice: it draws tokens without gathering logits, but for a few rows that are truncated
/// far from their best tokens.
pub struct VocabParallelHead<D: Device> {
    slice: Arc<VocabSlice<D>>,
}

impl<D: Device> VocabParallelHead<D> {
    /// A head over this rank's slice; a tied head shares it with the embedding.
    pub fn new(slice: Arc<VocabSlice<D>>) -> Self {
        Self { slice }
    }

    /// Draws one token for each row of `hidden`; none where the row's logits are not finite. Every rank draws the same.
    pub fn draw(
        &self,
        device: &D,
        hidden: &D::Tensor,
        rows: &[RowSampling<'_>],
    ) -> Result<Vec<Option<Drawn>>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let drawing = self.begin(device, hidden, rows)?;
        self.finish(device, drawing, rows)
    }

    /// Begins to draw one token for each row of `hidden`, of which there is one at least.
    pub fn begin(&self, device: &D, hidden: &D::Tensor, rows: &[RowSampling<'_>]) -> Result<Drawing<D>> {
        let logits = device.logits(hidden, &self.slice.linear)?;
        let candidates = device.candidates(&logits, self.slice.first_id, self.slice.num_ids, rows)?;
        // Only a draw from some of the tokens may have to look at the logits again.
        let logits = rows.iter().any(|row| row.truncation.is_some()).then_some(logits);
        Ok(Drawing { logits, candidates })
    }

    /// Ends what was begun for `rows`, of which only truncation, log-probabilities and offers are looked at where none of them is
    /// truncated.
    pub fn finish(
        &self,
        device: &D,
        drawing: Drawing<D>,
        rows: &[RowSampling<'_>],
    ) -> Result<Vec<Option<Drawn>>> {
        let Drawing { logits, candidates } = drawing;
        let of_ranks = self.gather(device, candidates, rows)?;
        rows.iter()
            .enumerate()
            .map(|(index, row)| {
                let candidates: Vec<_> = of_ranks.iter().map(|candidates| &candidates[index]).collect();
                let choice = self.choose(device, logits.as_ref(), index, row, &candidates)?;
                Ok(choice.map(|choice| draw::drawn(choice, &candidates, row.logprobs)))
            })
            .collect()
    }

    /// The token to draw at row `index`, for which the ranks told `candidates`.
    fn choose(
        &self,
        device: &D,
        logits: Option<&D::Tensor>,
        index: usize,
        row: &RowSampling<'_>,
        candidates: &[&Candidate],
    ) -> Result<Option<Choice>> {
        let Some(best) = draw::best(candidates) else { return Ok(None) };
        let Some(truncation) = row.truncation else { return Ok(Some(best)) };
        if let Some(choice) = truncation.choose(&offers(candidates), row, best) {
            return Ok(Some(choice));
        }
        // The best tokens of each rank do not settle it. Every rank comes here, since all decide by the same offers: they offer
        // all their tokens, for one row at a time, so that memory is bounded.
        let logits = logits.expect("logits are kept where a row is truncated");
        let logits = device.gather_rows(logits, &[index as u32])?;
        // With padding, as many on every rank.
        let all = [RowSampling { num_offered: logits.cols(), logprobs: None, ..row.clone() }];
        let candidates = device.candidates(&logits, self.slice.first_id, self.slice.num_ids, &all)?;
        let of_ranks = self.gather(device, candidates, &all)?;
        let candidates: Vec<_> = of_ranks.iter().flatten().collect();
        Ok(truncation.choose(&offers(&candidates), row, best))
    }

    /// What all ranks offer for `rows`, rank by rank.
    fn gather(
        &self,
        device: &D,
        mine: D::Candidates,
        rows: &[RowSampling<'_>],
    ) -> Result<Vec<Vec<Candidate>>> {
        let mine = match device.read_candidates(mine)? {
            Told::OfRanks(candidates) => return Ok(candidates),
            Told::Own(mine) => mine,
        };
        let places: Vec<Places> = rows.iter().map(Places::of).collect();
        let mine = draw::encode(&mine, &places);
        let of_ranks = device.all_gather(&mine)?;
        Ok(of_ranks.iter().map(|bytes| draw::decode(bytes, &places)).collect())
    }
}

fn offers<'a>(candidates: &[&'a Candidate]) -> Vec<&'a Offer> {
    candidates.iter().filter_map(|candidate| candidate.offer.as_ref()).collect()
}

#[cfg(test)]
mod tests;

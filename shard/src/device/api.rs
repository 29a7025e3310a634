//! The waist between model and device: [`Device`], the list of everything a device must do.
//!
//! Activations are two-dimensional, row-major, `[rows, cols]`; a row is a token or a patch. Devices choose their element
//! type (CPU: f32). Rows may be zero, and so may columns: a rank may own no head at all.

use std::cmp::Ordering;
use std::ops::Range;

use super::angles::Angles;
use crate::collective::Collective;

/// Why a device operation could not be done.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Another rank died or gave up, so that a collective cannot end.
    #[error("the group of ranks fell apart during a collective")]
    GroupLost,
    /// The device itself failed.
    #[error("{0}")]
    Failed(String),
}

/// Result of a device operation.
pub type Result<T> = std::result::Result<T, DeviceError>;

/// Tokens in a block of the cache of keys and values, and in a tile of attention.
pub const KV_BLOCK_TOKENS: usize = 32;

/// Tokens in a block of the cache of vision features.
pub const FEATURE_BLOCK_TOKENS: usize = 64;

/// Outputs of a linear layer come in units of this many, so that every kernel works on whole registers.
pub const LINEAR_UNIT: usize = 16;

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// Threads of the host.
    Cpu,
    /// A GPU of NVIDIA.
    Cuda,
}

/// Element type of weights and of the cache of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// bfloat16.
    Bf16,
    /// IEEE single precision.
    F32,
}

impl DType {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            DType::Bf16 => 2,
            DType::F32 => 4,
        }
    }
}

/// The attention heads that a rank owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionHeads {
    /// For each query head of this rank, the index (within this rank) of its head of keys and values. Ascending.
    pub kv_of_query: Vec<usize>,
    /// Heads of keys and values on this rank.
    pub num_kv: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl AttentionHeads {
    /// Query heads on this rank.
    pub fn num_query(&self) -> usize {
        self.kv_of_query.len()
    }
}

/// The rows of one sequence in a step, for paged attention.
#[derive(Clone, Debug)]
pub struct SequenceRows {
    /// Rows of the step's activations.
    pub rows: Range<usize>,
    /// Tokens of the sequence before the first of `rows`.
    pub num_computed_tokens: usize,
    /// Blocks of the cache, in order; token `i` is at offset `i % KV_BLOCK_TOKENS` of block `i / KV_BLOCK_TOKENS`.
    pub block_table: Vec<u32>,
}

/// The rows of a step: those of several sequences, one after the other.
pub struct StepRows<'a, T> {
    /// The token of each row.
    pub token_ids: &'a [u32],
    /// Rows whose token is not in `token_ids`, but is what the ranks' candidates for a row of the step before give, or 0 where they
    /// give none: `(row, row of candidates)`. None where candidates feed no rows.
    pub drawn: &'a [(u32, u32)],
    /// Where each row's keys and values go: `block * KV_BLOCK_TOKENS + offset`.
    pub slots: &'a [u32],
    /// The sequences; their rows cover all rows.
    pub sequences: &'a [SequenceRows],
    /// The heads that attend.
    pub heads: &'a AttentionHeads,
    /// Cosines of the angles that queries and keys are turned by, `[rows, head_dim / 2]`, from [`Device::angles`].
    pub cos: T,
    /// Their sines.
    pub sin: T,
}

/// How a token is drawn at one row of logits. Borrowed for one call. The fields work in their order.
#[derive(Clone, Debug)]
pub struct RowSampling<'a> {
    /// Added to the logits of single tokens, `(token, bias)`.
    pub logit_bias: &'a [(u32, f32)],
    /// Distinct tokens of prompt and answer, for the repetition penalty. Empty when there is none.
    pub penalized_ids: &'a [u32],
    /// Divides positive and multiplies negative logits of `penalized_ids`.
    pub repetition_penalty: f32,
    /// Distinct tokens of the answer and how often each occurs, for the next two penalties. Empty when there are none.
    pub answer_counts: &'a [(u32, u32)],
    /// Subtracted from the logits of the tokens of `answer_counts`.
    pub presence_penalty: f32,
    /// Subtracted from these logits, times the count.
    pub frequency_penalty: f32,
    /// Divides all logits. `None` is greedy.
    pub temperature: Option<f32>,
    /// Which tokens may be drawn; `None`: all of them, and always so where the draw is greedy.
    pub truncation: Option<Truncation>,
    /// How many tokens a device offers for the truncation: 0 without one.
    pub num_offered: usize,
    /// Key of the Gumbel noise: see [`crate::runner::noise`].
    pub noise_key: u64,
    /// How many of the most probable tokens to report (of the model's own distribution); `None`: no log-probabilities.
    pub logprobs: Option<usize>,
}

impl Default for RowSampling<'_> {
    /// Greedy, and nothing else.
    fn default() -> Self {
        Self {
            logit_bias: &[],
            penalized_ids: &[],
            repetition_penalty: 1.0,
            answer_counts: &[],
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            temperature: None,
            truncation: None,
            num_offered: 0,
            noise_key: 0,
            logprobs: None,
        }
    }
}

/// Which tokens may be drawn, of those in the order of their logits after penalties and temperature (smaller id first on
/// a tie). Each field keeps the first ones; what all of them keep may be drawn. See [`crate::layers::truncation`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Truncation {
    /// This many, at least 1; `None`: all.
    pub top_k: Option<usize>,
    /// As few as have this part of the probability that `top_k` leaves, in (0, 1]; 1: all.
    pub top_p: f32,
    /// Those at least this fraction as probable as the first, in [0, 1]; 0: all.
    pub min_p: f32,
}

/// What one rank's slice of the vocabulary offers for one row. Ids are of the whole vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Largest penalized, tempered and perturbed logit; negative infinity on a rank without vocabulary.
    pub score: f32,
    /// Its token; the smallest id on a tie.
    pub token_id: u32,
    /// Its logit before penalty and temperature.
    pub logit: f32,
    /// Largest logit of the slice, before penalties; not a number if any logit of the slice is infinite or not a number,
    /// and then nothing else here means anything. Negative infinity on a rank without vocabulary.
    pub max_logit: f32,
    /// Sum of `exp(logit - max_logit)` over the slice.
    pub sum_exp: f32,
    /// The most probable tokens and their logits, best first, smaller id first on a tie.
    pub top: Vec<(u32, f32)>,
    /// What there is to draw from, where [`RowSampling::num_offered`] asks for it.
    pub offer: Option<Offer>,
}

/// Candidates that are known, one for each row.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// This rank's.
    Own(Vec<Candidate>),
    /// Those of all ranks, in rank order. Then it is so at all ranks.
    OfRanks(Vec<Vec<Candidate>>),
}

/// The best tokens of a slice of the vocabulary, and how probable the others are together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Offer {
    /// The tokens with the largest logits after penalties and temperature, in the order of [`Offered::best_first`].
    pub best: Vec<Offered>,
    /// Tokens of the slice, offered or not.
    pub num_ids: usize,
    /// Sum of `exp(scaled - largest)` over the tokens that are not in `best`, where `largest` is that of `best[0]`.
    pub tail_sum_exp: f64,
}

/// A token that is offered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Offered {
    /// The token.
    pub token_id: u32,
    /// Its logit after penalties and temperature, brought into the range of finite numbers.
    pub scaled: f32,
    /// Its logit before.
    pub logit: f32,
}

impl Offered {
    /// Order of tokens to draw from: larger `scaled` first, then the smaller id.
    pub fn best_first(&self, other: &Self) -> Ordering {
        other.scaled.total_cmp(&self.scaled).then(self.token_id.cmp(&other.token_id))
    }
}

/// A row-major matrix of weights, on its way from the checkpoint to the device, `[out, in]`.
pub struct HostMatrix {
    /// Outputs, padding included.
    pub rows: usize,
    /// Inputs, padding included.
    pub cols: usize,
    /// `rows * cols` elements.
    pub data: HostElements,
}

/// Elements of a [`HostMatrix`].
pub enum HostElements {
    /// bfloat16.
    Bf16(Vec<half::bf16>),
    /// Single precision.
    F32(Vec<f32>),
}

/// A matrix of activations on a device.
pub trait Activations {
    /// Rows.
    fn rows(&self) -> usize;
    /// Columns.
    fn cols(&self) -> usize;
}

/// What a device must do. One thread owns it.
///
/// Every operation is repeatable: an output element is accumulated in one order, fixed by the shapes of the model, the
/// world size and the instruction set, never by how many rows the call has or how many threads share it.
pub trait Device: Sized {
    /// Activations, `[rows, cols]`. Dropping one returns its memory to the workspace.
    type Tensor: Activations;
    /// Packed weights of a linear layer, `[out, in]`, with an optional bias.
    type Linear;
    /// Weights of an RMS norm.
    type Norm;
    /// Keys and values of all layers.
    type KvCache;
    /// Vision features of media.
    type Features;
    /// What the rows of a step are.
    type Rows;
    /// A hash that is not known yet.
    type Hash;
    /// Candidates that are not known yet.
    type Candidates;

    /// Whether weights are read. A device that only counts gets matrices without elements: the right shape, no data.
    const WANTS_DATA: bool = true;

    // Memory.

    /// Packs a matrix and its bias (one element per output) for [`Device::linear`] and [`Device::embedding`].
    fn pack_linear(&self, weight: HostMatrix, bias: Option<Vec<f32>>) -> Result<Self::Linear>;
    /// Takes the weights of an RMS norm over `weight.len()` columns.
    fn pack_norm(&self, weight: Vec<f32>, epsilon: f32) -> Result<Self::Norm>;
    /// Reserves the cache of keys and values for `num_blocks` blocks of [`KV_BLOCK_TOKENS`], and touches all of it.
    fn kv_cache(
        &self,
        dtype: DType,
        num_layers: usize,
        heads: &AttentionHeads,
        num_blocks: usize,
    ) -> Result<Self::KvCache>;
    /// Reserves the cache of vision features for `num_blocks` blocks of [`FEATURE_BLOCK_TOKENS`], and touches all of it.
    fn features(&self, hidden: usize, num_blocks: usize) -> Result<Self::Features>;
    /// Copies activations from the host.
    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Self::Tensor>;
    /// Copies activations to the host, row-major.
    fn download(&self, x: &Self::Tensor) -> Result<Vec<f32>>;
    /// Cosines and sines, `[positions, frequencies]` each, in single precision.
    fn angles(&self, angles: &Angles<'_>) -> Result<(Self::Tensor, Self::Tensor)>;

    // Text.

    /// Takes what the rows of a step are, for the operations on all of them.
    fn rows(&self, rows: StepRows<'_, Self::Tensor>) -> Result<Self::Rows>;
    /// Does `work`, which computes activations of all `rows` by calls that depend on `rows` and on what was loaded, and on nothing
    /// else. A device may keep what the calls did for rows like these and do it again, in place of `work`, and begins `work` anew
    /// where that fails.
    fn replay(
        &self,
        _rows: &Self::Rows,
        mut work: impl FnMut() -> Result<Self::Tensor>,
    ) -> Result<Self::Tensor> {
        work()
    }
    /// Rows of `table` (`[vocabulary slice, hidden]`, first id `first_id`) for the tokens of `rows`; zeros where an id is of
    /// another rank.
    fn embedding(&self, table: &Self::Linear, first_id: u32, rows: &Self::Rows) -> Result<Self::Tensor>;
    /// Overwrites rows of `x`: for each `(row, slot)`, by slot `slot` of the features, or by zeros if `zero`.
    fn insert_features(
        &self,
        x: &mut Self::Tensor,
        features: &Self::Features,
        rows: &[(u32, u32)],
        zero: bool,
    ) -> Result<()>;
    /// Sums `x` over the ranks, adds `residual` if there is one, and norms: returns `(norm(sum), sum)`.
    ///
    /// `norm(v) = v / sqrt(mean(v^2) + epsilon) * weight`, per row.
    fn reduce_residual_norm(
        &self,
        x: Self::Tensor,
        residual: Option<Self::Tensor>,
        norm: &Self::Norm,
    ) -> Result<(Self::Tensor, Self::Tensor)>;
    /// Norms of some rows of `x`: `[rows of x, cols] -> [rows.len(), cols]`, each as
    /// [`Device::reduce_residual_norm`] norms its sum.
    fn norm(&self, x: &Self::Tensor, rows: Range<usize>, norm: &Self::Norm) -> Result<Self::Tensor>;
    /// Sums `x` over the ranks.
    fn reduce(&self, x: Self::Tensor) -> Result<Self::Tensor>;
    /// `x W^T + bias`: `[rows, in] -> [rows, out]`.
    fn linear(&self, x: &Self::Tensor, weight: &Self::Linear) -> Result<Self::Tensor>;
    /// What [`Device::linear`] gives, where that is this rank's part of a sum: [`Device::reduce`] or
    /// [`Device::reduce_residual_norm`] is to be the next call that sums anything, unless the part is dropped. A device may write
    /// it to where the other ranks read it.
    fn linear_part(&self, x: &Self::Tensor, weight: &Self::Linear) -> Result<Self::Tensor> {
        self.linear(x, weight)
    }
    /// What [`Device::linear`] gives, in single precision where activations are not: for [`Device::candidates`].
    fn logits(&self, x: &Self::Tensor, weight: &Self::Linear) -> Result<Self::Tensor>;
    /// Rotates the queries and keys of `qkv` (`[rows, (num_query + 2 num_kv) * head_dim]`: queries, keys, values) by the
    /// angles of `rows`, halves paired as `(i, i + head_dim / 2)`, and writes keys and values of each row to its slot of layer
    /// `layer`.
    fn rotary_append(
        &self,
        qkv: &mut Self::Tensor,
        heads: &AttentionHeads,
        rows: &Self::Rows,
        cache: &mut Self::KvCache,
        layer: usize,
    ) -> Result<()>;
    /// Causal attention of the rotated queries of `qkv` over the cache, scores scaled by `1 / sqrt(head_dim)`:
    /// `-> [rows, num_query * head_dim]`. Tiles of [`KV_BLOCK_TOKENS`] are aligned to token 0.
    fn paged_attention(
        &self,
        qkv: &Self::Tensor,
        heads: &AttentionHeads,
        rows: &Self::Rows,
        cache: &Self::KvCache,
        layer: usize,
    ) -> Result<Self::Tensor>;
    /// `silu(gate) * up` of `[rows, gate | up]`: `[rows, 2 n] -> [rows, n]`.
    fn gated_silu(&self, gate_up: &Self::Tensor) -> Result<Self::Tensor>;
    /// The bits of [`Device::linear`] and [`Device::gated_silu`] of its result. A device may do both at once.
    fn gated_linear(&self, x: &Self::Tensor, weight: &Self::Linear) -> Result<Self::Tensor> {
        self.gated_silu(&self.linear(x, weight)?)
    }
    /// Copies blocks of keys and values, `(source, target)`.
    fn copy_blocks(&self, cache: &mut Self::KvCache, copies: &[(u32, u32)]) -> Result<()>;

    // Vision.

    /// Patches of frames in RGB order (`[t, height, width, 3]`, already at the model's size), normalized by
    /// `(pixel / 255 - mean) / std`: one row per patch in `order`, columns `(channel, frame in patch, y, x)`. When the frames are fewer than
    /// the patches need, the last one is repeated. `order[i]` is the patch, counted row by row over `grid` (`[t, h, w]`), of output row `i`.
    fn patches(&self, pixels: &[u8], image: &PatchLayout, order: &[u32]) -> Result<Self::Tensor>;
    /// Rotates queries and keys of `qkv` (`[rows, 3 * num_heads * head_dim]`) in place, as [`Device::rotary_append`] does.
    fn vision_rotary(
        &self,
        qkv: &mut Self::Tensor,
        num_heads: usize,
        cos: &Self::Tensor,
        sin: &Self::Tensor,
    ) -> Result<()>;
    /// Attention without a mask of the queries of `rows` inside their windows; window `i` is rows
    /// `cu_seqlens[i]..cu_seqlens[i + 1]` of `qkv`. `-> [rows.len(), num_heads * head_dim]`.
    fn vision_attention(
        &self,
        qkv: &Self::Tensor,
        num_heads: usize,
        head_dim: usize,
        cu_seqlens: &[u32],
        rows: Range<usize>,
    ) -> Result<Self::Tensor>;
    /// `gelu(x)` with the error function, in place.
    fn gelu(&self, x: &mut Self::Tensor) -> Result<()>;
    /// Reads `[rows, cols]` as `[rows / group, cols * group]`: neighbouring rows are joined.
    fn join_rows(&self, x: Self::Tensor, group: usize) -> Result<Self::Tensor>;
    /// Writes row `i` of `x` to slot `slots[i]`.
    fn write_features(&self, features: &mut Self::Features, x: &Self::Tensor, slots: &[u32]) -> Result<()>;

    // Rows.

    /// Row `i` of the result is row `rows[i]` of `x`.
    fn gather_rows(&self, x: &Self::Tensor, rows: &[u32]) -> Result<Self::Tensor>;
    /// Uninitialised (on CPU: zeroed) activations, to be filled by [`Device::copy_rows`].
    fn empty(&self, rows: usize, cols: usize) -> Result<Self::Tensor>;
    /// Copies all rows of `x` to the rows of `target` from `first_row` on.
    fn copy_rows(&self, x: &Self::Tensor, target: &mut Self::Tensor, first_row: usize) -> Result<()>;

    // Sampling.

    /// What this rank's slice of the vocabulary offers: `logits` is `[rows, slice]`, of which the first `num_ids` columns
    /// are tokens `first_id..first_id + num_ids` and the rest is padding.
    fn candidates(
        &self,
        logits: &Self::Tensor,
        first_id: u32,
        num_ids: usize,
        rows: &[RowSampling<'_>],
    ) -> Result<Self::Candidates>;
    /// Candidates, one for each row, which are waited for: this rank's, or those of all ranks where the device has gathered them.
    fn read_candidates(&self, candidates: Self::Candidates) -> Result<Told>;
    /// Whether rows of the next step can take their tokens from these candidates before they are read: see
    /// [`StepRows::drawn`]. To read them is then no meeting with the other ranks, which may be at the next step already.
    fn feeds(&self, _candidates: &Self::Candidates) -> bool {
        false
    }
    /// Whether candidates can be read without waiting.
    fn has_come(&self, _candidates: &Self::Candidates) -> Result<bool> {
        Ok(true)
    }
    /// Every rank's `mine`, in rank order. All ranks give the same number of bytes.
    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>>;
    /// Hash of the bits of some rows of `x`.
    fn hash(&self, x: &Self::Tensor, rows: Range<usize>) -> Result<Self::Hash>;
    /// The value of a hash, which is waited for.
    fn read_hash(&self, hash: Self::Hash) -> Result<u64>;
}

/// A device that a rank of a group owns: what it does between two groups.
pub trait RankDevice: Device {
    /// Leaves the group, which ends it for the other ranks too. Until another one is joined, everything that would meet them
    /// fails.
    fn leave_group(&mut self) -> Result<()>;
    /// Goes on as a rank of another group, of the same size.
    fn join_group(&mut self, collective: Box<dyn Collective>) -> Result<()>;
    /// Checks that all weights are still what was packed: an error if they are not.
    fn verify_weights(&self) -> Result<()>;
    /// Bytes of the workspace that are in use.
    fn used_workspace_bytes(&self) -> usize;
}

/// How a medium's pixels become patches.
#[derive(Clone, Debug, PartialEq)]
pub struct PatchLayout {
    /// Patches in time, height and width.
    pub grid: [usize; 3],
    /// Pixels on a side of a patch.
    pub patch_size: usize,
    /// Frames in a patch.
    pub temporal_patch_size: usize,
    /// Mean of each channel, of values in 0..1.
    pub mean: [f32; 3],
    /// Standard deviation of each channel.
    pub std: [f32; 3],
}

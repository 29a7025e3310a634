//! [`CpuDevice`]: the list of operations, each cut into tasks for the threads.
#![allow(unsafe_code)]

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use super::arena::{Arena, Tensor};
use super::attention::PagedAttention;
use super::candidates::{PIECE_LEN, RowLogits};
use super::instruction_set::InstructionSet;
use super::kept::KeptWeights;
use super::kv_cache::KvCache;
use super::linear::linear;
use super::memory::{Region, SharedPtr, as_bytes};
use super::packed::PackedLinear;
use super::patches::Patches;
use super::pool::Pool;
use super::rowwise::{GatedSilu, Gelu, ResidualNorm, RmsNorm, Rotary};
use super::scratch::Scratch;
use super::vision_attention::VisionAttention;
use crate::checksum::Checksum;
use crate::collective::{Collective, GroupLost};
use crate::device::patches::patch_len;
use crate::device::{
    Activations, Angles, AttentionHeads, Candidate, DType, Device, DeviceError, FEATURE_BLOCK_TOKENS,
    HostMatrix, PatchLayout, RankDevice, Result, RowSampling, SequenceRows, StepRows, Told,
};
use crate::progress::Progress;

/// Elements that a thread should have to do before others are asked to help.
const GRAIN: usize = 16 * 1024;

/// How a [`CpuDevice`] is set up.
pub struct CpuOptions {
    /// Threads that compute, the calling one included.
    pub threads: usize,
    /// Cores to pin the threads to, one each; if there are fewer, all threads to all of them; if none, no pinning.
    pub cpus: Vec<u32>,
    /// Bytes for activations.
    pub workspace_bytes: usize,
    /// Instructions to use; `None`: the best that the processor has.
    pub instruction_set: Option<InstructionSet>,
    /// How this rank meets the others.
    pub collective: Box<dyn Collective>,
    /// Where the threads count what they do.
    pub progress: Arc<Progress>,
}

/// A device of CPU cores. The thread that makes it owns it, and computes as one of its threads.
pub struct CpuDevice {
    set: InstructionSet,
    pool: Pool,
    arena: Rc<Arena>,
    scratch: Scratch,
    kept: KeptWeights,
    /// None between two groups.
    collective: Option<Box<dyn Collective>>,
}

/// Weights of an RMS norm.
pub struct Norm {
    weight: Arc<[f32]>,
    epsilon: f32,
}

/// The rows of a step.
pub struct Rows {
    token_ids: Vec<u32>,
    slots: Vec<u32>,
    sequences: Vec<SequenceRows>,
    cos: Tensor,
    sin: Tensor,
}

/// Vision features, `[slots, hidden]`.
pub struct Features {
    region: Region,
    hidden: usize,
}

impl Features {
    fn slot_range(&self, slot: u32) -> std::ops::Range<usize> {
        let start = slot as usize * self.hidden;
        start..start + self.hidden
    }
}

impl From<GroupLost> for DeviceError {
    fn from(_: GroupLost) -> Self {
        DeviceError::GroupLost
    }
}

impl CpuDevice {
    /// Starts the threads, and reserves and touches the workspace and the scratch
    /// ([`scratch_bytes`](super::scratch_bytes)).
    pub fn new(options: CpuOptions) -> Result<Self> {
        let set = options.instruction_set.unwrap_or_else(InstructionSet::detect);
        if !set.is_available() {
            return Err(DeviceError::Failed(format!(
                "this processor does not have the instruction set {set}"
            )));
        }
        // The threads come first: once this one is pinned, the memory that it touches is near to it.
        let pool = Pool::new(options.threads, &options.cpus, options.progress)?;
        let arena = Arena::new(options.workspace_bytes, pool.progress().pieces_of(0))?;
        let scratch = Scratch::new(options.threads, pool.progress().pieces_of(0))?;
        let kept = KeptWeights::default();
        Ok(Self { set, pool, arena, scratch, kept, collective: Some(options.collective) })
    }

    /// The instructions in use.
    pub fn instruction_set(&self) -> InstructionSet {
        self.set
    }

    fn group(&self) -> Result<&dyn Collective> {
        self.collective.as_deref().ok_or(DeviceError::GroupLost)
    }

    /// How far its threads are.
    pub fn progress(&self) -> &Progress {
        self.pool.progress()
    }

    /// Most bytes of the workspace that were in use.
    pub fn peak_workspace_bytes(&self) -> usize {
        self.arena.peak_bytes()
    }

    /// Calls `work(rows, part of to)` for runs of rows of `to`.
    fn for_rows(&self, to: &mut Tensor, work: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync) {
        let (rows, cols) = (to.rows(), to.cols());
        let data = SharedPtr::new(to.data_mut());
        self.pool.run_ranges(rows, GRAIN.div_ceil(cols.max(1)), &|rows, _| {
            // SAFETY: the ranges of rows are disjoint, and within the tensor that is borrowed for the call.
            let part = unsafe { data.slice(rows.start * cols, rows.len() * cols) };
            work(rows, part);
        });
    }

    /// Calls `work(row, row of to)` for each row.
    fn for_each_row(&self, to: &mut Tensor, work: impl Fn(usize, &mut [f32]) + Sync) {
        let cols = to.cols();
        if cols == 0 {
            return;
        }
        self.for_rows(to, |rows, part| {
            rows.zip(part.chunks_exact_mut(cols)).for_each(|(row, to)| work(row, to));
        });
    }

    fn rotate(&self, x: &mut Tensor, num_heads: usize, head_dim: usize, cos: &Tensor, sin: &Tensor) {
        let half = head_dim / 2;
        assert_eq!(head_dim % 2, 0, "heads of odd width {head_dim} cannot be rotated");
        assert_eq!((cos.rows(), cos.cols()), (x.rows(), half), "shape of the cosines");
        assert_eq!((sin.rows(), sin.cols()), (x.rows(), half), "shape of the sines");
        if half == 0 || num_heads == 0 {
            return;
        }
        let cols = x.cols();
        let (set, cos, sin) = (self.set, cos.data(), sin.data());
        self.for_rows(x, |rows, x| {
            let angles = rows.start * half..rows.end * half;
            let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
            set.run(Rotary { x, cols, num_heads, head_dim, cos, sin });
        });
    }
}

impl Device for CpuDevice {
    type Tensor = Tensor;
    type Linear = PackedLinear;
    type Norm = Norm;
    type KvCache = KvCache;
    type Features = Features;
    type Rows = Rows;
    type Hash = u64;
    type Candidates = Vec<Candidate>;

    fn pack_linear(&self, weight: HostMatrix, bias: Option<Vec<f32>>) -> Result<PackedLinear> {
        let packed = PackedLinear::new(weight, bias, self.progress().pieces_of(0))?;
        self.kept.keep(&self.pool, &packed.weight);
        self.kept.keep(&self.pool, &packed.bias);
        Ok(packed)
    }

    fn pack_norm(&self, weight: Vec<f32>, epsilon: f32) -> Result<Norm> {
        let weight = weight.into();
        self.kept.keep(&self.pool, &weight);
        Ok(Norm { weight, epsilon })
    }

    fn kv_cache(
        &self,
        dtype: DType,
        num_layers: usize,
        heads: &AttentionHeads,
        num_blocks: usize,
    ) -> Result<KvCache> {
        KvCache::new(dtype, num_layers, heads, num_blocks, self.progress().pieces_of(0))
    }

    fn features(&self, hidden: usize, num_blocks: usize) -> Result<Features> {
        let bytes = [num_blocks, FEATURE_BLOCK_TOKENS, hidden, size_of::<f32>()];
        let bytes = bytes
            .into_iter()
            .try_fold(1_usize, usize::checked_mul)
            .ok_or_else(|| DeviceError::Failed(format!("{num_blocks} blocks of features are too many")))?;
        let pieces = self.progress().pieces_of(0);
        Ok(Features { region: Region::new(bytes, "the cache of vision features", pieces)?, hidden })
    }

    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Tensor> {
        let mut x = self.arena.tensor(rows, cols)?;
        assert_eq!(x.data().len(), data.len(), "elements for {rows} x {cols} activations");
        x.data_mut().copy_from_slice(data);
        Ok(x)
    }

    fn download(&self, x: &Tensor) -> Result<Vec<f32>> {
        Ok(x.data().to_vec())
    }

    fn angles(&self, angles: &Angles<'_>) -> Result<(Tensor, Tensor)> {
        let (rows, cols) = (angles.positions.len(), angles.frequencies.len());
        let (mut cos, mut sin) = (self.arena.tensor(rows, cols)?, self.arena.tensor(rows, cols)?);
        angles.fill(cos.data_mut(), sin.data_mut());
        Ok((cos, sin))
    }

    fn rows(&self, rows: StepRows<'_, Tensor>) -> Result<Rows> {
        let StepRows { token_ids, drawn, slots, sequences, cos, sin, .. } = rows;
        assert!(drawn.is_empty(), "candidates are read before the next step");
        assert_eq!(slots.len(), token_ids.len(), "slots for the rows of a step");
        Ok(Rows {
            token_ids: token_ids.to_vec(),
            slots: slots.to_vec(),
            sequences: sequences.to_vec(),
            cos,
            sin,
        })
    }

    fn embedding(&self, table: &PackedLinear, first_id: u32, rows: &Rows) -> Result<Tensor> {
        let ids = &rows.token_ids;
        let mut out = self.arena.tensor(ids.len(), table.inputs)?;
        self.for_each_row(&mut out, |row, to| match ids[row].checked_sub(first_id) {
            Some(output) if (output as usize) < table.outputs => table.read_row(output as usize, to),
            _ => to.fill(0.0),
        });
        Ok(out)
    }

    fn insert_features(
        &self,
        x: &mut Tensor,
        features: &Features,
        rows: &[(u32, u32)],
        zero: bool,
    ) -> Result<()> {
        let cols = x.cols();
        assert_eq!(cols, features.hidden, "columns of features");
        for &(row, slot) in rows {
            let to = &mut x.data_mut()[row as usize * cols..(row as usize + 1) * cols];
            if zero {
                to.fill(0.0);
            } else {
                to.copy_from_slice(&features.region.as_slice()[features.slot_range(slot)]);
            }
        }
        Ok(())
    }

    fn reduce_residual_norm(
        &self,
        x: Tensor,
        residual: Option<Tensor>,
        norm: &Norm,
    ) -> Result<(Tensor, Tensor)> {
        let mut sum = self.reduce(x)?;
        let (rows, cols) = (sum.rows(), sum.cols());
        assert_eq!(cols, norm.weight.len(), "columns of a norm");
        let mut normed = self.arena.tensor(rows, cols)?;
        if cols == 0 {
            return Ok((normed, sum));
        }
        if let Some(residual) = &residual {
            assert_eq!((residual.rows(), residual.cols()), (rows, cols), "shape of the residual");
        }
        let residual = residual.as_ref().map(Tensor::data);
        let (set, weight, epsilon) = (self.set, &*norm.weight, norm.epsilon);
        let sums = SharedPtr::new(sum.data_mut());
        self.for_rows(&mut normed, |rows, normed| {
            let part = rows.start * cols..rows.end * cols;
            // SAFETY: the ranges of rows are disjoint, and `sum` is borrowed for the call.
            let sum = unsafe { sums.slice(part.start, part.len()) };
            let residual = residual.map(|residual| &residual[part]);
            set.run(ResidualNorm { sum, residual, normed, weight, epsilon });
        });
        Ok((normed, sum))
    }

    fn norm(&self, x: &Tensor, rows: Range<usize>, norm: &Norm) -> Result<Tensor> {
        let cols = x.cols();
        assert_eq!(cols, norm.weight.len(), "columns of a norm");
        let mut normed = self.arena.tensor(rows.len(), cols)?;
        if cols == 0 {
            return Ok(normed);
        }
        let x = &x.data()[rows.start * cols..rows.end * cols];
        let (set, weight, epsilon) = (self.set, &*norm.weight, norm.epsilon);
        self.for_rows(&mut normed, |rows, normed| {
            let x = &x[rows.start * cols..rows.end * cols];
            set.run(RmsNorm { x, normed, weight, epsilon });
        });
        Ok(normed)
    }

    fn reduce(&self, mut x: Tensor) -> Result<Tensor> {
        self.group()?.all_reduce_sum(x.data_mut())?;
        Ok(x)
    }

    fn linear(&self, x: &Tensor, weight: &PackedLinear) -> Result<Tensor> {
        assert_eq!(x.cols(), weight.inputs, "inputs of a linear layer");
        let mut out = self.arena.tensor(x.rows(), weight.outputs)?;
        linear(self.set, &self.pool, &self.scratch, x.data(), weight, out.data_mut());
        Ok(out)
    }

    fn logits(&self, x: &Tensor, weight: &PackedLinear) -> Result<Tensor> {
        self.linear(x, weight)
    }

    fn rotary_append(
        &self,
        qkv: &mut Tensor,
        heads: &AttentionHeads,
        rows: &Rows,
        cache: &mut KvCache,
        layer: usize,
    ) -> Result<()> {
        let Rows { slots, cos, sin, .. } = rows;
        let head_dim = heads.head_dim;
        cache.check_heads(heads);
        assert_eq!(qkv.cols(), (heads.num_query() + 2 * heads.num_kv) * head_dim, "columns of qkv");
        assert_eq!(slots.len(), qkv.rows(), "slots for the rows of qkv");
        self.rotate(qkv, heads.num_query() + heads.num_kv, head_dim, cos, sin);
        for (row, &slot) in slots.iter().enumerate() {
            let (keys, values) =
                qkv.row(row)[heads.num_query() * head_dim..].split_at(heads.num_kv * head_dim);
            for kv_head in 0..heads.num_kv {
                let part = kv_head * head_dim..(kv_head + 1) * head_dim;
                cache.write(layer, slot, kv_head, &keys[part.clone()], &values[part]);
            }
        }
        Ok(())
    }

    fn paged_attention(
        &self,
        qkv: &Tensor,
        heads: &AttentionHeads,
        rows: &Rows,
        cache: &KvCache,
        layer: usize,
    ) -> Result<Tensor> {
        assert_eq!(qkv.cols(), (heads.num_query() + 2 * heads.num_kv) * heads.head_dim, "columns of qkv");
        let mut out = self.empty(qkv.rows(), heads.num_query() * heads.head_dim)?;
        let sequences = &rows.sequences[..];
        let call = PagedAttention { qkv: qkv.data(), heads, cache, layer, sequences };
        call.run(self.set, &self.pool, &self.scratch, out.data_mut());
        Ok(out)
    }

    fn gated_silu(&self, gate_up: &Tensor) -> Result<Tensor> {
        assert_eq!(gate_up.cols() % 2, 0, "columns of gate and up");
        let cols = gate_up.cols() / 2;
        let mut out = self.arena.tensor(gate_up.rows(), cols)?;
        if cols == 0 {
            return Ok(out);
        }
        let (set, data) = (self.set, gate_up.data());
        self.for_rows(&mut out, |rows, out| {
            let gate_up = &data[rows.start * 2 * cols..rows.end * 2 * cols];
            set.run(GatedSilu { gate_up, out, cols });
        });
        Ok(out)
    }

    fn copy_blocks(&self, cache: &mut KvCache, copies: &[(u32, u32)]) -> Result<()> {
        cache.copy_blocks(copies);
        Ok(())
    }

    fn patches(&self, pixels: &[u8], image: &PatchLayout, order: &[u32]) -> Result<Tensor> {
        let patches = Patches::new(pixels, image, order).map_err(DeviceError::Failed)?;
        let mut out = self.arena.tensor(order.len(), patch_len(image))?;
        self.for_each_row(&mut out, |row, to| patches.write_row(row, to));
        Ok(out)
    }

    fn vision_rotary(&self, qkv: &mut Tensor, num_heads: usize, cos: &Tensor, sin: &Tensor) -> Result<()> {
        let head_dim = 2 * cos.cols();
        assert_eq!(qkv.cols(), 3 * num_heads * head_dim, "columns of qkv");
        // Queries and keys are neighbours: together they are twice as many heads.
        self.rotate(qkv, 2 * num_heads, head_dim, cos, sin);
        Ok(())
    }

    fn vision_attention(
        &self,
        qkv: &Tensor,
        num_heads: usize,
        head_dim: usize,
        cu_seqlens: &[u32],
        rows: Range<usize>,
    ) -> Result<Tensor> {
        assert_eq!(qkv.cols(), 3 * num_heads * head_dim, "columns of qkv");
        assert!(rows.end <= qkv.rows(), "rows {rows:?} of {}", qkv.rows());
        let mut out = self.arena.tensor(rows.len(), num_heads * head_dim)?;
        let call = VisionAttention { qkv: qkv.data(), num_heads, head_dim, cu_seqlens, rows };
        call.run(self.set, &self.pool, &self.scratch, out.data_mut());
        Ok(out)
    }

    fn gelu(&self, x: &mut Tensor) -> Result<()> {
        let set = self.set;
        self.for_rows(x, |_, part| set.run(Gelu(part)));
        Ok(())
    }

    fn join_rows(&self, x: Tensor, group: usize) -> Result<Tensor> {
        let (rows, cols) = (x.rows(), x.cols());
        assert!(group > 0 && rows.is_multiple_of(group), "{rows} rows cannot be joined by {group}");
        Ok(x.reshaped(rows / group, cols * group))
    }

    fn write_features(&self, features: &mut Features, x: &Tensor, slots: &[u32]) -> Result<()> {
        assert_eq!(x.cols(), features.hidden, "columns of features");
        assert_eq!(x.rows(), slots.len(), "slots for the rows of features");
        for (row, &slot) in slots.iter().enumerate() {
            let range = features.slot_range(slot);
            features.region.as_mut_slice()[range].copy_from_slice(x.row(row));
        }
        Ok(())
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let mut out = self.arena.tensor(rows.len(), x.cols())?;
        let data = x.data();
        self.for_each_row(&mut out, |row, to| {
            let start = rows[row] as usize * to.len();
            to.copy_from_slice(&data[start..start + to.len()]);
        });
        Ok(out)
    }

    fn empty(&self, rows: usize, cols: usize) -> Result<Tensor> {
        let mut x = self.arena.tensor(rows, cols)?;
        x.data_mut().fill(0.0);
        Ok(x)
    }

    fn copy_rows(&self, x: &Tensor, target: &mut Tensor, first_row: usize) -> Result<()> {
        assert_eq!(x.cols(), target.cols(), "columns of copied rows");
        let (cols, from) = (x.cols(), x.data());
        let start = first_row * cols;
        let to = SharedPtr::new(&mut target.data_mut()[start..start + from.len()]);
        self.pool.run_ranges(x.rows(), GRAIN.div_ceil(cols.max(1)), &|rows, _| {
            // SAFETY: the ranges of rows are disjoint, and within the part of the target that is borrowed for the call.
            let to = unsafe { to.slice(rows.start * cols, rows.len() * cols) };
            to.copy_from_slice(&from[rows.start * cols..rows.end * cols]);
        });
        Ok(())
    }

    fn candidates(
        &self,
        logits: &Tensor,
        first_id: u32,
        num_ids: usize,
        rows: &[RowSampling<'_>],
    ) -> Result<Vec<Candidate>> {
        assert_eq!(logits.rows(), rows.len(), "rows to sample");
        let rows: Vec<_> = rows
            .iter()
            .enumerate()
            .map(|(row, sampling)| RowLogits::new(&logits.row(row)[..num_ids], first_id, sampling))
            .collect();
        let num_pieces = num_ids.div_ceil(PIECE_LEN);
        let mut pieces: Vec<Option<Candidate>> = vec![None; rows.len() * num_pieces];
        let results = SharedPtr::new(&mut pieces);
        let (set, scratch) = (self.set, &self.scratch);
        self.pool.run(rows.len() * num_pieces, &|task, thread| {
            // SAFETY: a thread runs one task at a time, and each task writes its own result.
            let (scratch, result) = unsafe { (scratch.of_thread(thread), results.slice(task, 1)) };
            result[0] = Some(rows[task / num_pieces].piece(set, task % num_pieces, scratch));
        });
        let mut pieces = pieces.into_iter().flatten();
        Ok(rows.iter().map(|row| row.merge(pieces.by_ref().take(row.num_pieces()).collect())).collect())
    }

    fn read_candidates(&self, candidates: Vec<Candidate>) -> Result<Told> {
        Ok(Told::Own(candidates))
    }

    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(self.group()?.all_gather(mine)?)
    }

    fn hash(&self, x: &Tensor, rows: Range<usize>) -> Result<u64> {
        let data = &x.data()[rows.start * x.cols()..rows.end * x.cols()];
        Ok(Checksum::of(as_bytes(data)))
    }

    fn read_hash(&self, hash: u64) -> Result<u64> {
        Ok(hash)
    }
}

impl RankDevice for CpuDevice {
    fn leave_group(&mut self) -> Result<()> {
        self.collective = None;
        Ok(())
    }

    fn join_group(&mut self, collective: Box<dyn Collective>) -> Result<()> {
        self.collective = Some(collective);
        Ok(())
    }

    fn verify_weights(&self) -> Result<()> {
        self.kept.verify(&self.pool)
    }

    fn used_workspace_bytes(&self) -> usize {
        self.arena.used_bytes()
    }
}

//! [`CudaDevice`]: the list of operations, each a launch or a few.
#![allow(unsafe_code)]

use std::{cell::RefCell, ops::Range, rc::Rc, sync::Arc};

use half::bf16;

use super::arena::{Arena, Tensor};
use super::attention::StepWords;
use super::candidates::{Candidates, Sampling};
use super::cublas_lt::CublasLt;
use super::driver::{DeviceBuffer, Event, Gpu, PinnedBuffer};
use super::graphs::Graphs;
use super::group::{Group, Sums, Ways};
use super::hash::{Hash, Hashes, Kept};
use super::kernels::{Argument, Kernels, count, launch};
use super::linear::{Bias, Linear};
use super::paged::{KvCache, Rows};
use super::peers::Exchange;
use super::pixels::Levels;
use super::sizes::Sizes;
use super::staging::{DOWNLOAD_BYTES, Staging, as_bytes};
use super::weights::WeightMemory;
use crate::collective::Collective;
use crate::device::{
    Activations, Angles, AttentionHeads, DType, Device, DeviceError, FEATURE_BLOCK_TOKENS, HostElements,
    HostMatrix, PatchLayout, Result, RowSampling, StepRows, Told,
};
use crate::progress::Progress;

/// Threads of most blocks.
pub const THREADS: usize = 256;
/// Elements that a thread has before there are more blocks.
const ELEMENTS_PER_THREAD: usize = 8;
/// How a [`CudaDevice`] is set up.
pub struct CudaOptions {
    /// The GPU, open.
    pub gpu: Rc<Gpu>,
    /// Cubins of all kernels, with the names of their modules.
    pub cubins: Vec<(String, Vec<u8>)>,
    /// What the largest calls are.
    pub sizes: Sizes,
    /// Bytes for activations.
    pub workspace_bytes: usize,
    /// How this rank meets the others.
    pub collective: Box<dyn Collective>,
    /// What sums of activations may go through.
    pub sums: Sums,
    /// Whether NCCL is there.
    pub has_nccl: bool,
    /// Whether cuBLASLt is there to multiply many rows.
    pub use_cublas_lt: bool,
    /// Whether a row's bits must not depend on the rows beside it: Lockstep's own kernels alone compute then, and sums over
    /// ranks are in one order.
    pub is_repeatable: bool,
    /// Whether steps that only decode are kept as graphs, where sums over ranks can be.
    pub use_graphs: bool,
    /// Whether kernels may begin before the one before them has ended, where the GPU can do so.
    pub overlap_kernels: bool,
    /// Where it counts what it does.
    pub progress: Arc<Progress>,
}

/// A GPU. The thread that makes it owns it.
pub struct CudaDevice {
    /// None between two groups. Given up first: what waits for other ranks keeps all else from being given back.
    pub(super) group: RefCell<Option<Group>>,
    pub(super) kernels: Kernels,
    pub(super) arena: Rc<Arena>,
    pub(super) staging: Staging,
    /// What the rows of the step in work are.
    pub(super) step_words: DeviceBuffer,
    pub(super) pixels: DeviceBuffer,
    pub(super) levels: RefCell<Option<Levels>>,
    pub(super) returned: RefCell<PinnedBuffer>,
    /// When what was last to come to `returned` is there.
    pub(super) brought: Event,
    pub(super) hashes: Hashes,
    pub(super) sampling: Sampling,
    pub(super) weights: RefCell<WeightMemory>,
    pub(super) kept: RefCell<Vec<Kept>>,
    /// Outlives all groups. None where sums do not go that way.
    pub(super) exchange: Option<Rc<Exchange>>,
    pub(super) ways: Ways,
    pub(super) is_repeatable: bool,
    pub(super) graphs: Graphs,
    pub(super) use_graphs: bool,
    /// None where it is not installed.
    pub(super) cublas_lt: Option<CublasLt>,
    pub(super) sizes: Sizes,
    pub(super) progress: Arc<Progress>,
    pub(super) gpu: Rc<Gpu>,
}

/// Weights of an RMS norm.
pub struct Norm {
    pub(super) weight: DeviceBuffer,
    pub(super) epsilon: f32,
    pub(super) cols: usize,
}

/// Vision features, `[slots, hidden]` of bf16.
pub struct Features {
    slots: DeviceBuffer,
    hidden: usize,
}

impl CudaDevice {
    /// Loads the kernels and reserves what the largest calls need, beside weights and caches.
    ///
    /// # Errors
    /// The GPU has too little memory or fails, or the other ranks cannot be met.
    pub fn new(options: CudaOptions) -> Result<Self> {
        let CudaOptions {
            gpu,
            cubins,
            sizes,
            workspace_bytes,
            collective,
            sums,
            has_nccl,
            use_cublas_lt,
            is_repeatable,
            use_graphs,
            overlap_kernels,
            progress,
        } = options;
        gpu.let_kernels_begin_early(overlap_kernels)?;
        let cubins: Vec<_> = cubins.iter().map(|(name, cubin)| (&name[..], &cubin[..])).collect();
        let ways = Ways { sums, has_nccl, is_repeatable };
        let shares = sums == Sums::Peers && collective.world_size() > 1;
        let exchange = if shares { Some(Rc::new(Exchange::new(&gpu)?)) } else { None };
        let group = Group::new(&gpu, collective, ways, exchange.as_ref())?;
        gpu.count_in(progress.clone());
        let device = Self {
            kernels: Kernels::load(&gpu, &cubins)?,
            arena: Arena::new(&gpu, workspace_bytes)?,
            staging: Staging::new(&gpu, sizes.slot_bytes())?,
            step_words: DeviceBuffer::new(&gpu, sizes.step_bytes(), "the rows of a step")?,
            pixels: DeviceBuffer::new(&gpu, sizes.frame_bytes, "pixels")?,
            levels: RefCell::new(None),
            returned: RefCell::new(PinnedBuffer::new(&gpu, DOWNLOAD_BYTES)?),
            brought: Event::new(&gpu)?,
            hashes: Hashes::new(&gpu)?,
            sampling: Sampling::new(&gpu, sizes.num_ids)?,
            weights: RefCell::default(),
            kept: RefCell::new(Vec::new()),
            group: RefCell::new(Some(group)),
            exchange,
            ways,
            is_repeatable,
            graphs: Graphs::new(),
            use_graphs,
            cublas_lt: if use_cublas_lt { Some(CublasLt::new(&gpu)?) } else { None },
            sizes,
            progress,
            gpu,
        };
        device.warm_up_products()?;
        device.warm_up_sums()?;
        Ok(device)
    }

    /// Most bytes of the workspace that were in use.
    pub fn peak_workspace_bytes(&self) -> usize {
        self.arena.peak_bytes()
    }

    pub(super) fn with_group<T>(&self, work: impl FnOnce(&mut Group) -> Result<T>) -> Result<T> {
        work(self.group.borrow_mut().as_mut().ok_or(DeviceError::GroupLost)?)
    }

    /// Waits for an event, as long as the group is whole.
    pub(super) fn wait(&self, event: &Event) -> Result<()> {
        self.with_group(|group| group.wait(event))
    }

    pub(super) fn tensor(&self, rows: usize, cols: usize) -> Result<Tensor> {
        self.arena.tensor(rows, cols, DType::Bf16)
    }

    /// Blocks for work on so many elements.
    pub(super) fn element_blocks(elements: usize) -> [usize; 3] {
        [elements.div_ceil(THREADS * ELEMENTS_PER_THREAD).max(1), 1, 1]
    }
}

impl Device for CudaDevice {
    type Tensor = Tensor;
    type Linear = Linear;
    type Norm = Norm;
    type KvCache = KvCache;
    type Features = Features;
    type Rows = Rows;
    type Hash = Hash;
    type Candidates = Candidates;

    fn pack_linear(&self, weight: HostMatrix, bias: Option<Vec<f32>>) -> Result<Linear> {
        let HostMatrix { rows: outputs, cols: inputs, data } = weight;
        if !inputs.is_multiple_of(8) {
            return Err(DeviceError::Failed(format!(
                "a matrix of {outputs} x {inputs}: on CUDA a row is a multiple of 8 elements"
            )));
        }
        let weight = match data {
            HostElements::Bf16(elements) => self.keep(&elements)?,
            HostElements::F32(elements) => {
                self.keep(&elements.iter().map(|element| bf16::from_f32(*element)).collect::<Vec<_>>())?
            }
        };
        let bias = bias.map(|bias| {
            let half: Vec<bf16> = bias.iter().map(|element| bf16::from_f32(*element)).collect();
            Ok::<_, DeviceError>(Bias { single: self.keep(&bias)?, half: self.keep(&half)? })
        });
        let bias = bias.transpose()?;
        Ok(Linear { weight, bias, outputs, inputs })
    }

    fn pack_norm(&self, weight: Vec<f32>, epsilon: f32) -> Result<Norm> {
        Ok(Norm { weight: self.keep(&weight)?, epsilon, cols: weight.len() })
    }

    fn kv_cache(
        &self,
        dtype: DType,
        num_layers: usize,
        heads: &AttentionHeads,
        num_blocks: usize,
    ) -> Result<KvCache> {
        self.reserve_cache(dtype, num_layers, heads, num_blocks)
    }

    fn features(&self, hidden: usize, num_blocks: usize) -> Result<Features> {
        let bytes = num_blocks * FEATURE_BLOCK_TOKENS * hidden * size_of::<bf16>();
        let slots = DeviceBuffer::new(&self.gpu, bytes, "vision features")?;
        self.gpu.fill(slots.address(), 0, bytes)?;
        Ok(Features { slots, hidden })
    }

    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Tensor> {
        assert_eq!(rows * cols, data.len(), "elements for {rows} x {cols} activations");
        let x = self.tensor(rows, cols)?;
        let rounded: Vec<bf16> = data.iter().map(|element| bf16::from_f32(*element)).collect();
        self.staging.send(as_bytes(&rounded), x.address())?;
        Ok(x)
    }

    fn download(&self, x: &Tensor) -> Result<Vec<f32>> {
        let bytes = self.bring(x.address(), x.bytes())?;
        Ok(match x.dtype() {
            DType::Bf16 => bytes.as_chunks().0.iter().map(|x| bf16::from_le_bytes(*x).to_f32()).collect(),
            DType::F32 => bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect(),
        })
    }

    fn angles(&self, angles: &Angles<'_>) -> Result<(Tensor, Tensor)> {
        let Angles { frequencies, scale, positions } = *angles;
        let (rows, cols) = (positions.len(), frequencies.len());
        let cos = self.arena.tensor(rows, cols, DType::F32)?;
        let sin = self.arena.tensor(rows, cols, DType::F32)?;
        if cos.bytes() > 0 {
            let words: Vec<[u32; 2]> =
                frequencies.iter().map(|(frequency, axis)| [frequency.to_bits(), *axis as u32]).collect();
            launch!(
                self,
                &self.kernels.rotary_angles,
                Self::element_blocks(rows * cols),
                THREADS,
                self.staging.put(positions)?,
                self.staging.put(&words)?,
                count(cols),
                scale,
                (rows * cols) as u64,
                cos.address(),
                sin.address(),
            )?;
        }
        Ok((cos, sin))
    }

    fn rows(&self, rows: StepRows<'_, Tensor>) -> Result<Rows> {
        let StepRows { token_ids, drawn, slots, sequences, heads, cos, sin } = rows;
        let words = StepWords::new(token_ids, slots, sequences, self.sharing(heads));
        let start = self.step_words.address();
        self.staging.send(as_bytes(&words.words), start)?;
        let rows = Rows { num_rows: token_ids.len(), words, start, cos, sin };
        if !drawn.is_empty() {
            self.feed(rows.at(rows.words.token_ids), drawn)?;
        }
        Ok(rows)
    }

    fn replay(&self, rows: &Rows, work: impl FnMut() -> Result<Tensor>) -> Result<Tensor> {
        self.repeat(rows, work)
    }

    fn embedding(&self, table: &Linear, first_id: u32, rows: &Rows) -> Result<Tensor> {
        let out = self.tensor(rows.num_rows, table.inputs)?;
        if out.bytes() > 0 {
            launch!(
                self,
                &self.kernels.embedding,
                [rows.num_rows, 1, 1],
                THREADS,
                table.weight.address(),
                first_id,
                count(table.outputs),
                rows.at(rows.words.token_ids),
                count(table.inputs),
                out.address(),
            )?;
        }
        Ok(out)
    }

    fn insert_features(
        &self,
        x: &mut Tensor,
        features: &Features,
        rows: &[(u32, u32)],
        zero: bool,
    ) -> Result<()> {
        assert_eq!(x.cols(), features.hidden, "columns of features");
        let pairs: Vec<[u32; 2]> = rows.iter().map(|&(row, slot)| [row, slot]).collect();
        for pairs in pairs.chunks(self.sizes.max_pairs()) {
            let from = if zero { 0 } else { features.slots.address() };
            let to = self.staging.put(pairs)?;
            let cols = count(x.cols());
            let function = &self.kernels.insert_features;
            launch!(self, function, [pairs.len(), 1, 1], THREADS, x.address(), from, to, cols)?;
        }
        Ok(())
    }

    fn reduce_residual_norm(
        &self,
        x: Tensor,
        residual: Option<Tensor>,
        norm: &Norm,
    ) -> Result<(Tensor, Tensor)> {
        self.sum_and_norm(x, residual, norm)
    }

    fn norm(&self, x: &Tensor, rows: Range<usize>, norm: &Norm) -> Result<Tensor> {
        assert_eq!(x.cols(), norm.cols, "columns of a norm");
        assert!(rows.end <= x.rows(), "rows {rows:?} of {}", x.rows());
        let normed = self.tensor(rows.len(), x.cols())?;
        if normed.bytes() > 0 {
            launch!(
                self,
                &self.kernels.norm_rows,
                [rows.len(), 1, 1],
                THREADS,
                x.row_address(rows.start),
                norm.weight.address(),
                norm.epsilon,
                count(x.cols()),
                normed.address(),
            )?;
        }
        Ok(normed)
    }

    fn reduce(&self, x: Tensor) -> Result<Tensor> {
        self.sum_over_ranks(x)
    }

    fn linear(&self, x: &Tensor, weight: &Linear) -> Result<Tensor> {
        self.multiply(x, weight, DType::Bf16)
    }

    fn linear_part(&self, x: &Tensor, weight: &Linear) -> Result<Tensor> {
        self.multiply_part(x, weight)
    }

    fn logits(&self, x: &Tensor, weight: &Linear) -> Result<Tensor> {
        self.multiply(x, weight, DType::F32)
    }

    fn rotary_append(
        &self,
        qkv: &mut Tensor,
        heads: &AttentionHeads,
        rows: &Rows,
        cache: &mut KvCache,
        layer: usize,
    ) -> Result<()> {
        let head_dim = heads.head_dim;
        assert_eq!((heads.num_kv, head_dim), (cache.num_kv, cache.head_dim), "heads of the cache");
        assert_eq!(qkv.cols(), (heads.num_query() + 2 * heads.num_kv) * head_dim, "columns of qkv");
        assert_eq!(qkv.rows(), rows.num_rows, "rows of qkv");
        if qkv.bytes() == 0 {
            return Ok(());
        }
        launch!(
            self,
            &self.kernels.rotary_append,
            [rows.num_rows, 1, 1],
            THREADS,
            qkv.address(),
            rows.cos.address(),
            rows.sin.address(),
            rows.at(rows.words.slots),
            count(heads.num_query()),
            count(heads.num_kv),
            count(head_dim),
            cache.layer(layer),
        )
    }

    fn paged_attention(
        &self,
        qkv: &Tensor,
        heads: &AttentionHeads,
        rows: &Rows,
        cache: &KvCache,
        layer: usize,
    ) -> Result<Tensor> {
        self.attend(qkv, heads, rows, cache, layer)
    }

    fn gated_silu(&self, gate_up: &Tensor) -> Result<Tensor> {
        self.activate_gated(gate_up)
    }

    fn gated_linear(&self, x: &Tensor, weight: &Linear) -> Result<Tensor> {
        self.multiply_gated(x, weight)
    }

    fn copy_blocks(&self, cache: &mut KvCache, copies: &[(u32, u32)]) -> Result<()> {
        self.copy_cache(cache, copies)
    }

    fn patches(&self, pixels: &[u8], image: &PatchLayout, order: &[u32]) -> Result<Tensor> {
        self.to_patches(pixels, image, order)
    }

    fn vision_rotary(&self, qkv: &mut Tensor, num_heads: usize, cos: &Tensor, sin: &Tensor) -> Result<()> {
        let head_dim = 2 * cos.cols();
        assert_eq!(qkv.cols(), 3 * num_heads * head_dim, "columns of qkv");
        assert_eq!((cos.rows(), sin.rows()), (qkv.rows(), qkv.rows()), "rows of angles");
        if qkv.bytes() == 0 {
            return Ok(());
        }
        launch!(
            self,
            &self.kernels.vision_rotary,
            [qkv.rows(), 1, 1],
            THREADS,
            qkv.address(),
            cos.address(),
            sin.address(),
            count(num_heads),
            count(head_dim),
        )
    }

    fn vision_attention(
        &self,
        qkv: &Tensor,
        num_heads: usize,
        head_dim: usize,
        cu_seqlens: &[u32],
        rows: Range<usize>,
    ) -> Result<Tensor> {
        self.attend_windows(qkv, num_heads, head_dim, cu_seqlens, rows)
    }

    fn gelu(&self, x: &mut Tensor) -> Result<()> {
        let elements = x.rows() * x.cols();
        if elements == 0 {
            return Ok(());
        }
        let grid = Self::element_blocks(elements);
        launch!(self, &self.kernels.gelu, grid, THREADS, x.address(), elements as u64)
    }

    fn join_rows(&self, x: Tensor, group: usize) -> Result<Tensor> {
        let (rows, cols) = (x.rows(), x.cols());
        assert!(group > 0 && rows.is_multiple_of(group), "{rows} rows cannot be joined by {group}");
        Ok(x.reshaped(rows / group, cols * group))
    }

    fn write_features(&self, features: &mut Features, x: &Tensor, slots: &[u32]) -> Result<()> {
        assert_eq!(x.cols(), features.hidden, "columns of features");
        assert_eq!(x.rows(), slots.len(), "slots for the rows of features");
        if x.bytes() == 0 {
            return Ok(());
        }
        let (function, cols) = (&self.kernels.scatter_rows, count(x.cols()));
        let at = self.staging.put(slots)?;
        launch!(self, function, [x.rows(), 1, 1], THREADS, x.address(), at, cols, features.slots.address())
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let out = self.arena.tensor(rows.len(), x.cols(), x.dtype())?;
        if out.bytes() > 0 {
            // A row of single precision is one of twice as many halves.
            let cols = count(x.row_bytes() / size_of::<bf16>());
            let at = self.staging.put(rows)?;
            let function = &self.kernels.gather_rows;
            launch!(self, function, [rows.len(), 1, 1], THREADS, x.address(), at, cols, out.address())?;
        }
        Ok(out)
    }

    fn empty(&self, rows: usize, cols: usize) -> Result<Tensor> {
        self.tensor(rows, cols)
    }

    fn copy_rows(&self, x: &Tensor, target: &mut Tensor, first_row: usize) -> Result<()> {
        assert_eq!((x.cols(), x.dtype()), (target.cols(), target.dtype()), "columns of copied rows");
        assert!(first_row + x.rows() <= target.rows(), "rows of {}", target.rows());
        self.gpu.copy(x.address(), target.row_address(first_row), x.bytes())
    }

    fn candidates(
        &self,
        logits: &Tensor,
        first_id: u32,
        num_ids: usize,
        rows: &[RowSampling<'_>],
    ) -> Result<Candidates> {
        assert_eq!(logits.rows(), rows.len(), "rows to sample");
        self.offered(logits, first_id, num_ids, rows)
    }

    fn read_candidates(&self, candidates: Candidates) -> Result<Told> {
        self.told(candidates)
    }

    fn feeds(&self, candidates: &Candidates) -> bool {
        self.are_fed(candidates)
    }

    fn has_come(&self, candidates: &Candidates) -> Result<bool> {
        self.are_there(candidates)
    }

    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.with_group(|group| Ok(group.host().all_gather(mine)?))
    }

    fn hash(&self, x: &Tensor, rows: Range<usize>) -> Result<Hash> {
        assert!(rows.end <= x.rows(), "rows {rows:?} of {}", x.rows());
        self.begin_hash(x.row_address(rows.start), rows.len() * x.row_bytes())
    }

    fn read_hash(&self, hash: Hash) -> Result<u64> {
        self.wait(self.hashes.event(&hash))?;
        Ok(self.hashes.value(&hash))
    }
}

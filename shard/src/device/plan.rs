//! A device that only counts: it runs the model over shapes, to plan memory.
//!
//! It lends and takes back the workspace exactly as the device does that it plans for, through the same [`RangeAllocator`], so
//! that what it counts is what a run of the same calls needs.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use super::cpu::packed_bytes;
use super::cuda;
use super::ranges::RangeAllocator;
use super::{
    Activations, Angles, AttentionHeads, Candidate, DType, Device, DeviceError, DeviceKind,
    FEATURE_BLOCK_TOKENS, HostElements, HostMatrix, KV_BLOCK_TOKENS, LINEAR_UNIT, Offer, PatchLayout, Result,
    RowSampling, StepRows, Told,
};

/// Counts bytes, reads and computes nothing.
pub struct PlanDevice {
    kind: DeviceKind,
    weights_bytes: Cell<u64>,
    /// Where a GPU's weights would lie.
    places: RefCell<cuda::Places>,
    kv_bytes: Cell<u64>,
    features_bytes: Cell<u64>,
    workspace: Rc<Workspace>,
}

struct Workspace(RefCell<RangeAllocator>);

/// The shape of activations, and their place in the workspace.
pub struct PlanTensor {
    workspace: Rc<Workspace>,
    range: Range<usize>,
    rows: usize,
    cols: usize,
    dtype: DType,
}

impl Activations for PlanTensor {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }
}

impl Drop for PlanTensor {
    fn drop(&mut self) {
        self.workspace.0.borrow_mut().release(self.range.clone());
    }
}

/// How many rows a step has, and their angles.
pub struct PlanRows {
    num_rows: usize,
    _angles: [PlanTensor; 2],
}

/// The shape of a linear layer.
pub struct PlanLinear {
    rows: usize,
    cols: usize,
}

/// Memory that was counted.
pub struct Counted;

impl PlanDevice {
    /// A device that has counted nothing yet, of what one of this kind would take.
    pub fn new(kind: DeviceKind) -> Self {
        Self {
            kind,
            weights_bytes: Cell::new(0),
            places: RefCell::default(),
            kv_bytes: Cell::new(0),
            features_bytes: Cell::new(0),
            workspace: Rc::new(Workspace(RefCell::new(RangeAllocator::new(None)))),
        }
    }

    /// Bytes of packed weights, biases and norms.
    pub fn weights_bytes(&self) -> u64 {
        match self.kind {
            DeviceKind::Cpu => self.weights_bytes.get(),
            DeviceKind::Cuda => self.places.borrow().bytes() as u64,
        }
    }

    /// Bytes of the caches of keys and values.
    pub fn kv_bytes(&self) -> u64 {
        self.kv_bytes.get()
    }

    /// Bytes of the caches of vision features.
    pub fn features_bytes(&self) -> u64 {
        self.features_bytes.get()
    }

    /// Bytes of workspace that the calls so far need.
    pub fn workspace_bytes(&self) -> u64 {
        let unit_bytes = match self.kind {
            DeviceKind::Cpu => size_of::<f32>(),
            DeviceKind::Cuda => cuda::RANGE_BYTES,
        };
        (self.workspace.0.borrow().peak() * unit_bytes) as u64
    }

    fn tensor(&self, rows: usize, cols: usize) -> Result<PlanTensor> {
        self.tensor_of(rows, cols, self.activations())
    }

    fn tensor_of(&self, rows: usize, cols: usize, dtype: DType) -> Result<PlanTensor> {
        let units = match self.kind {
            DeviceKind::Cpu => rows.checked_mul(cols),
            DeviceKind::Cuda => cuda::tensor_units(rows, cols, dtype),
        };
        let range = units.and_then(|units| self.workspace.0.borrow_mut().allocate(units));
        let range = range
            .ok_or_else(|| DeviceError::Failed(format!("activations of {rows} x {cols} are too large")))?;
        Ok(PlanTensor { workspace: self.workspace.clone(), range, rows, cols, dtype })
    }

    /// The type of activations, but for angles and logits, which are of single precision everywhere.
    fn activations(&self) -> DType {
        match self.kind {
            DeviceKind::Cpu => DType::F32,
            DeviceKind::Cuda => DType::Bf16,
        }
    }
}

fn add(counter: &Cell<u64>, bytes: usize) {
    counter.set(counter.get() + bytes as u64);
}

impl Device for PlanDevice {
    type Tensor = PlanTensor;
    type Linear = PlanLinear;
    type Norm = Counted;
    type KvCache = Counted;
    type Features = Counted;
    type Rows = PlanRows;
    type Hash = u64;
    type Candidates = Vec<Candidate>;

    const WANTS_DATA: bool = false;

    fn pack_linear(&self, weight: HostMatrix, bias: Option<Vec<f32>>) -> Result<PlanLinear> {
        let HostMatrix { rows, cols, data } = weight;
        let dtype = match data {
            HostElements::Bf16(_) => DType::Bf16,
            HostElements::F32(_) => DType::F32,
        };
        match self.kind {
            // A layer without bias has one of zeros.
            DeviceKind::Cpu => {
                let bias_bytes = rows.next_multiple_of(LINEAR_UNIT) * size_of::<f32>();
                add(&self.weights_bytes, packed_bytes(rows, cols, dtype) + bias_bytes);
            }
            DeviceKind::Cuda => {
                let mut places = self.places.borrow_mut();
                places.count(rows * cols * DType::Bf16.size_bytes());
                // A bias is there in both types.
                for dtype in bias.iter().flat_map(|_| [DType::F32, DType::Bf16]) {
                    places.count(rows * dtype.size_bytes());
                }
            }
        }
        Ok(PlanLinear { rows, cols })
    }

    fn pack_norm(&self, weight: Vec<f32>, _epsilon: f32) -> Result<Counted> {
        let bytes = size_of_val(&weight[..]);
        match self.kind {
            DeviceKind::Cpu => add(&self.weights_bytes, bytes),
            DeviceKind::Cuda => self.places.borrow_mut().count(bytes),
        }
        Ok(Counted)
    }

    fn kv_cache(
        &self,
        dtype: DType,
        num_layers: usize,
        heads: &AttentionHeads,
        num_blocks: usize,
    ) -> Result<Counted> {
        let token_bytes = num_layers * heads.num_kv * 2 * heads.head_dim * dtype.size_bytes();
        add(&self.kv_bytes, num_blocks * KV_BLOCK_TOKENS * token_bytes);
        Ok(Counted)
    }

    fn features(&self, hidden: usize, num_blocks: usize) -> Result<Counted> {
        add(
            &self.features_bytes,
            num_blocks * FEATURE_BLOCK_TOKENS * hidden * self.activations().size_bytes(),
        );
        Ok(Counted)
    }

    fn upload(&self, rows: usize, cols: usize, _data: &[f32]) -> Result<PlanTensor> {
        self.tensor(rows, cols)
    }

    fn download(&self, x: &PlanTensor) -> Result<Vec<f32>> {
        Ok(vec![0.0; x.rows * x.cols])
    }

    fn angles(&self, angles: &Angles<'_>) -> Result<(PlanTensor, PlanTensor)> {
        let (rows, cols) = (angles.positions.len(), angles.frequencies.len());
        Ok((self.tensor_of(rows, cols, DType::F32)?, self.tensor_of(rows, cols, DType::F32)?))
    }

    fn rows(&self, rows: StepRows<'_, PlanTensor>) -> Result<PlanRows> {
        let StepRows { token_ids, cos, sin, .. } = rows;
        Ok(PlanRows { num_rows: token_ids.len(), _angles: [cos, sin] })
    }

    fn embedding(&self, table: &PlanLinear, _first_id: u32, rows: &PlanRows) -> Result<PlanTensor> {
        self.tensor(rows.num_rows, table.cols)
    }

    fn insert_features(
        &self,
        _x: &mut PlanTensor,
        _: &Counted,
        _rows: &[(u32, u32)],
        _zero: bool,
    ) -> Result<()> {
        Ok(())
    }

    fn reduce_residual_norm(
        &self,
        x: PlanTensor,
        residual: Option<PlanTensor>,
        _: &Counted,
    ) -> Result<(PlanTensor, PlanTensor)> {
        let normed = self.tensor(x.rows, x.cols)?;
        // The sum takes the place of `x`; the residual is kept until it has been added.
        drop(residual);
        Ok((normed, x))
    }

    fn norm(&self, x: &PlanTensor, rows: Range<usize>, _: &Counted) -> Result<PlanTensor> {
        self.tensor(rows.len(), x.cols)
    }

    fn reduce(&self, x: PlanTensor) -> Result<PlanTensor> {
        Ok(x)
    }

    fn linear(&self, x: &PlanTensor, weight: &PlanLinear) -> Result<PlanTensor> {
        assert_eq!(x.cols, weight.cols, "inputs of a linear layer");
        self.tensor(x.rows, weight.rows)
    }

    fn logits(&self, x: &PlanTensor, weight: &PlanLinear) -> Result<PlanTensor> {
        assert_eq!(x.cols, weight.cols, "inputs of a linear layer");
        self.tensor_of(x.rows, weight.rows, DType::F32)
    }

    fn rotary_append(
        &self,
        _qkv: &mut PlanTensor,
        _heads: &AttentionHeads,
        _rows: &PlanRows,
        _: &mut Counted,
        _layer: usize,
    ) -> Result<()> {
        Ok(())
    }

    fn paged_attention(
        &self,
        qkv: &PlanTensor,
        heads: &AttentionHeads,
        _rows: &PlanRows,
        _: &Counted,
        _layer: usize,
    ) -> Result<PlanTensor> {
        self.tensor(qkv.rows, heads.num_query() * heads.head_dim)
    }

    fn gated_silu(&self, gate_up: &PlanTensor) -> Result<PlanTensor> {
        self.tensor(gate_up.rows, gate_up.cols / 2)
    }

    fn copy_blocks(&self, _: &mut Counted, _copies: &[(u32, u32)]) -> Result<()> {
        Ok(())
    }

    /// Takes three colours, as pixels have. Without pixels, too: planning needs the shapes only.
    fn patches(&self, _pixels: &[u8], image: &PatchLayout, order: &[u32]) -> Result<PlanTensor> {
        let values = 3 * image.temporal_patch_size * image.patch_size * image.patch_size;
        self.tensor(order.len(), values)
    }

    fn vision_rotary(
        &self,
        _qkv: &mut PlanTensor,
        _num_heads: usize,
        _cos: &PlanTensor,
        _sin: &PlanTensor,
    ) -> Result<()> {
        Ok(())
    }

    fn vision_attention(
        &self,
        _qkv: &PlanTensor,
        num_heads: usize,
        head_dim: usize,
        _cu_seqlens: &[u32],
        rows: Range<usize>,
    ) -> Result<PlanTensor> {
        self.tensor(rows.len(), num_heads * head_dim)
    }

    fn gelu(&self, _x: &mut PlanTensor) -> Result<()> {
        Ok(())
    }

    fn join_rows(&self, mut x: PlanTensor, group: usize) -> Result<PlanTensor> {
        (x.rows, x.cols) = (x.rows / group, x.cols * group);
        Ok(x)
    }

    fn write_features(&self, _: &mut Counted, _x: &PlanTensor, _slots: &[u32]) -> Result<()> {
        Ok(())
    }

    fn gather_rows(&self, x: &PlanTensor, rows: &[u32]) -> Result<PlanTensor> {
        self.tensor_of(rows.len(), x.cols, x.dtype)
    }

    fn empty(&self, rows: usize, cols: usize) -> Result<PlanTensor> {
        self.tensor(rows, cols)
    }

    fn copy_rows(&self, _x: &PlanTensor, _target: &mut PlanTensor, _first_row: usize) -> Result<()> {
        Ok(())
    }

    fn candidates(
        &self,
        _logits: &PlanTensor,
        first_id: u32,
        num_ids: usize,
        rows: &[RowSampling<'_>],
    ) -> Result<Vec<Candidate>> {
        // Offers that name no token never suffice: so the planned steps make the calls of rows that need all logits.
        let offer = Offer { num_ids, ..Offer::default() };
        let candidate = |row: &RowSampling<'_>| Candidate {
            score: 0.0,
            token_id: first_id,
            logit: 0.0,
            max_logit: 0.0,
            sum_exp: 1.0,
            top: Vec::new(),
            offer: (row.num_offered > 0).then(|| offer.clone()),
        };
        Ok(rows.iter().map(candidate).collect())
    }

    fn read_candidates(&self, candidates: Vec<Candidate>) -> Result<Told> {
        Ok(Told::Own(candidates))
    }

    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![mine.to_vec()])
    }

    fn hash(&self, _x: &PlanTensor, _rows: Range<usize>) -> Result<u64> {
        Ok(0)
    }

    fn read_hash(&self, hash: u64) -> Result<u64> {
        Ok(hash)
    }
}

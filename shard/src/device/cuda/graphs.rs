//! Steps that are done again at once: what the calls of one gave the stream is kept as a graph, and launched for the next
//! of the same shape.
//!
//! A graph has the addresses of its activations in it. They are the same again because the workspace deals out memory by a fixed
//! rule: from the same free ranges the same calls get the same places. So a graph is kept with the free ranges from which it
//! began, and used where these are the same.
//!
//! Where a step cannot be kept, it is done as it is, and so are all later ones: what the driver or a library refuses once is not
//! asked for again.

use std::{
    cell::{Cell, RefCell},
    ops::Range,
};

use super::arena::Tensor;
use super::device::CudaDevice;
use super::driver::{Address, Graph};
use super::paged::Rows;
use super::recent::Recent;
use crate::device::{Activations, DType, DeviceError, Result};

/// The most rows of a step that is kept: beyond, a step takes long beside the calls that it is made of. Its sums, of up to 8192
/// columns, are no longer than what ranks sum through one another's memory.
const MAX_ROWS: usize = 64;

/// Graphs that are kept.
const MAX_GRAPHS: usize = 512;

/// Kernels of a step for each layer, at most, and beside the layers.
const LAYER_KERNELS: usize = 12;
const OTHER_KERNELS: usize = 8;

/// Bytes of the GPU that a kernel of a graph takes. CUDA does not say: a graph of a few hundred takes about a megabyte.
const KERNEL_BYTES: usize = 3 << 10;

/// Bytes of the GPU that all graphs take that are kept of a model of so many layers, about.
pub fn graphs_bytes(num_layers: usize) -> usize {
    MAX_GRAPHS * (num_layers * LAYER_KERNELS + OTHER_KERNELS) * KERNEL_BYTES
}

/// What the calls of a step depend on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Shape {
    num_rows: usize,
    num_pieces: usize,
    combine_warps: usize,
    angles: [Address; 2],
    free: Vec<Range<usize>>,
}

/// How far a shape is.
enum Kept {
    /// It was seen once. What libraries set up at a first call is set up, and is in no graph.
    Seen,
    /// With where its result is, and how many sums in one shot it has.
    Graph(Graph, Place, usize),
}

/// Where the result of a graph is.
#[derive(Clone, Debug)]
struct Place {
    range: Range<usize>,
    rows: usize,
    cols: usize,
    dtype: DType,
}

/// The graphs of a device.
pub struct Graphs {
    kept: RefCell<Recent<Shape, Kept>>,
    /// Whether a step could not be kept.
    are_off: Cell<bool>,
}

impl Graphs {
    /// None so far.
    pub fn new() -> Self {
        Self { kept: RefCell::new(Recent::new(MAX_GRAPHS)), are_off: Cell::new(false) }
    }

    /// Forgets all: what they had in them is no more, as a group's way to meet.
    pub fn clear(&self) {
        self.kept.borrow_mut().clear();
    }

    /// Keeps no more of them.
    fn turn_off(&self, error: &DeviceError) {
        tracing::warn!(%error, "steps are not kept as graphs any more: each token takes longer");
        self.are_off.set(true);
        self.clear();
    }
}

impl CudaDevice {
    /// Does `work` or what it did before. See [`Device::replay`](crate::device::Device::replay).
    pub(super) fn repeat(&self, rows: &Rows, mut work: impl FnMut() -> Result<Tensor>) -> Result<Tensor> {
        // A rank that keeps nothing any more still meets the others as they begin.
        let may_be_kept = self.begin_repeatable()? && self.use_graphs && !self.graphs.are_off.get();
        let split = rows.words.split;
        // Each row is the next token of a sequence, and has its context split: then all sizes follow from the shape.
        let decodes = split.rows.count == rows.num_rows && split.sequences.count == rows.num_rows;
        if !may_be_kept || !decodes || rows.num_rows > MAX_ROWS {
            return work();
        }
        let shape = Shape {
            num_rows: rows.num_rows,
            num_pieces: split.pieces.count,
            combine_warps: split.combine_warps,
            angles: [rows.cos.address(), rows.sin.address()],
            free: self.arena.free_ranges(),
        };
        let mut graphs = self.graphs.kept.borrow_mut();
        match graphs.get(&shape) {
            Some(Kept::Graph(graph, place, calls)) => {
                self.progress.pieces_of(0).count();
                self.repeat_calls(*calls)?;
                graph.launch()?;
                let Place { range, rows, cols, dtype } = place.clone();
                Ok(self.arena.tensor_at(range, rows, cols, dtype))
            }
            Some(Kept::Seen) => {
                drop(graphs);
                self.capture(shape, work)
            }
            None => {
                graphs.insert(shape, Kept::Seen);
                drop(graphs);
                work()
            }
        }
    }

    /// Keeps what `work` does as the graph of a shape, and launches it, or does it if it cannot be kept.
    fn capture(&self, shape: Shape, mut work: impl FnMut() -> Result<Tensor>) -> Result<Tensor> {
        let (captured, calls) = self.keep_calls(|| Graph::capture(&self.gpu, &mut work))?;
        match captured {
            Ok((graph, out)) => {
                self.repeat_calls(calls)?;
                graph.launch()?;
                let (rows, cols, dtype) = (out.rows(), out.cols(), out.dtype());
                let place = Place { range: out.range(), rows, cols, dtype };
                self.graphs.kept.borrow_mut().insert(shape, Kept::Graph(graph, place, calls));
                Ok(out)
            }
            Err(DeviceError::GroupLost) => Err(DeviceError::GroupLost),
            Err(error) => {
                // Whoever ends what waits for a lost rank disturbs what is being kept.
                self.with_group(|group| group.check())?;
                self.graphs.turn_off(&error);
                // Where the GPU itself has failed, this fails as well.
                work()
            }
        }
    }
}

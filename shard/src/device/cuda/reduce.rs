//! Sums over ranks, and the norms that follow: in one shot where ranks reach one another's memory and the message is small, by
//! the group's other way where not. Where they reach it, a few words of each rank are gathered in the same way.
//!
//! **Turns.** Calls in one shot use two buffers in turn, and a graph has in it which ones its calls use. So what is kept as a graph
//! begins with the first buffer, always: before it an empty call is made if it would be the other's turn, and after it the turn
//! follows from how many calls were kept. All ranks have made the same calls and are at the same turn, and the
//! empty call comes before a step that could be repeated, whether this rank repeats it or not: so all make it, or none.
#![allow(unsafe_code)]

use super::arena::Tensor;
use super::device::{CudaDevice, Norm, THREADS};
use super::driver::Address;
use super::kernels::{Argument, count, launch};
use super::linear::Linear;
use super::peers::{MAX_BLOCKS, MAX_MESSAGE_BYTES, Peers};
use crate::device::{Activations, DType, DeviceError, Result};

/// Elements that a thread reads of each rank at a time.
const VECTOR: usize = 8;

/// Launches a kernel that meets those of the other ranks: its function, grid, what it is given to meet them, and other arguments.
macro_rules! launch_meeting {
    ($device:expr, $function:expr, $grid:expr, $call:expr, $($argument:expr),* $(,)?) => {
        launch!(
            $device,
            $function,
            $grid,
            THREADS,
            $call.inputs,
            $call.flags,
            $call.rank,
            $call.world_size,
            $call.epochs,
            $call.abort,
            $call.status,
            $($argument),*
        )
    };
}

impl CudaDevice {
    /// `x W^T + bias`, to be summed over the ranks: written where the others read it, if it fits there, so that the sum copies
    /// nothing.
    pub(super) fn multiply_part(&self, x: &Tensor, linear: &Linear) -> Result<Tensor> {
        let out = self.tensor(x.rows(), linear.outputs)?;
        let mut group = self.group.borrow_mut();
        let lent = group.as_mut().and_then(|group| group.lend(out.bytes()));
        drop(group);
        let out = out.placed(lent);
        self.multiply_to(x, linear, &out)?;
        Ok(out)
    }

    /// The sum of `x` over the ranks, in the place of `x` in the workspace.
    pub(super) fn sum_over_ranks(&self, x: Tensor) -> Result<Tensor> {
        self.with_group(|group| match group.peers(x.bytes())? {
            Some(peers) => self.sum_in_pieces(peers, x),
            None => {
                group.all_reduce_sum(x.address(), x.rows() * x.cols())?;
                Ok(x)
            }
        })
    }

    /// The same in as many calls as it takes: of any element, the same bits as in one.
    fn sum_in_pieces(&self, peers: &mut Peers, mut x: Tensor) -> Result<Tensor> {
        let bytes = x.bytes();
        if x.is_lent() {
            x.settle();
            self.sum_piece(peers, x.address(), bytes)?;
            return Ok(x);
        }
        for first in (0..bytes).step_by(MAX_MESSAGE_BYTES) {
            let (at, len) = (x.address() + first as Address, MAX_MESSAGE_BYTES.min(bytes - first));
            self.gpu.copy(at, peers.input(), len)?;
            self.sum_piece(peers, at, len)?;
        }
        Ok(x)
    }

    /// Sums the parts that the ranks have written, to `out`.
    fn sum_piece(&self, peers: &mut Peers, out: Address, bytes: usize) -> Result<()> {
        let (call, elements) = (peers.begin()?, bytes / DType::Bf16.size_bytes());
        launch_meeting!(
            self,
            &self.kernels.one_shot_sum,
            [elements.div_ceil(THREADS * VECTOR).clamp(1, MAX_BLOCKS), 1, 1],
            call,
            elements as u64,
            out,
        )
    }

    /// Whether [`CudaDevice::gather_words`] can be called, which is so at all ranks or at none.
    pub(super) fn gathers(&self) -> Result<bool> {
        self.with_group(|group| Ok(group.peers(0)?.is_some()))
    }

    /// Has the stream write the ranks' words to `out`, one rank after the other; there are as many ranks as is returned. All make
    /// the same calls, in the same places among their sums.
    pub(super) fn gather_words(&self, mine: Address, words: usize, out: Address) -> Result<usize> {
        let call = self.with_group(|group| group.peers(0)?.map(Peers::begin).transpose())?;
        let call = call.ok_or_else(|| DeviceError::Failed("ranks do not reach one another".into()))?;
        assert!(words * size_of::<u32>() <= MAX_MESSAGE_BYTES, "{words} words in a part");
        launch_meeting!(self, &self.kernels.one_shot_gather, [1, 1, 1], call, mine, count(words), out,)?;
        Ok(call.world_size as usize)
    }

    /// See [`Device::reduce_residual_norm`](crate::device::Device::reduce_residual_norm).
    pub(super) fn sum_and_norm(
        &self,
        mut x: Tensor,
        residual: Option<Tensor>,
        norm: &Norm,
    ) -> Result<(Tensor, Tensor)> {
        let (rows, cols) = (x.rows(), x.cols());
        assert_eq!(cols, norm.cols, "columns of a norm");
        if let Some(residual) = &residual {
            assert_eq!((residual.rows(), residual.cols()), (rows, cols), "shape of the residual");
        }
        let residual_at = residual.as_ref().map_or(0, Tensor::address);
        let fits = (1..=MAX_MESSAGE_BYTES).contains(&x.bytes());
        let call = self.with_group(|group| match group.peers(x.bytes())? {
            Some(peers) if fits => {
                if x.is_lent() {
                    x.settle();
                } else {
                    self.gpu.copy(x.address(), peers.input(), x.bytes())?;
                }
                peers.begin().map(Some)
            }
            _ => Ok(None),
        })?;
        let Some(call) = call else {
            let sum = self.sum_over_ranks(x)?;
            let normed = self.tensor(rows, cols)?;
            self.norm_sum(&sum, residual_at, norm, &normed)?;
            return Ok((normed, sum));
        };
        let normed = self.tensor(rows, cols)?;
        launch_meeting!(
            self,
            &self.kernels.one_shot_residual_norm,
            [rows.min(MAX_BLOCKS), 1, 1],
            call,
            residual_at,
            norm.weight.address(),
            norm.epsilon,
            count(rows),
            count(cols),
            normed.address(),
            x.address(),
        )?;
        Ok((normed, x))
    }

    /// Adds a residual, unless it is at 0, to a sum over the ranks, and norms.
    fn norm_sum(&self, sum: &Tensor, residual: Address, norm: &Norm, normed: &Tensor) -> Result<()> {
        if normed.bytes() == 0 {
            return Ok(());
        }
        launch!(
            self,
            &self.kernels.residual_norm,
            [sum.rows(), 1, 1],
            THREADS,
            sum.address(),
            residual,
            norm.weight.address(),
            norm.epsilon,
            count(sum.cols()),
            normed.address(),
            sum.address(),
        )
    }

    /// Comes to the turn of the first buffer, and says whether what follows may be kept as a graph.
    pub(super) fn begin_repeatable(&self) -> Result<bool> {
        self.with_group(|group| {
            group.check()?;
            if let Some(peers) = group.peers(0)?.filter(|peers| peers.turn() != 0) {
                self.sum_piece(peers, 0, 0)?;
            }
            Ok(group.fits_graphs())
        })
    }

    /// Does `work` so that its calls in one shot are kept as a graph and not made. Returns what it gives, and how many calls there
    /// are.
    pub(super) fn keep_calls<T>(&self, work: impl FnOnce() -> T) -> Result<(T, usize)> {
        self.with_group(|group| {
            if let Some(peers) = group.peers(0)? {
                peers.keep();
            }
            Ok(())
        })?;
        let done = work();
        let calls = self.with_group(|group| Ok(group.peers(0)?.map_or(0, Peers::kept)))?;
        Ok((done, calls))
    }

    /// Begins calls in one shot of a graph that is launched next.
    pub(super) fn repeat_calls(&self, calls: usize) -> Result<()> {
        self.with_group(|group| group.peers(0)?.map_or(Ok(()), |peers| peers.repeat(calls)))
    }
}

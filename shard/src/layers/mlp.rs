//! The gated MLP of both towers.

use crate::device::{Activations, Device, Result};
use crate::layers::linear::{GateUp, LinearSpec, RowParallel};
use crate::layers::partition::{self, Parallel};
use crate::weights::Loader;

/// Rows that an MLP works on at a time: what lies between gate and down is several times wider than the
/// residual stream, and a step may have tens of thousands of rows.
pub const MLP_CHUNK_ROWS: usize = 4096;

/// `down(silu(gate(x)) * up(x))`, its columns split over ranks.
pub struct GatedMlp<D: Device> {
    gate_up_proj: GateUp<D>,
    down_proj: RowParallel<D>,
    hidden_size: usize,
}

impl<D: Device> GatedMlp<D> {
    /// Loads this rank's columns of `{prefix}.gate_proj`, `{prefix}.up_proj` and `{prefix}.down_proj`.
    pub fn load(
        loader: &mut Loader<'_, D>,
        prefix: &str,
        [hidden_size, intermediate_size]: [usize; 2],
        bias: bool,
        parallel: Parallel,
    ) -> Result<Self> {
        let columns = partition::columns(intermediate_size, parallel);
        let gate_up_proj = GateUp::load(loader, prefix, [hidden_size, intermediate_size], bias, &columns)?;
        let down = format!("{prefix}.down_proj");
        let spec = LinearSpec { prefix: &down, outputs: hidden_size, inputs: intermediate_size, bias };
        let down_proj = RowParallel::load(loader, spec, &columns, parallel)?;
        Ok(Self { gate_up_proj, down_proj, hidden_size })
    }

    /// `[rows, hidden] -> [rows, hidden]`, one addend of as many as there are ranks.
    pub fn forward(&self, device: &D, x: &D::Tensor) -> Result<D::Tensor> {
        let num_rows = x.rows();
        if num_rows <= MLP_CHUNK_ROWS {
            return self.down_proj.forward(device, &self.gate_up_proj.forward(device, x)?);
        }
        let mut out = device.empty(num_rows, self.hidden_size)?;
        for first_row in (0..num_rows).step_by(MLP_CHUNK_ROWS) {
            let rows: Vec<u32> =
                (first_row..num_rows.min(first_row + MLP_CHUNK_ROWS)).map(|row| row as u32).collect();
            let chunk = device.gather_rows(x, &rows)?;
            let chunk = self.gate_up_proj.forward(device, &chunk)?;
            let chunk = self.down_proj.forward(device, &chunk)?;
            device.copy_rows(&chunk, &mut out, first_row)?;
        }
        Ok(out)
    }
}

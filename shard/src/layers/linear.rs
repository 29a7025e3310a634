//! Linear layers that are split over ranks.

use crate::device::{Device, Result};
use crate::layers::partition::{ColumnRange, HeadRange, Parallel};
use crate::weights::{Loader, RowSlice};

/// Weights as the checkpoint names them: `{prefix}.weight` of shape `[out, in]`, and `{prefix}.bias` where
/// there is one.
#[derive(Clone, Copy)]
pub struct LinearSpec<'a> {
    /// What stands before `.weight` and `.bias`.
    pub prefix: &'a str,
    /// Outputs of the whole layer.
    pub outputs: usize,
    /// Inputs of the whole layer.
    pub inputs: usize,
    /// Whether there is a bias.
    pub bias: bool,
}

impl LinearSpec<'_> {
    /// Packs rows `ranges` (each with its padding) and columns `cols` of the layers `specs`, one under the
    /// other.
    fn pack<D: Device>(
        loader: &mut Loader<'_, D>,
        specs: &[(LinearSpec<'_>, ColumnRange)],
        cols: &ColumnRange,
    ) -> Result<D::Linear> {
        let mut matrices = Vec::with_capacity(specs.len());
        let mut biases = Vec::with_capacity(specs.len());
        let names: Vec<_> = specs
            .iter()
            .map(|(spec, _)| (format!("{}.weight", spec.prefix), format!("{}.bias", spec.prefix)))
            .collect();
        let shapes: Vec<_> = specs.iter().map(|(spec, _)| [spec.outputs, spec.inputs]).collect();
        for (((spec, range), (weight, bias)), shape) in specs.iter().zip(&names).zip(&shapes) {
            let slice =
                |name, shape| RowSlice { name, shape, rows: range.cols.clone(), padded_rows: range.padded };
            matrices.push(slice(weight, shape));
            if spec.bias {
                biases.push(slice(bias, &shape[..1]));
            }
        }
        let matrix = loader.matrix(&matrices, cols.cols.clone(), cols.padded)?;
        let bias = if biases.is_empty() { None } else { Some(loader.vector(&biases)?) };
        loader.device.pack_linear(matrix, bias)
    }
}

/// All of `0..len`, without padding.
fn whole(len: usize) -> ColumnRange {
    ColumnRange { cols: 0..len, padded: len }
}

/// Columns of some heads, without padding.
fn head_columns(heads: &std::ops::Range<usize>, head_dim: usize) -> ColumnRange {
    let cols = heads.start * head_dim..heads.end * head_dim;
    ColumnRange { padded: cols.len(), cols }
}

/// A layer of which each rank computes some outputs.
pub struct ColumnParallel<D: Device> {
    linear: D::Linear,
}

impl<D: Device> ColumnParallel<D> {
    /// Loads the outputs `outputs`.
    pub fn load(loader: &mut Loader<'_, D>, spec: LinearSpec<'_>, outputs: ColumnRange) -> Result<Self> {
        let linear = LinearSpec::pack(loader, &[(spec, outputs)], &whole(spec.inputs))?;
        Ok(Self { linear })
    }

    /// `[rows, inputs] -> [rows, this rank's outputs]`.
    pub fn forward(&self, device: &D, x: &D::Tensor) -> Result<D::Tensor> {
        device.linear(x, &self.linear)
    }
}

/// A layer of which each rank has some inputs. What it gives is a part of a sum: [`Device::reduce`] or
/// [`Device::reduce_residual_norm`] has to follow.
pub struct RowParallel<D: Device> {
    linear: D::Linear,
}

impl<D: Device> RowParallel<D> {
    /// Loads the inputs `inputs`; the bias goes to one rank, so that it is added once.
    pub fn load(
        loader: &mut Loader<'_, D>,
        spec: LinearSpec<'_>,
        inputs: &ColumnRange,
        parallel: Parallel,
    ) -> Result<Self> {
        let spec = LinearSpec { bias: spec.bias && parallel.rank == 0, ..spec };
        let linear = LinearSpec::pack(loader, &[(spec, whole(spec.outputs))], inputs)?;
        Ok(Self { linear })
    }

    /// Loads the inputs that come from this rank's heads.
    pub fn load_heads(
        loader: &mut Loader<'_, D>,
        spec: LinearSpec<'_>,
        heads: &HeadRange,
        head_dim: usize,
        parallel: Parallel,
    ) -> Result<Self> {
        Self::load(loader, spec, &head_columns(&heads.query, head_dim), parallel)
    }

    /// `[rows, this rank's inputs] -> [rows, outputs]`, one addend of as many as there are ranks.
    pub fn forward(&self, device: &D, x: &D::Tensor) -> Result<D::Tensor> {
        device.linear_part(x, &self.linear)
    }
}

/// Queries, keys and values of this rank's heads, in one matrix.
pub struct QkvParallel<D: Device> {
    linear: D::Linear,
}

impl<D: Device> QkvParallel<D> {
    /// Loads from three layers with biases: `{prefix}.q_proj`, `{prefix}.k_proj`, `{prefix}.v_proj`.
    pub fn load(
        loader: &mut Loader<'_, D>,
        prefix: &str,
        hidden_size: usize,
        num_heads: [usize; 2],
        heads: &HeadRange,
        head_dim: usize,
    ) -> Result<Self> {
        let [num_query, num_kv] = num_heads;
        let parts = [
            ("q_proj", num_query, &heads.query),
            ("k_proj", num_kv, &heads.kv),
            ("v_proj", num_kv, &heads.kv),
        ];
        let prefixes = parts.map(|(name, ..)| format!("{prefix}.{name}"));
        let specs: Vec<_> = parts
            .iter()
            .zip(&prefixes)
            .map(|((_, num, range), prefix)| {
                let spec = LinearSpec { prefix, outputs: num * head_dim, inputs: hidden_size, bias: true };
                (spec, head_columns(range, head_dim))
            })
            .collect();
        Ok(Self { linear: LinearSpec::pack(loader, &specs, &whole(hidden_size))? })
    }

    /// Loads from one layer with bias, in which all queries come first, then all keys, then all values.
    pub fn load_fused(
        loader: &mut Loader<'_, D>,
        prefix: &str,
        hidden_size: usize,
        heads: &HeadRange,
        head_dim: usize,
    ) -> Result<Self> {
        let spec = LinearSpec { prefix, outputs: 3 * hidden_size, inputs: hidden_size, bias: true };
        let specs = [0, 1, 2].map(|part| {
            let ColumnRange { cols, padded } = head_columns(&heads.query, head_dim);
            let offset = part * hidden_size;
            (spec, ColumnRange { cols: cols.start + offset..cols.end + offset, padded })
        });
        Ok(Self { linear: LinearSpec::pack(loader, &specs, &whole(hidden_size))? })
    }

    /// `[rows, hidden] -> [rows, (num_query + 2 num_kv) * head_dim]`: queries, keys, values.
    pub fn forward(&self, device: &D, x: &D::Tensor) -> Result<D::Tensor> {
        device.linear(x, &self.linear)
    }
}

/// Gate and up of a gated MLP, in one matrix.
pub struct GateUp<D: Device> {
    linear: D::Linear,
}

impl<D: Device> GateUp<D> {
    /// Loads `{prefix}.gate_proj` and `{prefix}.up_proj`. Padded columns have gates of zero, so that they
    /// give zeros.
    pub fn load(
        loader: &mut Loader<'_, D>,
        prefix: &str,
        [hidden_size, intermediate_size]: [usize; 2],
        bias: bool,
        columns: &ColumnRange,
    ) -> Result<Self> {
        let prefixes = ["gate_proj", "up_proj"].map(|name| format!("{prefix}.{name}"));
        let specs = [0, 1].map(|part| {
            let spec =
                LinearSpec { prefix: &prefixes[part], outputs: intermediate_size, inputs: hidden_size, bias };
            (spec, columns.clone())
        });
        Ok(Self { linear: LinearSpec::pack(loader, &specs, &whole(hidden_size))? })
    }

    /// `[rows, hidden] -> [rows, this rank's columns]`: `silu(gate) * up`.
    pub fn forward(&self, device: &D, x: &D::Tensor) -> Result<D::Tensor> {
        device.gated_linear(x, &self.linear)
    }
}

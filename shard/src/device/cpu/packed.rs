//! Weights of a linear layer, in the order in which the kernels read them.
//!
//! Outputs come in panels of 16, one panel after the other; within a panel, inputs come in pairs:
//! bf16 as `[in / 2][16 outputs][2 inputs]`, which is one cache line per pair and what `vdpbf16ps` wants;
//! f32 as `[in][16 outputs]`. An odd last input is padded by zero, and so are the outputs of the last panel.

use std::sync::Arc;

use half::bf16;

use super::memory::Region;
use super::simd::LANES;
use crate::device::{DType, DeviceError, HostElements, HostMatrix, Result};
use crate::progress::Counter;

/// Weights of a linear layer, `[out, in]`, and its bias.
pub struct PackedLinear {
    pub(super) weight: Arc<Region>,
    pub(super) dtype: DType,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// One element per output, padded to whole panels; zeros without a bias.
    pub(super) bias: Arc<[f32]>,
}

/// Bytes of the packed weights of a linear layer of `rows` outputs and `cols` inputs, without its bias of 4 bytes per
/// output.
pub fn packed_bytes(rows: usize, cols: usize, dtype: DType) -> usize {
    rows.next_multiple_of(LANES) * cols.next_multiple_of(2) * dtype.size_bytes()
}

impl PackedLinear {
    /// Packs a matrix, counting the work on `pieces`. `bias`, if there is one, has an element for each of its rows.
    pub fn new(matrix: HostMatrix, bias: Option<Vec<f32>>, pieces: &Counter) -> Result<Self> {
        let (outputs, inputs) = (matrix.rows, matrix.cols);
        let (dtype, len) = match &matrix.data {
            HostElements::Bf16(data) => (DType::Bf16, data.len()),
            HostElements::F32(data) => (DType::F32, data.len()),
        };
        if outputs.checked_mul(inputs) != Some(len) {
            return Err(DeviceError::Failed(format!(
                "a matrix of {outputs} x {inputs} has {len} elements instead of their product"
            )));
        }
        let mut bias = bias.unwrap_or_else(|| vec![0.0; outputs]);
        if bias.len() != outputs {
            return Err(DeviceError::Failed(format!(
                "a bias has {} elements for a matrix of {outputs} outputs",
                bias.len()
            )));
        }
        bias.resize(outputs.next_multiple_of(LANES), 0.0);
        let bytes = packed_bytes(outputs, inputs, dtype);
        let mut weight = Region::new(bytes, "the weights of a layer", pieces)?;
        let shape = [outputs, inputs];
        match &matrix.data {
            HostElements::Bf16(data) => {
                pack(weight.as_mut_slice(), data, shape, DType::Bf16, |x| x.to_bits(), pieces);
            }
            HostElements::F32(data) => {
                pack(weight.as_mut_slice(), data, shape, DType::F32, |x| x, pieces);
            }
        }
        Ok(Self { weight: weight.into(), dtype, outputs, inputs, bias: bias.into() })
    }

    /// Elements of a panel.
    pub(super) fn panel_len(&self) -> usize {
        LANES * self.inputs.next_multiple_of(2)
    }

    /// Weights of output `output`, in f32.
    pub(super) fn read_row(&self, output: usize, to: &mut [f32]) {
        assert!(output < self.outputs, "output {output} of a layer of {}", self.outputs);
        assert_eq!(to.len(), self.inputs);
        let panel = output / LANES * self.panel_len();
        for (input, x) in to.iter_mut().enumerate() {
            let index = panel + place(self.dtype, output % LANES, input);
            *x = match self.dtype {
                DType::Bf16 => bf16::from_bits(self.weight.as_slice::<u16>()[index]).to_f32(),
                DType::F32 => self.weight.as_slice::<f32>()[index],
            };
        }
    }
}

/// Where in its panel the weight of an output and an input lies.
fn place(dtype: DType, lane: usize, input: usize) -> usize {
    match dtype {
        DType::Bf16 => (input / 2 * LANES + lane) * 2 + input % 2,
        DType::F32 => input * LANES + lane,
    }
}

fn pack<T: Copy, U>(
    to: &mut [U],
    from: &[T],
    [outputs, inputs]: [usize; 2],
    dtype: DType,
    convert: impl Fn(T) -> U,
    pieces: &Counter,
) {
    let panel_len = LANES * inputs.next_multiple_of(2);
    if panel_len == 0 {
        return;
    }
    for (panel, to) in to.chunks_exact_mut(panel_len).enumerate() {
        let first = panel * LANES;
        for output in first..outputs.min(first + LANES) {
            for (input, &x) in from[output * inputs..(output + 1) * inputs].iter().enumerate() {
                to[place(dtype, output - first, input)] = convert(x);
            }
        }
        pieces.count();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_went_in() {
        for (outputs, inputs) in [(0, 0), (1, 1), (16, 2), (17, 3), (33, 8), (5, 0)] {
            let data: Vec<f32> = (0..outputs * inputs).map(|i| i as f32 - 7.0).collect();
            let halves = data.iter().map(|&x| bf16::from_f32(x)).collect();
            for elements in [HostElements::F32(data.clone()), HostElements::Bf16(halves)] {
                let matrix = HostMatrix { rows: outputs, cols: inputs, data: elements };
                let packed = PackedLinear::new(matrix, None, &Counter::default()).expect("it fits");
                assert_eq!(packed.weight.len(), packed_bytes(outputs, inputs, packed.dtype));
                let mut row = vec![0.0; inputs];
                for output in 0..outputs {
                    packed.read_row(output, &mut row);
                    assert_eq!(row, data[output * inputs..(output + 1) * inputs]);
                }
            }
        }
    }

    #[test]
    fn wrong_lengths_are_errors() {
        let matrix = |len| HostMatrix { rows: 3, cols: 2, data: HostElements::F32(vec![0.0; len]) };
        let pack = |len, bias| PackedLinear::new(matrix(len), bias, &Counter::default());
        assert!(pack(5, None).is_err());
        assert!(pack(6, Some(vec![0.0; 2])).is_err());
        assert!(pack(6, Some(vec![0.0; 3])).is_ok());
    }
}

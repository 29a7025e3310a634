//! From a checkpoint to a device: slices of tensors, converted, and a note of everything that is wrong.

use std::ops::Range;

use half::{bf16, f16};
use safetensors::Dtype;

use super::checkpoint::{Checkpoint, CheckpointFault, TensorRef};
use crate::checksum::Checksum;
use crate::device::{DType, Device, HostElements, HostMatrix, Result};

/// Rows of one tensor that become rows of a matrix.
pub struct RowSlice<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// Its whole shape; sizes after the first are read as one.
    pub shape: &'a [usize],
    /// Rows to take.
    pub rows: Range<usize>,
    /// Rows that they are filled up to, with zeros.
    pub padded_rows: usize,
}

/// Bytes of a tensor that are read between two calls of the progress.
const READ_BYTES: usize = 1 << 20;

/// Hears the bytes that were read so far. An error ends the load.
pub type Progress<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// Reads the slices of one rank. Every tensor is checked in name, type and whole shape; faults are collected,
/// and a faulty tensor reads as zeros, so that one pass tells all faults.
pub struct Loader<'a, D: Device> {
    /// Where the weights go.
    pub device: &'a D,
    checkpoint: &'a Checkpoint,
    dtype: DType,
    progress: &'a mut Progress<'a>,
    loaded_bytes: u64,
    checksum: Checksum,
    faults: Vec<CheckpointFault>,
}

impl<'a, D: Device> Loader<'a, D> {
    /// A loader that has read nothing yet.
    pub fn new(
        device: &'a D,
        checkpoint: &'a Checkpoint,
        dtype: DType,
        progress: &'a mut Progress<'a>,
    ) -> Self {
        Self {
            device,
            checkpoint,
            dtype,
            progress,
            loaded_bytes: 0,
            checksum: Checksum::default(),
            faults: Vec::new(),
        }
    }

    /// The checksum of the bytes read so far, in their order. A device that only counts reads none.
    pub fn checksum(&self) -> u64 {
        self.checksum.finish()
    }

    /// Everything that was wrong so far.
    pub fn into_faults(self) -> Vec<CheckpointFault> {
        self.faults
    }

    /// Columns `cols` of slices of rows, one under the other, filled up to `padded_cols` with zeros.
    ///
    /// # Errors
    /// The load was ended.
    pub fn matrix(
        &mut self,
        slices: &[RowSlice<'_>],
        cols: Range<usize>,
        padded_cols: usize,
    ) -> Result<HostMatrix> {
        let rows = slices.iter().map(|slice| slice.padded_rows).sum();
        let capacity = if D::WANTS_DATA { rows * padded_cols } else { 0 };
        let mut data = match self.dtype {
            DType::Bf16 => HostElements::Bf16(Vec::with_capacity(capacity)),
            DType::F32 => HostElements::F32(Vec::with_capacity(capacity)),
        };
        for slice in slices {
            let tensor = self.tensor(slice.name, slice.shape);
            match &mut data {
                HostElements::Bf16(out) => self.append(out, tensor, slice, &cols, padded_cols)?,
                HostElements::F32(out) => self.append(out, tensor, slice, &cols, padded_cols)?,
            }
        }
        Ok(HostMatrix { rows, cols: padded_cols, data })
    }

    /// Slices of vectors, one after the other, each filled up to `padded_rows` with zeros.
    ///
    /// # Errors
    /// The load was ended.
    pub fn vector(&mut self, slices: &[RowSlice<'_>]) -> Result<Vec<f32>> {
        let mut data = Vec::with_capacity(slices.iter().map(|slice| slice.padded_rows).sum());
        for slice in slices {
            let tensor = self.tensor(slice.name, slice.shape);
            self.append(&mut data, tensor, slice, &(0..1), 1)?;
            if !D::WANTS_DATA {
                data.resize(data.len() + slice.padded_rows, 0.0);
            }
        }
        Ok(data)
    }

    /// The RMS norm `{prefix}.weight`, of `len` columns.
    pub fn norm(&mut self, prefix: &str, len: usize, epsilon: f32) -> Result<D::Norm> {
        let name = format!("{prefix}.weight");
        let slice = RowSlice { name: &name, shape: &[len], rows: 0..len, padded_rows: len };
        let weight = self.vector(&[slice])?;
        self.device.pack_norm(weight, epsilon)
    }

    /// Appends a slice of `tensor` to `out`, zeros where there is no tensor; nothing at all for a device that only counts.
    fn append<T: Element>(
        &mut self,
        out: &mut Vec<T>,
        tensor: Option<TensorRef<'_>>,
        slice: &RowSlice<'_>,
        cols: &Range<usize>,
        padded_cols: usize,
    ) -> Result<()> {
        let end = out.len() + slice.padded_rows * padded_cols;
        if let Some(tensor) = tensor {
            let size = bytes_of(tensor.dtype);
            let row_bytes = cols.len() * size;
            if !D::WANTS_DATA {
                return self.advance(slice.rows.len() * row_bytes);
            }
            let row_len: usize = slice.shape[1..].iter().product();
            let mut unsaid = 0;
            for row in slice.rows.clone() {
                let start = (row * row_len + cols.start) * size;
                let bytes = &tensor.bytes[start..start + row_bytes];
                self.checksum.update(bytes);
                append_row(out, tensor.dtype, bytes);
                out.resize(out.len() + padded_cols - cols.len(), T::ZERO);
                unsaid += row_bytes;
                if unsaid >= READ_BYTES {
                    self.advance(std::mem::take(&mut unsaid))?;
                }
            }
            if unsaid > 0 {
                self.advance(unsaid)?;
            }
        }
        if D::WANTS_DATA {
            out.resize(end, T::ZERO);
        }
        Ok(())
    }

    /// Notes a fault once, however often a tensor is read.
    fn fault(&mut self, fault: CheckpointFault) {
        if !self.faults.contains(&fault) {
            self.faults.push(fault);
        }
    }

    fn advance(&mut self, bytes: usize) -> Result<()> {
        self.loaded_bytes += bytes as u64;
        (self.progress)(self.loaded_bytes)
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Option<TensorRef<'a>> {
        let Some(tensor) = self.checkpoint.get(name) else {
            self.fault(CheckpointFault::Missing { tensor: name.to_owned() });
            return None;
        };
        let known = matches!(tensor.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
        if !known {
            let found = format!("{:?}", tensor.dtype);
            self.fault(CheckpointFault::Dtype { tensor: name.to_owned(), found });
        }
        if tensor.shape != shape {
            let (found, expected) = (tensor.shape.to_vec(), shape.to_vec());
            self.fault(CheckpointFault::Shape { tensor: name.to_owned(), found, expected });
        }
        (known && tensor.shape == shape).then_some(tensor)
    }
}

/// An element type that checkpoints are converted to.
trait Element: Copy {
    const ZERO: Self;
    fn from_f32(value: f32) -> Self;
    fn from_bf16(value: bf16) -> Self;
}

impl Element for f32 {
    const ZERO: Self = 0.0;

    fn from_f32(value: f32) -> Self {
        value
    }

    fn from_bf16(value: bf16) -> Self {
        value.to_f32()
    }
}

impl Element for bf16 {
    const ZERO: Self = bf16::ZERO;

    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }

    fn from_bf16(value: bf16) -> Self {
        value
    }
}

fn bytes_of(dtype: Dtype) -> usize {
    if dtype == Dtype::F32 { 4 } else { 2 }
}

/// Appends elements.
fn append_row<T: Element>(out: &mut Vec<T>, dtype: Dtype, bytes: &[u8]) {
    match dtype {
        Dtype::F32 => out.extend(read(bytes, f32::from_le_bytes).map(T::from_f32)),
        Dtype::BF16 => out.extend(read(bytes, bf16::from_le_bytes).map(T::from_bf16)),
        _ => out.extend(read(bytes, f16::from_le_bytes).map(|x| T::from_f32(x.to_f32()))),
    }
}

fn read<const N: usize, T>(bytes: &[u8], element: fn([u8; N]) -> T) -> impl ExactSizeIterator<Item = T> {
    let (chunks, rest) = bytes.as_chunks::<N>();
    debug_assert!(rest.is_empty());
    chunks.iter().map(move |chunk| element(*chunk))
}

//! The workspace on the GPU: activations live here, and nowhere else.

use std::{
    cell::{Cell, RefCell},
    ops::Range,
    rc::Rc,
};

use super::driver::{Address, DeviceBuffer, Gpu};
use crate::device::{Activations, DType, DeviceError, Result, ranges::RangeAllocator};

/// Bytes that ranges are counted in. Ranges begin at multiples of 16 of them.
pub const RANGE_BYTES: usize = 16;

/// One region of the GPU's memory, lent out in ranges.
pub struct Arena {
    buffer: DeviceBuffer,
    ranges: RefCell<RangeAllocator>,
}

impl Arena {
    /// Reserves `bytes`.
    pub fn new(gpu: &Rc<Gpu>, bytes: usize) -> Result<Rc<Self>> {
        let buffer = DeviceBuffer::new(gpu, bytes, "the workspace")?;
        Ok(Rc::new(Self { buffer, ranges: RefCell::new(RangeAllocator::new(Some(bytes / RANGE_BYTES))) }))
    }

    /// Activations with whatever values were there before.
    pub fn tensor(self: &Rc<Self>, rows: usize, cols: usize, dtype: DType) -> Result<Tensor> {
        let units = tensor_units(rows, cols, dtype);
        let range = units.and_then(|units| self.ranges.borrow_mut().allocate(units)).ok_or_else(|| {
            DeviceError::Failed(format!(
                "the workspace of {} bytes has no room for activations of {rows} x {cols} elements of {} bytes; \
                 its largest free range has {} bytes",
                self.buffer.bytes(),
                dtype.size_bytes(),
                self.ranges.borrow().largest_free() * RANGE_BYTES,
            ))
        })?;
        Ok(Tensor { arena: self.clone(), range, rows, cols, dtype, lent: None })
    }

    /// What is free. From the same free ranges the same calls get the same places.
    pub fn free_ranges(&self) -> Vec<Range<usize>> {
        self.ranges.borrow().free_ranges().to_vec()
    }

    /// Activations at a place that is free.
    ///
    /// # Panics
    /// It is not, or does not hold them.
    pub fn tensor_at(self: &Rc<Self>, range: Range<usize>, rows: usize, cols: usize, dtype: DType) -> Tensor {
        assert!(
            tensor_units(rows, cols, dtype).is_some_and(|units| units <= range.len()),
            "room in {range:?}"
        );
        self.ranges.borrow_mut().take(range.clone());
        Tensor { arena: self.clone(), range, rows, cols, dtype, lent: None }
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> usize {
        self.ranges.borrow().used() * RANGE_BYTES
    }

    /// Most bytes that were in use.
    pub fn peak_bytes(&self) -> usize {
        self.ranges.borrow().peak() * RANGE_BYTES
    }
}

/// What activations take of a workspace, in units of [`RANGE_BYTES`]; none if that is beyond any number.
pub fn tensor_units(rows: usize, cols: usize, dtype: DType) -> Option<usize> {
    let bytes = rows.checked_mul(cols)?.checked_mul(dtype.size_bytes())?;
    Some(bytes.div_ceil(RANGE_BYTES))
}

/// Activations in the workspace, row-major. Dropping them returns their range: what the stream does with it next comes after
/// all that it was given before.
pub struct Tensor {
    arena: Rc<Arena>,
    range: Range<usize>,
    rows: usize,
    cols: usize,
    dtype: DType,
    /// Where they are in place of the workspace. They keep their range of it for what follows: plans of memory know of no other
    /// place.
    lent: Option<Lent>,
}

/// A place outside of the workspace that one tensor at a time has.
pub struct Lent {
    address: Address,
    is_lent: Rc<Cell<bool>>,
}

impl Lent {
    /// A place that is lent, which `is_lent` says until this is dropped.
    pub fn new(address: Address, is_lent: Rc<Cell<bool>>) -> Self {
        Self { address, is_lent }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.is_lent.set(false);
    }
}

impl Tensor {
    /// Where its first element is.
    pub fn address(&self) -> Address {
        let in_workspace = || self.arena.buffer.address() + (self.range.start * RANGE_BYTES) as Address;
        self.lent.as_ref().map_or_else(in_workspace, |lent| lent.address)
    }

    /// At a place that was lent, with whatever values are there.
    pub fn placed(mut self, lent: Option<Lent>) -> Self {
        self.lent = lent;
        self
    }

    /// Whether it is at a place that was lent.
    pub fn is_lent(&self) -> bool {
        self.lent.is_some()
    }

    /// Gives a place back that was lent. From now on it is in the workspace, with whatever values were there before.
    pub fn settle(&mut self) {
        self.lent = None;
    }

    /// Where the first element of row `row` is.
    pub fn row_address(&self, row: usize) -> Address {
        assert!(row <= self.rows, "row {row} of {}", self.rows);
        self.address() + (row * self.row_bytes()) as Address
    }

    /// Its place in the workspace.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// The type of its elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.cols * self.dtype.size_bytes()
    }

    /// Bytes of all rows.
    pub fn bytes(&self) -> usize {
        self.rows * self.row_bytes()
    }

    /// The same elements with another number of columns, which must divide them.
    pub fn reshaped(mut self, rows: usize, cols: usize) -> Self {
        assert_eq!(self.rows * self.cols, rows * cols, "a reshape keeps the number of elements");
        (self.rows, self.cols) = (rows, cols);
        self
    }
}

impl Activations for Tensor {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        self.arena.ranges.borrow_mut().release(self.range.clone());
    }
}

//! The workspace: activations live here, and nowhere else.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use super::memory::Region;
use crate::device::ranges::{RANGE_UNIT, RangeAllocator};
use crate::device::{Activations, DeviceError, Result};
use crate::progress::Counter;

/// One region of f32, lent out in ranges.
pub struct Arena {
    region: Region,
    ranges: RefCell<RangeAllocator>,
}

impl Arena {
    /// Reserves and touches `bytes`, counting the work on `pieces`.
    pub fn new(bytes: usize, pieces: &Counter) -> Result<Rc<Self>> {
        let unit = RANGE_UNIT * size_of::<f32>();
        let region = Region::new(bytes.next_multiple_of(unit), "the workspace", pieces)?;
        let ranges = RefCell::new(RangeAllocator::new(Some(region.len() / size_of::<f32>())));
        Ok(Rc::new(Self { region, ranges }))
    }

    /// Activations with whatever values were there before.
    pub fn tensor(self: &Rc<Self>, rows: usize, cols: usize) -> Result<Tensor> {
        let range = rows.checked_mul(cols).and_then(|len| self.ranges.borrow_mut().allocate(len));
        let range = range.ok_or_else(|| {
            DeviceError::Failed(format!(
                "the workspace of {} bytes has no room for activations of {rows} x {cols} elements of 4 bytes; \
                 its largest free range has {} bytes",
                self.region.len(),
                self.ranges.borrow().largest_free() * size_of::<f32>(),
            ))
        })?;
        Ok(Tensor { arena: self.clone(), range, rows, cols })
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> usize {
        self.ranges.borrow().used() * size_of::<f32>()
    }

    /// Most bytes that were in use.
    pub fn peak_bytes(&self) -> usize {
        self.ranges.borrow().peak() * size_of::<f32>()
    }
}

/// Activations in the workspace, row-major. Dropping them returns their range.
pub struct Tensor {
    arena: Rc<Arena>,
    range: Range<usize>,
    rows: usize,
    cols: usize,
}

impl Tensor {
    /// The elements.
    pub fn data(&self) -> &[f32] {
        // SAFETY: the range is this tensor's alone while it lives, and the arena lives as long.
        unsafe {
            let start = self.arena.region.as_ptr().cast::<f32>().add(self.range.start);
            std::slice::from_raw_parts(start, self.rows * self.cols)
        }
    }

    /// The elements.
    pub fn data_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `data`, and the borrow is exclusive.
        unsafe {
            let start = self.arena.region.as_ptr().cast::<f32>().add(self.range.start);
            std::slice::from_raw_parts_mut(start, self.rows * self.cols)
        }
    }

    /// The elements of row `row`.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data()[row * self.cols..(row + 1) * self.cols]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_tensor_makes_room() {
        let arena = Arena::new(4096, &Counter::default()).expect("there is memory");
        let first = arena.tensor(8, 64).expect("half of it");
        let second = arena.tensor(8, 64).expect("the other half");
        let error = arena.tensor(1, 1).err().expect("nothing is left").to_string();
        assert!(error.contains("1 x 1") && error.contains("4096 bytes"), "{error}");
        drop(first);
        let empty = arena.tensor(0, 64).expect("nothing takes no room");
        assert!(empty.data().is_empty());
        arena.tensor(16, 32).expect("the first half is free again");
        drop(second);
        assert_eq!(arena.used_bytes(), 0);
        assert_eq!(arena.tensor(1, 1024).expect("all of it is free").data().len(), 1024);
        assert_eq!(arena.peak_bytes(), 4096);
    }
}

//! Bookkeeping of a workspace: which ranges of one region are free.
//!
//! It owns no memory, so that the same decisions can be made while planning (with no capacity, to learn the peak) and
//! while running (with the planned capacity): the same sequence of calls gives the same ranges in both.

use std::ops::Range;

/// Ranges start and end at multiples of this many elements: a cache line of f32, a register of AVX-512.
pub const RANGE_UNIT: usize = 16;

/// First-fit allocation of ranges of elements, with neighbouring free ranges joined.
#[derive(Clone, Debug)]
pub struct RangeAllocator {
    /// Ascending, never empty, never touching one another.
    free: Vec<Range<usize>>,
    peak: usize,
    capacity: usize,
}

impl RangeAllocator {
    /// An allocator over elements `0..capacity`, or over as many as are asked for.
    pub fn new(capacity: Option<usize>) -> Self {
        let capacity = capacity.unwrap_or(usize::MAX) / RANGE_UNIT * RANGE_UNIT;
        let everything = 0..capacity;
        Self { free: if capacity == 0 { Vec::new() } else { vec![everything] }, peak: 0, capacity }
    }

    /// The first free range of `len` elements, rounded up to [`RANGE_UNIT`]; `None` when there is none.
    ///
    /// The range of zero elements is empty, takes no place, and may be released like any other.
    pub fn allocate(&mut self, len: usize) -> Option<Range<usize>> {
        if len == 0 {
            return Some(0..0);
        }
        let len = len.checked_next_multiple_of(RANGE_UNIT)?;
        let index = self.free.iter().position(|range| range.len() >= len)?;
        let range = &mut self.free[index];
        let taken = range.start..range.start + len;
        range.start = taken.end;
        if range.start == range.end {
            self.free.remove(index);
        }
        self.peak = self.peak.max(taken.end);
        Some(taken)
    }

    /// The free ranges, ascending.
    pub fn free_ranges(&self) -> &[Range<usize>] {
        &self.free
    }

    /// Takes a range that is free.
    ///
    /// # Panics
    /// It is not.
    pub fn take(&mut self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        let index = self.free.iter().position(|free| free.start <= range.start && range.end <= free.end);
        let index = index.unwrap_or_else(|| panic!("range {range:?} is not free"));
        let free = self.free.remove(index);
        let parts = [free.start..range.start, range.end..free.end];
        self.free.splice(index..index, parts.into_iter().filter(|part| !part.is_empty()));
        self.peak = self.peak.max(range.end);
    }

    /// Returns a range that [`RangeAllocator::allocate`] gave.
    ///
    /// # Panics
    /// When part of the range is free already or lies outside the region: a fault of the caller.
    pub fn release(&mut self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        let index = self.free.partition_point(|free| free.start < range.start);
        let after_previous = index == 0 || self.free[index - 1].end <= range.start;
        let before_next = self.free.get(index).is_none_or(|next| range.end <= next.start);
        assert!(
            after_previous && before_next && range.end <= self.capacity,
            "range {range:?} was not allocated when it was released"
        );
        let joins_previous = index > 0 && self.free[index - 1].end == range.start;
        let joins_next = self.free.get(index).is_some_and(|next| next.start == range.end);
        match (joins_previous, joins_next) {
            (true, true) => {
                self.free[index - 1].end = self.free[index].end;
                self.free.remove(index);
            }
            (true, false) => self.free[index - 1].end = range.end,
            (false, true) => self.free[index].start = range.start,
            (false, false) => self.free.insert(index, range),
        }
    }

    /// Elements from the start of the region to the end of the furthest range ever given: the capacity with which the
    /// calls so far would have succeeded.
    pub fn peak(&self) -> usize {
        self.peak
    }

    /// Elements of the ranges that are taken.
    pub fn used(&self) -> usize {
        self.capacity - self.free.iter().map(ExactSizeIterator::len).sum::<usize>()
    }

    /// Length of the largest free range.
    pub fn largest_free(&self) -> usize {
        self.free.iter().map(ExactSizeIterator::len).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_up_and_takes_the_first_fit() {
        let mut ranges = RangeAllocator::new(Some(128));
        assert_eq!(ranges.allocate(1), Some(0..16));
        assert_eq!(ranges.allocate(17), Some(16..48));
        assert_eq!(ranges.allocate(16), Some(48..64));
        ranges.release(16..48);
        assert_eq!(ranges.allocate(16), Some(16..32));
        assert_eq!(ranges.allocate(32), Some(64..96));
        assert_eq!(ranges.allocate(33), None);
        assert_eq!((ranges.largest_free(), ranges.used()), (32, 80));
        assert_eq!(ranges.peak(), 96);
    }

    #[test]
    fn a_free_place_is_taken_where_it_is() {
        let mut ranges = RangeAllocator::new(Some(96));
        ranges.take(32..48);
        assert_eq!(ranges.free_ranges(), [0..32, 48..96]);
        ranges.take(48..96);
        ranges.take(0..0);
        assert_eq!((ranges.allocate(64), ranges.peak()), (None, 96));
        assert_eq!(ranges.largest_free(), 32);
        ranges.release(32..48);
        ranges.release(48..96);
        assert_eq!((ranges.free_ranges().len(), ranges.largest_free()), (1, 96));
    }

    #[test]
    fn joins_neighbours_whatever_the_order_of_release() {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut ranges = RangeAllocator::new(Some(96));
            let taken: Vec<_> = (0..3).map(|_| ranges.allocate(32).expect("there is room")).collect();
            assert_eq!(ranges.allocate(1), None);
            for index in order {
                ranges.release(taken[index].clone());
            }
            assert_eq!(ranges.allocate(96), Some(0..96), "released in order {order:?}");
        }
    }

    #[test]
    fn nothing_is_free_in_an_empty_region_but_nothing() {
        let mut ranges = RangeAllocator::new(Some(15));
        assert_eq!(ranges.allocate(1), None);
        assert_eq!(ranges.allocate(0), Some(0..0));
        ranges.release(0..0);
        assert_eq!(ranges.peak(), 0);
    }

    #[test]
    fn a_run_within_the_planned_peak_gets_the_planned_ranges() {
        let steps = [(100, 0), (60, 1), (16, 0), (200, 1), (90, 1), (5, 0), (33, 2)];
        let run = |capacity: Option<usize>| {
            let mut ranges = RangeAllocator::new(capacity);
            let (mut held, mut trace) = (Vec::new(), Vec::new());
            for (len, releases) in steps {
                let range = ranges.allocate(len).expect("there is room");
                trace.push(range.clone());
                held.push(range);
                for _ in 0..releases {
                    ranges.release(held.remove(0));
                }
            }
            (trace, ranges.peak())
        };
        let (planned, peak) = run(None);
        assert_eq!(run(Some(peak)), (planned, peak));
    }

    #[test]
    fn impossible_lengths_are_refused() {
        let mut ranges = RangeAllocator::new(None);
        assert_eq!(ranges.allocate(usize::MAX), None);
    }

    #[test]
    #[should_panic(expected = "was not allocated")]
    fn a_double_release_is_a_fault() {
        let mut ranges = RangeAllocator::new(Some(64));
        let range = ranges.allocate(32).expect("there is room");
        ranges.release(range.clone());
        ranges.release(range);
    }
}

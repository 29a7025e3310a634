//! Where weights lie. The driver gives out whole pages, and a model has hundreds of biases and norms of a few kilobytes: these
//! share pages of their own, by a rule that a plan of memory follows, too.

use std::rc::Rc;

use super::driver::{DeviceBuffer, Gpu};
use super::sizes::{PAGE_BYTES, allocation_bytes};
use crate::device::Result;

/// The largest weights that share a page.
const MAX_SHARED_BYTES: usize = PAGE_BYTES / 2;

/// Places in a page are multiples of this many bytes, as allocations are.
const ALIGNMENT: usize = 512;

/// A place for weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Memory of their own.
    Own,
    /// A new page, whose beginning they have.
    NewPage,
    /// From this byte on in the page that was begun last.
    Page(usize),
}

/// Gives weights places, in the order in which they come. A plan counts by it what a device will take.
#[derive(Debug, Default)]
pub struct Places {
    /// Bytes of the page that was begun last that are given out; none before the first.
    used: Option<usize>,
    bytes: usize,
}

impl Places {
    /// Counts weights of so many bytes.
    pub fn count(&mut self, bytes: usize) {
        self.next(bytes);
    }

    /// Bytes of the GPU that all of them take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn next(&mut self, bytes: usize) -> Place {
        if bytes == 0 || bytes > MAX_SHARED_BYTES {
            self.bytes += allocation_bytes(bytes);
            return Place::Own;
        }
        match self.used {
            Some(used) if used + bytes <= PAGE_BYTES => {
                self.used = Some((used + bytes).next_multiple_of(ALIGNMENT));
                Place::Page(used)
            }
            _ => {
                self.used = Some(bytes.next_multiple_of(ALIGNMENT));
                self.bytes += PAGE_BYTES;
                Place::NewPage
            }
        }
    }
}

/// The places of a device's weights.
#[derive(Default)]
pub struct WeightMemory {
    places: Places,
    page: Option<Rc<DeviceBuffer>>,
}

impl WeightMemory {
    /// Memory for weights of so many bytes.
    ///
    /// # Errors
    /// The GPU has no more.
    pub fn reserve(&mut self, gpu: &Rc<Gpu>, bytes: usize) -> Result<DeviceBuffer> {
        let offset = match self.places.next(bytes) {
            Place::Own => return DeviceBuffer::new(gpu, bytes, "weights"),
            Place::NewPage => {
                self.page = Some(Rc::new(DeviceBuffer::new(gpu, PAGE_BYTES, "weights")?));
                0
            }
            Place::Page(offset) => offset,
        };
        let page = self.page.as_ref().expect("a page was begun");
        Ok(DeviceBuffer::part_of(page, offset, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_weights_share_pages() {
        let mut places = Places::default();
        let half = PAGE_BYTES / 2;
        let found = [10, 600, half, half, half + 1, 0, 10].map(|bytes| places.next(bytes));
        let expected = [
            Place::NewPage,
            Place::Page(512),
            Place::Page(512 + 1024),
            Place::NewPage,
            Place::Own,
            Place::Own,
            Place::Page(half),
        ];
        assert_eq!(found, expected);
        assert_eq!(places.bytes(), 3 * PAGE_BYTES);
    }
}

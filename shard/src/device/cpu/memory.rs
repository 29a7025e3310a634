//! Memory that is reserved once and touched at once, so that nothing is missing later.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::device::{DeviceError, Result};
use crate::progress::Counter;

const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4096;
/// Bytes of one piece of touching memory.
const TOUCHED_BYTES: usize = 1 << 20;

/// Bytes past the end of every region that may be read: kernels read whole vectors at the end of rows.
const SLACK: usize = 64;

/// Zeroed memory, aligned to a page at least, on huge pages where the kernel has them.
pub struct Region {
    map: NonNull<u8>,
    map_len: usize,
    start: NonNull<u8>,
    len: usize,
}

impl Region {
    /// Maps `len` bytes for `purpose` and touches them all, counting the work on `pieces`.
    pub fn new(len: usize, purpose: &str, pieces: &Counter) -> Result<Self> {
        let huge = len >= HUGE_PAGE;
        let needed = (len + SLACK).next_multiple_of(PAGE);
        let map_len = needed + if huge { HUGE_PAGE } else { 0 };
        let failed = |error| {
            DeviceError::Failed(format!("cannot reserve {len} bytes of memory for {purpose}: {error}"))
        };
        // SAFETY: a new private mapping at an address of the kernel's choice changes no other memory.
        let map = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                map_len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(failed)?;
        let map = NonNull::new(map.cast::<u8>()).expect("a mapping is never at address zero");
        let offset = if huge { map.align_offset(HUGE_PAGE) } else { 0 };
        // SAFETY: the offset is less than the huge page that was mapped in addition.
        let start = unsafe { map.add(offset) };
        let region = Self { map, map_len, start, len };
        if huge {
            // Without huge pages everything works, only slower: a refusal is no error.
            // SAFETY: the range lies within the mapping, and the advice does not change its content.
            let _ = unsafe { rustix::mm::madvise(start.as_ptr().cast(), needed, Advice::LinuxHugepage) };
        }
        for page in (0..needed).step_by(PAGE) {
            // SAFETY: the page lies within the mapping, which nothing else refers to yet.
            unsafe { start.add(page).write_volatile(0) };
            if page.is_multiple_of(TOUCHED_BYTES) {
                pieces.count();
            }
        }
        Ok(region)
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The whole region as elements, all bits of which are valid.
    pub fn as_slice<T: Plain>(&self) -> &[T] {
        // SAFETY: the region is aligned to a page, initialised, and `T` allows any bits.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / size_of::<T>()) }
    }

    /// The whole region as elements, all bits of which are valid.
    pub fn as_mut_slice<T: Plain>(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len / size_of::<T>()) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is this region's own, and no borrow of it outlives the region.
        // A failure would leave the memory mapped, which is harmless.
        let _ = unsafe { rustix::mm::munmap(self.map.as_ptr().cast(), self.map_len) };
    }
}

// SAFETY: a region owns its memory like a `Vec<u8>` does.
unsafe impl Send for Region {}
// SAFETY: shared access only reads, but for writes through `as_ptr` that their callers answer for.
unsafe impl Sync for Region {}

/// Types of which any bits are a value.
///
/// # Safety
/// Every pattern of bits must be a valid value, and the alignment at most that of a page.
pub unsafe trait Plain: Copy {}
// SAFETY: any bits are a number.
unsafe impl Plain for u8 {}
// SAFETY: any bits are a number.
unsafe impl Plain for u16 {}
// SAFETY: any bits are a number.
unsafe impl Plain for f32 {}

/// The bytes of numbers.
pub fn as_bytes(data: &[f32]) -> &[u8] {
    // SAFETY: the bytes of floats are initialised, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

/// A pointer that the tasks of one kernel share; each writes only its own part behind it.
pub struct SharedPtr<T>(*mut T);

impl<T> Clone for SharedPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedPtr<T> {}

impl<T> SharedPtr<T> {
    /// To the first element of `to`.
    pub fn new(to: &mut [T]) -> Self {
        Self(to.as_mut_ptr())
    }

    /// The address. A method, so that closures capture this type and not the bare pointer.
    pub fn get(self) -> *mut T {
        self.0
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// They must be valid, and nothing else may refer to them while the slice lives.
    pub unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: as this function's.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

// SAFETY: what is written through it is each task's own part, as its users promise.
unsafe impl<T: Send> Send for SharedPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedPtr<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_zeroed_aligned_and_writable_to_the_end() {
        for len in [0, 4, 4096, HUGE_PAGE - 4, HUGE_PAGE, 3 * HUGE_PAGE + 12] {
            let mut region = Region::new(len, "a test", &Counter::default()).expect("there is memory");
            assert_eq!(region.as_ptr() as usize % if len >= HUGE_PAGE { HUGE_PAGE } else { PAGE }, 0);
            assert!(region.as_slice::<u16>().iter().all(|&x| x == 0));
            region.as_mut_slice::<f32>().fill(1.0);
            assert_eq!(region.as_slice::<f32>().len(), len / 4);
        }
    }

    #[test]
    fn memory_that_is_not_there_is_an_error_that_says_what_for() {
        let error =
            Region::new(1 << 60, "the workspace", &Counter::default()).err().expect("no machine has so much");
        assert!(error.to_string().contains("the workspace"), "{error}");
    }
}

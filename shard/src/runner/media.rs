//! Pixels of media that wait to be encoded, in memory reserved at start.
//!
//! The store is shared: uploads fill it while the compute thread takes from it. Pixels lie in pages, so that media of any
//! size fit as long as there are pages, and nothing is allocated after start.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use thiserror::Error;

use super::step::{Grid, MediaHash};

/// Bytes of a page. A medium wastes less than one.
const PAGE_BYTES: usize = 16 * 1024;

/// Why pixels were not taken.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MediaError {
    /// The pages are taken.
    #[error("pixels of {size_bytes} bytes do not fit: {free_bytes} of {total_bytes} bytes are free")]
    Full {
        /// Bytes of the medium.
        size_bytes: usize,
        /// Bytes in free pages.
        free_bytes: usize,
        /// Bytes of all pages.
        total_bytes: usize,
    },
    /// The same medium is here with another grid.
    #[error("the medium waits already, with another grid")]
    OtherGrid,
    /// Other bytes came than the header announced.
    #[error("chunks: {actual} bytes came, header.size_bytes is {expected}")]
    Length {
        /// Bytes that came.
        actual: usize,
        /// Bytes announced.
        expected: usize,
    },
}

/// Pixels by hash, in a bounded number of pages.
pub struct MediaStore {
    inner: Mutex<Inner>,
    total_pages: usize,
}

struct Inner {
    free: Vec<Box<[u8]>>,
    waiting: HashMap<MediaHash, Waiting>,
}

struct Waiting {
    grid: Grid,
    size_bytes: usize,
    pages: Vec<Box<[u8]>>,
}

impl MediaStore {
    /// Reserves pages for `capacity_bytes`, and touches all of them.
    pub fn new(capacity_bytes: usize) -> Self {
        let total_pages = capacity_bytes.div_ceil(PAGE_BYTES);
        // A value other than zero: zeroed pages would only be promised by the system, not given.
        let free = (0..total_pages).map(|_| vec![1; PAGE_BYTES].into_boxed_slice()).collect();
        Self { inner: Mutex::new(Inner { free, waiting: HashMap::new() }), total_pages }
    }

    /// Bytes that [`MediaStore::new`] reserves for `capacity_bytes`.
    pub fn reserved_bytes(capacity_bytes: usize) -> usize {
        capacity_bytes.next_multiple_of(PAGE_BYTES)
    }

    /// Takes pages for a medium of `size_bytes`; `None` if its pixels wait already, and need not come again.
    ///
    /// # Errors
    /// The pages are taken, or the medium waits with another grid.
    pub fn begin(
        &self,
        hash: MediaHash,
        grid: Grid,
        size_bytes: usize,
    ) -> Result<Option<Upload<'_>>, MediaError> {
        let mut inner = self.lock();
        if let Some(waiting) = inner.waiting.get(&hash) {
            return if waiting.grid == grid { Ok(None) } else { Err(MediaError::OtherGrid) };
        }
        let (needed, free) = (size_bytes.div_ceil(PAGE_BYTES), inner.free.len());
        if needed > free {
            let (free_bytes, total_bytes) = (free * PAGE_BYTES, self.total_pages * PAGE_BYTES);
            return Err(MediaError::Full { size_bytes, free_bytes, total_bytes });
        }
        let pages = inner.free.split_off(free - needed);
        Ok(Some(Upload { store: self, hash, filled: 0, waiting: Some(Waiting { grid, size_bytes, pages }) }))
    }

    /// The grid of a medium that waits.
    pub fn grid(&self, hash: &MediaHash) -> Option<Grid> {
        self.lock().waiting.get(hash).map(|waiting| waiting.grid)
    }

    /// Copies the pixels of a medium to `pixels`, which is cleared before, and frees its pages. False if it is not here.
    pub fn take(&self, hash: &MediaHash, pixels: &mut Vec<u8>) -> bool {
        pixels.clear();
        let Some(waiting) = self.lock().waiting.remove(hash) else { return false };
        for (index, page) in waiting.pages.iter().enumerate() {
            let length = (waiting.size_bytes - index * PAGE_BYTES).min(PAGE_BYTES);
            pixels.extend_from_slice(&page[..length]);
        }
        self.lock().free.extend(waiting.pages);
        true
    }

    /// Frees the pages of a medium. False if it is not here.
    pub fn discard(&self, hash: &MediaHash) -> bool {
        let mut inner = self.lock();
        let Some(waiting) = inner.waiting.remove(hash) else { return false };
        inner.free.extend(waiting.pages);
        true
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change under the lock is complete before anything can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A medium on its way in. Dropping it unfinished frees its pages.
pub struct Upload<'a> {
    store: &'a MediaStore,
    hash: MediaHash,
    filled: usize,
    waiting: Option<Waiting>,
}

impl Upload<'_> {
    /// Appends pixels.
    ///
    /// # Errors
    /// More bytes than announced.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), MediaError> {
        let Some(waiting) = &mut self.waiting else { return Ok(()) };
        let (actual, expected) = (self.filled + bytes.len(), waiting.size_bytes);
        if actual > expected {
            return Err(MediaError::Length { actual, expected });
        }
        while !bytes.is_empty() {
            let (page, offset) = (self.filled / PAGE_BYTES, self.filled % PAGE_BYTES);
            let length = bytes.len().min(PAGE_BYTES - offset);
            let (head, rest) = bytes.split_at(length);
            waiting.pages[page][offset..offset + length].copy_from_slice(head);
            self.filled += length;
            bytes = rest;
        }
        Ok(())
    }

    /// Makes the medium known, now that all its pixels are here.
    ///
    /// # Errors
    /// Fewer bytes than announced.
    pub fn finish(mut self) -> Result<(), MediaError> {
        let expected = self.waiting.as_ref().map_or(0, |waiting| waiting.size_bytes);
        if self.filled != expected {
            return Err(MediaError::Length { actual: self.filled, expected });
        }
        if let Some(waiting) = self.waiting.take() {
            let mut inner = self.store.lock();
            // Another upload of the same medium may have ended first: hash and bytes are the same.
            if let Some(replaced) = inner.waiting.insert(self.hash, waiting) {
                inner.free.extend(replaced.pages);
            }
        }
        Ok(())
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            self.store.lock().free.extend(waiting.pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: Grid = Grid { t: 1, h: 2, w: 2 };

    fn pixels(size: usize) -> Vec<u8> {
        (0..size).map(|i| (i * 31 % 251) as u8).collect()
    }

    fn free_pages(store: &MediaStore) -> usize {
        store.lock().free.len()
    }

    #[test]
    fn pixels_come_back_as_they_went_in() {
        let store = MediaStore::new(5 * PAGE_BYTES);
        let (hash, all) = (MediaHash([1; 32]), pixels(3 * PAGE_BYTES + 17));
        let mut upload = store.begin(hash, GRID, all.len()).unwrap().unwrap();
        all.chunks(10_001).for_each(|chunk| upload.push(chunk).unwrap());
        assert_eq!(store.grid(&hash), None);
        upload.finish().unwrap();
        assert_eq!(store.grid(&hash), Some(GRID));
        assert!(store.begin(hash, GRID, all.len()).unwrap().is_none());
        let mut taken = vec![9; 4];
        assert!(store.take(&hash, &mut taken));
        assert_eq!(taken, all);
        assert!(!store.take(&hash, &mut taken));
        assert_eq!(free_pages(&store), 5);
    }

    #[test]
    fn the_bound_holds_and_nothing_leaks() {
        let store = MediaStore::new(4 * PAGE_BYTES);
        let first = store.begin(MediaHash([1; 32]), GRID, 3 * PAGE_BYTES).unwrap();
        let Err(error) = store.begin(MediaHash([2; 32]), GRID, PAGE_BYTES + 1) else {
            panic!("over the bound")
        };
        assert!(error.to_string().contains("16384 of 65536 bytes are free"), "{error}");
        drop(first);
        assert_eq!(free_pages(&store), 4);

        let mut short = store.begin(MediaHash([3; 32]), GRID, 10).unwrap().unwrap();
        assert!(short.push(&pixels(11)).is_err());
        short.push(&pixels(9)).unwrap();
        assert_eq!(short.finish(), Err(MediaError::Length { actual: 9, expected: 10 }));
        assert_eq!(free_pages(&store), 4);

        let mut upload = store.begin(MediaHash([4; 32]), GRID, 10).unwrap().unwrap();
        upload.push(&pixels(10)).unwrap();
        upload.finish().unwrap();
        assert!(store.begin(MediaHash([4; 32]), Grid { t: 2, ..GRID }, 10).is_err());
        assert!(store.discard(&MediaHash([4; 32])));
        assert_eq!(free_pages(&store), 4);
    }
}

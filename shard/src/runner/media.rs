//! Pixels of media that wait to be encoded: in files that the server wrote for all ranks of a host, or in memory of this
//! rank, reserved at start, where they come from another host.
//!
//! The store is shared: uploads fill it while the compute thread reads from it, a temporal patch at a time, and lets go of
//! what it has encoded. Pixels in memory lie in pages, so that media of any size fit as long as there are pages, and nothing
//! is allocated after start.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use thiserror::Error;

use super::step::{Grid, MediaHash};

/// Bytes of a page. A medium wastes less than one.
const PAGE_BYTES: usize = 16 * 1024;

/// Files that may wait: far more than a server has placed at a time, and far fewer than a process may have open.
const MAX_FILES: usize = 64;

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
    /// As many files wait as may.
    #[error("{MAX_FILES} media wait as files already")]
    TooManyFiles,
    /// The file cannot be used.
    #[error("header.path: {0}")]
    File(String),
    /// The same medium is here with another grid.
    #[error("the medium waits already, with another grid")]
    OtherGrid,
    /// Pixels of another epoch than the rank's.
    #[error("header.epoch: the pixels are of epoch {actual}, this rank of epoch {expected}")]
    OtherEpoch {
        /// The epoch of the pixels.
        actual: u64,
        /// The rank's.
        expected: u64,
    },
    /// The rank went on to another epoch while the pixels came.
    #[error("the rank has joined another epoch meanwhile")]
    Cleared,
    /// Other bytes came than the header announced.
    #[error("chunks: {actual} bytes came, header.size_bytes is {expected}")]
    Length {
        /// Bytes that came.
        actual: usize,
        /// Bytes announced.
        expected: usize,
    },
}

/// Pixels by hash, in a bounded number of pages and files.
pub struct MediaStore {
    inner: Mutex<Inner>,
    total_pages: usize,
}

struct Inner {
    free: Vec<Box<[u8]>>,
    waiting: HashMap<MediaHash, Waiting>,
    /// Whose pixels are taken.
    epoch: u64,
}

struct Waiting {
    grid: Grid,
    size_bytes: usize,
    source: Source,
}

enum Source {
    Pages(Vec<Box<[u8]>>),
    File(Arc<File>),
}

impl MediaStore {
    /// Reserves pages for `capacity_bytes`, and touches all of them. Pixels of `epoch` are taken.
    pub fn new(capacity_bytes: usize, epoch: u64) -> Self {
        let total_pages = capacity_bytes.div_ceil(PAGE_BYTES);
        // A value other than zero: zeroed pages would only be promised by the system, not given.
        let free = (0..total_pages).map(|_| vec![1; PAGE_BYTES].into_boxed_slice()).collect();
        Self { inner: Mutex::new(Inner { free, waiting: HashMap::new(), epoch }), total_pages }
    }

    /// Bytes that [`MediaStore::new`] reserves for `capacity_bytes`.
    pub fn reserved_bytes(capacity_bytes: usize) -> usize {
        capacity_bytes.next_multiple_of(PAGE_BYTES)
    }

    /// The epoch whose pixels are taken.
    pub fn epoch(&self) -> u64 {
        self.lock().epoch
    }

    /// Takes pages for a medium of `size_bytes`; `None` if its pixels wait already, and need not come again.
    ///
    /// # Errors
    /// It is of another epoch, the pages are taken, or the medium waits with another grid.
    pub fn begin(
        &self,
        epoch: u64,
        hash: MediaHash,
        grid: Grid,
        size_bytes: usize,
    ) -> Result<Option<Upload<'_>>, MediaError> {
        let mut inner = self.lock();
        inner.check(epoch)?;
        if let Some(waiting) = inner.waiting.get(&hash) {
            return if waiting.grid == grid { Ok(None) } else { Err(MediaError::OtherGrid) };
        }
        let (needed, free) = (size_bytes.div_ceil(PAGE_BYTES), inner.free.len());
        if needed > free {
            let (free_bytes, total_bytes) = (free * PAGE_BYTES, self.total_pages * PAGE_BYTES);
            return Err(MediaError::Full { size_bytes, free_bytes, total_bytes });
        }
        let pages = inner.free.split_off(free - needed);
        Ok(Some(Upload { store: self, epoch, hash, grid, size_bytes, filled: 0, pages }))
    }

    /// Lets a medium wait whose pixels are all of `file`. It may be removed: it is open. No-op if the medium waits already.
    ///
    /// # Errors
    /// It is of another epoch, the file has another size, the medium waits with another grid, or too many files wait.
    pub fn put_file(
        &self,
        epoch: u64,
        hash: MediaHash,
        grid: Grid,
        size_bytes: usize,
        file: File,
    ) -> Result<(), MediaError> {
        let metadata = file.metadata().map_err(|error| MediaError::File(error.to_string()))?;
        if metadata.len() != size_bytes as u64 {
            let actual = metadata.len();
            return Err(MediaError::File(format!("has {actual} bytes, header.size_bytes is {size_bytes}")));
        }
        let mut inner = self.lock();
        inner.check(epoch)?;
        if let Some(waiting) = inner.waiting.get(&hash) {
            return if waiting.grid == grid { Ok(()) } else { Err(MediaError::OtherGrid) };
        }
        let files = inner.waiting.values().filter(|waiting| matches!(waiting.source, Source::File(_)));
        if files.count() >= MAX_FILES {
            return Err(MediaError::TooManyFiles);
        }
        inner.waiting.insert(hash, Waiting { grid, size_bytes, source: Source::File(Arc::new(file)) });
        Ok(())
    }

    /// The grid of a medium that waits, and the bytes of its pixels.
    pub fn shape(&self, hash: &MediaHash) -> Option<(Grid, usize)> {
        self.lock().waiting.get(hash).map(|waiting| (waiting.grid, waiting.size_bytes))
    }

    /// Copies some of a medium's pixels to `pixels`, in place of what was there.
    ///
    /// # Errors
    /// The medium is not here, has no such bytes, or its file cannot be read.
    pub fn read(&self, hash: &MediaHash, bytes: Range<usize>, pixels: &mut Vec<u8>) -> io::Result<()> {
        pixels.resize(bytes.len(), 0);
        let mut filled = 0;
        while filled < pixels.len() {
            // For a page at a time, so that uploads wait for no more than that.
            let inner = self.lock();
            let waiting = inner.waiting.get(hash).ok_or(io::ErrorKind::NotFound)?;
            if bytes.end > waiting.size_bytes {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let at = bytes.start + filled;
            match &waiting.source {
                Source::Pages(pages) => {
                    let page = pages.get(at / PAGE_BYTES).ok_or(io::ErrorKind::UnexpectedEof)?;
                    let from = &page[at % PAGE_BYTES..];
                    let length = from.len().min(pixels.len() - filled);
                    pixels[filled..filled + length].copy_from_slice(&from[..length]);
                    filled += length;
                }
                Source::File(file) => {
                    let file = file.clone();
                    drop(inner);
                    return file.read_exact_at(pixels, at as u64);
                }
            }
        }
        Ok(())
    }

    /// Lets go of a medium's pixels. False if it is not here.
    pub fn discard(&self, hash: &MediaHash) -> bool {
        let mut inner = self.lock();
        let Some(waiting) = inner.waiting.remove(hash) else { return false };
        if let Source::Pages(pages) = waiting.source {
            inner.free.extend(pages);
        }
        true
    }

    /// Lets go of all pixels, also of those that are on their way in, and takes those of `epoch` from now on.
    pub fn clear(&self, epoch: u64) {
        let mut inner = self.lock();
        inner.epoch = epoch;
        for (_, waiting) in std::mem::take(&mut inner.waiting) {
            if let Source::Pages(pages) = waiting.source {
                inner.free.extend(pages);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change under the lock is complete before anything can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn check(&self, epoch: u64) -> Result<(), MediaError> {
        let expected = self.epoch;
        if epoch == expected { Ok(()) } else { Err(MediaError::OtherEpoch { actual: epoch, expected }) }
    }
}

/// A medium on its way in. Dropping it unfinished frees its pages.
pub struct Upload<'a> {
    store: &'a MediaStore,
    epoch: u64,
    hash: MediaHash,
    grid: Grid,
    size_bytes: usize,
    filled: usize,
    pages: Vec<Box<[u8]>>,
}

impl Upload<'_> {
    /// Appends pixels.
    ///
    /// # Errors
    /// More bytes than announced.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), MediaError> {
        let (actual, expected) = (self.filled + bytes.len(), self.size_bytes);
        if actual > expected {
            return Err(MediaError::Length { actual, expected });
        }
        while !bytes.is_empty() {
            let (page, offset) = (self.filled / PAGE_BYTES, self.filled % PAGE_BYTES);
            let length = bytes.len().min(PAGE_BYTES - offset);
            let (head, rest) = bytes.split_at(length);
            self.pages[page][offset..offset + length].copy_from_slice(head);
            self.filled += length;
            bytes = rest;
        }
        Ok(())
    }

    /// Makes the medium known, now that all its pixels are here.
    ///
    /// # Errors
    /// Fewer bytes than announced, or everything was let go of meanwhile.
    pub fn finish(mut self) -> Result<(), MediaError> {
        let (actual, size_bytes) = (self.filled, self.size_bytes);
        if actual != size_bytes {
            return Err(MediaError::Length { actual, expected: size_bytes });
        }
        let mut inner = self.store.lock();
        if inner.epoch != self.epoch {
            drop(inner);
            return Err(MediaError::Cleared);
        }
        // Another upload of the same medium may have ended first: hash and bytes are the same, and it may be in work. The
        // pages of this one are then freed like those of an unfinished one.
        if let Entry::Vacant(place) = inner.waiting.entry(self.hash) {
            let source = Source::Pages(std::mem::take(&mut self.pages));
            place.insert(Waiting { grid: self.grid, size_bytes, source });
        }
        drop(inner);
        Ok(())
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        self.store.lock().free.append(&mut self.pages);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const EPOCH: u64 = 7;
    const GRID: Grid = Grid { t: 1, h: 2, w: 2 };

    fn pixels(size: usize) -> Vec<u8> {
        (0..size).map(|i| (i * 31 % 251) as u8).collect()
    }

    fn free_pages(store: &MediaStore) -> usize {
        store.lock().free.len()
    }

    #[test]
    fn pixels_come_back_as_they_went_in() {
        let store = MediaStore::new(5 * PAGE_BYTES, EPOCH);
        let (hash, all) = (MediaHash([1; 32]), pixels(3 * PAGE_BYTES + 17));
        let mut upload = store.begin(EPOCH, hash, GRID, all.len()).unwrap().unwrap();
        all.chunks(10_001).for_each(|chunk| upload.push(chunk).unwrap());
        assert_eq!(store.shape(&hash), None);
        upload.finish().unwrap();
        assert_eq!(store.shape(&hash), Some((GRID, all.len())));
        assert!(store.begin(EPOCH, hash, GRID, all.len()).unwrap().is_none());
        check_reads(&store, hash, &all);
        assert!(store.discard(&hash) && !store.discard(&hash));
        assert_eq!(free_pages(&store), 5);
    }

    /// Any part can be read, and nothing beyond the end.
    fn check_reads(store: &MediaStore, hash: MediaHash, all: &[u8]) {
        let mut read = vec![9; 4];
        for part in
            [0..all.len(), 0..0, 5..PAGE_BYTES, PAGE_BYTES - 1..2 * PAGE_BYTES + 1, all.len() - 1..all.len()]
        {
            store.read(&hash, part.clone(), &mut read).unwrap();
            assert_eq!(read, all[part]);
        }
        assert!(store.read(&hash, all.len()..all.len() + PAGE_BYTES, &mut read).is_err());
        assert!(store.read(&MediaHash([9; 32]), 0..1, &mut read).is_err());
    }

    #[test]
    fn a_file_is_read_where_it_is_and_closed_when_done() {
        let store = MediaStore::new(0, EPOCH);
        let (hash, all) = (MediaHash([1; 32]), pixels(3 * PAGE_BYTES + 17));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&all).unwrap();
        let put = |grid, size| store.put_file(EPOCH, hash, grid, size, file.try_clone().unwrap());
        let wrong = put(GRID, 5).unwrap_err().to_string();
        assert!(wrong.contains("has 49169 bytes, header.size_bytes is 5"), "{wrong}");
        put(GRID, all.len()).unwrap();
        put(GRID, all.len()).unwrap();
        assert_eq!(put(Grid { t: 2, ..GRID }, all.len()), Err(MediaError::OtherGrid));
        assert_eq!(store.shape(&hash), Some((GRID, all.len())));
        check_reads(&store, hash, &all);
        let put_named =
            |name| store.put_file(EPOCH, MediaHash([name; 32]), GRID, all.len(), file.try_clone().unwrap());
        for name in 2..=MAX_FILES as u8 {
            put_named(name).unwrap();
        }
        assert_eq!(put_named(99), Err(MediaError::TooManyFiles));
        assert!(store.discard(&hash) && store.shape(&hash).is_none());
    }

    #[test]
    fn of_two_uploads_of_a_medium_the_first_to_end_stays() {
        let store = MediaStore::new(4 * PAGE_BYTES, EPOCH);
        let hash = MediaHash([1; 32]);
        let mut uploads = [(); 2].map(|()| store.begin(EPOCH, hash, GRID, 10).unwrap().unwrap());
        uploads.iter_mut().for_each(|upload| upload.push(&pixels(10)).unwrap());
        uploads.into_iter().for_each(|upload| upload.finish().unwrap());
        assert_eq!(free_pages(&store), 3);
        assert!(store.discard(&hash));
        assert_eq!(free_pages(&store), 4);
    }

    #[test]
    fn a_cleared_store_has_nothing_and_takes_nothing_of_before() {
        let store = MediaStore::new(4 * PAGE_BYTES, EPOCH);
        let put = |epoch, name: u8| {
            let mut upload = store.begin(epoch, MediaHash([name; 32]), GRID, 10).unwrap().unwrap();
            upload.push(&pixels(10)).unwrap();
            upload
        };
        put(EPOCH, 1).finish().unwrap();
        let late = put(EPOCH, 2);
        let put_file =
            |epoch| store.put_file(epoch, MediaHash([3; 32]), GRID, 0, tempfile::tempfile().unwrap());
        put_file(EPOCH).unwrap();
        let other = |actual, expected| MediaError::OtherEpoch { actual, expected };
        assert_eq!(put_file(EPOCH + 1), Err(other(EPOCH + 1, EPOCH)));
        store.clear(EPOCH + 1);
        assert_eq!(late.finish(), Err(MediaError::Cleared));
        assert_eq!(put_file(EPOCH), Err(other(EPOCH, EPOCH + 1)));
        let later = store.begin(EPOCH, MediaHash([1; 32]), GRID, 10);
        assert_eq!(later.err(), Some(other(EPOCH, EPOCH + 1)));
        assert!((1..4).all(|name| store.shape(&MediaHash([name; 32])).is_none()));
        assert_eq!(free_pages(&store), 4);
        put(EPOCH + 1, 2).finish().unwrap();
        assert_eq!(free_pages(&store), 3);
    }

    #[test]
    fn the_bound_holds_and_nothing_leaks() {
        let store = MediaStore::new(4 * PAGE_BYTES, EPOCH);
        let first = store.begin(EPOCH, MediaHash([1; 32]), GRID, 3 * PAGE_BYTES).unwrap();
        let Err(error) = store.begin(EPOCH, MediaHash([2; 32]), GRID, PAGE_BYTES + 1) else {
            panic!("over the bound")
        };
        assert!(error.to_string().contains("16384 of 65536 bytes are free"), "{error}");
        drop(first);
        assert_eq!(free_pages(&store), 4);

        let mut short = store.begin(EPOCH, MediaHash([3; 32]), GRID, 10).unwrap().unwrap();
        assert!(short.push(&pixels(11)).is_err());
        short.push(&pixels(9)).unwrap();
        assert_eq!(short.finish(), Err(MediaError::Length { actual: 9, expected: 10 }));
        assert_eq!(free_pages(&store), 4);

        let mut upload = store.begin(EPOCH, MediaHash([4; 32]), GRID, 10).unwrap().unwrap();
        upload.push(&pixels(10)).unwrap();
        upload.finish().unwrap();
        assert!(store.begin(EPOCH, MediaHash([4; 32]), Grid { t: 2, ..GRID }, 10).is_err());
        assert!(store.discard(&MediaHash([4; 32])));
        assert_eq!(free_pages(&store), 4);
    }
}

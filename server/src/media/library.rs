//! Files of media that clients uploaded, found again by their hash. The one that nobody asked for longest goes first.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use lru::LruCache;

use crate::request::Namespace;

/// What an entry takes beside its file, about: it bounds how many small files there are.
const ENTRY_BYTES: u64 = 512;

/// BLAKE3 of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MediaId(pub [u8; 32]);

impl MediaId {
    /// The id of a file.
    pub fn of(file: &[u8]) -> Self {
        Self(blake3::hash(file).into())
    }
}

/// What a file was uploaded as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MediaKind {
    /// A picture.
    Image,
    /// A video.
    Video,
}

/// A file that is larger than all files may be together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a file of {bytes} bytes cannot be kept: uploaded files have {max} bytes together")]
pub struct TooLarge {
    /// Size of the file.
    pub bytes: u64,
    /// The bound.
    pub max: u64,
}

/// Uploaded files, of a bounded number of bytes together. A medium belongs to the namespace that it was uploaded to: to others it is
/// not there.
#[derive(Debug)]
pub struct MediaLibrary {
    max_bytes: u64,
    shelf: Mutex<Shelf>,
}

type Key = (Namespace, MediaKind, MediaId);

#[derive(Debug)]
struct Shelf {
    files: LruCache<Key, Bytes>,
    bytes: u64,
}

impl MediaLibrary {
    /// A library of at most `max_bytes`.
    pub fn new(max_bytes: u64) -> Self {
        Self { max_bytes, shelf: Mutex::new(Shelf { files: LruCache::unbounded(), bytes: 0 }) }
    }

    /// Checks that a file of `bytes` bytes can be kept, alone if need be.
    ///
    /// # Errors
    /// If it cannot.
    pub fn check(&self, bytes: u64) -> Result<(), TooLarge> {
        let max = self.max_bytes.saturating_sub(ENTRY_BYTES);
        if bytes > max { Err(TooLarge { bytes, max }) } else { Ok(()) }
    }

    /// Keeps a file, and lets others go that nobody asked for longest, as many as it takes.
    ///
    /// # Errors
    /// If it is larger than all may be together.
    pub fn insert(
        &self,
        namespace: Namespace,
        kind: MediaKind,
        id: MediaId,
        file: Bytes,
    ) -> Result<(), TooLarge> {
        self.check(file.len() as u64)?;
        let mut shelf = self.lock();
        let mut gone = Vec::new();
        shelf.bytes += taken(&file);
        gone.extend(shelf.files.put((namespace, kind, id), file));
        shelf.bytes -= gone.iter().map(taken).sum::<u64>();
        while shelf.bytes > self.max_bytes {
            let (_, file) = shelf.files.pop_lru().expect("a file alone fits");
            shelf.bytes -= taken(&file);
            gone.push(file);
        }
        drop(shelf);
        Ok(())
    }

    /// A file, if it is there for this namespace.
    pub fn find(&self, namespace: Namespace, kind: MediaKind, id: MediaId) -> Option<Bytes> {
        self.lock().files.get(&(namespace, kind, id)).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shelf> {
        // Nothing between two changes of a shelf can panic.
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn taken(file: &Bytes) -> u64 {
    file.len() as u64 + ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: MediaKind = MediaKind::Image;

    fn file(byte: u8, bytes: u64) -> (MediaId, Bytes) {
        let file = Bytes::from(vec![byte; bytes as usize]);
        (MediaId::of(&file), file)
    }

    fn insert(library: &MediaLibrary, (id, file): &(MediaId, Bytes)) {
        library.insert(Namespace::default(), KIND, *id, file.clone()).unwrap();
    }

    fn has(library: &MediaLibrary, (id, file): &(MediaId, Bytes)) -> bool {
        library.find(Namespace::default(), KIND, *id).inspect(|found| assert_eq!(found, file)).is_some()
    }

    #[test]
    fn what_was_asked_for_last_stays_longest() {
        let library = MediaLibrary::new(3 * (100 + ENTRY_BYTES));
        let [a, b, c, d] = [1, 2, 3, 4].map(|byte| file(byte, 100));
        for file in [&a, &b, &c] {
            insert(&library, file);
        }
        assert!(has(&library, &a));
        insert(&library, &d);
        assert_eq!([&a, &b, &c, &d].map(|file| has(&library, file)), [true, false, true, true]);
        // What comes again is as if it had been asked for, and takes its room once.
        insert(&library, &a);
        insert(&library, &b);
        assert_eq!([&a, &b, &c, &d].map(|file| has(&library, file)), [true, true, false, true]);
    }

    #[test]
    fn the_bound_holds_for_files_of_any_size() {
        let library = MediaLibrary::new(2048);
        let largest = 2048 - ENTRY_BYTES;
        let (id, too_large) = file(1, largest + 1);
        let refused = library.insert(Namespace::default(), KIND, id, too_large);
        assert_eq!(refused, Err(TooLarge { bytes: largest + 1, max: largest }));
        for byte in 0..100 {
            insert(&library, &file(byte, u64::from(byte) * 15));
            let shelf = library.lock();
            assert_eq!(shelf.bytes, shelf.files.iter().map(|(_, file)| taken(file)).sum::<u64>());
            assert!(shelf.bytes <= 2048 && !shelf.files.is_empty());
        }
        insert(&library, &file(7, largest));
        assert_eq!(library.lock().files.len(), 1);
    }

    #[test]
    fn others_do_not_find_it() {
        let library = MediaLibrary::new(1 << 20);
        let (id, file) = file(1, 10);
        let owner = Namespace::new(Some(b"Bearer a"), Some("salt"));
        library.insert(owner, KIND, id, file).unwrap();
        assert!(library.find(owner, KIND, id).is_some());
        assert!(library.find(owner, MediaKind::Video, id).is_none());
        for (key, salt) in [
            (Some(&b"Bearer a"[..]), None),
            (Some(b"Bearer a"), Some("")),
            (Some(b"Bearer b"), Some("salt")),
            (None, Some("salt")),
            (Some(b"Bearer"), Some(" asalt")),
            (None, None),
        ] {
            assert!(library.find(Namespace::new(key, salt), KIND, id).is_none(), "{key:?} {salt:?}");
        }
    }
}

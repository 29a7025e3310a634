//! Ranks of one host meet in a file that all of them map.
//!
//! The file has a header and, for each rank, two slots, which calls use in turn: a rank writes its own slots
//! only. A rank that writes for call `k + 2` has passed a barrier of call `k + 1`, so that every rank has
//! read all of call `k`, which used the same slots.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::FallocateFlags;

use super::api::{Checker, Collective, GroupLost};
use super::barrier::Barrier;

/// A good size of a slot: small enough for a cache, large enough that barriers do not count.
pub const DEFAULT_SLOT_BYTES: usize = 1 << 20;

/// Ranks that the file has room to note.
pub const MAX_WORLD_SIZE: usize = 32;

const PAGE: usize = 4096;
/// Slots of a rank.
const TURNS: usize = 2;
/// Up to this many elements, every rank adds all of them itself: that is less than a second barrier costs.
const ONE_PHASE_ELEMENTS: usize = 8192;
/// A share of a sum begins at a cache line, so that ranks do not write to the same.
const SHARE_UNIT: usize = 16;

/// Bytes of the file for `world_size` ranks whose slots are of `slot_bytes`.
pub fn required_bytes(world_size: usize, slot_bytes: usize) -> usize {
    PAGE + world_size * TURNS * slot_bytes.next_multiple_of(PAGE)
}

/// Why a rank cannot join its group.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The file cannot be opened, sized or mapped.
    #[error("cannot share {path} with the other ranks: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The other ranks are another group, or the file is of an earlier one.
    #[error("{path} belongs to another group: {problem}")]
    OtherGroup {
        /// The file.
        path: PathBuf,
        /// How that shows.
        problem: String,
    },
}

/// What the file begins with. All zeros is a fresh one.
#[repr(C)]
struct Header {
    barrier: Barrier,
    world_size: AtomicU64,
    slot_bytes: AtomicU64,
    /// Ranks that have joined, one bit each.
    joined: AtomicU32,
}

/// The mapped file.
struct Mapping {
    map: MmapRaw,
    world_size: usize,
    /// A multiple of [`PAGE`].
    slot_bytes: usize,
}

impl Mapping {
    fn header(&self) -> &Header {
        // SAFETY: the map begins at a page and is longer than the header, whose fields are atomics, valid for
        // any bits, and accessed by all ranks as such only.
        unsafe { &*self.map.as_ptr().cast::<Header>() }
    }

    fn check(&self) -> Result<(), GroupLost> {
        if self.header().barrier.is_aborted() { Err(GroupLost) } else { Ok(()) }
    }

    /// The first byte of a slot.
    fn slot(&self, rank: usize, turn: usize) -> *mut u8 {
        assert!(rank < self.world_size && turn < TURNS);
        // SAFETY: the map has `required_bytes`: a page, and then so many slots.
        unsafe { self.map.as_mut_ptr().add(PAGE + (rank * TURNS + turn) * self.slot_bytes) }
    }
}

/// Ends the collectives of a group from another thread.
#[derive(Clone)]
pub struct Aborter {
    mapping: Arc<Mapping>,
}

impl Aborter {
    /// Makes every collective of every rank return [`GroupLost`], the present ones and all later ones.
    pub fn abort(&self) {
        self.mapping.header().barrier.abort();
    }
}

/// A rank of a group that meets in shared memory.
///
/// Sums are taken in rank order, whoever computes them. Dropping a rank ends the group: the others get
/// [`GroupLost`].
pub struct SharedMemory {
    mapping: Arc<Mapping>,
    rank: usize,
    turn: Cell<usize>,
}

impl SharedMemory {
    /// Creates the file of a new group, which must not exist, so that only its owner can open it.
    pub fn create(path: &Path, world_size: usize, slot_bytes: usize) -> Result<(), JoinError> {
        let create = || {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            file.set_len(required_bytes(world_size, slot_bytes) as u64)
        };
        create().map_err(|source| JoinError::Io { path: path.to_owned(), source })
    }

    /// Joins the group that meets in a file: one made by [`SharedMemory::create`], or an empty one, such as a
    /// fresh memfd. All ranks give the same sizes. Reserves and touches all of the memory. Does not wait for
    /// the other ranks.
    pub fn join(path: &Path, rank: usize, world_size: usize, slot_bytes: usize) -> Result<Self, JoinError> {
        assert!(rank < world_size && world_size <= MAX_WORLD_SIZE && slot_bytes > 0);
        let map = map(path, world_size, slot_bytes)
            .map_err(|source| JoinError::Io { path: path.to_owned(), source })?;
        let mapping = Mapping { map, world_size, slot_bytes: slot_bytes.next_multiple_of(PAGE) };
        let other_group = |problem| Err(JoinError::OtherGroup { path: path.to_owned(), problem });
        let header = mapping.header();
        for (what, field, mine) in [
            ("ranks", &header.world_size, world_size),
            ("bytes in a slot", &header.slot_bytes, mapping.slot_bytes),
        ] {
            let mine = mine as u64;
            if let Err(theirs) = field.compare_exchange(0, mine, Ordering::AcqRel, Ordering::Acquire)
                && theirs != mine
            {
                return other_group(format!("it has {theirs} {what}, not {mine}"));
            }
        }
        if header.joined.fetch_or(1 << rank, Ordering::AcqRel) & (1 << rank) != 0 {
            return other_group(format!("rank {rank} has joined it before"));
        }
        Ok(Self { mapping: Arc::new(mapping), rank, turn: Cell::new(0) })
    }

    /// A handle that ends the group's collectives from another thread.
    pub fn aborter(&self) -> Aborter {
        Aborter { mapping: self.mapping.clone() }
    }

    fn wait(&self) -> Result<(), GroupLost> {
        self.mapping.header().barrier.wait(self.mapping.world_size as u32)
    }

    fn next_turn(&self) -> usize {
        self.turn.replace((self.turn.get() + 1) % TURNS)
    }

    /// Copies `bytes` to this rank's slot.
    fn put(&self, turn: usize, bytes: &[u8]) {
        assert!(bytes.len() <= self.mapping.slot_bytes);
        // SAFETY: the slot is long enough, and this rank's alone to write. No rank reads it: all have read
        // what it held, since this turn comes again only after a barrier that followed their reading.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.mapping.slot(self.rank, turn), bytes.len())
        }
    }

    /// Elements `start..start + len` of a rank's slot.
    ///
    /// # Safety
    /// No rank may write them while the slice lives: a barrier must lie between the write and this call, and one must
    /// follow before the next write.
    unsafe fn elements(&self, rank: usize, turn: usize, start: usize, len: usize) -> &[f32] {
        assert!((start + len) * size_of::<f32>() <= self.mapping.slot_bytes);
        // SAFETY: a slot begins at a page and is long enough; any bits are an f32; the caller answers for the
        // rest.
        unsafe { std::slice::from_raw_parts(self.mapping.slot(rank, turn).cast::<f32>().add(start), len) }
    }

    /// Writes the sum of elements `start..start + to.len()` over all ranks, in rank order.
    ///
    /// # Safety
    /// As for [`SharedMemory::elements`], for all ranks.
    unsafe fn sum(&self, turn: usize, start: usize, to: &mut [f32]) {
        for rank in 0..self.mapping.world_size {
            // SAFETY: as the caller promises.
            let addends = unsafe { self.elements(rank, turn, start, to.len()) };
            if rank == 0 {
                to.copy_from_slice(addends);
            } else {
                to.iter_mut().zip(addends).for_each(|(sum, addend)| *sum += addend);
            }
        }
    }

    /// The elements of a piece of `len` that a rank adds.
    fn share(&self, len: usize, rank: usize) -> std::ops::Range<usize> {
        let share = len.div_ceil(self.mapping.world_size).next_multiple_of(SHARE_UNIT);
        (rank * share).min(len)..((rank + 1) * share).min(len)
    }

    /// Sums a piece that fits into a slot.
    fn reduce_piece(&self, data: &mut [f32]) -> Result<(), GroupLost> {
        let turn = self.next_turn();
        self.put(turn, as_bytes(data));
        self.wait()?;
        if data.len() <= ONE_PHASE_ELEMENTS {
            // SAFETY: all ranks wrote before the barrier, and write to this turn again only after the next.
            unsafe { self.sum(turn, 0, data) };
            return Ok(());
        }
        let mine = self.share(data.len(), self.rank);
        let to = &mut data[mine.clone()];
        // SAFETY: as above; what follows is written to elements that only this rank reads before the next
        // barrier.
        unsafe { self.sum(turn, mine.start, to) };
        let offset = mine.start * size_of::<f32>();
        // SAFETY: the share lies within the slot, and until the next barrier no other rank reads or writes
        // it: each reads its own share of every slot, and shares are disjoint.
        unsafe {
            let slot = self.mapping.slot(self.rank, turn).add(offset);
            std::ptr::copy_nonoverlapping(to.as_ptr().cast::<u8>(), slot, size_of_val(to));
        }
        self.wait()?;
        for rank in (0..self.mapping.world_size).filter(|&rank| rank != self.rank) {
            let share = self.share(data.len(), rank);
            // SAFETY: the share was written before the barrier, and its slot is written again only after
            // another.
            let sums = unsafe { self.elements(rank, turn, share.start, share.len()) };
            data[share].copy_from_slice(sums);
        }
        Ok(())
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        self.mapping.header().barrier.abort();
    }
}

impl Collective for SharedMemory {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.mapping.world_size
    }

    fn all_reduce_sum(&self, data: &mut [f32]) -> Result<(), GroupLost> {
        let piece_len = self.mapping.slot_bytes / size_of::<f32>();
        data.chunks_mut(piece_len).try_for_each(|piece| self.reduce_piece(piece))
    }

    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, GroupLost> {
        let mut of_ranks = vec![Vec::with_capacity(mine.len()); self.mapping.world_size];
        for piece in mine.chunks(self.mapping.slot_bytes) {
            let turn = self.next_turn();
            self.put(turn, piece);
            self.wait()?;
            for (rank, of_rank) in of_ranks.iter_mut().enumerate() {
                // SAFETY: all ranks wrote as many bytes before the barrier, and write to this turn again only
                // after the next.
                let theirs =
                    unsafe { std::slice::from_raw_parts(self.mapping.slot(rank, turn), piece.len()) };
                of_rank.extend_from_slice(theirs);
            }
        }
        Ok(of_ranks)
    }

    fn check(&self) -> Result<(), GroupLost> {
        self.mapping.check()
    }

    fn checker(&self) -> Checker {
        let mapping = self.mapping.clone();
        Box::new(move || mapping.check())
    }

    fn barrier(&self) -> Result<(), GroupLost> {
        self.wait()
    }
}

/// Maps the file, after reserving its memory: without that, a full file system shows as SIGBUS at some later
/// write.
fn map(path: &Path, world_size: usize, slot_bytes: usize) -> std::io::Result<MmapRaw> {
    let file: File = OpenOptions::new().read(true).write(true).open(path)?;
    let len = required_bytes(world_size, slot_bytes);
    match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len as u64) {
        // Some file systems cannot reserve.
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(len as u64)?,
        reserved => reserved?,
    }
    MmapOptions::new().len(len).populate().map_raw(&file)
}

fn as_bytes(data: &[f32]) -> &[u8] {
    // SAFETY: the bytes of floats are initialised, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast::<u8>(), size_of_val(data)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `work` as each rank of a group, on a thread and a mapping of its own.
    fn group<T: Send>(
        world_size: usize,
        slot_bytes: usize,
        work: impl Fn(SharedMemory) -> T + Sync,
    ) -> Vec<T> {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("group");
        SharedMemory::create(&path, world_size, slot_bytes).expect("created");
        std::thread::scope(|scope| {
            let (path, work) = (&path, &work);
            let ranks: Vec<_> = (0..world_size)
                .map(|rank| {
                    scope.spawn(move || {
                        work(SharedMemory::join(path, rank, world_size, slot_bytes).expect("joined"))
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
        })
    }

    /// Values of which the sum depends on the order.
    fn addends(rank: usize, len: usize) -> Vec<f32> {
        (0..len)
            .map(|i| ((i * 31 + rank * 17) % 97) as f32 * 10f32.powi((rank % 5) as i32 * 3 - 6) - 1.0)
            .collect()
    }

    #[test]
    fn sums_are_in_rank_order_whatever_the_length() {
        for world_size in 1..=8 {
            // One phase, two phases, several pieces, pieces that do not divide.
            for len in [0, 1, 5, 8192, 8193, 16_384, 40_001] {
                let mut expected = addends(0, len);
                for rank in 1..world_size {
                    expected.iter_mut().zip(addends(rank, len)).for_each(|(sum, x)| *sum += x);
                }
                let sums = group(world_size, 64 << 10, |collective| {
                    let mut data = addends(collective.rank(), len);
                    collective.all_reduce_sum(&mut data).expect("whole group");
                    data
                });
                for sum in sums {
                    assert!(
                        sum.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{world_size} {len}"
                    );
                }
            }
        }
    }

    #[test]
    fn gathers_are_in_rank_order() {
        for len in [0, 3, 4096, 10_000] {
            let gathered = group(3, 4096, |collective| {
                let mine: Vec<u8> = (0..len).map(|i| (i + collective.rank() * 7) as u8).collect();
                collective.all_gather(&mine).expect("whole group")
            });
            for of_ranks in gathered {
                assert_eq!(of_ranks.len(), 3);
                for (rank, bytes) in of_ranks.iter().enumerate() {
                    assert!(bytes.iter().copied().eq((0..len).map(|i| (i + rank * 7) as u8)));
                }
            }
        }
    }

    #[test]
    fn many_calls_of_all_kinds_do_not_mix() {
        let totals = group(4, 4096, |collective| {
            let mut total = 0.0;
            for call in 0..2000 {
                let mut data = vec![call as f32; 1 + call % 3000];
                collective.all_reduce_sum(&mut data).expect("whole group");
                assert!(data.iter().all(|&x| x == 4.0 * call as f32));
                let gathered =
                    collective.all_gather(&[call as u8, collective.rank() as u8]).expect("whole group");
                assert!((0..4).all(|rank| gathered[rank] == [call as u8, rank as u8]));
                if call % 7 == 0 {
                    collective.barrier().expect("whole group");
                }
                total += data[0];
            }
            total
        });
        assert!(totals.iter().all(|&total| total == totals[0]));
    }

    #[test]
    fn a_rank_that_leaves_ends_the_group() {
        let results = group(3, 4096, |collective| {
            collective.barrier().expect("whole group");
            if collective.rank() == 1 {
                return Err(GroupLost);
            }
            collective.all_reduce_sum(&mut [1.0])
        });
        assert_eq!(results, [Err(GroupLost); 3]);
    }

    #[test]
    fn another_thread_ends_a_wait() {
        let results = group(2, 4096, |collective| {
            if collective.rank() == 1 {
                // Long enough for the other to be asleep in its wait; either way it must return.
                std::thread::sleep(std::time::Duration::from_millis(20));
                collective.aborter().abort();
            }
            collective.barrier()
        });
        assert_eq!(results, [Err(GroupLost); 2]);
    }

    #[test]
    fn strangers_are_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("group");
        let refusal = |rank, world_size, slot_bytes| {
            SharedMemory::join(&path, rank, world_size, slot_bytes).err().expect("refused").to_string()
        };
        assert!(refusal(0, 2, 4096).contains("cannot share"));
        File::create(&path).expect("an empty file will do");
        let first = SharedMemory::join(&path, 0, 2, 4096).expect("joined");
        assert_eq!(std::fs::metadata(&path).expect("there").len(), required_bytes(2, 4096) as u64);
        assert!(refusal(0, 2, 4096).contains("rank 0 has joined it before"));
        assert!(refusal(1, 3, 4096).contains("2 ranks, not 3"));
        assert!(refusal(1, 2, 8192).contains("4096 bytes in a slot, not 8192"));
        drop(first);
        assert!(SharedMemory::create(&path, 2, 4096).is_err(), "a group's file is new");
    }
}

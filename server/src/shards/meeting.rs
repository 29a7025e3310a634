//! Where ranks meet.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    process,
};

use rustix::fs::{MemfdFlags, memfd_create};

/// The meeting of a group's ranks for an epoch, and what they are told of it.
pub(super) struct Meeting {
    /// A number that no other group has: ranks that were started elsewhere may know several. Not 0.
    pub group: u64,
    pub epoch: u64,
    /// The memory that the ranks of this host share. They open it by this path, under `/proc`, so it must stay open here.
    pub path: String,
    _memory: OwnedFd,
}

impl Meeting {
    /// The first of a new group.
    ///
    /// # Errors
    /// The system gives no memory.
    pub fn first() -> io::Result<Self> {
        Self::of(rand::random_range(1..=u64::MAX), 0)
    }

    /// The next of the same group, in fresh memory.
    ///
    /// # Errors
    /// The system gives no memory.
    pub fn next(&self) -> io::Result<Self> {
        Self::of(self.group, self.epoch + 1)
    }

    fn of(group: u64, epoch: u64) -> io::Result<Self> {
        let memory = memfd_create("lockstep-collective", MemfdFlags::CLOEXEC)?;
        let path = format!("/proc/{}/fd/{}", process::id(), memory.as_raw_fd());
        Ok(Self { group, epoch, path, _memory: memory })
    }
}

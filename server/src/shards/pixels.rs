//! Pixels on their way to the shards of this host.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsRawFd, OwnedFd},
};

use bytes::Bytes;
use rustix::fs::{MemfdFlags, memfd_create};

/// Pixels in a file in memory, written once for all ranks. It has no name in any folder, so that nothing is left behind,
/// whoever dies: the memory is free as soon as neither this value nor a rank that opened [`PixelFile::path`] is left.
pub(super) struct PixelFile(OwnedFd);

impl PixelFile {
    /// Writes the pixels, off the async threads.
    ///
    /// # Errors
    /// The system gives no file, or no memory for it.
    pub async fn write(pixels: Bytes) -> io::Result<Self> {
        let write = move || {
            let file = File::from(memfd_create("lockstep-pixels", MemfdFlags::CLOEXEC)?);
            (&file).write_all(&pixels)?;
            Ok(Self(file.into()))
        };
        tokio::task::spawn_blocking(write).await.map_err(io::Error::other)?
    }

    /// Where other processes of this user find the file while this value lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

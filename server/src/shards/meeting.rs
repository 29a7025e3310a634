//! Where ranks meet.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    process,
};

use rustix::fs::{MemfdFlags, memfd_create};

/// The meeting of a group's ranks for an epoch, and what they are told of it.
///
/// Ranks of one host meet in a file in memory, a fresh one for each epoch, which they open by a path under `/proc` while it is open
/// here. The path is made of a descriptor's number, and what is closed here makes room for another file of the same path. A rank
/// may be late to open the file of an epoch that was given up meanwhile; so all stay open until every rank has joined a later
/// epoch, and a path never leads to what it was not given for. Without that, who is late could join the wrong epoch, or write to
/// the wrong file.
pub(super) struct Meeting {
    /// A number that no other group has: ranks that were started elsewhere may know several. Not 0.
    pub group: u64,
    pub epoch: u64,
    /// Of the epoch's file.
    pub path: String,
    files: Vec<OwnedFd>,
}

impl Meeting {
    /// The first of a new group.
    ///
    /// # Errors
    /// The system gives no memory.
    pub fn first() -> io::Result<Self> {
        let (file, path) = open()?;
        Ok(Self { group: rand::random_range(1..=u64::MAX), epoch: 0, path, files: vec![file] })
    }

    /// Becomes the meeting of the next epoch.
    ///
    /// # Errors
    /// The system gives no memory.
    pub fn advance(&mut self) -> io::Result<()> {
        let (file, path) = open()?;
        self.files.push(file);
        (self.epoch, self.path) = (self.epoch + 1, path);
        Ok(())
    }

    /// Closes the files of earlier epochs: all ranks have joined this one, and do what they are asked in order.
    pub fn close_earlier(&mut self) {
        self.files.drain(..self.files.len() - 1);
    }

    /// How many files are open.
    #[cfg(test)]
    pub fn num_files(&self) -> usize {
        self.files.len()
    }
}

/// An empty file in memory, and its path.
fn open() -> io::Result<(OwnedFd, String)> {
    let file = memfd_create("lockstep-collective", MemfdFlags::CLOEXEC)?;
    let path = format!("/proc/{}/fd/{}", process::id(), file.as_raw_fd());
    Ok((file, path))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_path_leads_to_the_file_of_its_epoch_until_all_have_joined_a_later_one() {
        let mut meeting = Meeting::first().unwrap();
        let mut paths = vec![meeting.path.clone()];
        for _ in 1..5 {
            meeting.advance().unwrap();
            paths.push(meeting.path.clone());
        }
        assert_eq!(meeting.epoch, 4);
        for (epoch, path) in paths.iter().enumerate() {
            fs::write(path, format!("epoch {epoch}")).unwrap();
        }
        for (epoch, path) in paths.iter().enumerate() {
            assert_eq!(fs::read_to_string(path).unwrap(), format!("epoch {epoch}"));
        }
        meeting.close_earlier();
        assert_eq!((meeting.num_files(), fs::read_to_string(&paths[4]).unwrap().as_str()), (1, "epoch 4"));
        meeting.close_earlier();
        assert_eq!(meeting.num_files(), 1, "the last one stays");
    }
}

//! The memory that the ranks of this host meet in.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::fs::{MemfdFlags, memfd_create};

/// A file in memory for each epoch, which ranks open by a path under `/proc` while it is open here.
///
/// The path is made of a descriptor's number, and what is closed here makes room for another file of the same path. A rank may be
/// late to open the file of an epoch that was given up meanwhile; so all stay open until every rank has joined a later epoch, and
/// a path never leads to what it was not given for. Without that, who is late could join the wrong epoch, or write to the wrong
/// file.
#[derive(Default)]
pub(super) struct MeetingFiles {
    files: Vec<OwnedFd>,
}

impl MeetingFiles {
    /// An empty file for the next epoch, and its path.
    ///
    /// # Errors
    /// The system gives none.
    pub fn open(&mut self) -> io::Result<String> {
        let file = memfd_create("lockstep-collective", MemfdFlags::CLOEXEC)?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        self.files.push(file);
        Ok(path)
    }

    /// Closes the files of earlier epochs: all ranks have joined the last one, and do what they are asked in order.
    pub fn close_earlier(&mut self) {
        self.files.drain(..self.files.len().saturating_sub(1));
    }

    /// How many files are open.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.files.len()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_path_leads_to_the_file_of_its_epoch_until_all_have_joined_a_later_one() {
        let mut meeting = MeetingFiles::default();
        let paths: Vec<String> = (0..5).map(|_| meeting.open().unwrap()).collect();
        for (epoch, path) in paths.iter().enumerate() {
            fs::write(path, format!("epoch {epoch}")).unwrap();
        }
        for (epoch, path) in paths.iter().enumerate() {
            assert_eq!(fs::read_to_string(path).unwrap(), format!("epoch {epoch}"));
        }
        meeting.close_earlier();
        assert_eq!((meeting.count(), fs::read_to_string(&paths[4]).unwrap().as_str()), (1, "epoch 4"));
        meeting.close_earlier();
        assert_eq!(meeting.count(), 1, "the last one stays");
    }
}

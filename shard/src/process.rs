//! The shard as a process: whom it dies with, who is killed first, and what memory it holds.

use std::{fs, io, panic};

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// Ends this process when its parent ends, whatever ends it.
///
/// The kernel ties this to the parent's *thread* that started the process: a server starts shards from a thread that
/// lives as long as itself.
///
/// # Errors
/// The parent is not `parent`: it died before this call.
pub fn die_with_parent(parent: u32) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have died before the signal was asked for; then this process has another parent by now.
    let actual = getppid().map_or(0, Pid::as_raw_pid);
    if i64::from(actual) == i64::from(parent) {
        return Ok(());
    }
    Err(io::Error::other(format!("the parent process {parent} is gone: this process's parent is {actual}")))
}

/// Makes this process the first choice of the out-of-memory killer: a shard can be started again, its server not.
///
/// # Errors
/// The system does not allow it.
pub fn be_killed_first() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "1000")
}

/// Ends the process when any thread panics, after the panic's words are on standard error. A rank that lost a thread
/// would hold up the others for ever.
pub fn end_on_panic() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        print(panic);
        std::process::exit(101);
    }));
}

/// Resident memory of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResidentMemory {
    /// Anonymous bytes (`RssAnon`).
    pub anonymous_bytes: u64,
    /// Bytes shared with other processes (`RssShmem`).
    pub shared_bytes: u64,
}

/// Asks the system for this process's resident memory.
///
/// # Errors
/// `/proc` cannot be read.
pub fn resident_memory() -> io::Result<ResidentMemory> {
    let status = fs::read_to_string("/proc/self/status")?;
    Ok(ResidentMemory {
        anonymous_bytes: kibibytes(&status, "RssAnon:")?,
        shared_bytes: kibibytes(&status, "RssShmem:")?,
    })
}

/// Memory that the host can still give: free, or held by caches that it would drop.
///
/// # Errors
/// `/proc` cannot be read.
pub fn available_memory_bytes() -> io::Result<u64> {
    kibibytes(&fs::read_to_string("/proc/meminfo")?, "MemAvailable:")
}

/// Bytes of the line `key   123 kB`.
fn kibibytes(table: &str, key: &str) -> io::Result<u64> {
    let line = table.lines().find_map(|line| line.strip_prefix(key));
    let number = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    number.map(|kib| kib * 1024).ok_or_else(|| io::Error::other(format!("no {key} in /proc")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touched_memory_is_resident() {
        let touched = std::hint::black_box(vec![1_u8; 64 << 20]);
        // Other tests take and free memory meanwhile, so that only a lower bound holds.
        let resident = resident_memory().unwrap().anonymous_bytes;
        assert!(resident >= touched.len() as u64, "{resident}");
        assert!(available_memory_bytes().unwrap() > 1 << 20);
    }

    #[test]
    fn a_dead_parent_is_noticed() {
        // Process 0 is nobody's parent here.
        let error = die_with_parent(0).unwrap_err();
        assert!(error.to_string().contains("the parent process 0 is gone"), "{error}");
        set_parent_process_death_signal(None).unwrap();
    }
}

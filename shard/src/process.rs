//! The shard as a process: whom it dies with, who is killed first, and what memory it holds.

use std::{fs, io, panic};

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

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

/// Has the calling thread, and those that it starts from now on, run on these processors only.
///
/// # Errors
/// There is one of them that this machine or this process does not have.
pub fn run_on(cpus: &[u32]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        if cpu as usize >= CpuSet::MAX_CPU {
            return Err(io::Error::other(format!("there is no cpu {cpu}")));
        }
        set.set(cpu as usize);
    }
    Ok(sched_setaffinity(None, &set)?)
}

/// Has the calling thread run on the processors that are nearest to a device on the PCI bus. Returns these, as the system
/// writes them: `0-15,32-47`. Memory that it touches first is near then, too.
///
/// # Errors
/// The system does not know of the device, or this process may use none of these processors.
pub fn run_near(pci_bus_id: &str) -> io::Result<String> {
    let list = fs::read_to_string(format!("/sys/bus/pci/devices/{pci_bus_id}/local_cpulist"))?;
    let list = list.trim();
    let mut near =
        cpus_of_list(list).ok_or_else(|| io::Error::other(format!("{list:?} is no list of cpus")))?;
    let allowed = sched_getaffinity(None)?;
    near.retain(|&cpu| (cpu as usize) < CpuSet::MAX_CPU && allowed.is_set(cpu as usize));
    if near.is_empty() {
        return Err(io::Error::other(format!("this process may run on none of the cpus {list}")));
    }
    run_on(&near)?;
    Ok(list.to_owned())
}

/// `0-2,5` is 0, 1, 2 and 5.
fn cpus_of_list(list: &str) -> Option<Vec<u32>> {
    let mut cpus = Vec::new();
    for range in list.split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cpus.extend(first.parse::<u32>().ok()?..=last.parse().ok()?);
    }
    Some(cpus)
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
    fn lists_of_cpus_are_read() {
        assert_eq!(cpus_of_list("0-2,5,8-9"), Some(vec![0, 1, 2, 5, 8, 9]));
        assert_eq!(cpus_of_list(""), Some(vec![]));
        assert_eq!(cpus_of_list("0-x"), None);
    }

    #[test]
    fn a_dead_parent_is_noticed() {
        // Process 0 is nobody's parent here.
        let error = die_with_parent(0).unwrap_err();
        assert!(error.to_string().contains("the parent process 0 is gone"), "{error}");
        set_parent_process_death_signal(None).unwrap();
    }
}

//! What a process that decodes gives up before it looks at a client's bytes.
//!
//! Limits on memory, time, files and processes are set everywhere. A kernel that has Landlock lets it open no file and no
//! connection; one that has filters of system calls lets it do little more than compute, and read and write the streams that
//! it has. Either is left out where the kernel lacks it.

use std::collections::BTreeMap;
use std::io;

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, Scope};
use rustix::process::{
    DumpableBehavior, Pid, Resource, Rlimit, Signal, getppid, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Standard input, output and error, and not one file or socket more.
const OPEN_FILES: u64 = 3;
/// The version of Landlock whose every right is asked about; kernels with an older one know fewer of them.
const LANDLOCK: ABI = ABI::V6;

/// System calls that decoding makes, beside those of [`FOR_DATA`]: memory, locks, time, and the end.
const FREE: [i64; 19] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
];
/// Calls that make memory of data, which must not become code.
const FOR_DATA: [i64; 2] = [libc::SYS_mmap, libc::SYS_mprotect];
/// Calls that read and write, which only standard streams are there for.
const STREAMS: [(i64, u64); 6] = [
    (libc::SYS_read, 0),
    (libc::SYS_readv, 0),
    (libc::SYS_write, 1),
    (libc::SYS_writev, 1),
    (libc::SYS_write, 2),
    (libc::SYS_writev, 2),
];

/// How much a process may use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// The process that must live for as long as this one.
    pub(super) parent: u32,
    /// Of address space.
    pub(super) memory_bytes: u64,
    /// Of a processor's time.
    pub(super) cpu_seconds: u64,
}

/// Gives up what decoding does not take, in this thread for good. There must be no other.
///
/// # Errors
/// A limit that cannot be set, or a parent that is gone.
pub(super) fn confine(bounds: Bounds) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have died before the signal was asked for; then this process has another parent by now.
    if i64::from(getppid().map_or(0, Pid::as_raw_pid)) != i64::from(bounds.parent) {
        return Err(io::Error::other("the parent process is gone"));
    }
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    for (resource, most) in [
        (Resource::As, bounds.memory_bytes),
        (Resource::Cpu, bounds.cpu_seconds),
        (Resource::Core, 0),
        (Resource::Fsize, 0),
        (Resource::Nproc, 0),
        (Resource::Nofile, OPEN_FILES),
    ] {
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
    }
    // The second is the stronger one; a kernel without the first may have it, and the other way round.
    let _ = without_files_and_network();
    let _ = without_system_calls();
    Ok(())
}

/// Forbids to open files, to connect and to listen, to speak to other processes.
fn without_files_and_network() -> Result<(), RulesetError> {
    let rules = Ruleset::default().handle_access(AccessFs::from_all(LANDLOCK))?;
    let rules = rules.handle_access(AccessNet::from_all(LANDLOCK))?.scope(Scope::from_all(LANDLOCK))?;
    rules.create()?.restrict_self()?;
    Ok(())
}

/// Makes every system call fail that is not listed above.
fn without_system_calls() -> Result<(), seccompiler::Error> {
    let program = filter(std::env::consts::ARCH.try_into()?)?;
    seccompiler::apply_filter(&program)
}

fn filter(arch: TargetArch) -> Result<BpfProgram, seccompiler::BackendError> {
    use SeccompCmpArgLen::Dword;
    let rule = |argument: u8, operator, value| {
        SeccompRule::new(vec![SeccompCondition::new(argument, Dword, operator, value)?])
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = FREE.iter().map(|call| (*call, Vec::new())).collect();
    for call in FOR_DATA {
        let executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
        rules.insert(call, vec![rule(2, executable, 0)?]);
    }
    for (call, stream) in STREAMS {
        rules.entry(call).or_default().push(rule(0, SeccompCmpOp::Eq, stream)?);
    }
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(rules, refused, SeccompAction::Allow, arch)?.try_into()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use super::*;

    /// Run by the test below in a process of its own, which is then good for nothing else.
    #[test]
    #[ignore = "confines the process that it runs in"]
    fn inside() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let parent = getppid().unwrap().as_raw_pid() as u32;
        confine(Bounds { parent, memory_bytes: 1 << 30, cpu_seconds: 10 }).unwrap();
        // What the number of open files forbids alone, they may all be closed: these are not even asked about it.
        drop(listener);
        assert!(File::open("/proc/self/status").is_err());
        assert!(File::create("/tmp/lockstep-confined").is_err());
        assert!(std::fs::read_dir("/").is_err());
        assert!(
            std::fs::remove_file("/tmp/lockstep-confined-none")
                .is_err_and(|error| { error.kind() == io::ErrorKind::PermissionDenied })
        );
        assert!(
            TcpStream::connect(address)
                .is_err_and(|error| { error.kind() == io::ErrorKind::PermissionDenied })
        );
        assert!(UdpSocket::bind("127.0.0.1:0").is_err());
        assert!(UnixStream::pair().is_err());
        assert!(Command::new("/bin/true").spawn().is_err());
        assert!(std::thread::Builder::new().spawn(|| ()).is_err());
        assert!(Vec::<u8>::new().try_reserve_exact(2 << 30).is_err());
        assert_eq!(vec![1_u8; 64 << 20].iter().map(|byte| u64::from(*byte)).sum::<u64>(), 64 << 20);
    }

    #[test]
    fn a_confined_process_computes_and_does_nothing_else() {
        let this = std::env::current_exe().unwrap();
        let name = concat!(module_path!(), "::inside");
        let name = name.split_once("::").unwrap().1;
        let arguments = ["--exact", name, "--ignored", "--nocapture", "--test-threads=1"];
        let output = Command::new(this).args(arguments).output().unwrap();
        let words =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && words.contains("1 passed"), "{}: {words}", output.status);
    }

    #[test]
    fn there_is_a_filter_for_every_architecture_that_is_built_for() {
        for arch in [TargetArch::x86_64, TargetArch::aarch64] {
            assert!(filter(arch).is_ok());
        }
    }
}

//! What a process that decodes gives up before it looks at a client's bytes.
//!
//! Limits on memory, time, files and processes are set everywhere. A kernel that has Landlock lets it open no file and no
//! connection; one that has filters of system calls lets it do little more than compute, and read and write the streams
//! that it has. Either is left out where the kernel lacks it, which the process tells; anything else that keeps it from
//! being in force is an error.

mod program;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus,
    Scope, path_beneath_rules,
};
use rustix::process::{
    DumpableBehavior, Pid, Resource, Rlimit, Signal, getppid, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

pub(super) use program::confine_program;

/// Standard input, output and error, and not one file or socket more.
const OPEN_FILES: u64 = 3;
/// The version of Landlock whose every right is asked about; kernels with an older one know fewer of them.
const LANDLOCK: ABI = ABI::V6;
/// Seconds of a processor's time after the signal that there are no more of them, until the process is killed: whoever was
/// killed without that signal was so by somebody else.
const LAST_CPU_SECONDS: u64 = 5;

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

/// How much of something is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Force {
    /// Nothing: the kernel lacks it.
    None,
    /// What an older kernel has of it.
    Part,
    /// All.
    Whole,
}

/// What is in force beside the limits on resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layers {
    /// No files, no network, no other processes: Landlock.
    pub(super) landlock: Force,
    /// Few system calls: seccomp.
    pub(super) seccomp: Force,
}

impl Layers {
    /// As the process tells it.
    pub(super) fn to_bytes(self) -> [u8; 2] {
        [self.landlock as u8, self.seccomp as u8]
    }

    /// What the process told.
    pub(super) fn from_bytes(bytes: [u8; 2]) -> Option<Self> {
        let force =
            |byte| [Force::None, Force::Part, Force::Whole].into_iter().find(|force| *force as u8 == byte);
        Some(Self { landlock: force(bytes[0])?, seccomp: force(bytes[1])? })
    }
}

/// Gives up what decoding does not take, in this thread for good. There must be no other.
///
/// # Errors
/// A limit that cannot be set, a parent that is gone, or a layer that the kernel has and that cannot be put in force.
pub(super) fn confine(bounds: Bounds) -> io::Result<Layers> {
    let limits = [(Resource::Nproc, 0), (Resource::Nofile, OPEN_FILES)];
    confined(bounds, &limits, &[], |arch| Ok(vec![filter(arch)?]))
}

/// Sets limits, those of every process and `limits`, and puts in force what the kernel has: files can be read and run only
/// at and below `readable`, and the filters of system calls are `filters`.
fn confined(
    bounds: Bounds,
    limits: &[(Resource, u64)],
    readable: &[&Path],
    filters: impl FnOnce(TargetArch) -> Result<Vec<BpfProgram>, BackendError>,
) -> io::Result<Layers> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have died before the signal was asked for; then this process has another parent by now.
    if i64::from(getppid().map_or(0, Pid::as_raw_pid)) != i64::from(bounds.parent) {
        return Err(io::Error::other("the parent process is gone"));
    }
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    // First, since a set of rules is an open file until it is in force.
    let landlock = without_files_and_network(readable).map_err(io::Error::other)?;
    let limit =
        |resource, soft, hard| setrlimit(resource, Rlimit { current: Some(soft), maximum: Some(hard) });
    limit(Resource::Cpu, bounds.cpu_seconds, bounds.cpu_seconds.saturating_add(LAST_CPU_SECONDS))?;
    let usual = [(Resource::As, bounds.memory_bytes), (Resource::Core, 0), (Resource::Fsize, 0)];
    for (resource, most) in usual.iter().chain(limits) {
        limit(*resource, *most, *most)?;
    }
    Ok(Layers { landlock, seccomp: without_system_calls(filters)? })
}

/// Forbids to open files but those at and below `readable`, to connect and to listen, to speak to other processes, as far
/// as the kernel knows how to.
fn without_files_and_network(readable: &[&Path]) -> Result<Force, RulesetError> {
    let rules = Ruleset::default().handle_access(AccessFs::from_all(LANDLOCK))?;
    let rules = rules.handle_access(AccessNet::from_all(LANDLOCK))?.scope(Scope::from_all(LANDLOCK))?;
    let rules =
        rules.create()?.add_rules(path_beneath_rules(readable, AccessFs::Execute | AccessFs::ReadFile))?;
    Ok(match rules.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Force::Whole,
        RulesetStatus::PartiallyEnforced => Force::Part,
        RulesetStatus::NotEnforced => Force::None,
    })
}

/// Puts filters of system calls in force, if the kernel can.
fn without_system_calls(
    filters: impl FnOnce(TargetArch) -> Result<Vec<BpfProgram>, BackendError>,
) -> io::Result<Force> {
    let Ok(arch) = TargetArch::try_from(std::env::consts::ARCH) else { return Ok(Force::None) };
    for program in filters(arch).map_err(io::Error::other)? {
        match seccompiler::apply_filter(&program) {
            Ok(()) => {}
            Err(seccompiler::Error::Seccomp(error)) if is_lacking(&error) => return Ok(Force::None),
            Err(error) => return Err(io::Error::other(error)),
        }
    }
    Ok(Force::Whole)
}

/// Whether a system call failed because the kernel does not have it.
fn is_lacking(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP))
}

/// Makes every system call fail that is not listed above.
fn filter(arch: TargetArch) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = FREE.iter().map(|call| (*call, Vec::new())).collect();
    for call in FOR_DATA {
        let executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
        rules.insert(call, vec![rule([(2, executable, 0)])?]);
    }
    for (call, stream) in STREAMS {
        rules.entry(call).or_default().push(rule([(0, SeccompCmpOp::Eq, stream)])?);
    }
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(rules, refused, SeccompAction::Allow, arch)?.try_into()
}

/// A rule that holds when all these arguments, told by their index, compare so.
fn rule<const N: usize>(arguments: [(u8, SeccompCmpOp, u64); N]) -> Result<SeccompRule, BackendError> {
    let conditions = arguments.map(|(index, operator, value)| {
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)
    });
    SeccompRule::new(conditions.into_iter().collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use super::*;

    const BOUNDS: Bounds = Bounds { parent: 0, memory_bytes: 1 << 30, cpu_seconds: 10 };

    pub(super) fn bounds() -> Bounds {
        Bounds { parent: getppid().unwrap().as_raw_pid() as u32, ..BOUNDS }
    }

    pub(super) fn code<T>(result: io::Result<T>) -> Option<i32> {
        result.err().and_then(|error| error.raw_os_error())
    }

    /// Run by a test below in a process of its own, which is then good for nothing else.
    #[test]
    #[ignore = "confines the process that it runs in"]
    fn inside() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let layers = confine(bounds()).unwrap();
        // Every kernel that this is built for has it; Landlock is looked at by itself.
        assert_eq!(layers.seccomp, Force::Whole);
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

    /// Landlock alone, told by its code from the other layers; and with them it is in force no less.
    #[test]
    #[ignore = "confines the process that it runs in"]
    fn inside_landlock() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let force = without_files_and_network(&[]).unwrap();
        if force == Force::None {
            println!("this kernel has no Landlock");
        } else {
            assert_eq!(code(File::open("/proc/self/status")), Some(libc::EACCES));
            assert_eq!(code(std::fs::read_dir("/")), Some(libc::EACCES));
        }
        if force == Force::Whole {
            assert_eq!(code(TcpStream::connect(address)), Some(libc::EACCES));
        }
        assert_eq!(confine(bounds()).unwrap(), Layers { landlock: force, seccomp: Force::Whole });
    }

    /// The filter of system calls alone.
    #[test]
    #[ignore = "confines the process that it runs in"]
    fn inside_seccomp() {
        assert_eq!(without_system_calls(|arch| Ok(vec![filter(arch)?])).unwrap(), Force::Whole);
        assert_eq!(code(File::open("/proc/self/status")), Some(libc::EPERM));
        assert_eq!(code(UdpSocket::bind("127.0.0.1:0")), Some(libc::EPERM));
        assert_eq!(code(Command::new("/bin/true").spawn()), Some(libc::EPERM));
    }

    /// A confinement that fails is an error: here there is another parent.
    #[test]
    fn nobody_is_confined_for_another_parent() {
        assert!(confine(BOUNDS).is_err());
    }

    #[test]
    fn a_confined_process_computes_and_does_nothing_else() {
        for name in ["inside", "inside_landlock", "inside_seccomp"] {
            passes(&format!("{}::{name}", module_path!()));
        }
    }

    /// Runs a test of this program that is ignored otherwise, in a process of its own.
    pub(super) fn passes(test: &str) {
        let output = Command::new(std::env::current_exe().unwrap()).args(alone(test)).output().unwrap();
        let words =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        let passed = output.status.success() && words.contains("1 passed");
        assert!(passed, "{test}: {}: {words}", output.status);
    }

    /// What makes a program of tests run this one alone.
    pub(super) fn alone(test: &str) -> [&str; 5] {
        let test = test.split_once("::").unwrap().1;
        ["--exact", test, "--ignored", "--nocapture", "--test-threads=1"]
    }

    #[test]
    fn layers_are_told() {
        for (landlock, seccomp) in [(Force::None, Force::Whole), (Force::Part, Force::None)] {
            let layers = Layers { landlock, seccomp };
            assert_eq!(Layers::from_bytes(layers.to_bytes()), Some(layers));
        }
        assert_eq!(Layers::from_bytes([0, 3]), None);
    }

    #[test]
    fn there_is_a_filter_for_every_architecture_that_is_built_for() {
        for arch in [TargetArch::x86_64, TargetArch::aarch64] {
            assert!(filter(arch).is_ok());
        }
    }
}

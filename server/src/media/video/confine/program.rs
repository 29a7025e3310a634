//! What this process gives up before it becomes a program of others: ffmpeg.
//!
//! Such a program loads its libraries, starts threads, and asks for what its version and its libraries ask for: a list of
//! allowed system calls would break it sooner or later. It has a list of refused ones instead, of all that reaches beyond
//! its own memory and the files that it may read. With that, it can start no process, write no file and speak to nobody,
//! also where the kernel has no Landlock; but there it can read files.

use std::io;
use std::path::Path;

use super::{
    BTreeMap, BackendError, Bounds, BpfProgram, Layers, Resource, SeccompAction, SeccompCmpOp, SeccompFilter,
    SeccompRule, TargetArch, confined, rule,
};

/// The standard streams, and libraries while they are loaded.
const OPEN_FILES: u64 = 16;
/// Where programs find their libraries; there are no others that it may open.
const LIBRARIES: [&str; 6] =
    ["/etc/ld.so.cache", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"];

/// System calls that no decoder needs: of networks, of other processes, of what belongs to the whole system, and of files
/// but for reading them.
const REFUSED: [i64; 104] = [
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_listen,
    libc::SYS_socket,
    libc::SYS_socketpair,
    // Other processes.
    libc::SYS_execveat,
    libc::SYS_ioprio_set,
    libc::SYS_kcmp,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_mq_open,
    libc::SYS_mq_unlink,
    libc::SYS_msgctl,
    libc::SYS_msgget,
    libc::SYS_msgrcv,
    libc::SYS_msgsnd,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_semctl,
    libc::SYS_semget,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_setns,
    libc::SYS_setpgid,
    libc::SYS_setpriority,
    libc::SYS_setsid,
    libc::SYS_shmat,
    libc::SYS_shmctl,
    libc::SYS_shmget,
    libc::SYS_tkill,
    libc::SYS_unshare,
    // The system.
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_inotify_add_watch,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
    // Files.
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_ftruncate,
    libc::SYS_linkat,
    libc::SYS_lremovexattr,
    libc::SYS_lsetxattr,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_removexattr,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_symlinkat,
    libc::SYS_truncate,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];
/// Older names of some of these.
#[cfg(target_arch = "x86_64")]
const REFUSED_OLD: [i64; 18] = [
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_creat,
    libc::SYS_fork,
    libc::SYS_futimesat,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_lchown,
    libc::SYS_link,
    libc::SYS_mkdir,
    libc::SYS_mknod,
    libc::SYS_rename,
    libc::SYS_rmdir,
    libc::SYS_symlink,
    libc::SYS_unlink,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_vfork,
];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_OLD: [i64; 0] = [];
/// `fchmodat2`, which has this number everywhere, and not everywhere a name.
const FCHMODAT2: i64 = 452;
/// Calls that say what they do in memory, where no filter sees it, or that libraries have long done without: they go on with
/// the older ones where a kernel does not have these.
const UNKNOWN: [i64; 3] = [libc::SYS_clone3, FCHMODAT2, libc::SYS_openat2];
/// Calls that open files, with the index of the argument that says how.
#[cfg(target_arch = "x86_64")]
const OPENING: [(i64, u8); 2] = [(libc::SYS_open, 1), (libc::SYS_openat, 2)];
#[cfg(not(target_arch = "x86_64"))]
const OPENING: [(i64, u8); 1] = [(libc::SYS_openat, 2)];
/// Ways of opening a file that are more than reading it.
const MORE_THAN_READING: [i32; 4] = [libc::O_WRONLY, libc::O_RDWR, libc::O_CREAT, libc::O_TRUNC];
/// Calls about the process that their first argument names, where 0 is the one that calls.
const OF_A_PROCESS: [i64; 5] = [
    libc::SYS_prlimit64,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
];

/// Gives up what a decoder of others does not take, in this thread for good: what is in force stays so in the program that
/// this process becomes. There must be no other thread. `program` is its path, absolute and without links.
///
/// # Errors
/// A limit that cannot be set, a parent that is gone, or a layer that the kernel has and that cannot be put in force.
pub(in crate::media::video) fn confine_program(bounds: Bounds, program: &Path) -> io::Result<Layers> {
    let readable: Vec<&Path> = LIBRARIES.iter().map(Path::new).chain([program]).collect();
    // Not the number of processes: threads count as such, and those of all others of this user with them.
    let own = std::process::id();
    confined(bounds, &[(Resource::Nofile, OPEN_FILES)], &readable, |arch| filters(arch, own))
}

fn filters(arch: TargetArch, own: u32) -> Result<Vec<BpfProgram>, BackendError> {
    let unknown = UNKNOWN.iter().map(|call| (*call, Vec::new())).collect();
    let refusing = |rules, code: i32| {
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(code as u32), arch)?.try_into()
    };
    Ok(vec![refusing(refused(own)?, libc::EPERM)?, refusing(unknown, libc::ENOSYS)?])
}

/// What is refused, and when. `own` is this process.
fn refused(own: u32) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let own = u64::from(own);
    let calls = REFUSED.iter().chain(&REFUSED_OLD);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = calls.map(|call| (*call, Vec::new())).collect();
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![rule([(0, SeccompCmpOp::MaskedEq(thread), 0)])?]);
    for (call, argument) in OPENING {
        let ways = MORE_THAN_READING.map(|way| way as u64);
        let ways = ways.map(|way| rule([(argument, SeccompCmpOp::MaskedEq(way), way)]));
        rules.insert(call, ways.into_iter().collect::<Result<_, _>>()?);
    }
    for call in [libc::SYS_kill, libc::SYS_tgkill] {
        rules.insert(call, vec![rule([(0, SeccompCmpOp::Ne, own)])?]);
    }
    for call in OF_A_PROCESS {
        rules.insert(call, vec![rule([(0, SeccompCmpOp::Ne, 0), (0, SeccompCmpOp::Ne, own)])?]);
    }
    if cfg!(target_arch = "x86_64") {
        // Kernels with x32 know each call by a second number, and some by numbers of their own.
        const X32: i64 = 0x4000_0000;
        let second: Vec<i64> = rules.keys().chain(&UNKNOWN).copied().chain(512..=547).collect();
        rules.extend(second.into_iter().map(|call| (call | X32, Vec::new())));
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::super::Force;
    use super::super::tests::{alone, bounds, code, passes};
    use super::*;

    /// Run by a test below in a process of its own, which then becomes [`afterwards`].
    #[test]
    #[ignore = "confines the process that it runs in"]
    fn before() {
        let this = std::env::current_exe().unwrap().canonicalize().unwrap();
        let layers = confine_program(bounds(), &this).unwrap();
        assert_eq!(layers.seccomp, Force::Whole);
        let afterwards = format!("{}::afterwards", module_path!());
        // What the program is told of Landlock, which it cannot ask.
        let landlock = format!("{:?}", layers.landlock);
        panic!("{}", Command::new(this).args(alone(&afterwards)).env("LANDLOCK", landlock).exec());
    }

    /// What is in force in a program that a confined process became.
    #[test]
    #[ignore = "run in a process that is confined"]
    fn afterwards() {
        let Ok(landlock) = std::env::var("LANDLOCK") else { return };
        if landlock != "None" {
            assert_eq!(code(File::open("/etc/passwd")), Some(libc::EACCES));
            assert_eq!(code(File::open("/proc/self/environ")), Some(libc::EACCES));
            assert_eq!(code(std::fs::read_dir("/")), Some(libc::EACCES));
        }
        assert_eq!(code(File::create("/tmp/lockstep-confined")), Some(libc::EPERM));
        assert_eq!(code(std::fs::remove_file("/tmp/lockstep-none")), Some(libc::EPERM));
        assert_eq!(code(std::fs::rename("/tmp/lockstep-none", "/tmp/lockstep-none")), Some(libc::EPERM));
        assert_eq!(code(TcpStream::connect("127.0.0.1:1")), Some(libc::EPERM));
        assert_eq!(code(TcpListener::bind("127.0.0.1:0")), Some(libc::EPERM));
        assert_eq!(code(UdpSocket::bind("127.0.0.1:0")), Some(libc::EPERM));
        assert_eq!(code(Command::new("/bin/true").spawn()), Some(libc::EPERM));
        let parent = rustix::process::getppid().unwrap();
        let killed = rustix::process::kill_process(parent, rustix::process::Signal::CONT);
        assert_eq!(killed, Err(rustix::io::Errno::PERM));
        assert!(Vec::<u8>::new().try_reserve_exact(2 << 30).is_err());
        assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
        // What it needs nevertheless.
        assert!(File::open(std::env::current_exe().unwrap()).is_ok());
    }

    #[test]
    fn a_program_keeps_threads_and_its_own_files() {
        passes(&format!("{}::before", module_path!()));
    }

    #[test]
    fn there_are_filters_for_every_architecture_that_is_built_for() {
        for arch in [TargetArch::x86_64, TargetArch::aarch64] {
            assert_eq!(filters(arch, 1).unwrap().len(), 2);
        }
    }
}

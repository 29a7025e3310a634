//! `lockstep` whose shards break when they are told to: for tests of what a server does about it.
//!
//! `LOCKSTEP_FAULTS` names a folder. A shard of rank 1 looks for the file `1` in it whenever it is about to meet the other ranks. It
//! takes the first line out of it, `KIND AFTER`, and does this when it has met the others `AFTER` times more. A shard that is started
//! in its place does not do the same again, but what the next line says. The kinds are those of [`Fault`], in lower case.

#![forbid(unsafe_code)]

use std::{
    cell::Cell,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use lockstep_shard::{
    ShardArgs,
    collective::{Collective, GroupLost},
    serve_with,
    service::load::load_with,
};
use rustix::process::{Resource, Rlimit, Signal, getpid, kill_process, setrlimit};

/// What a shard may do all at once.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Change one bit of what an all-reduce gives, on this rank only.
    Flip,
    /// Never come to a meeting.
    Hang,
    /// Take memory until there is none.
    Exhaust,
    /// Panic.
    Panic,
    /// Be killed (SIGKILL).
    Kill,
    /// Be stopped (SIGSTOP).
    Stop,
}

impl Fault {
    fn named(name: &str) -> Option<Self> {
        let all = [Self::Flip, Self::Hang, Self::Exhaust, Self::Panic, Self::Kill, Self::Stop];
        all.into_iter().find(|fault| format!("{fault:?}").eq_ignore_ascii_case(name))
    }

    /// Does it. A flip is done with what a meeting gives.
    fn happen(self) {
        match self {
            Self::Flip => {}
            Self::Hang => loop {
                thread::sleep(Duration::from_secs(3600));
            },
            Self::Exhaust => exhaust(),
            Self::Panic => panic!("a fault that was planted"),
            Self::Kill => drop(kill_process(getpid(), Signal::KILL)),
            Self::Stop => drop(kill_process(getpid(), Signal::STOP)),
        }
    }
}

/// Takes memory until the system refuses, which ends the process. A bound on this process alone keeps others from harm.
fn exhaust() {
    let bytes = fs::read_to_string("/proc/self/statm").expect("the size of this process");
    let pages: u64 = bytes.split(' ').next().and_then(|pages| pages.parse().ok()).expect("pages");
    let bound = Some(pages * rustix::param::page_size() as u64 + (256 << 20));
    setrlimit(Resource::As, Rlimit { current: bound, maximum: bound }).expect("a bound on memory");
    let mut taken = Vec::new();
    loop {
        taken.push(vec![1_u8; 1 << 20]);
    }
}

/// A collective on a rank with faults.
struct Faulty {
    inner: Box<dyn Collective>,
    orders: PathBuf,
    due: Cell<Option<(Fault, u64)>>,
}

impl Faulty {
    /// Looks for an order, and carries it out when its time has come. Whether a bit is to be flipped.
    fn about_to_meet(&self) -> bool {
        if self.due.get().is_none()
            && let Ok(orders) = fs::read_to_string(&self.orders)
        {
            self.due.set(Some(self.take(orders.trim())));
        }
        match self.due.take() {
            Some((fault, 0)) => {
                fault.happen();
                matches!(fault, Fault::Flip)
            }
            Some((fault, after)) => {
                self.due.set(Some((fault, after - 1)));
                false
            }
            None => false,
        }
    }
}

impl Collective for Faulty {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce_sum(&self, data: &mut [f32]) -> Result<(), GroupLost> {
        let flips = self.about_to_meet();
        self.inner.all_reduce_sum(data)?;
        match data.last_mut() {
            // The last row is one whose hidden state counts. Half or twice as much is not lost in rounding.
            Some(last) if flips => *last = f32::from_bits(last.to_bits() ^ 1 << 23),
            None if flips => self.due.set(Some((Fault::Flip, 0))),
            _ => {}
        }
        Ok(())
    }

    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, GroupLost> {
        self.meet_unchanged();
        self.inner.all_gather(mine)
    }

    fn barrier(&self) -> Result<(), GroupLost> {
        self.meet_unchanged();
        self.inner.barrier()
    }
}

impl Faulty {
    /// The first of these orders, which leaves the others in the file.
    fn take(&self, orders: &str) -> (Fault, u64) {
        let (order, rest) = orders.split_once('\n').unwrap_or((orders, ""));
        let taken = if rest.is_empty() {
            fs::remove_file(&self.orders)
        } else {
            let left = self.orders.with_extension("left");
            fs::write(&left, rest).and_then(|()| fs::rename(left, &self.orders))
        };
        taken.expect("an order is taken once");
        let (fault, after) = order.split_once(' ').expect("KIND AFTER");
        (Fault::named(fault).expect("a kind"), after.parse().expect("a number"))
    }

    /// A flip waits for the next all-reduce.
    fn meet_unchanged(&self) {
        if self.about_to_meet() {
            self.due.set(Some((Fault::Flip, 0)));
        }
    }
}

/// Reads `... shard --listen ADDRESS [--parent PID]`.
fn shard_args(arguments: &[OsString]) -> anyhow::Result<ShardArgs> {
    let (mut listen, mut parent) = (None, None);
    for pair in arguments.chunks(2) {
        let [name, value] = pair else { bail!("{pair:?} has no value") };
        let value = value.to_str().context("an argument that is not text")?;
        match name.to_str() {
            Some("--listen") => listen = Some(value.parse()?),
            Some("--parent") => parent = Some(value.parse()?),
            _ => bail!("{name:?} is unknown"),
        }
    }
    Ok(ShardArgs { listen: listen.context("--listen is missing")?, parent })
}

fn shard(args: ShardArgs, faults: &Path) -> anyhow::Result<()> {
    let faults = faults.to_owned();
    let load = load_with(Arc::new(move |inner: Box<dyn Collective>| {
        let orders = faults.join(inner.rank().to_string());
        Box::new(Faulty { inner, orders, due: Cell::new(None) })
    }));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve_with(args, load))
}

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let verb = arguments.iter().position(|argument| argument == "shard");
    let (Some(verb), Some(faults)) = (verb, std::env::var_os("LOCKSTEP_FAULTS")) else {
        return lockstep::cli::main();
    };
    match shard_args(&arguments[verb + 1..]).and_then(|args| shard(args, Path::new(&faults))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("faulty-shard: {error:#}");
            ExitCode::FAILURE
        }
    }
}

//! `lockstep` whose shards break when they are told to: for tests of what a server does about it.
//!
//! `LOCKSTEP_FAULTS` names a folder. A shard of rank 1 looks for the file `1` in it whenever it is about to meet the other ranks. It
//! takes the first line out of it, `KIND AFTER` or `KIND AFTER PHASE`, and does this when it has met the others `AFTER` times more,
//! of times in such a phase. A shard that is started in its place does not do the same again, but what the next line says. The kinds
//! are those of [`Fault`], the phases those of [`Phase`], in lower case.

#![forbid(unsafe_code)]

use std::{
    cell::Cell,
    collections::HashSet,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use lockstep_shard::{
    ShardArgs,
    collective::{Checker, Collective, GroupLost},
    runner::{
        Step, StepError, StepResult,
        step::{Chunk, Encode, MediaHash},
    },
    serve_with,
    service::{
        load::load_with,
        worker::{Load, LoadError, Rank},
    },
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
            Self::Kill => signal(Signal::KILL),
            Self::Stop => signal(Signal::STOP),
        }
    }
}

/// Sends a signal to this process, and waits until it has come: it may be another thread that takes it.
fn signal(signal: Signal) {
    kill_process(getpid(), signal).expect("a signal to this process");
    thread::sleep(Duration::from_secs(1));
}

/// What a rank does in a step. It may be several at once.
#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Encodes a picture.
    Picture,
    /// Encodes a video.
    Video,
    /// Computes several tokens of a sequence.
    Prefill,
    /// Computes one token of a sequence.
    Decode,
}

impl Phase {
    const ALL: [Self; 4] = [Self::Picture, Self::Video, Self::Prefill, Self::Decode];

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| format!("{phase:?}").eq_ignore_ascii_case(name))
    }

    fn is_in(self, step: &Step, videos: &HashSet<MediaHash>) -> bool {
        let encodes = |of_video: bool| {
            let is_one = |encode: &Encode| videos.contains(&encode.hash) == of_video;
            step.encodes.iter().any(is_one)
        };
        let computes = |is_one: &dyn Fn(&Chunk) -> bool| step.chunks.iter().any(is_one);
        match self {
            Self::Picture => encodes(false),
            Self::Video => encodes(true),
            Self::Prefill => computes(&|chunk| chunk.length > 1),
            Self::Decode => computes(&|chunk| chunk.length == 1),
        }
    }

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// What a rank is to do, and when.
#[derive(Clone, Copy, Debug)]
struct Order {
    fault: Fault,
    after: u64,
    /// None is any.
    phase: Option<Phase>,
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
    due: Cell<Option<Order>>,
    /// Phases of the step in work, by [`Phase::bit`].
    phases: Arc<AtomicU8>,
}

impl Faulty {
    /// Looks for an order, and carries it out when its time has come. Whether a bit is to be flipped.
    fn about_to_meet(&self) -> bool {
        if self.due.get().is_none()
            && let Ok(orders) = fs::read_to_string(&self.orders)
        {
            self.due.set(Some(self.take(orders.trim())));
        }
        let Some(order) = self.due.take() else { return false };
        let phases = self.phases.load(Ordering::Relaxed);
        if order.phase.is_some_and(|phase| phases & phase.bit() == 0) {
            self.due.set(Some(order));
        } else if order.after > 0 {
            self.due.set(Some(Order { after: order.after - 1, ..order }));
        } else {
            order.fault.happen();
            return matches!(order.fault, Fault::Flip);
        }
        false
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
            None if flips => self.flip_next(),
            _ => {}
        }
        Ok(())
    }

    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, GroupLost> {
        self.meet_unchanged();
        self.inner.all_gather(mine)
    }

    fn begin_elsewhere(&self) -> Result<(), GroupLost> {
        self.meet_unchanged();
        self.inner.begin_elsewhere()
    }

    fn check(&self) -> Result<(), GroupLost> {
        self.inner.check()
    }

    fn checker(&self) -> Checker {
        self.inner.checker()
    }

    fn barrier(&self) -> Result<(), GroupLost> {
        self.meet_unchanged();
        self.inner.barrier()
    }
}

impl Faulty {
    /// The first of these orders, which leaves the others in the file.
    fn take(&self, orders: &str) -> Order {
        let (order, rest) = orders.split_once('\n').unwrap_or((orders, ""));
        let taken = if rest.is_empty() {
            fs::remove_file(&self.orders)
        } else {
            let left = self.orders.with_extension("left");
            fs::write(&left, rest).and_then(|()| fs::rename(left, &self.orders))
        };
        taken.expect("an order is taken once");
        let words: Vec<&str> = order.split(' ').collect();
        let (&[fault, after] | &[fault, after, _]) = &words[..] else { panic!("KIND AFTER PHASE: {order}") };
        Order {
            fault: Fault::named(fault).expect("a kind"),
            after: after.parse().expect("a number"),
            phase: words.get(2).map(|phase| Phase::named(phase).expect("a phase")),
        }
    }

    fn flip_next(&self) {
        self.due.set(Some(Order { fault: Fault::Flip, after: 0, phase: None }));
    }

    /// A flip waits for the next all-reduce.
    fn meet_unchanged(&self) {
        if self.about_to_meet() {
            self.flip_next();
        }
    }
}

/// A rank that says what it does.
struct Phased {
    rank: Box<dyn Rank>,
    phases: Arc<AtomicU8>,
    videos: HashSet<MediaHash>,
}

impl Rank for Phased {
    fn run(&mut self, step: Step) -> Result<StepResult, StepError> {
        let media = step.admissions.iter().flat_map(|admission| &admission.media);
        self.videos.extend(media.filter(|span| span.seconds_per_grid_t.is_some()).map(|span| span.hash));
        let phases = Phase::ALL.into_iter().filter(|phase| phase.is_in(&step, &self.videos));
        self.phases.store(phases.map(Phase::bit).sum(), Ordering::Relaxed);
        let result = self.rank.run(step);
        self.phases.store(0, Ordering::Relaxed);
        result
    }

    fn regroup(&mut self, epoch: u64, collective_path: &Path) -> Result<(), LoadError> {
        self.rank.regroup(epoch, collective_path)
    }
}

/// Loads ranks that take orders from a folder.
fn load(faults: PathBuf) -> Arc<Load> {
    let phases = Arc::<AtomicU8>::default();
    let now = phases.clone();
    let load = load_with(Arc::new(move |inner: Box<dyn Collective>| {
        let orders = faults.join(inner.rank().to_string());
        Box::new(Faulty { inner, orders, due: Cell::new(None), phases: now.clone() })
    }));
    Arc::new(move |options, gate, tell| {
        let mut loaded = load(options, gate, tell)?;
        loaded.rank = Box::new(Phased { rank: loaded.rank, phases: phases.clone(), videos: HashSet::new() });
        Ok(loaded)
    })
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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve_with(args, load(faults.to_owned())))
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

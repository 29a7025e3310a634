//! A fixed set of threads that share the tasks of one kernel at a time.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::thread::{JoinHandle, Thread};

use crate::device::{DeviceError, Result};
use crate::process;
use crate::progress::Progress;

/// Turns of a waiting loop before a thread sleeps: some tens of microseconds, which bridges the short operations that the
/// owner does alone, and costs no more than a few wake-ups.
const SPINS: usize = 1000;

/// A task: its index, and the index of the thread that runs it.
type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

#[derive(Clone, Copy)]
struct Job {
    task: *const Task<'static>,
    num_tasks: usize,
}

/// What the threads share.
///
/// `open` is the number of the job that may be entered, or 0. A thread enters by counting itself in `inside` and only
/// then looking at `open`; the owner closes the job and only then looks at `inside`. So one of the two sees the other
/// (both orders are sequentially consistent), and the owner never waits for a thread that has not yet woken up.
struct Shared {
    open: AtomicU64,
    inside: AtomicUsize,
    next: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    owner: Thread,
    owner_waits: AtomicBool,
    panicked: AtomicBool,
    stop: AtomicBool,
    spins: usize,
    progress: Arc<Progress>,
}

// SAFETY: `job` is written only by the owner while no thread is inside, and read only by threads inside.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in it is used only while the owner keeps its target alive.
unsafe impl Send for Shared {}

/// Threads, each pinned to its cores. The thread that made the pool owns it and takes part in the work as thread 0.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    last_job: UnsafeCell<u64>,
    // The owner is woken by its handle, so a pool stays on its thread.
    _not_send: PhantomData<*const ()>,
}

impl Pool {
    /// Starts `num_threads - 1` threads and pins them and the calling thread: thread `i` to `cpus[i]`, all threads to all
    /// of `cpus` if these are fewer than threads, none if `cpus` is empty. Each counts its tasks on `progress`.
    pub fn new(num_threads: usize, cpus: &[u32], progress: Arc<Progress>) -> Result<Self> {
        assert!(progress.num_threads() >= num_threads, "a counter for each thread");
        if num_threads == 0 {
            return Err(DeviceError::Failed("the number of threads is 0; it must be at least 1".into()));
        }
        let crowded = !cpus.is_empty() && cpus.len() < num_threads;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let shared = Arc::new(Shared {
            open: AtomicU64::new(0),
            inside: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            owner: std::thread::current(),
            owner_waits: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            // A spinning thread would only take the core from one that works.
            spins: if crowded || num_threads > cores { 0 } else { SPINS },
            progress,
        });
        let cpus_of = |thread: usize| if crowded { cpus } else { cpus.get(thread..=thread).unwrap_or(&[]) };
        pin(cpus_of(0))?;
        let mut pool = Self {
            shared: shared.clone(),
            workers: Vec::new(),
            last_job: UnsafeCell::new(0),
            _not_send: PhantomData,
        };
        for thread in 1..num_threads {
            let (shared, cpus) = (shared.clone(), cpus_of(thread).to_vec());
            let (sender, pinned) = std::sync::mpsc::sync_channel(1);
            let worker = std::thread::Builder::new()
                .name(format!("kernel-{thread}"))
                .spawn(move || {
                    let result = pin(&cpus);
                    let proceed = result.is_ok();
                    if sender.send(result).is_ok() && proceed {
                        work(&shared, thread);
                    }
                })
                .map_err(|error| DeviceError::Failed(format!("cannot start thread {thread}: {error}")))?;
            pool.workers.push(worker);
            pinned.recv().map_err(|_| DeviceError::Failed(format!("thread {thread} ended at once")))??;
        }
        Ok(pool)
    }

    /// Threads, the owner's included.
    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Where the threads count, for tasks that take long.
    pub fn progress(&self) -> &Progress {
        &self.shared.progress
    }

    /// Calls `task(i, thread)` once for each `i` in `0..num_tasks`, and returns when all calls have.
    ///
    /// # Panics
    /// When a task does.
    pub fn run(&self, num_tasks: usize, task: &Task<'_>) {
        if num_tasks <= 1 || self.workers.is_empty() {
            let pieces = self.progress().pieces_of(0);
            for index in 0..num_tasks {
                task(index, 0);
                pieces.count();
            }
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; the pointer is used only until `Closing` has closed the job.
        let task: *const Task<'static> = unsafe { std::mem::transmute(std::ptr::from_ref(task)) };
        // SAFETY: no job is open and no thread inside, so that nobody reads; the pool is used by one thread only.
        let number = unsafe {
            *shared.job.get() = Some(Job { task, num_tasks });
            *self.last_job.get() += 1;
            *self.last_job.get()
        };
        shared.next.store(0, Relaxed);
        shared.open.store(number, SeqCst);
        let closing = Closing(shared);
        for worker in self.workers.iter().take(num_tasks - 1) {
            worker.thread().unpark();
        }
        // SAFETY: the job is open, and this thread is its owner.
        unsafe { share_tasks(shared, Job { task, num_tasks }, 0) };
        drop(closing);
        assert!(!shared.panicked.swap(false, SeqCst), "a task of a kernel panicked on another thread");
    }

    /// Splits `0..len` into tasks of at least `grain`, a few for each thread, and calls `task(range, thread)` for each.
    pub fn run_ranges(
        &self,
        len: usize,
        grain: usize,
        task: &(dyn Fn(std::ops::Range<usize>, usize) + Sync),
    ) {
        let num_threads = self.num_threads();
        let pieces = if num_threads == 1 { 1 } else { 3 * num_threads };
        let step = len.div_ceil(pieces).max(grain).max(1);
        self.run(len.div_ceil(step), &|index, thread| {
            let start = index * step;
            task(start..(start + step).min(len), thread);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker's panic is caught in `share_tasks`, so that there is nothing to report here.
            let _ = worker.join();
        }
    }
}

/// Closes the open job when dropped, also when the owner's own task panics, and waits until no thread is inside.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let shared = self.0;
        // After a panic of the owner the tasks that are left must not be started.
        if std::thread::panicking() {
            shared.next.store(usize::MAX / 2, SeqCst);
        }
        shared.open.store(0, SeqCst);
        for _ in 0..shared.spins {
            if shared.inside.load(SeqCst) == 0 {
                return;
            }
            std::hint::spin_loop();
        }
        shared.owner_waits.store(true, SeqCst);
        while shared.inside.load(SeqCst) != 0 {
            std::thread::park();
        }
        shared.owner_waits.store(false, SeqCst);
    }
}

/// The loop of a worker.
fn work(shared: &Shared, thread: usize) {
    let mut last = 0;
    let mut idle = 0;
    while !shared.stop.load(SeqCst) {
        let open = shared.open.load(SeqCst);
        if open == 0 || open == last {
            if idle < shared.spins {
                idle += 1;
                std::hint::spin_loop();
            } else {
                std::thread::park();
                idle = 0;
            }
            continue;
        }
        idle = 0;
        shared.inside.fetch_add(1, SeqCst);
        let entered = shared.open.load(SeqCst);
        if entered != 0 {
            last = entered;
            // SAFETY: this thread is inside an open job, so the owner has written it and waits before changing it.
            unsafe {
                if let Some(job) = *shared.job.get() {
                    let result = catch_unwind(AssertUnwindSafe(|| share_tasks(shared, job, thread)));
                    if result.is_err() {
                        shared.panicked.store(true, SeqCst);
                    }
                }
            }
        }
        if shared.inside.fetch_sub(1, SeqCst) == 1 && shared.owner_waits.load(SeqCst) {
            shared.owner.unpark();
        }
    }
}

/// Takes tasks until none is left.
///
/// # Safety
/// `job` must be the open job, and the caller its owner or inside it.
unsafe fn share_tasks(shared: &Shared, job: Job, thread: usize) {
    // SAFETY: the owner keeps the task alive until no thread is inside.
    let task = unsafe { &*job.task };
    let pieces = shared.progress.pieces_of(thread);
    loop {
        let index = shared.next.fetch_add(1, Relaxed);
        if index >= job.num_tasks {
            return;
        }
        task(index, thread);
        pieces.count();
    }
}

/// Pins the calling thread to `cpus`, unless these are none.
fn pin(cpus: &[u32]) -> Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    process::run_on(cpus)
        .map_err(|error| DeviceError::Failed(format!("cannot pin a thread to cpus {cpus:?}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_threads() {
        for num_threads in [1, 2, 3, 8] {
            let progress = Arc::new(Progress::new(num_threads));
            let pool = Pool::new(num_threads, &[], progress.clone()).expect("threads start");
            let mut expected = 0;
            for round in 0..500 {
                let num_tasks = round % 23;
                let counts: Vec<_> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(num_tasks, &|index, thread| {
                    assert!(thread < num_threads);
                    counts[index].fetch_add(1, Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Relaxed) == 1), "{num_threads} threads");
                expected += num_tasks as u64;
                assert_eq!(progress.work_pieces(), expected, "{num_threads} threads");
            }
        }
    }

    #[test]
    fn ranges_cover_everything_once() {
        let pool = Pool::new(3, &[], Arc::new(Progress::new(3))).expect("threads start");
        for (len, grain) in [(0, 1), (1, 1), (7, 100), (100, 7), (1000, 0)] {
            let counts: Vec<_> = (0..len).map(|_| AtomicUsize::new(0)).collect();
            pool.run_ranges(len, grain, &|range, _| {
                range.for_each(|index| {
                    counts[index].fetch_add(1, Relaxed);
                });
            });
            assert!(counts.iter().all(|count| count.load(Relaxed) == 1), "{len} by {grain}");
        }
    }

    #[test]
    fn a_panic_on_any_thread_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(4, &[], Arc::new(Progress::new(4))).expect("threads start");
        for culprit in 0..8 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8, &|index, _| {
                    std::thread::yield_now();
                    assert!(index != culprit, "told to");
                });
            }));
            assert!(outcome.is_err());
        }
        let count = AtomicUsize::new(0);
        pool.run(100, &|_, _| {
            count.fetch_add(1, Relaxed);
        });
        assert_eq!(count.load(Relaxed), 100);
    }

    #[test]
    fn cpus_that_are_not_there_are_named() {
        let start = || Pool::new(1, &[1000], Arc::new(Progress::new(1)));
        let result = std::thread::spawn(move || start().err().map(|error| error.to_string())).join();
        let error = result.expect("no panic").expect("no machine for tests has so many");
        assert!(error.contains("1000"), "{error}");
    }
}

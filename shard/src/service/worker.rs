//! The one thread that owns the device: it loads the model, then runs the steps that come, in order, from epoch to epoch.

use std::{
    io,
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    thread,
    time::SystemTime,
};

use futures::{executor::block_on, future::select};
use lockstep_proto::shard as pb;
use thiserror::Error;
use tokio::sync::{
    mpsc::{
        self,
        error::{TryRecvError, TrySendError},
    },
    oneshot, watch,
};
use tonic::Status;

use super::{
    convert,
    gate::Gate,
    options::LoadOptions,
    status,
    trace::{StepTracer, Watched},
};
use crate::collective::JoinError;
use crate::device::DeviceError;
use crate::runner::{MediaStore, MemoryPlan, Step, StepError, StepResult, plan::PlanError};

/// Jobs that may wait for the thread: the step in work and the next.
const QUEUED_JOBS: usize = 2;

/// What loading tells on the way.
#[derive(Clone, Debug, PartialEq)]
pub enum LoadEvent {
    /// The plan, before anything is allocated.
    Plan(MemoryPlan),
    /// Bytes of weights read so far.
    Progress {
        /// Bytes read.
        loaded_bytes: u64,
        /// Bytes to read.
        total_bytes: u64,
    },
}

/// A loaded model. It stays on the thread that loaded it.
pub trait Rank {
    /// Runs a step.
    ///
    /// # Errors
    /// The step is wrong, or the device or another rank failed. No step of this epoch can follow.
    fn run(&mut self, step: Step) -> Result<StepResult, StepError>;

    /// Forgets everything but the weights, enters an epoch and meets its ranks in the file `collective_path`, as one that loads. Whatever
    /// happened before, the rank is then as if it had just been loaded.
    ///
    /// # Errors
    /// The other ranks cannot be met, or this epoch was given up. Another one may follow.
    fn regroup(&mut self, epoch: u64, collective_path: &Path) -> Result<(), LoadError>;

    /// How it begins a step before the one before is told, if it ever can.
    fn ahead(&mut self) -> Option<&mut dyn Ahead> {
        None
    }
}

/// A rank that can begin a step before the result of the one before is told.
pub trait Ahead {
    /// Whether it can begin this step now.
    fn may_begin(&self, step: &Step) -> bool;

    /// Begins a step.
    ///
    /// # Errors
    /// As of [`Rank::run`].
    fn begin(&mut self, step: Step) -> Result<(), StepError>;

    /// Whether the step that was begun first can be told without waiting for this rank's device.
    ///
    /// # Errors
    /// As of [`Rank::run`].
    fn has_finished(&self) -> Result<bool, StepError>;

    /// The result of the step that was begun first.
    ///
    /// # Errors
    /// As of [`Rank::run`].
    fn finish(&mut self) -> Result<StepResult, StepError>;
}

/// What loading gives.
pub struct Loaded {
    /// What the model is.
    pub description: pb::ModelDescription,
    /// Pixels that wait, shared with uploads.
    pub media: Arc<MediaStore>,
    /// The model.
    pub rank: Box<dyn Rank>,
}

/// Why a model was not loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// This build or host cannot do what is asked.
    #[error("{0}")]
    Unsupported(String),
    /// The checkpoint cannot be used: all that is wrong with it.
    #[error("{0}")]
    Checkpoint(String),
    /// The plan does not fit, or cannot be made.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The host's free memory is not known.
    #[error("cannot tell how much memory is available: {0}")]
    Memory(io::Error),
    /// The other ranks cannot be met.
    #[error("collective_path: {0}")]
    Join(#[from] JoinError),
    /// The device failed, or another rank did.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Loads a model, telling how it goes. What it counts and meets the other ranks by is the gate's.
pub type Load =
    dyn Fn(&LoadOptions, &Arc<Gate>, &mut dyn FnMut(LoadEvent)) -> Result<Loaded, LoadError> + Send + Sync;

/// What the thread tells about loading.
pub enum Loading {
    /// How it goes.
    Event(LoadEvent),
    /// It is done: the model, and where its pixels wait.
    Done(Box<pb::ModelDescription>, Arc<MediaStore>),
    /// It failed.
    Failed(LoadError),
}

/// What the thread is asked to do.
pub enum Job {
    /// To run a step.
    Step {
        /// The step.
        request: pb::RunRequest,
        /// Takes the answer. An error is the last.
        answers: Answers,
    },
    /// To join another epoch, which the gate was asked for.
    Regroup {
        /// The epoch.
        epoch: u64,
        /// File that its ranks meet in.
        collective_path: PathBuf,
        /// Takes the answer.
        answer: oneshot::Sender<Result<(), Status>>,
    },
}

/// Starts the thread. Loading is told on `loading`; jobs go to the returned sender. `alive` turns true,
/// and when all that the thread had is given back it is dropped.
///
/// # Errors
/// The system gives no thread.
pub fn start(
    options: LoadOptions,
    load: Arc<Load>,
    gate: Arc<Gate>,
    loading: mpsc::Sender<Loading>,
    alive: watch::Sender<bool>,
) -> io::Result<mpsc::Sender<Job>> {
    let (jobs, queue) = mpsc::channel(QUEUED_JOBS);
    let name = format!("rank-{}", options.rank);
    alive.send_replace(true);
    thread::Builder::new().name(name).spawn(move || {
        work(&options, &*load, gate, loading, queue);
        drop(alive);
    })?;
    Ok(jobs)
}

fn work(
    options: &LoadOptions,
    load: &Load,
    gate: Arc<Gate>,
    loading: mpsc::Sender<Loading>,
    queue: mpsc::Receiver<Job>,
) {
    // Whoever asked may have gone away; then there is nobody to tell, and the jobs end when their sender is dropped.
    let tell = |event| drop(loading.blocking_send(event));
    match load(options, &gate, &mut |event| tell(Loading::Event(event))) {
        Ok(Loaded { description, media, rank }) => {
            let epoch = options.epoch;
            let standing = gate.join(epoch).map_or(Standing::Alone, |()| Standing::Takes { step: 0 });
            let tracer = StepTracer::new(options.rank);
            let member = Member { index: options.rank, gate, rank, tracer, epoch, standing, under_way: None };
            tell(Loading::Done(Box::new(description), media));
            drop(loading);
            do_jobs(member, queue);
        }
        Err(error) => tell(Loading::Failed(error)),
    }
}

/// Does jobs until there can be no more.
fn do_jobs(mut member: Member, mut queue: mpsc::Receiver<Job>) {
    while let Some(job) = member.next_job(&mut queue) {
        match job {
            Job::Step { request, answers } => member.take(request, answers),
            Job::Regroup { epoch, collective_path, answer } => {
                member.tell_begun();
                // Whoever asked may have given up.
                let _ = answer.send(member.regroup(epoch, &collective_path));
            }
        }
    }
}

/// A loaded rank and where it is in its epoch.
struct Member {
    index: usize,
    gate: Arc<Gate>,
    rank: Box<dyn Rank>,
    tracer: StepTracer,
    epoch: u64,
    standing: Standing,
    /// A step that was begun and is not told yet.
    under_way: Option<UnderWay>,
}

/// A step that was begun and is not told yet.
struct UnderWay {
    epoch: u64,
    step: u64,
    watched: Option<Watched>,
    start: SystemTime,
    /// There already, of a rank that does not run ahead.
    result: Option<StepResult>,
    answers: Answers,
}

/// Takes answers to steps. An error is the last.
type Answers = mpsc::Sender<Result<pb::RunResponse, Status>>;

/// What a rank can do in its epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It takes this step next.
    Takes { step: u64 },
    /// A step failed.
    Failed,
    /// It did not meet the others.
    Alone,
}

impl Member {
    /// The next job. Tells the step that is under way as soon as its result is there.
    fn next_job(&mut self, queue: &mut mpsc::Receiver<Job>) -> Option<Job> {
        while let Some(under_way) = &self.under_way {
            let has_come = match (&under_way.result, self.rank.ahead()) {
                // An error is found again where the result is asked for.
                (None, Some(rank)) => rank.has_finished().unwrap_or(true),
                _ => true,
            };
            if has_come {
                self.tell_begun();
                break;
            }
            match queue.try_recv() {
                Ok(job) => return Some(job),
                Err(TryRecvError::Empty) => thread::yield_now(),
                Err(TryRecvError::Disconnected) => self.tell_begun(),
            }
        }
        queue.blocking_recv()
    }

    /// Begins a step. What is under way is told before, or right after where the rank can begin this one already.
    fn take(&mut self, request: pb::RunRequest, answers: Answers) {
        let (epoch, step) = (request.epoch, request.step);
        let domain = self.check(&request).and_then(|()| {
            convert::step(request.clone()).map_err(|error| {
                self.standing = Standing::Failed;
                status::of_step(self.index, step, &error)
            })
        });
        let may_begin = match (&domain, self.rank.ahead()) {
            (Ok(step), Some(rank)) => rank.may_begin(step),
            _ => false,
        };
        if !may_begin {
            self.tell_begun();
        }
        // What was under way may have failed.
        let domain = domain.and_then(|domain| self.check(&request).map(|()| domain));
        let begun = domain.and_then(|domain| {
            self.standing = Standing::Failed;
            let (watched, start) = (self.tracer.before(&request), SystemTime::now());
            let result = match self.rank.ahead() {
                Some(rank) => rank.begin(domain).map(|()| None),
                None => self.rank.run(domain).map(Some),
            };
            let result = result.map_err(|error| status::of_step(self.index, step, &error))?;
            self.standing = Standing::Takes { step: step + 1 };
            Ok(UnderWay { epoch, step, watched, start, result, answers: answers.clone() })
        });
        if may_begin {
            self.tell_begun();
        }
        match begun {
            // Nothing follows a step that failed.
            Ok(_) if self.standing == Standing::Failed => {}
            Ok(begun) => self.under_way = Some(begun),
            Err(status) => self.tell(&answers, Err(status)),
        }
        // After the answer, so that the rank that failed is heard before those that it leaves alone.
        if self.standing == Standing::Failed {
            self.gate.leave();
        }
    }

    /// Checks that a step is the next one of the epoch. A step of another epoch changes nothing.
    fn check(&mut self, request: &pb::RunRequest) -> Result<(), Status> {
        let (epoch, step) = (request.epoch, request.step);
        let refusal = |words| Err(Status::failed_precondition(words));
        if epoch != self.epoch {
            let words = format!("epoch: the step is of epoch {epoch}, this rank of epoch {}", self.epoch);
            return refusal(words);
        }
        let asked = self.gate.asked();
        if epoch != asked {
            return Err(Status::aborted(format!("this rank is to join epoch {asked}")));
        }
        let next = match self.standing {
            Standing::Takes { step } => step,
            Standing::Failed => return refusal("an earlier step failed: this rank must be regrouped".into()),
            Standing::Alone => return refusal(format!("this rank did not meet the others of epoch {epoch}")),
        };
        if step != next {
            self.standing = Standing::Failed;
            return refusal(format!("step: is {step}, the next one is {next}"));
        }
        Ok(())
    }

    /// Tells the result of the step that is under way, if one is.
    fn tell_begun(&mut self) {
        let Some(UnderWay { epoch, step, watched, start, result, answers }) = self.under_way.take() else {
            return;
        };
        let result = match (result, self.rank.ahead()) {
            (None, Some(rank)) => rank.finish(),
            (Some(result), _) => Ok(result),
            (None, None) => unreachable!("a rank that does not run ahead has run its step"),
        };
        if let Some(watched) = watched {
            self.tracer.after(watched, start, SystemTime::now());
        }
        let answer = match result {
            Ok(result) => {
                self.gate.progress().steps.count();
                Ok(convert::response(epoch, step, self.index, result))
            }
            Err(error) => {
                self.standing = Standing::Failed;
                Err(status::of_step(self.index, step, &error))
            }
        };
        let has_failed = answer.is_err();
        self.tell(&answers, answer);
        // After the answer, so that the rank that failed is heard before those that it leaves alone.
        if has_failed {
            self.gate.leave();
        }
    }

    /// Joins an epoch, unless a later one was asked for.
    fn regroup(&mut self, epoch: u64, collective_path: &Path) -> Result<(), Status> {
        let given_up = |asked| Status::aborted(format!("epoch {epoch} was given up for epoch {asked}"));
        if self.gate.asked() != epoch {
            return Err(given_up(self.gate.asked()));
        }
        (self.epoch, self.standing) = (epoch, Standing::Alone);
        self.tracer.forget();
        let met = self.rank.regroup(epoch, collective_path);
        if self.gate.asked() != epoch {
            return Err(given_up(self.gate.asked()));
        }
        let joined = met.and_then(|()| Ok(self.gate.join(epoch).map_err(DeviceError::from)?));
        if joined.is_err() {
            self.gate.leave();
        }
        joined.map_err(|error| status::of_load(&error))?;
        self.standing = Standing::Takes { step: 0 };
        Ok(())
    }

    /// Gives an answer to a stream. One that is not read holds this thread up for no longer than its epoch lasts.
    fn tell(&self, answers: &Answers, answer: Result<pb::RunResponse, Status>) {
        // A server that went away needs no answer.
        if let Err(TrySendError::Full(answer)) = answers.try_send(answer) {
            let over = pin!(self.gate.over(self.epoch));
            block_on(select(pin!(answers.send(answer)), over));
        }
    }
}

//! The one thread that owns the device: it loads the model, then runs the steps that come, in order.

use std::{io, sync::Arc, thread, time::SystemTime};

use lockstep_proto::shard as pb;
use thiserror::Error;
use tokio::sync::mpsc;
use tonic::Status;

use super::{convert, options::LoadOptions, status, trace::StepTracer};
use crate::collective::JoinError;
use crate::runner::{MediaStore, MemoryPlan, Step, StepError, StepResult, plan::PlanError};

/// Steps that may wait for the thread: the one in work and the next.
const QUEUED_STEPS: usize = 2;

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

/// Runs a step on the loaded model.
pub type RunStep = Box<dyn FnMut(Step) -> Result<StepResult, StepError>>;

/// A loaded model. It stays on the thread that loaded it.
pub struct Loaded {
    /// What the model is.
    pub description: pb::ModelDescription,
    /// Pixels that wait, shared with uploads.
    pub media: Arc<MediaStore>,
    /// Runs steps.
    pub run: RunStep,
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
    Device(#[from] crate::device::DeviceError),
}

/// Loads a model, telling how it goes.
pub type Load = dyn Fn(&LoadOptions, &mut dyn FnMut(LoadEvent)) -> Result<Loaded, LoadError> + Send + Sync;

/// What the thread tells about loading.
pub enum Loading {
    /// How it goes.
    Event(LoadEvent),
    /// It is done: the model, and where its pixels wait.
    Done(Box<pb::ModelDescription>, Arc<MediaStore>),
    /// It failed.
    Failed(LoadError),
}

/// A step, and where its answer goes.
pub struct Job {
    /// The step.
    pub request: pb::RunRequest,
    /// Takes the answer. An error is the last.
    pub answers: mpsc::Sender<Result<pb::RunResponse, Status>>,
}

/// Starts the thread. Loading is told on `loading`; steps go to the returned sender.
///
/// # Errors
/// The system gives no thread.
pub fn start(
    options: LoadOptions,
    load: Arc<Load>,
    loading: mpsc::Sender<Loading>,
) -> io::Result<mpsc::Sender<Job>> {
    let (jobs, queue) = mpsc::channel(QUEUED_STEPS);
    let name = format!("rank-{}", options.rank);
    thread::Builder::new().name(name).spawn(move || work(&options, &*load, loading, queue))?;
    Ok(jobs)
}

fn work(options: &LoadOptions, load: &Load, loading: mpsc::Sender<Loading>, queue: mpsc::Receiver<Job>) {
    // Whoever asked may have gone away; then there is nobody to tell, and the steps end when their sender is dropped.
    let tell = |event| drop(loading.blocking_send(event));
    match load(options, &mut |event| tell(Loading::Event(event))) {
        Ok(Loaded { description, media, run }) => {
            tell(Loading::Done(Box::new(description), media));
            drop(loading);
            run_steps(options, run, queue);
        }
        Err(error) => tell(Loading::Failed(error)),
    }
}

/// Runs steps until there can be no more. After an error the model is dropped, so that the other ranks are not left
/// waiting for this one, and every later step is refused.
fn run_steps(options: &LoadOptions, run: RunStep, mut queue: mpsc::Receiver<Job>) {
    let mut run = Some(run);
    let mut next_step = 0;
    let mut tracer = StepTracer::new(options.rank);
    while let Some(Job { request, answers }) = queue.blocking_recv() {
        let answer = match &mut run {
            Some(run) => {
                let (watched, start) = (tracer.before(&request), SystemTime::now());
                let answer = answer(options, next_step, request, run);
                if let Some(watched) = watched {
                    tracer.after(watched, start, SystemTime::now());
                }
                answer
            }
            None => {
                Err(Status::failed_precondition("an earlier step failed: this rank must be started again"))
            }
        };
        next_step += 1;
        let failed = answer.is_err();
        // A server that went away needs no answer.
        let _ = answers.blocking_send(answer);
        // After the answer, so that the rank that failed is heard before those that it leaves alone.
        if failed {
            run = None;
        }
    }
}

fn answer(
    options: &LoadOptions,
    next_step: u64,
    request: pb::RunRequest,
    run: &mut RunStep,
) -> Result<pb::RunResponse, Status> {
    let (epoch, step) = (request.epoch, request.step);
    if epoch != options.epoch {
        let words = format!("epoch: the step is of epoch {epoch}, this rank of epoch {}", options.epoch);
        return Err(Status::failed_precondition(words));
    }
    if step != next_step {
        return Err(Status::failed_precondition(format!("step: is {step}, the next one is {next_step}")));
    }
    let result =
        convert::step(request).and_then(run).map_err(|error| status::of_step(options.rank, step, &error))?;
    Ok(convert::response(epoch, step, options.rank, result))
}

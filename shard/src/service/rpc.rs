//! The handlers of `ShardService`: convert, hand over, stream.

use std::{
    fs::File,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use futures::Stream;
use lockstep_proto::shard::{
    self as pb, load_response::Event, put_media_request::Piece, shard_service_server::ShardService,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    convert,
    options::LoadOptions,
    status,
    worker::{self, Job, Load, LoadEvent, Loading},
};
use crate::{
    build_id, process,
    runner::{MediaStore, MemoryPlan},
};

/// Events of loading, and answers to steps, that may wait for a slow reader.
const QUEUED_ANSWERS: usize = 4;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// One rank. Clones share it.
#[derive(Clone)]
pub struct Shard {
    load: Arc<Load>,
    phase: Arc<Mutex<Phase>>,
}

/// How far a rank is. It only goes forward: a rank loads once.
enum Phase {
    Idle,
    Loading,
    Ready(Ready),
    Failed,
}

/// A rank that takes steps.
#[derive(Clone)]
struct Ready {
    media: Arc<MediaStore>,
    jobs: mpsc::Sender<Job>,
    /// Whether a `Run` stream is open: steps have one order, so they have one source.
    running: Arc<AtomicBool>,
}

/// Holds [`Ready::running`] while a `Run` stream is open.
struct OpenRun(Arc<AtomicBool>);

impl Drop for OpenRun {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Shard {
    /// A rank that will load with `load`.
    pub fn new(load: Arc<Load>) -> Self {
        Self { load, phase: Arc::new(Mutex::new(Phase::Idle)) }
    }

    fn set_phase(&self, phase: Phase) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
    }

    /// Goes from idle to loading.
    fn begin_loading(&self) -> Result<(), Status> {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        let words = match *phase {
            Phase::Idle => {
                *phase = Phase::Loading;
                return Ok(());
            }
            Phase::Loading => "this rank is loading already",
            Phase::Ready(_) => "this rank is loaded already: start another process to load again",
            Phase::Failed => "this rank failed to load: start another process to load again",
        };
        Err(Status::failed_precondition(words))
    }

    fn ready(&self) -> Result<Ready, Status> {
        match &*self.phase.lock().unwrap_or_else(PoisonError::into_inner) {
            Phase::Ready(ready) => Ok(ready.clone()),
            _ => Err(Status::failed_precondition("this rank is not loaded")),
        }
    }

    /// Passes on what the compute thread tells while it loads. Ends with loading, whether or not anybody still listens.
    async fn follow_loading(
        self,
        mut loading: mpsc::Receiver<Loading>,
        jobs: mpsc::Sender<Job>,
        events: mpsc::Sender<Result<pb::LoadResponse, Status>>,
    ) {
        while let Some(told) = loading.recv().await {
            let event = match told {
                Loading::Event(LoadEvent::Plan(plan)) => Event::Plan(memory_plan(&plan)),
                Loading::Event(LoadEvent::Progress { loaded_bytes, total_bytes }) => {
                    Event::Progress(pb::LoadProgress { loaded_bytes, total_bytes })
                }
                Loading::Done(description, media) => {
                    let jobs = jobs.clone();
                    self.set_phase(Phase::Ready(Ready { media, jobs, running: Arc::default() }));
                    Event::Description(*description)
                }
                Loading::Failed(error) => {
                    self.set_phase(Phase::Failed);
                    let _ = events.send(Err(status::of_load(&error))).await;
                    return;
                }
            };
            let _ = events.send(Ok(pb::LoadResponse { event: Some(event) })).await;
        }
    }
}

#[tonic::async_trait]
impl ShardService for Shard {
    type LoadStream = Answers<pb::LoadResponse>;
    type RunStream = Answers<pb::RunResponse>;

    async fn load(&self, request: Request<pb::LoadRequest>) -> Result<Response<Self::LoadStream>, Status> {
        let request = request.into_inner();
        if request.build_id != build_id() {
            let words =
                format!("build_id: the server is {:?}, this rank is {:?}", request.build_id, build_id());
            return Err(Status::failed_precondition(words));
        }
        let options = LoadOptions::new(request).map_err(|error| status::of_options(&error))?;
        self.begin_loading()?;
        let (tell, loading) = mpsc::channel(QUEUED_ANSWERS);
        let (events, stream) = mpsc::channel(QUEUED_ANSWERS);
        let jobs = worker::start(options, self.load.clone(), tell).map_err(|error| {
            self.set_phase(Phase::Failed);
            Status::resource_exhausted(format!("no thread to compute on: {error}"))
        })?;
        tokio::spawn(self.clone().follow_loading(loading, jobs, events));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn put_media(
        &self,
        request: Request<Streaming<pb::PutMediaRequest>>,
    ) -> Result<Response<pb::PutMediaResponse>, Status> {
        let media = self.ready()?.media;
        let mut pieces = request.into_inner();
        let Some(Piece::Header(header)) = pieces.message().await?.and_then(|message| message.piece) else {
            return Err(Status::invalid_argument("header: must come first"));
        };
        let invalid = |field: &str, fault| Status::invalid_argument(format!("header.{field}: {fault}"));
        let hash = convert::media_hash(&header.hash).map_err(|fault| invalid("hash", fault.to_string()))?;
        let grid = convert::grid(header.grid).map_err(|fault| invalid("grid", fault.to_string()))?;
        let size_bytes = usize::try_from(header.size_bytes).unwrap_or(usize::MAX);
        if !header.path.is_empty() {
            let file = File::open(&header.path).map_err(|error| invalid("path", error.to_string()))?;
            media.put_file(hash, grid, size_bytes, file).map_err(|error| status::of_media(&error))?;
            return Ok(Response::new(pb::PutMediaResponse {}));
        }
        let upload = media.begin(hash, grid, size_bytes).map_err(|error| status::of_media(&error))?;
        // Pixels that wait already need not be read again.
        let Some(mut upload) = upload else { return Ok(Response::new(pb::PutMediaResponse {})) };
        while let Some(message) = pieces.message().await? {
            match message.piece {
                Some(Piece::Chunk(bytes)) => upload.push(&bytes).map_err(|error| status::of_media(&error))?,
                Some(Piece::Header(_)) => return Err(Status::invalid_argument("header: came twice")),
                None => return Err(Status::invalid_argument("piece: is missing")),
            }
        }
        upload.finish().map_err(|error| status::of_media(&error))?;
        Ok(Response::new(pb::PutMediaResponse {}))
    }

    async fn run(
        &self,
        request: Request<Streaming<pb::RunRequest>>,
    ) -> Result<Response<Self::RunStream>, Status> {
        let Ready { jobs, running, .. } = self.ready()?;
        if running.swap(true, Ordering::AcqRel) {
            return Err(Status::failed_precondition("steps come on another stream already"));
        }
        let open = OpenRun(running);
        let mut steps = request.into_inner();
        let (answers, stream) = mpsc::channel(QUEUED_ANSWERS);
        tokio::spawn(async move {
            let _open = open;
            // A broken stream means that the server went away; it has nobody to tell.
            while let Ok(Some(request)) = steps.message().await {
                if jobs.send(Job { request, answers: answers.clone() }).await.is_err() {
                    let _ = answers.send(Err(Status::internal("the compute thread ended"))).await;
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn get_memory(
        &self,
        _request: Request<pb::GetMemoryRequest>,
    ) -> Result<Response<pb::GetMemoryResponse>, Status> {
        let memory = process::resident_memory().map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(pb::GetMemoryResponse {
            anonymous_bytes: memory.anonymous_bytes,
            shared_bytes: memory.shared_bytes,
        }))
    }
}

fn memory_plan(plan: &MemoryPlan) -> pb::MemoryPlan {
    pb::MemoryPlan {
        weights_bytes: plan.weights_bytes,
        kv_bytes: plan.kv_bytes,
        features_bytes: plan.features_bytes,
        workspace_bytes: plan.workspace_bytes,
        collective_bytes: plan.collective_bytes,
        media_bytes: plan.media_bytes,
        process_bytes: plan.process_bytes,
    }
}

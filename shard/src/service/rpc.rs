//! The handlers of `ShardService`: convert, hand over, stream.

use std::{fs::File, pin::Pin, sync::Arc, time::Instant};

use futures::Stream;
use lockstep_proto::shard::{
    self as pb, load_response::Event, put_media_request::Piece, shard_service_server::ShardService,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    convert,
    gate::{Gate, OpenRun, Reached},
    options::LoadOptions,
    phase::{Loaded, Phase, Tenancy},
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
    phase: Phase,
}

impl Shard {
    /// A rank that will load with `load`.
    pub fn new(load: Arc<Load>) -> Self {
        Self { load, phase: Phase::default() }
    }

    /// Passes on what the compute thread tells while it loads. Ends with loading, whether or not anybody still listens: events that
    /// are not read hold it up for no longer than the load is asked for.
    async fn follow_loading(
        self,
        mut loading: mpsc::Receiver<Loading>,
        (gate, epoch): (Arc<Gate>, u64),
        loaded: impl Fn(Arc<MediaStore>) -> Loaded + Send,
        events: mpsc::Sender<Result<pb::LoadResponse, Status>>,
    ) {
        while let Some(told) = loading.recv().await {
            let event = match told {
                Loading::Event(LoadEvent::Plan(plan)) => Event::Plan(memory_plan(&plan)),
                Loading::Event(LoadEvent::Progress { loaded_bytes, total_bytes }) => {
                    Event::Progress(pb::LoadProgress { loaded_bytes, total_bytes })
                }
                Loading::Done(description, media) => {
                    self.phase.loaded(&gate, loaded(media));
                    Event::Description(*description)
                }
                Loading::Failed(error) => {
                    self.phase.failed(&gate);
                    let _ = events.send(Err(status::of_load(&error))).await;
                    return;
                }
            };
            tokio::select! {
                _ = events.send(Ok(pb::LoadResponse { event: Some(event) })) => {}
                () = gate.over(epoch) => {}
            }
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
        let (world_size, epoch) = (options.world_size, options.epoch);
        let gate = Gate::new(epoch, options.threads);
        let (thread, alive) = watch::channel(false);
        let tenancy = Tenancy { group: options.group, gate: gate.clone(), alive, heard: Instant::now() };
        let before = self.phase.begin(tenancy)?;
        let (events, stream) = mpsc::channel(QUEUED_ANSWERS);
        let shard = self.clone();
        // Whether or not anybody waits for it: what was begun must end before the next load can begin.
        tokio::spawn(async move {
            if let Some(before) = before {
                before.end().await;
            }
            let (tell, loading) = mpsc::channel(QUEUED_ANSWERS);
            match worker::start(options, shard.load.clone(), gate.clone(), tell, thread) {
                Ok(jobs) => {
                    let loaded = move |media| Loaded { media, jobs: jobs.clone(), world_size };
                    shard.follow_loading(loading, (gate, epoch), loaded, events).await;
                }
                Err(error) => {
                    shard.phase.failed(&gate);
                    let error = Status::resource_exhausted(format!("no thread to compute on: {error}"));
                    let _ = events.send(Err(error)).await;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn put_media(
        &self,
        request: Request<Streaming<pb::PutMediaRequest>>,
    ) -> Result<Response<pb::PutMediaResponse>, Status> {
        let (Tenancy { group, gate, .. }, Loaded { media, .. }) = self.phase.ready()?;
        let mut pieces = request.into_inner();
        let Some(Piece::Header(header)) = pieces.message().await?.and_then(|message| message.piece) else {
            return Err(Status::invalid_argument("header: must come first"));
        };
        if header.group != group {
            return Err(other_group("header.group"));
        }
        let invalid = |field: &str, fault| Status::invalid_argument(format!("header.{field}: {fault}"));
        let hash = convert::media_hash(&header.hash).map_err(|fault| invalid("hash", fault.to_string()))?;
        let grid = convert::grid(header.grid).map_err(|fault| invalid("grid", fault.to_string()))?;
        let size_bytes = usize::try_from(header.size_bytes).unwrap_or(usize::MAX);
        if !header.path.is_empty() {
            let file = File::open(&header.path).map_err(|error| invalid("path", error.to_string()))?;
            let put = media.put_file(header.epoch, hash, grid, size_bytes, file);
            put.map_err(|error| status::of_media(&error))?;
            return Ok(Response::new(pb::PutMediaResponse {}));
        }
        let upload = media.begin(header.epoch, hash, grid, size_bytes);
        let upload = upload.map_err(|error| status::of_media(&error))?;
        // Pixels that wait already need not be read again.
        let Some(mut upload) = upload else { return Ok(Response::new(pb::PutMediaResponse {})) };
        let receive = async {
            while let Some(message) = pieces.message().await? {
                match message.piece {
                    Some(Piece::Chunk(bytes)) => {
                        upload.push(&bytes).map_err(|error| status::of_media(&error))?
                    }
                    Some(Piece::Header(_)) => return Err(Status::invalid_argument("header: came twice")),
                    None => return Err(Status::invalid_argument("piece: is missing")),
                }
            }
            Ok(())
        };
        // Chunks may stop coming without a word. They hold their memory for no longer than the epoch lasts.
        tokio::select! {
            received = receive => received?,
            () = gate.over(header.epoch) => return Err(over(header.epoch)),
        }
        upload.finish().map_err(|error| status::of_media(&error))?;
        Ok(Response::new(pb::PutMediaResponse {}))
    }

    async fn run(
        &self,
        request: Request<Streaming<pb::RunRequest>>,
    ) -> Result<Response<Self::RunStream>, Status> {
        let (Tenancy { gate, group, .. }, Loaded { jobs, .. }) = self.phase.ready()?;
        let open = gate.open_run().map_err(Status::failed_precondition)?;
        let (answers, stream) = mpsc::channel(QUEUED_ANSWERS);
        tokio::spawn(pass_on(request.into_inner(), (group, open), jobs, answers));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn regroup(
        &self,
        request: Request<pb::RegroupRequest>,
    ) -> Result<Response<pb::RegroupResponse>, Status> {
        let (Tenancy { gate, group: mine, .. }, Loaded { jobs, world_size, .. }) = self.phase.ready()?;
        let pb::RegroupRequest { epoch, collective_path, group } = request.into_inner();
        if group != mine {
            return Err(other_group("group"));
        }
        if world_size > 1 && collective_path.is_empty() {
            return Err(Status::invalid_argument(
                "collective_path: is empty, and there are other ranks to meet",
            ));
        }
        gate.ask(epoch).map_err(|latest| {
            Status::invalid_argument(format!("epoch: is {epoch}, it must be larger than {latest}"))
        })?;
        let (answer, joined) = oneshot::channel();
        let ended = |_| Status::internal("the compute thread ended");
        let job = Job::Regroup { epoch, collective_path: collective_path.into(), answer };
        jobs.send(job).await.map_err(|_| Status::internal("the compute thread ended"))?;
        joined.await.map_err(ended)??;
        Ok(Response::new(pb::RegroupResponse {}))
    }

    async fn get_progress(
        &self,
        request: Request<pb::GetProgressRequest>,
    ) -> Result<Response<pb::GetProgressResponse>, Status> {
        self.phase.hear(request.into_inner().group);
        let (reached, group) =
            self.phase.gate().map(|(gate, group)| (gate.reached(), group)).unwrap_or_default();
        let Reached { epoch, work_pieces, collectives, steps } = reached;
        let group = group.unwrap_or_default();
        Ok(Response::new(pb::GetProgressResponse { epoch, work_pieces, collectives, steps, group }))
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

fn over(epoch: u64) -> Status {
    Status::aborted(format!("epoch {epoch} is over"))
}

fn other_group(field: &str) -> Status {
    Status::failed_precondition(format!("{field}: this rank is loaded for another one"))
}

/// Passes the steps of a stream on to the compute thread, for as long as their epoch lasts.
async fn pass_on(
    mut steps: Streaming<pb::RunRequest>,
    (group, open): (u64, OpenRun),
    jobs: mpsc::Sender<Job>,
    answers: mpsc::Sender<Result<pb::RunResponse, Status>>,
) {
    let pass_on = async {
        // A broken stream means that the server went away; it has nobody to tell.
        while let Ok(Some(request)) = steps.message().await {
            if request.group != group {
                return Some(other_group("group"));
            }
            if jobs.send(Job::Step { request, answers: answers.clone() }).await.is_err() {
                return Some(Status::internal("the compute thread ended"));
            }
        }
        None
    };
    let over = async {
        open.over().await;
        Some(over(open.epoch()))
    };
    let last = tokio::select! { last = pass_on => last, last = over => last };
    if let Some(last) = last {
        // Nobody waits for a stream that is not read.
        let _ = answers.try_send(Err(last));
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
        staging_bytes: plan.staging_bytes,
        on_gpu: plan.on_gpu,
        graphs_bytes: plan.graphs_bytes,
        pinned_bytes: plan.pinned_bytes,
    }
}

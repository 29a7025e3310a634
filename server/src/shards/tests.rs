//! Groups of shards that compute nothing: in this process, behind sockets, and as processes that die.

mod processes;

use std::{
    collections::HashMap,
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures::Stream;
use lockstep_proto::shard::{
    self as pb,
    load_response::Event,
    put_media_request::Piece,
    shard_service_server::{ShardService, ShardServiceServer},
};
use tempfile::TempDir;
use tokio::{
    net::UnixListener,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use lockstep_shard::service::ListenAddress;

use super::*;
use crate::scheduler::{
    Admission, BlockId, Chunk, DrawFailure, Encode, MediaHash, Medium, SamplingParams, SeqId, StepPlan,
    StepResult,
};

/// What a fake shard does, beside answering as it should.
#[derive(Clone, Default)]
struct Fake {
    /// Refuses to load, in these words.
    refuses: Option<String>,
    /// Its state differs in this step.
    diverges_at: Option<u64>,
    /// Never answers this step, as one that waits for a dead rank.
    hangs_at: Option<u64>,
    /// Its process ends in this step.
    dies_at: Option<u64>,
    /// Answers this step with an error.
    fails_at: Option<u64>,
    /// Draws no token in this step.
    silent_at: Option<u64>,
    /// Its process ends when it is to join another epoch.
    falls: bool,
    /// Takes its time.
    slow: bool,
    /// Meetings that it began.
    collectives: u64,
    /// Cannot draw for the first sequence of this step, and says so.
    stuck_at: Option<u64>,
    /// Blocks of keys and values that it has.
    kv_blocks: u32,
    vocab_size: u32,
    /// Of the weights that it reads.
    weights_checksum: u64,
    /// What came to it.
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    load: Option<pb::LoadRequest>,
    /// Regrouped for.
    epochs: Vec<u64>,
    steps: Vec<pb::RunRequest>,
    media: HashMap<Vec<u8>, Vec<u8>>,
    headers: Vec<pb::MediaHeader>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl ShardService for Fake {
    type LoadStream = Answers<pb::LoadResponse>;
    type RunStream = Answers<pb::RunResponse>;

    async fn load(&self, request: Request<pb::LoadRequest>) -> Result<Response<Self::LoadStream>, Status> {
        let request = request.into_inner();
        let rank = u64::from(request.rank);
        self.seen.lock().unwrap().load = Some(request);
        if let Some(words) = &self.refuses {
            return Err(Status::failed_precondition(words));
        }
        let description = pb::ModelDescription {
            architecture: "Fake".into(),
            vocab_size: self.vocab_size,
            kv_blocks: self.kv_blocks,
            kv_block_tokens: 16,
            instruction_set: "none".into(),
            weights_checksum: self.weights_checksum,
            ..Default::default()
        };
        let events = [
            Event::Plan(pb::MemoryPlan { weights_bytes: 100 + rank, kv_bytes: 11, ..Default::default() }),
            Event::Progress(pb::LoadProgress { loaded_bytes: 50, total_bytes: 100 + rank }),
            Event::Progress(pb::LoadProgress { loaded_bytes: 100 + rank, total_bytes: 100 + rank }),
            Event::Description(description),
        ];
        let events = events.map(|event| Ok(pb::LoadResponse { event: Some(event) }));
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }

    async fn put_media(
        &self,
        request: Request<Streaming<pb::PutMediaRequest>>,
    ) -> Result<Response<pb::PutMediaResponse>, Status> {
        let mut pieces = request.into_inner();
        let Some(Piece::Header(header)) = pieces.message().await?.and_then(|message| message.piece) else {
            return Err(Status::invalid_argument("no header"));
        };
        let mut pixels = match header.path.as_str() {
            "" => vec![],
            path => std::fs::read(path)?,
        };
        while let Some(message) = pieces.message().await? {
            match message.piece {
                Some(Piece::Chunk(chunk)) => pixels.extend_from_slice(&chunk),
                _ => return Err(Status::invalid_argument("no chunk")),
            }
        }
        if pixels.len() as u64 != header.size_bytes {
            return Err(Status::invalid_argument("other bytes than announced"));
        }
        let mut seen = self.seen.lock().unwrap();
        seen.media.insert(header.hash.to_vec(), pixels);
        seen.headers.push(header);
        Ok(Response::new(pb::PutMediaResponse {}))
    }

    async fn run(
        &self,
        request: Request<Streaming<pb::RunRequest>>,
    ) -> Result<Response<Self::RunStream>, Status> {
        let mut steps = request.into_inner();
        let fake = self.clone();
        let (answers, stream) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Ok(Some(request)) = steps.message().await {
                // What goes wrong does so in the first epoch.
                let step = Some(request.step).filter(|_| request.epoch == 0);
                if fake.slow {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                if step.is_some() && step == fake.dies_at {
                    eprintln!("step {} was too much for me", request.step);
                    std::process::exit(7);
                }
                if step.is_some() && step == fake.hangs_at {
                    std::future::pending::<()>().await;
                }
                if answers.send(fake.answer(request)).await.is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn regroup(
        &self,
        request: Request<pb::RegroupRequest>,
    ) -> Result<Response<pb::RegroupResponse>, Status> {
        if self.falls {
            std::process::exit(9);
        }
        self.seen.lock().unwrap().epochs.push(request.into_inner().epoch);
        Ok(Response::new(pb::RegroupResponse {}))
    }

    async fn get_progress(
        &self,
        _request: Request<pb::GetProgressRequest>,
    ) -> Result<Response<pb::GetProgressResponse>, Status> {
        let group = self.seen.lock().unwrap().load.as_ref().map_or(0, |load| load.group);
        let collectives = self.collectives;
        Ok(Response::new(pb::GetProgressResponse { collectives, group, ..Default::default() }))
    }

    async fn get_memory(
        &self,
        _request: Request<pb::GetMemoryRequest>,
    ) -> Result<Response<pb::GetMemoryResponse>, Status> {
        Ok(Response::new(pb::GetMemoryResponse { anonymous_bytes: 1000, shared_bytes: 24 }))
    }
}

impl Fake {
    fn new() -> Self {
        Self { kv_blocks: 8, vocab_size: 100, ..Self::default() }
    }

    fn answer(&self, request: pb::RunRequest) -> Result<pb::RunResponse, Status> {
        let step = request.step;
        self.seen.lock().unwrap().steps.push(request.clone());
        if self.fails_at == Some(step) {
            return Err(Status::internal("the device is on fire"));
        }
        let drawing = request.chunks.iter().filter(|chunk| chunk.max_new_tokens > 0);
        let token = pb::SampledToken {
            token_id: 42,
            logprob: Some(-0.5),
            top: vec![pb::TokenProbability { token_id: 42, logprob: -0.5 }],
        };
        let mut sampled: Vec<pb::Sampled> = drawing
            .map(|chunk| pb::Sampled {
                sequence_id: chunk.sequence_id,
                tokens: vec![token.clone()],
                ..Default::default()
            })
            .collect();
        if self.silent_at == Some(step) {
            sampled.clear();
        }
        if self.stuck_at == Some(step) {
            sampled[0].tokens.clear();
            sampled[0].set_failure(pb::DrawFailure::LogitsNotFinite);
        }
        let state_hash = if self.diverges_at == Some(step) { 13 } else { 12 };
        Ok(pb::RunResponse { epoch: request.epoch, step, state_hash, sampled, vision_us: 3, step_us: 4 })
    }

    fn serve(self, socket: &Path) -> impl Future<Output = Result<(), tonic::transport::Error>> + use<> {
        let listener = UnixListener::bind(socket).unwrap();
        let service = ShardServiceServer::new(self).max_decoding_message_size(16 << 20);
        Server::builder().add_service(service).serve_with_incoming(UnixListenerStream::new(listener))
    }
}

fn config(world_size: u32) -> GroupConfig {
    GroupConfig {
        build_id: "test".into(),
        silence: Duration::from_secs(1),
        source: ShardSource::Children { command: None },
        model_dir: "/models/fake".into(),
        world_size,
        device: DeviceKind::Cpu,
        gpu: None,
        dtype: DType::F32,
        threads: Some(3),
        max_context_tokens: 1000,
        max_step_tokens: 100,
        max_frame_patches: 64,
        placement: Placement::Files,
        max_step_sequences: 4,
        kv_capacity_tokens: 128,
        feature_capacity_tokens: 64,
        image_mean: [0.5; 3],
        image_std: [0.25; 3],
    }
}

/// Keeps a group in this process alive.
struct Stage {
    _dir: TempDir,
    progress: watch::Receiver<Vec<LoadProgress>>,
}

type Started = Result<(Group, Vec<MemoryPlan>), StartError>;

/// A group of fakes that are served by this process.
async fn attach(fakes: Vec<Fake>) -> (Started, Stage) {
    attach_placing(fakes, Placement::Files).await
}

async fn attach_placing(fakes: Vec<Fake>, placement: Placement) -> (Started, Stage) {
    let dir = tempfile::tempdir().unwrap();
    let mut addresses = vec![];
    for (rank, fake) in fakes.into_iter().enumerate() {
        let socket = dir.path().join(rank.to_string());
        tokio::spawn(fake.serve(&socket));
        addresses.push(ListenAddress::Unix(socket));
    }
    let world_size = addresses.len() as u32;
    let config = GroupConfig { placement, source: ShardSource::Elsewhere(addresses), ..config(world_size) };
    let (tell, progress) = watch::channel(vec![]);
    let started = Group::start(&config, &tell).await;
    (started, Stage { _dir: dir, progress })
}

fn plan(step: u64) -> StepPlan {
    let sampling = SamplingParams {
        temperature: 0.5,
        top_k: 40,
        top_p: 0.75,
        min_p: 0.25,
        repetition_penalty: 1.5,
        presence_penalty: -0.5,
        frequency_penalty: 2.0,
        logit_bias: vec![(6, -4.0)],
        seed: 9,
        branch: 2,
        logprobs: Some(1),
    };
    let hash = MediaHash([3; 32]);
    let medium = Medium { hash, first_token: 1, num_tokens: 1, grid: [1, 2, 4], seconds_per_grid_t: 0.0 };
    let admission = Admission {
        id: SeqId(7),
        token_ids: vec![1, 2, 3],
        num_prompt_tokens: 3,
        media: vec![medium],
        sampling,
        num_computed_tokens: 2,
        blocks: vec![BlockId(9)],
    };
    let drawing = |id, start| Chunk { id, start, length: 1, new_blocks: vec![BlockId(4)], max_new_tokens: 1 };
    StepPlan {
        step,
        admissions: vec![admission],
        encodes: vec![Encode { id: SeqId(7), hash, feature_blocks: vec![BlockId(2)], from: 3, to: 5 }],
        chunks: vec![
            Chunk { length: 2, max_new_tokens: 0, ..drawing(SeqId(7), 0) },
            drawing(SeqId(5), 10),
            drawing(SeqId(6), 20),
        ],
        copies: vec![],
        releases: vec![SeqId(1), SeqId(2)],
        evictions: vec![MediaHash([8; 32])],
    }
}

async fn run(group: &mut Group, plan: StepPlan) -> Result<StepResult, GroupError> {
    group.send(plan);
    match group.receive().await {
        Ok(result) => Ok(result),
        Err(Broken) => Err(group.diagnose().await),
    }
}

fn drawn(result: &StepResult) -> Vec<(u64, u32)> {
    result.sampled.iter().map(|sampled| (sampled.id.0, sampled.tokens[0].token_id)).collect()
}

#[tokio::test]
async fn loads_all_ranks_and_agrees_on_the_poorest() {
    let fakes = vec![Fake::new(), Fake { kv_blocks: 6, ..Fake::new() }, Fake::new()];
    let seen: Vec<_> = fakes.iter().map(|fake| fake.seen.clone()).collect();
    let (started, stage) = attach(fakes).await;
    let (group, plans) = started.unwrap();
    let description = group.description();
    assert_eq!((description.kv_blocks, description.architecture.as_str()), (6, "Fake"));
    assert_eq!(plans.iter().map(MemoryPlan::total_bytes).collect::<Vec<_>>(), [111, 112, 113]);
    let progress: Vec<_> =
        stage.progress.borrow().iter().map(|told| (told.loaded_bytes, told.total_bytes)).collect();
    assert_eq!(progress, [(100, 100), (101, 101), (102, 102)]);
    let load = seen[1].lock().unwrap().load.clone().unwrap();
    assert_eq!((load.rank, load.world_size, load.epoch, load.threads, load.loading_ranks), (1, 3, 0, 3, 3));
    assert_eq!((load.device.as_str(), load.dtype.as_str()), ("cpu", "f32"));
    assert_eq!(load.model_dir, "/models/fake");
    assert!(load.group != 0 && load.collective_path.starts_with("/proc/"), "{load:?}");
}

#[tokio::test]
async fn all_ranks_get_the_same_plan_and_rank_0_tells_the_tokens() {
    let fakes = vec![Fake::new(), Fake::new()];
    let seen: Vec<_> = fakes.iter().map(|fake| fake.seen.clone()).collect();
    let (started, _stage) = attach(fakes).await;
    let (mut group, ..) = started.unwrap();
    let result = run(&mut group, plan(0)).await.unwrap();
    assert_eq!((drawn(&result), result.vision_us, result.step_us), (vec![(5, 42), (6, 42)], 3, 4));
    assert_eq!(result.sampled[0].tokens[0].logprob, Some(-0.5));
    run(&mut group, plan(1)).await.unwrap();
    let steps = seen[0].lock().unwrap().steps.clone();
    assert_eq!(steps, seen[1].lock().unwrap().steps);
    let pb::RunRequest { epoch, step, admissions, encodes, chunks, releases, evictions, .. } =
        steps[1].clone();
    assert_eq!((epoch, step, releases), (0, 1, vec![1, 2]));
    assert_eq!(evictions, [Bytes::from(vec![8; 32])]);
    assert_eq!((&encodes[0].feature_blocks[..], encodes[0].from, encodes[0].to), (&[2][..], 3, 5));
    assert_eq!((chunks[1].sequence_id, chunks[1].start, chunks[1].new_blocks.clone()), (5, 10, vec![4]));
    let admission = &admissions[0];
    assert_eq!((admission.sequence_id, admission.num_prompt_tokens), (7, 3));
    assert_eq!((admission.num_computed_tokens, &admission.blocks[..]), (2, &[9][..]));
    assert_eq!(admission.media[0].grid, Some(pb::Grid { t: 1, h: 2, w: 4 }));
    let sampling = pb::SamplingParams {
        temperature: 0.5,
        repetition_penalty: 1.5,
        seed: 9,
        branch: 2,
        logprobs: Some(1),
        top_k: 40,
        top_p: Some(0.75),
        min_p: 0.25,
        presence_penalty: -0.5,
        frequency_penalty: 2.0,
        logit_bias: vec![pb::LogitBias { token_id: 6, bias: -4.0 }],
    };
    assert_eq!(admission.sampling.as_ref(), Some(&sampling));
}

#[tokio::test]
async fn pixels_reach_all_ranks_and_memory_is_told() {
    let pixels: Vec<u8> = (0..2_500_000).map(|i| (i % 251) as u8).collect();
    for placement in [Placement::Files, Placement::Chunks { waiting_bytes: 77 }] {
        let fakes = vec![Fake::new(), Fake::new()];
        let seen: Vec<_> = fakes.iter().map(|fake| fake.seen.clone()).collect();
        let (started, _stage) = attach_placing(fakes, placement).await;
        let mut group = started.unwrap().0;
        group.meeting.epoch = 3;
        group.put_media(MediaHash([3; 32]), [1, 2, 4], pixels.clone().into()).await.unwrap();
        for seen in &seen {
            let seen = seen.lock().unwrap();
            assert!(seen.media[&vec![3; 32]] == pixels);
            let reserved = seen.load.as_ref().unwrap().waiting_pixel_bytes;
            let pb::MediaHeader { path, epoch, .. } = &seen.headers[0];
            assert_eq!(*epoch, 3);
            if placement == Placement::Files {
                assert!(reserved == 0 && path.starts_with("/proc/"), "{path}");
                let target = std::fs::read_link(path).unwrap_or_default();
                assert!(
                    !target.to_string_lossy().contains("lockstep-pixels"),
                    "the file is gone: {target:?}"
                );
            } else {
                assert!(reserved == 77 && path.is_empty(), "{path}");
            }
        }
    }
    let (started, _stage) = attach(vec![Fake::new(), Fake::new()]).await;
    let group = started.unwrap().0;
    let memory = group.handle().memory().await.unwrap();
    assert_eq!(memory.iter().map(ResidentMemory::total_bytes).collect::<Vec<_>>(), [1024, 1024]);
}

#[tokio::test]
async fn every_refusal_is_told_with_its_rank() {
    let refusing = |words: &str| Fake { refuses: Some(words.into()), ..Fake::new() };
    let fakes = vec![refusing("lacks lm_head.weight"), Fake::new(), refusing("no memory")];
    let error = attach(fakes).await.0.err().unwrap().to_string();
    assert!(error.contains("shard 0: lacks lm_head.weight"), "{error}");
    assert!(error.contains("shard 2: no memory"), "{error}");
}

#[tokio::test]
async fn ranks_of_different_models_are_refused() {
    let fakes = vec![Fake::new(), Fake { vocab_size: 101, ..Fake::new() }];
    let error = attach(fakes).await.0.err().unwrap();
    assert!(matches!(error, StartError::Disagreement { rank: 1, field: "the model", .. }), "{error}");
}

#[tokio::test]
async fn diverging_states_are_a_fault() {
    let (started, _stage) = attach(vec![Fake::new(), Fake { diverges_at: Some(1), ..Fake::new() }]).await;
    let (mut group, ..) = started.unwrap();
    run(&mut group, plan(0)).await.unwrap();
    let error = run(&mut group, plan(1)).await.unwrap_err();
    assert_eq!(error.to_string(), "the ranks diverged in step 1: their states hash to [c, d]");
}

#[tokio::test]
async fn a_rank_that_fails_is_told_though_the_others_never_answer() {
    let fakes = vec![Fake { hangs_at: Some(0), ..Fake::new() }, Fake { fails_at: Some(0), ..Fake::new() }];
    let (started, _stage) = attach(fakes).await;
    let error = run(&mut started.unwrap().0, plan(0)).await.unwrap_err();
    assert_eq!(error.to_string(), "shard 1 failed: the device is on fire");
}

#[tokio::test]
async fn a_missing_token_is_noticed() {
    let (started, _stage) = attach(vec![Fake { silent_at: Some(0), ..Fake::new() }]).await;
    let error = run(&mut started.unwrap().0, plan(0)).await.unwrap_err();
    assert!(error.to_string().contains("drew tokens for 0 sequences in step 0, not for 2"), "{error}");
}

#[tokio::test]
async fn a_sequence_that_cannot_draw_is_told_and_no_fault_of_the_group() {
    let (started, _stage) = attach(vec![Fake { stuck_at: Some(0), ..Fake::new() }]).await;
    let result = run(&mut started.unwrap().0, plan(0)).await.unwrap();
    assert_eq!(result.sampled[0].failure, Some(DrawFailure::LogitsNotFinite));
    assert!(result.sampled[0].tokens.is_empty());
    assert_eq!((result.sampled[1].failure, result.sampled[1].tokens.len()), (None, 1));
}

#[tokio::test]
async fn the_next_step_is_sent_before_the_last_is_answered() {
    let fakes = vec![Fake { slow: true, ..Fake::new() }, Fake::new()];
    let seen: Vec<_> = fakes.iter().map(|fake| fake.seen.clone()).collect();
    let (started, _stage) = attach(fakes).await;
    let mut group = started.unwrap().0;
    group.send(plan(0));
    group.send(plan(1));
    // Asked and given up many times, as an engine does that has other things to wait for.
    let mut steps = vec![];
    while steps.len() < 2 {
        if let Ok(result) = tokio::time::timeout(Duration::from_millis(3), group.receive()).await {
            steps.push(result.unwrap().step);
        }
    }
    assert_eq!(steps, [0, 1]);
    assert!(seen.iter().all(|seen| seen.lock().unwrap().steps.len() == 2));
}

#[tokio::test]
async fn who_holds_up_the_others_is_silent() {
    let hanging = |collectives| Fake { hangs_at: Some(0), collectives, ..Fake::new() };
    let (started, _stage) = attach(vec![hanging(5), hanging(4), hanging(5)]).await;
    let error = run(&mut started.unwrap().0, plan(0)).await.unwrap_err();
    assert!(matches!(&error, GroupError::Silent { ranks, .. } if *ranks == [1]), "{error}");
    assert_eq!(error.to_string(), "shard 1 is silent for 1s");
}

#[tokio::test]
async fn ranks_without_work_need_not_move() {
    let (started, _stage) = attach(vec![Fake::new(), Fake::new()]).await;
    let mut group = started.unwrap().0;
    run(&mut group, plan(0)).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_secs(2), group.receive()).await.is_err());
    run(&mut group, plan(1)).await.unwrap();
}

#[tokio::test]
async fn who_runs_elsewhere_keeps_its_weights_unless_it_has_none_or_they_are_distrusted() {
    let fakes = vec![Fake::new(), Fake::new(), Fake::new()];
    let seen: Vec<_> = fakes.iter().map(|fake| fake.seen.clone()).collect();
    let (started, _stage) = attach(fakes).await;
    let mut group = started.unwrap().0;
    let what_happened = || -> Vec<(u64, Vec<u64>)> {
        let seen = seen.iter().map(|seen| seen.lock().unwrap());
        seen.map(|seen| (seen.load.as_ref().unwrap().epoch, seen.epochs.clone())).collect()
    };

    // The way to a rank was broken.
    let broken = GroupError::Silent { ranks: vec![1], silence: Duration::from_secs(1) };
    group.restart(&broken).await.unwrap();
    assert_eq!(what_happened(), vec![(0, vec![1]); 3]);
    run(&mut group, plan(0)).await.unwrap();

    // Another process listens where rank 2 did.
    seen[2].lock().unwrap().load.as_mut().unwrap().group = 0;
    group.restart(&GroupError::ShardFailed { rank: 2, words: "gone".into() }).await.unwrap();
    assert_eq!(what_happened(), [(0, vec![1, 2]), (0, vec![1, 2]), (2, vec![1])]);

    let diverged = GroupError::Diverged { step: 3, hashes: vec![7, 8, 7] };
    group.restart(&diverged).await.unwrap();
    assert_eq!(what_happened(), [(0, vec![1, 2, 3]), (3, vec![1, 2]), (2, vec![1, 3])]);
    assert_eq!(seen[1].lock().unwrap().load.as_ref().unwrap().loading_ranks, 1);
    run(&mut group, plan(0)).await.unwrap();
}

#[test]
fn nccl_is_pinned_where_bits_must_be_the_same() {
    let of = |sums, repeatable| {
        let gpu = GpuConfig {
            ordinals: vec![0, 1],
            memory: 0.9,
            sums,
            repeatable,
            no_graphs: false,
            kernel_cache: String::new(),
        };
        GroupConfig { gpu: Some(gpu), ..config(2) }.shard_environment()
    };
    assert!(of(Sums::Nccl, true).contains(&("NCCL_ALGO", "Tree")));
    assert!(of(Sums::Nccl, false).is_empty() && of(Sums::Peers, true).is_empty());
    assert!(config(2).shard_environment().is_empty());
}

//! A shard's service as its server meets it: over a Unix socket, with a model that only counts.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use lockstep_proto::shard::{
    self as pb, load_response::Event, put_media_request::Piece, shard_service_client::ShardServiceClient,
    shard_service_server::ShardServiceServer,
};
use lockstep_shard::{
    build_id,
    collective::Alone,
    device::DeviceError,
    runner::{
        MediaStore, MemoryPlan, Step, StepError, StepResult,
        step::{Fault, MediaHash, Sampled, SampledToken},
    },
    service::{
        Shard,
        gate::Gate,
        options::LoadOptions,
        worker::{Load, LoadError, LoadEvent, Loaded, Rank},
    },
};
use tokio::{net::UnixListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint, Server},
};

pub type Client = ShardServiceClient<Channel>;

/// A shard on a socket of its own, ended with the test.
pub struct Served {
    pub client: Client,
    _folder: tempfile::TempDir,
}

pub async fn serve(load: Arc<Load>) -> Served {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("0.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let service = ShardServiceServer::new(Shard::new(load));
    let serving =
        Server::builder().add_service(service).serve_with_incoming(UnixListenerStream::new(listener));
    tokio::spawn(serving);
    let endpoint = Endpoint::from_shared(format!("unix://{}", path.display())).unwrap();
    Served { client: ShardServiceClient::new(endpoint.connect().await.unwrap()), _folder: folder }
}

/// Answers each step with how many chunks and media it saw. Sequence 13 is unknown to it, and when 14 leaves its group is lost.
struct Counting {
    pixels: Arc<MediaStore>,
    gate: Arc<Gate>,
}

fn counting(
    options: &LoadOptions,
    gate: &Arc<Gate>,
    told: &mut dyn FnMut(LoadEvent),
) -> Result<Loaded, LoadError> {
    if options.model_dir.ends_with("broken") {
        return Err(LoadError::Checkpoint("tensor a is missing; tensor b is missing".into()));
    }
    told(LoadEvent::Plan(MemoryPlan { weights_bytes: 5, ..MemoryPlan::default() }));
    told(LoadEvent::Progress { loaded_bytes: 5, total_bytes: 5 });
    let media = Arc::new(MediaStore::new(1 << 16, options.epoch));
    let rank = Counting { pixels: media.clone(), gate: gate.clone() };
    let description = pb::ModelDescription { architecture: "counting".into(), ..Default::default() };
    Ok(Loaded { description, media, rank: Box::new(rank) })
}

impl Rank for Counting {
    fn run(&mut self, step: Step) -> Result<StepResult, StepError> {
        if step.releases.iter().any(|id| id.0 == 13) {
            return Err(StepError::invalid("releases[0]", Fault::UnknownSequence(step.releases[0])));
        }
        if step.releases.iter().any(|id| id.0 == 14) {
            return Err(StepError::Device(DeviceError::GroupLost));
        }
        let mut bytes = Vec::new();
        let mut read = |hash: &MediaHash| {
            let Some((_, size_bytes)) = self.pixels.shape(hash) else { return false };
            self.pixels.read(hash, 0..size_bytes, &mut bytes).unwrap();
            self.pixels.discard(hash)
        };
        let encoded = step.encodes.iter().filter(|encode| read(&encode.hash)).count();
        let token = SampledToken { token_id: bytes.len() as u32, logprob: None, top: vec![] };
        let drawn = |id| Sampled { id, tokens: vec![token.clone()], failure: None };
        let sampled = step.chunks.iter().map(|chunk| drawn(chunk.id)).collect();
        Ok(StepResult { state_hash: encoded as u64, sampled, vision_us: 0, step_us: 1 })
    }

    fn regroup(&mut self, epoch: u64, _collective_path: &Path) -> Result<(), LoadError> {
        self.pixels.clear(epoch);
        self.gate.enter(epoch, Alone, None).map_err(|_| DeviceError::GroupLost)?;
        Ok(())
    }
}

pub fn load_request() -> pb::LoadRequest {
    pb::LoadRequest {
        build_id: build_id().into(),
        group: 9,
        epoch: 4,
        world_size: 1,
        model_dir: "somewhere".into(),
        device: "cpu".into(),
        dtype: "f32".into(),
        max_context_tokens: 64,
        max_step_tokens: 64,
        max_step_sequences: 4,
        kv_capacity_tokens: 256,
        threads: 1,
        image_mean: vec![0.5; 3],
        image_std: vec![0.5; 3],
        loading_ranks: 1,
        ..Default::default()
    }
}

pub async fn load(client: &mut Client, request: pb::LoadRequest) -> Result<Vec<Event>, Status> {
    let mut stream = client.load(request).await?.into_inner();
    let mut events = Vec::new();
    while let Some(response) = stream.message().await? {
        events.extend(response.event);
    }
    Ok(events)
}

/// Sends steps and reads answers, one after the other.
pub struct Steps {
    pub sender: mpsc::Sender<pb::RunRequest>,
    pub answers: Streaming<pb::RunResponse>,
}

impl Steps {
    pub async fn open(client: &mut Client) -> Result<Self, Status> {
        let (sender, steps) = mpsc::channel(4);
        let answers = client.run(ReceiverStream::new(steps)).await?.into_inner();
        Ok(Self { sender, answers })
    }

    pub async fn run(&mut self, step: pb::RunRequest) -> Result<pb::RunResponse, Status> {
        self.sender.send(step).await.expect("the stream is open");
        self.answers.message().await.map(|answer| answer.expect("an answer to each step"))
    }
}

pub fn step(number: u64) -> pb::RunRequest {
    let chunk = pb::Chunk { sequence_id: 7, start: 0, length: 1, new_blocks: vec![0], max_new_tokens: 1 };
    pb::RunRequest { group: 9, epoch: 4, step: number, chunks: vec![chunk], ..Default::default() }
}

fn pieces(hash: Vec<u8>, size_bytes: u64, chunks: &[&[u8]]) -> Vec<pb::PutMediaRequest> {
    let grid = Some(pb::Grid { t: 1, h: 2, w: 2 });
    let header =
        pb::MediaHeader { hash: hash.into(), grid, size_bytes, path: String::new(), epoch: 4, group: 9 };
    let chunks = chunks.iter().map(|chunk| Piece::Chunk(chunk.to_vec().into()));
    std::iter::once(Piece::Header(header))
        .chain(chunks)
        .map(|piece| pb::PutMediaRequest { piece: Some(piece) })
        .collect()
}

async fn put(client: &mut Client, pieces: Vec<pb::PutMediaRequest>) -> Result<(), Status> {
    client.put_media(tokio_stream::iter(pieces)).await.map(|_| ())
}

#[tokio::test]
async fn loading_tells_plan_progress_and_description_once() {
    let mut client = serve(Arc::new(counting)).await.client;
    let events = load(&mut client, load_request()).await.unwrap();
    let [Event::Plan(plan), Event::Progress(progress), Event::Description(description)] = &events[..] else {
        panic!("{events:?}");
    };
    assert_eq!((plan.weights_bytes, progress.total_bytes), (5, 5));
    assert_eq!(description.architecture, "counting");
    let memory = client.get_memory(pb::GetMemoryRequest {}).await.unwrap().into_inner();
    assert!(memory.anonymous_bytes > 100_000);
}

#[tokio::test]
async fn another_build_and_wrong_options_are_refused_and_may_be_corrected() {
    let mut client = serve(Arc::new(counting)).await.client;
    let other = load(&mut client, pb::LoadRequest { build_id: "0.0.0+x".into(), ..load_request() })
        .await
        .unwrap_err();
    assert_eq!(other.code(), Code::FailedPrecondition);
    assert!(other.message().contains("0.0.0+x") && other.message().contains(build_id()), "{other}");
    let wrong = pb::LoadRequest { device: "tpu".into(), threads: 0, ..load_request() };
    let wrong = load(&mut client, wrong).await.unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument);
    assert!(wrong.message().contains("device") && wrong.message().contains("threads"), "{wrong}");
    load(&mut client, load_request()).await.unwrap();
}

#[tokio::test]
async fn a_broken_checkpoint_is_reported_with_all_faults() {
    let mut client = serve(Arc::new(counting)).await.client;
    let before = Steps::open(&mut client).await.err().expect("nothing is loaded");
    assert_eq!(before.code(), Code::FailedPrecondition);
    let broken = pb::LoadRequest { model_dir: "/models/broken".into(), ..load_request() };
    let error = load(&mut client, broken).await.unwrap_err();
    assert!(error.message().contains("tensor a is missing; tensor b is missing"), "{error}");
    load(&mut client, load_request()).await.expect("what is mended can be loaded");
}

#[tokio::test]
async fn a_rank_is_loaded_again_by_its_own_group_or_when_the_other_is_gone() {
    let mut client = serve(Arc::new(counting)).await.client;
    load(&mut client, load_request()).await.unwrap();
    let ask = async |client: &mut Client, group| {
        client.get_progress(pb::GetProgressRequest { group }).await.unwrap().into_inner().group
    };
    assert_eq!(ask(&mut client, 9).await, 9);
    let mut steps = Steps::open(&mut client).await.unwrap();
    steps.run(step(0)).await.unwrap();

    let foreign = pb::LoadRequest { group: 10, ..load_request() };
    let refused = load(&mut client, foreign.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().contains("another server uses this rank"), "{refused}");
    let late = load(&mut client, load_request()).await.unwrap_err();
    assert_eq!(late.message(), "epoch: is 4, it must be larger than 4");
    steps.run(step(1)).await.expect("nothing has happened to it");

    let again = pb::LoadRequest { epoch: 5, ..load_request() };
    load(&mut client, again).await.expect("its own server may, for a later epoch");
    let ended = steps.answers.message().await.unwrap_err();
    assert_eq!(ended.code(), Code::Aborted, "{ended}");
    let mut steps = Steps::open(&mut client).await.unwrap();
    let first = pb::RunRequest { epoch: 5, ..step(0) };
    steps.run(first).await.expect("steps begin anew");

    // As long as its group asks.
    let (begin, mut asked) = (Instant::now(), Instant::now());
    while load(&mut client, foreign.clone()).await.is_err() {
        if begin.elapsed() < Duration::from_secs(7) {
            asked = Instant::now();
            ask(&mut client, 9).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(asked.elapsed() >= Duration::from_secs(5), "{:?}", asked.elapsed());
    assert_eq!(ask(&mut client, 10).await, 10);
    let regroup = pb::RegroupRequest { epoch: 6, group: 9, ..Default::default() };
    let refused = client.regroup(regroup).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().starts_with("group: "), "{refused}");
}

/// A server that was away for long may not know that another one uses the rank, whose epoch may have the same number.
#[tokio::test]
async fn a_step_of_another_group_is_refused() {
    let mut client = serve(Arc::new(counting)).await.client;
    load(&mut client, load_request()).await.unwrap();
    let mut steps = Steps::open(&mut client).await.unwrap();
    steps.run(step(0)).await.expect("of its own group");
    let refused = steps.run(pb::RunRequest { group: 10, ..step(1) }).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().starts_with("group: "), "{refused}");
    let mut steps = Steps::open(&mut client).await.expect("its own server may go on");
    steps.run(step(1)).await.expect("nothing has happened to it");
}

#[tokio::test]
async fn steps_are_answered_in_order() {
    let mut client = serve(Arc::new(counting)).await.client;
    load(&mut client, load_request()).await.unwrap();
    let mut steps = Steps::open(&mut client).await.unwrap();
    for number in 0..5 {
        let answer = steps.run(step(number)).await.unwrap();
        assert_eq!((answer.epoch, answer.step, answer.sampled[0].sequence_id), (4, number, 7));
    }
    let second = Steps::open(&mut client).await.err().expect("one stream at a time");
    assert!(second.message().contains("another stream"), "{second}");
    drop(steps);
    // A stream that ended gives way to the next, which goes on where it stopped.
    for _ in 0..100 {
        if let Ok(mut steps) = Steps::open(&mut client).await {
            assert_eq!(steps.run(step(5)).await.unwrap().step, 5);
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the ended stream still counts as open");
}

#[tokio::test]
async fn a_wrong_step_ends_the_stream_with_its_words_and_the_rank_with_it() {
    let wrong = [
        (step(1), Code::FailedPrecondition, "step: is 1, the next one is 0"),
        (
            pb::RunRequest { releases: vec![13], ..step(0) },
            Code::InvalidArgument,
            "releases[0]: sequence 13 is unknown",
        ),
        (
            pb::RunRequest { evictions: vec![vec![1].into()], ..step(0) },
            Code::InvalidArgument,
            "evictions[0]",
        ),
        (
            pb::RunRequest { releases: vec![14], ..step(0) },
            Code::Aborted,
            "rank 0, step 0: the group of ranks",
        ),
    ];
    for (request, code, words) in wrong {
        let mut client = serve(Arc::new(counting)).await.client;
        load(&mut client, load_request()).await.unwrap();
        let error = Steps::open(&mut client).await.unwrap().run(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(words), "{error}");
        for _ in 0..100 {
            match Steps::open(&mut client).await {
                Ok(mut steps) => {
                    let later = steps.run(step(1)).await.unwrap_err();
                    assert!(later.message().contains("an earlier step failed"), "{later}");
                    break;
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}

#[tokio::test]
async fn pixels_reach_the_step_that_encodes_them() {
    let mut client = serve(Arc::new(counting)).await.client;
    let early = put(&mut client, pieces(vec![1; 32], 3, &[&[1, 2, 3]])).await.unwrap_err();
    assert_eq!(early.code(), Code::FailedPrecondition);
    load(&mut client, load_request()).await.unwrap();

    put(&mut client, pieces(vec![1; 32], 5, &[&[1, 2, 3], &[4, 5]])).await.unwrap();
    put(&mut client, pieces(vec![1; 32], 5, &[&[1, 2, 3, 4, 5]])).await.unwrap();
    for (pieces, code, words) in [
        (pieces(vec![1; 31], 5, &[]), Code::InvalidArgument, "header.hash: has 31 bytes"),
        (pieces(vec![2; 32], 5, &[&[1, 2]]), Code::InvalidArgument, "2 bytes came, header.size_bytes is 5"),
        (pieces(vec![2; 32], 1, &[&[1, 2]]), Code::InvalidArgument, "2 bytes came, header.size_bytes is 1"),
        (pieces(vec![2; 32], u64::MAX, &[]), Code::ResourceExhausted, "do not fit"),
        (pieces(vec![2; 32], 5, &[&[1]])[1..].to_vec(), Code::InvalidArgument, "header: must come first"),
    ] {
        let error = put(&mut client, pieces).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(words), "{error}");
    }
    let encode = pb::Encode { hash: vec![1; 32].into(), feature_blocks: vec![0], from: 0, to: 1 };
    let mut steps = Steps::open(&mut client).await.unwrap();
    let answer = steps.run(pb::RunRequest { encodes: vec![encode], ..step(0) }).await.unwrap();
    assert_eq!((answer.state_hash, answer.sampled[0].tokens[0].token_id), (1, 5));
    assert_eq!(MediaHash([1; 32]).to_string(), "010101010101");
}

#[tokio::test]
async fn pixels_of_another_epoch_or_group_are_refused_and_those_of_before_are_gone() {
    let mut client = serve(Arc::new(counting)).await.client;
    load(&mut client, load_request()).await.unwrap();
    let of_epoch = |epoch| {
        let mut pieces = pieces(vec![1; 32], 5, &[&[1, 2, 3, 4, 5]]);
        let Some(Piece::Header(header)) = &mut pieces[0].piece else { panic!("a header comes first") };
        header.epoch = epoch;
        pieces
    };
    put(&mut client, of_epoch(4)).await.unwrap();
    let mut of_group = of_epoch(4);
    let Some(Piece::Header(header)) = &mut of_group[0].piece else { panic!("a header comes first") };
    header.group = 8;
    let error = put(&mut client, of_group).await.unwrap_err();
    assert_eq!(error.message(), "header.group: this rank is loaded for another one");
    client.regroup(pb::RegroupRequest { epoch: 5, group: 9, ..Default::default() }).await.unwrap();
    for epoch in [4, 6] {
        let error = put(&mut client, of_epoch(epoch)).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition);
        let words = format!("header.epoch: the pixels are of epoch {epoch}, this rank of epoch 5");
        assert_eq!(error.message(), words);
    }
    let encode = pb::Encode { hash: vec![1; 32].into(), feature_blocks: vec![0], from: 0, to: 1 };
    let encodes = |number| pb::RunRequest { epoch: 5, encodes: vec![encode.clone()], ..step(number) };
    let mut steps = Steps::open(&mut client).await.unwrap();
    assert_eq!(steps.run(encodes(0)).await.unwrap().state_hash, 0, "nothing waits");
    put(&mut client, of_epoch(5)).await.unwrap();
    assert_eq!(steps.run(encodes(1)).await.unwrap().state_hash, 1);
}

#[tokio::test]
async fn pixels_that_stop_coming_hold_memory_for_no_longer_than_their_epoch() {
    let mut client = serve(Arc::new(counting)).await.client;
    load(&mut client, load_request()).await.unwrap();
    let begun = tokio_stream::iter(pieces(vec![1; 32], 5, &[&[1, 2]]));
    let stalled = futures::StreamExt::chain(begun, futures::stream::pending());
    let mut uploading = client.clone();
    let put = tokio::spawn(async move { uploading.put_media(stalled).await.map(|_| ()) });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!put.is_finished(), "it waits for the rest");
    client.regroup(pb::RegroupRequest { epoch: 5, group: 9, ..Default::default() }).await.unwrap();
    assert_eq!(put.await.unwrap().unwrap_err().code(), Code::Aborted);
}

#[tokio::test]
async fn pixels_of_a_file_reach_the_step_though_the_file_is_gone() {
    let mut client = serve(Arc::new(counting)).await.client;
    load(&mut client, load_request()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pixels");
    let of_file = |name: u8, size_bytes| {
        let mut pieces = pieces(vec![name; 32], size_bytes, &[]);
        let Some(Piece::Header(header)) = &mut pieces[0].piece else { panic!("a header comes first") };
        header.path = path.display().to_string();
        pieces
    };
    let missing = put(&mut client, of_file(1, 5)).await.unwrap_err();
    assert_eq!(missing.code(), Code::InvalidArgument);
    assert!(missing.message().starts_with("header.path: No such file"), "{missing}");
    std::fs::write(&path, [1, 2, 3, 4, 5]).unwrap();
    let other = put(&mut client, of_file(1, 4)).await.unwrap_err();
    assert_eq!(other.message(), "header.path: has 5 bytes, header.size_bytes is 4");
    put(&mut client, of_file(1, 5)).await.unwrap();
    std::fs::remove_file(&path).unwrap();

    let encode = pb::Encode { hash: vec![1; 32].into(), feature_blocks: vec![0], from: 0, to: 1 };
    let mut steps = Steps::open(&mut client).await.unwrap();
    let answer = steps.run(pb::RunRequest { encodes: vec![encode], ..step(0) }).await.unwrap();
    assert_eq!((answer.state_hash, answer.sampled[0].tokens[0].token_id), (1, 5));
}

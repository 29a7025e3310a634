//! Starting a server, serving, and stopping: files, shards, engine, gRPC.

use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use futures::Stream;
use lockstep_proto::v1::inference_service_server::InferenceServiceServer;
use lockstep_shard::Facts;
use lockstep_shard::service::ListenAddress;
use opentelemetry::global;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::server::HealthReporter;

use crate::api::metered::Metered;
use crate::api::service::Inference;
use crate::api::timeout::TimeoutLayer;
use crate::budget::ByteBudget;
use crate::checkpoint::{GenerationDefaults, ModelFiles};
use crate::config::Config;
use crate::connections::{self, Connection};
use crate::engine::{Engine, EngineHandle, EngineThread};
use crate::generation::{Capacity, Frontend};
use crate::limits::{
    FLUSH_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MAX_ANSWER_BYTES, MAX_CONTROL_BYTES,
    MAX_ERROR_RESETS, MAX_HEADER_BYTES, MAX_PENDING_RESETS, MAX_REQUEST_BYTES, MAX_SOURCE_PIXELS,
    MAX_STREAMS_PER_CONNECTION, MAX_VIDEO_CPU_SECONDS, MAX_VIDEO_DECODING, MIN_FEATURE_TOKENS, OWN_FILES,
    RECEIVE_WINDOW_BYTES,
};
use crate::media::video::{Ffmpeg, TokenBounds, VideoDecoder, VideoLimits, VideoPreparer, VideoProcessor};
use crate::media::{MediaLibrary, MediaPreparer, PictureLimits, PicturePreparer, PictureProcessor};
use crate::metrics;
use crate::model_info::ModelInfo;
use crate::prompt::{MediaTokens, PromptEncoder};
use crate::scheduler::{Scheduler, SchedulerConfig, VisionCosts};
use crate::shards::{
    DeviceKind, Group, GroupConfig, GroupError, LoadProgress, MemoryPlan, ModelDescription, Placement,
    ShardSource,
};
use crate::warmup::warm_up;

/// The name by which health and reflection know the public API.
const INFERENCE_SERVICE: &str = "lockstep.v1.InferenceService";
/// This program as it runs, also where its file has been replaced meanwhile.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// Serves until a signal asks to stop or the shards are lost.
///
/// # Errors
/// Whatever keeps the server from starting, or ends it.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    let drain = config.args.drain_timeout;
    let mut server = Server::start(config, &mut |line| println!("{line}")).await?;
    let mut signals = StopSignals::listen()?;
    tokio::select! {
        error = server.lost() => {
            server.stop().await.ok();
            return Err(error);
        }
        signal = signals.next() => {
            server.close().await;
            println!("stopping on {signal}: running requests may finish within {drain:?}");
        }
    }
    tokio::select! {
        ended = server.stop() => ended,
        signal = signals.next() => Err(anyhow!("stopped at once on a second signal, {signal}")),
    }
}

/// Signals that ask to stop. None is missed between two looks.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Takes lines for a person: progress, plan, readiness.
type Say<'a> = dyn FnMut(&str) + Send + 'a;

/// A running server.
pub struct Server {
    address: SocketAddr,
    health: HealthReporter,
    /// Has health say whether steps move.
    following: JoinHandle<()>,
    handle: EngineHandle,
    stop: oneshot::Sender<()>,
    api: JoinHandle<Result<(), tonic::transport::Error>>,
    engine: JoinHandle<Result<(), GroupError>>,
    /// What the engine and its shards' connections run on.
    thread: EngineThread,
    drain_timeout: Duration,
}

impl Server {
    /// Starts the shards, loads the checkpoint, warms up, and listens.
    ///
    /// # Errors
    /// Every fault of the model folder at once, a port in use, memory that the host does not have, a shard that dies again and again,
    /// a warm-up that is not answered.
    pub async fn start(config: Config, say: &mut Say<'_>) -> anyhow::Result<Server> {
        let opened = open(&config).await?;
        let thread = EngineThread::start().context("starting a thread for the engine")?;
        let started = start_shards(&config, &opened.picture, &thread, say).await?;
        let model = model_info(&config, &opened, &started);
        let Opened { listener, prompts, picture, generation, ffmpeg } = opened;
        let Started { group, .. } = started;
        let description = group.description().clone();
        let scheduler = Scheduler::new(scheduler_config(&config, &model, &description));
        let media = media_preparer(&config, picture, model.max_context_tokens, ffmpeg);
        let shards = group.handle();
        let (engine, handle) = Engine::new(scheduler, group);
        metrics::register(&global::meter("lockstep"), &handle.stats(), &handle.moves());
        let frontend = Frontend {
            prompts: Arc::new(prompts),
            media,
            defaults: generation,
            engine: handle.clone(),
            max_context_tokens: model.max_context_tokens,
            capacity: Capacity {
                feature_blocks: description.feature_blocks,
                feature_block_tokens: description.feature_block_tokens,
                max_waiting: config.args.max_waiting,
            },
        };
        let address = listener.local_addr()?;
        let ready = ready_line(&config, &model, address);
        let frontend = Arc::new(frontend);
        let inference = Inference::new(
            frontend.clone(),
            Arc::new(model),
            MediaLibrary::new(config.args.library_bytes),
            shards,
        );
        let budget = ByteBudget::new(config.args.max_media_bytes);
        let (health, health_service) = tonic_health::server::health_reporter();
        let (stop, stopped) = oneshot::channel();
        let connections = connections::accept(listener, config.args.max_connections as usize);
        let engine = thread.spawn(engine.run());
        warm_up(&frontend, &budget).await?;
        let api = tokio::spawn(serve_api(connections, inference, budget, health_service, stopped));
        let following = tokio::spawn(follow_health(health.clone(), handle.moves()));
        say(&ready);
        let drain_timeout = config.args.drain_timeout;
        Ok(Server { address, health, following, handle, stop, api, engine, thread, drain_timeout })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until the shards are lost, and says why. Requests have then been told.
    pub async fn lost(&mut self) -> anyhow::Error {
        let error = match (&mut self.engine).await {
            Ok(Ok(())) => anyhow!("the engine stopped"),
            Ok(Err(error)) => error.into(),
            Err(panic) => anyhow!("the engine panicked: {panic}"),
        };
        self.say_not_serving().await;
        error
    }

    async fn say_not_serving(&self) {
        self.following.abort();
        say_health(&self.health, false).await;
    }

    /// Takes no more requests: new ones are refused from here on.
    pub async fn close(&self) {
        self.handle.close();
        self.say_not_serving().await;
    }

    /// Takes no more requests, lets the running ones finish within `--drain-timeout`, and stops the shards.
    ///
    /// # Errors
    /// When the server ended badly.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.close().await;
        let Server { stop, mut api, mut engine, thread: _thread, drain_timeout, .. } = self;
        let mut ended = Ok(());
        if !engine.is_finished() {
            match tokio::time::timeout(drain_timeout, &mut engine).await {
                Ok(engine) => ended = engine?.map_err(anyhow::Error::from),
                // The group goes with the engine, and requests that still run are told that it stopped.
                Err(_) => engine.abort(),
            }
        }
        let _ = stop.send(());
        match tokio::time::timeout(FLUSH_TIMEOUT, &mut api).await {
            Ok(api) => api??,
            // Connections that nobody closes.
            Err(_) => api.abort(),
        }
        ended
    }
}

/// Has health say SERVING while steps move.
async fn follow_health(health: HealthReporter, mut moves: watch::Receiver<bool>) {
    loop {
        let serving = *moves.borrow_and_update();
        say_health(&health, serving).await;
        if moves.changed().await.is_err() {
            return;
        }
    }
}

async fn say_health(health: &HealthReporter, serving: bool) {
    let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    for service in ["", INFERENCE_SERVICE] {
        health.set_service_status(service, status).await;
    }
}

/// What a server has before its shards are started.
struct Opened {
    listener: TcpListener,
    prompts: PromptEncoder,
    picture: PictureProcessor,
    generation: GenerationDefaults,
    ffmpeg: Option<Ffmpeg>,
}

/// Reads the model folder and takes the address, and reports what is wrong with either together, so that nothing is found
/// after minutes of loading that could have been found before.
async fn open(config: &Config) -> anyhow::Result<Opened> {
    let folder = config.args.model.clone();
    let files = tokio::task::spawn_blocking(move || ModelFiles::open(&folder)).await?;
    let listener = TcpListener::bind(config.listen).await;
    let mut faults = Vec::new();
    let files = files.map_err(|error| faults.push(error.to_string())).ok();
    let listener = listener.map_err(|error| faults.push(format!("--listen {}: {error}", config.listen))).ok();
    faults.extend(allow_files(config.args.max_connections).err());
    let ffmpeg =
        checked_ffmpeg(config).await.map_err(|error| faults.push(format!("{error:#}"))).ok().flatten();
    let folder = config.args.model.clone();
    let checked = tokio::task::spawn_blocking(move || lockstep_shard::check_folder(&folder)).await?;
    faults.extend(checked.faults);
    if let Some(Facts { max_context_tokens: bound, yarn, .. }) = checked.facts
        && let Some(asked) = config.args.max_context_tokens.filter(|asked| *asked > bound)
    {
        let says = if yarn { "context with YaRN" } else { "max_position_embeddings" };
        faults.push(format!("--max-context-tokens {asked}: the checkpoint's {says} is {bound}"));
    }
    let opened = files.zip(checked.facts).and_then(
        |(files, Facts { image_token_id: image, video_token_id: video, .. })| {
            let ModelFiles { tokenizer, template, generation, picture, .. } = files;
            let prompts = PromptEncoder::new(tokenizer, template, MediaTokens { image, video });
            let prompts = prompts.map_err(|error| faults.push(error.to_string())).ok()?;
            Some((prompts, picture, generation))
        },
    );
    match (opened, listener) {
        (Some((prompts, picture, generation)), Some(listener)) if faults.is_empty() => {
            Ok(Opened { listener, prompts, picture, generation, ffmpeg })
        }
        _ => Err(anyhow!("{}", faults.join("\n"))),
    }
}

/// The ffmpeg that decodes other videos, if there shall be one, after it has run once as it will run on videos.
async fn checked_ffmpeg(config: &Config) -> anyhow::Result<Option<Ffmpeg>> {
    let (Some(path), Some(given)) = (&config.ffmpeg, &config.args.ffmpeg) else { return Ok(None) };
    let ffmpeg =
        Ffmpeg::new(vec![OWN_PROGRAM.into()], path.clone(), VideoLimits::default(), MAX_VIDEO_CPU_SECONDS);
    ffmpeg.check().await.with_context(|| format!("--ffmpeg {}", given.display()))?;
    Ok(Some(ffmpeg))
}

/// Lets this process open as many files as its connections and its own work need: one too few would take the shards down.
fn allow_files(connections: u32) -> Result<(), String> {
    let needed = u64::from(connections) + OWN_FILES;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let refused =
        |why: String| format!("--max-connections {connections}: it takes {needed} open files; {why}");
    if let Some(most) = maximum.filter(|most| *most < needed) {
        return Err(refused(format!("this process may have {most}")));
    }
    if current.is_some_and(|current| current < needed) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(needed), maximum })
            .map_err(|error| refused(error.to_string()))?;
    }
    Ok(())
}

/// A loaded group, and what it told.
struct Started {
    group: Group,
    plans: Vec<MemoryPlan>,
}

async fn start_shards(
    config: &Config,
    picture: &PictureProcessor,
    thread: &EngineThread,
    say: &mut Say<'_>,
) -> anyhow::Result<Started> {
    let args = &config.args;
    let max_image_tokens = max_image_tokens(config, picture);
    let merged = picture.merge_size * picture.merge_size;
    let group = GroupConfig {
        build_id: lockstep_shard::build_id().to_owned(),
        source: shard_source(config)?,
        model_dir: args.model.clone(),
        world_size: config.world_size(),
        silence: args.silence_timeout,
        device: args.device,
        dtype: args.dtype,
        threads: args.threads,
        max_context_tokens: config.max_context_tokens,
        max_step_tokens: args.max_step_tokens,
        max_frame_patches: max_image_tokens.saturating_mul(merged),
        placement: placement(config, picture),
        max_step_sequences: args.max_running,
        kv_capacity_tokens: match args.device {
            DeviceKind::Cpu => args.kv_tokens.unwrap_or(config.max_context_tokens.into()),
            // As many as there is room for.
            DeviceKind::Cuda => args.kv_tokens.unwrap_or(0),
        },
        gpu: config.gpu(),
        feature_capacity_tokens: feature_tokens(config, picture),
        image_mean: picture.image_mean,
        image_std: picture.image_std,
    };
    let (progress, mut heard) = watch::channel(Vec::new());
    let mut starting = thread.spawn(async move { Group::start(&group, &progress).await });
    let mut told = 0;
    let (group, plans) = loop {
        tokio::select! {
            started = &mut starting => break started?.context("starting the shards")?,
            Ok(()) = heard.changed() => say_progress(&heard.borrow_and_update(), &mut told, say),
        }
    };
    for (rank, plan) in plans.iter().enumerate() {
        say(&plan_line(rank, plan));
    }
    Ok(Started { group, plans })
}

/// Shards that run already, or what starts one: this program or the one that was named, with what it is told of telemetry.
fn shard_source(config: &Config) -> anyhow::Result<ShardSource> {
    let Config { shard_program, otlp, args, .. } = config;
    if !args.shards.is_empty() {
        return Ok(ShardSource::Elsewhere(args.shards.clone()));
    }
    if shard_program.is_none() && otlp.is_none() {
        return Ok(ShardSource::Children { command: None });
    }
    let program = shard_program.clone().map_or_else(std::env::current_exe, Ok);
    let mut command: Vec<OsString> = vec![program.context("finding this program's own file")?.into()];
    command.extend(otlp.iter().flat_map(|otlp| ["--otlp".into(), otlp.into()]));
    Ok(ShardSource::Children { command: Some(command) })
}

/// Shards that are reached over TCP may be on other hosts, where the server's files are not.
fn placement(config: &Config, picture: &PictureProcessor) -> Placement {
    let is_remote = |address: &ListenAddress| matches!(address, ListenAddress::Tcp(_));
    if !config.args.shards.iter().any(is_remote) {
        return Placement::Files;
    }
    // Whatever waits has features reserved, and a token of a video is made of the pixels of two frames.
    let side = u64::from(picture.factor());
    let token_bytes = 2 * 3 * side * side;
    Placement::Chunks { waiting_bytes: feature_tokens(config, picture) * token_bytes }
}

/// A line for each tenth of the weights that is loaded.
fn say_progress(ranks: &[LoadProgress], told: &mut u64, say: &mut Say<'_>) {
    let loaded: u64 = ranks.iter().map(|rank| rank.loaded_bytes).sum();
    let total: u64 = ranks.iter().map(|rank| rank.total_bytes).sum();
    if total == 0 || ranks.iter().any(|rank| rank.total_bytes == 0) {
        return;
    }
    let tenths = loaded * 10 / total;
    if tenths > *told {
        *told = tenths;
        say(&format!("loading: {}% of {} of weights", tenths * 10, bytes(total)));
    }
}

fn plan_line(rank: usize, plan: &MemoryPlan) -> String {
    let device = [
        ("weights", plan.weights_bytes),
        ("keys and values", plan.kv_bytes),
        ("features", plan.features_bytes),
        ("workspace", plan.workspace_bytes),
        ("staging", plan.staging_bytes),
        ("graphs", plan.graphs_bytes),
    ];
    let host = [
        ("shared", plan.collective_bytes),
        ("pixels", plan.media_bytes),
        ("process", plan.process_bytes),
        ("pinned", plan.pinned_bytes),
    ];
    let words = |parts: &[(&str, u64)]| {
        let is_of_gpus = |name| ["staging", "graphs", "pinned"].contains(name);
        let parts = parts.iter().filter(|(name, size)| *size > 0 || !is_of_gpus(name));
        parts.map(|(name, size)| format!("{name} {}", bytes(*size))).collect::<Vec<_>>().join(", ")
    };
    if plan.on_gpu {
        let (on_gpu, on_host) = (plan.gpu_bytes(), plan.total_bytes() - plan.gpu_bytes());
        let (device, host) = (words(&device), words(&host));
        return format!(
            "memory of shard {rank}: {} of its GPU ({device}), {} of the host ({host})",
            bytes(on_gpu),
            bytes(on_host)
        );
    }
    let all = [&device[..], &host].concat();
    format!("memory of shard {rank}: {} ({})", bytes(plan.total_bytes()), words(&all))
}

/// Bytes for a person.
fn bytes(count: u64) -> String {
    let count = count as f64;
    if count >= 1e9 { format!("{:.2} GB", count / 1e9) } else { format!("{:.1} MB", count / 1e6) }
}

/// Tokens of the largest picture.
fn max_image_tokens(config: &Config, picture: &PictureProcessor) -> u32 {
    let side = u64::from(picture.factor());
    let largest = (picture.max_pixels / (side * side)).max(1) as u32;
    let room = config.args.feature_tokens.unwrap_or(u64::MAX);
    config.args.max_image_tokens.unwrap_or(largest).min(u32::try_from(room).unwrap_or(u32::MAX))
}

fn model_info(config: &Config, opened: &Opened, started: &Started) -> ModelInfo {
    let description = started.group.description();
    let kv_capacity_tokens = u64::from(description.kv_blocks) * u64::from(description.kv_block_tokens);
    let max_context_tokens = config.max_context_tokens.min(description.max_context_tokens);
    ModelInfo {
        name: config.name.clone(),
        architecture: description.architecture.clone(),
        max_context_tokens: max_context_tokens.min(u32::try_from(kv_capacity_tokens).unwrap_or(u32::MAX)),
        vocab_size: description.vocab_size,
        device: config.args.device.as_str(),
        dtype: config.args.dtype.as_str(),
        pixels_per_token_side: opened.picture.factor(),
        min_pixels: opened.picture.min_pixels,
        max_pixels: opened.picture.max_pixels,
        end_token_ids: opened.generation.eos_token_ids.clone(),
        kv_capacity_tokens,
        planned_bytes: started.plans.iter().map(MemoryPlan::total_bytes).collect(),
    }
}

fn scheduler_config(config: &Config, model: &ModelInfo, description: &ModelDescription) -> SchedulerConfig {
    SchedulerConfig {
        kv_blocks: description.kv_blocks,
        kv_block_tokens: description.kv_block_tokens,
        feature_blocks: description.feature_blocks,
        feature_block_tokens: description.feature_block_tokens,
        vision: VisionCosts {
            num_stages: description.vision_stages,
            attending_stages: description.attending_stages.clone(),
            attention_tokens: description.attention_tokens,
        },
        max_step_tokens: config.args.max_step_tokens,
        max_step_sequences: config.args.max_running,
        max_waiting: config.args.max_waiting,
        max_context_tokens: model.max_context_tokens,
        prefix_cache: !config.args.no_prefix_cache,
    }
}

/// Tokens of encoded media that are kept: unless told otherwise, those of any prompt.
fn feature_tokens(config: &Config, picture: &PictureProcessor) -> u64 {
    let largest = u64::from(max_image_tokens(config, picture));
    config
        .args
        .feature_tokens
        .unwrap_or(largest.max(config.max_context_tokens.into()).max(MIN_FEATURE_TOKENS))
}

/// A video is as long as its features have room for. One that nobody asks more of leaves an eighth of the context to words.
fn video_bounds(config: &Config, picture: &PictureProcessor, max_context_tokens: u32) -> TokenBounds {
    let context = u64::from(max_context_tokens);
    TokenBounds {
        video: feature_tokens(config, picture),
        temporal_patch: max_image_tokens(config, picture).into(),
        unasked: context - context / 8,
    }
}

fn media_preparer(
    config: &Config,
    picture: PictureProcessor,
    max_context_tokens: u32,
    ffmpeg: Option<Ffmpeg>,
) -> MediaPreparer {
    let limits = PictureLimits {
        max_file_bytes: MAX_REQUEST_BYTES,
        max_source_pixels: MAX_SOURCE_PIXELS,
        max_tokens: max_image_tokens(config, &picture).into(),
    };
    let decoder = VideoDecoder::new(vec![OWN_PROGRAM.into()], VideoLimits::default(), MAX_VIDEO_CPU_SECONDS);
    let bounds = video_bounds(config, &picture, max_context_tokens);
    let processor = VideoProcessor::of(&picture);
    MediaPreparer {
        pictures: PicturePreparer::new(picture, limits),
        videos: VideoPreparer::new(processor, decoder, bounds, MAX_VIDEO_DECODING).with_ffmpeg(ffmpeg),
    }
}

/// The line that says that the server is ready; its second word is the address.
fn ready_line(config: &Config, model: &ModelInfo, address: SocketAddr) -> String {
    let ModelInfo { name, device, dtype, max_context_tokens, .. } = model;
    let world_size = config.world_size();
    format!(
        "ready: {address} serves {name} on {world_size} {device} shard(s) in {dtype}, {max_context_tokens} tokens of context"
    )
}

/// The gRPC server: the public API, health and reflection.
async fn serve_api(
    connections: impl Stream<Item = io::Result<Connection>>,
    inference: Inference,
    budget: ByteBudget,
    health: HealthServer<impl Health>,
    stopped: oneshot::Receiver<()>,
) -> Result<(), tonic::transport::Error> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(lockstep_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // The shards' protocol is in the same descriptors and is nobody's to call.
            .with_service_name(INFERENCE_SERVICE)
            .with_service_name("grpc.health.v1.Health")
    };
    let reflection_v1 = reflection().build_v1().expect("the descriptors were made by this build");
    let reflection_v1alpha = reflection().build_v1alpha().expect("the descriptors were made by this build");
    let inference = InferenceServiceServer::new(inference)
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES);
    let router = tonic::transport::Server::builder()
        .initial_connection_window_size(RECEIVE_WINDOW_BYTES)
        .initial_stream_window_size(RECEIVE_WINDOW_BYTES)
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .http2_max_local_error_reset_streams(Some(MAX_ERROR_RESETS))
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .layer(TimeoutLayer)
        .add_service(reflection_v1.max_decoding_message_size(MAX_CONTROL_BYTES))
        .add_service(reflection_v1alpha.max_decoding_message_size(MAX_CONTROL_BYTES))
        .add_service(health.max_decoding_message_size(MAX_CONTROL_BYTES))
        .add_service(Metered::new(inference, budget));
    router
        .serve_with_incoming_shutdown(connections, async {
            let _ = stopped.await;
        })
        .await
}

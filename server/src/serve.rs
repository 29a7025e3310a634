//! Starting a server, serving, and stopping: files, shards, engine, gRPC.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use lockstep_proto::v1::inference_service_server::InferenceServiceServer;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;

use crate::api::service::Inference;
use crate::checkpoint::ModelFiles;
use crate::config::Config;
use crate::engine::Engine;
use crate::generation::Frontend;
use crate::limits::{DRAIN_TIMEOUT, MAX_REQUEST_BYTES, MAX_SOURCE_PIXELS, MAX_STREAMS_PER_CONNECTION};
use crate::media::{PictureLimits, PicturePreparer};
use crate::model_info::ModelInfo;
use crate::prompt::PromptEncoder;
use crate::scheduler::{Scheduler, SchedulerConfig};
use crate::shards::{Group, GroupConfig, Monitor, Started};

/// Serves until a signal asks to stop or the shards are lost.
///
/// # Errors
/// Whatever keeps the server from starting, or ends it.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    let mut server = Server::start(config, &mut |line| println!("{line}")).await?;
    tokio::select! {
        error = server.lost() => {
            server.stop().await.ok();
            return Err(error);
        }
        signal = stop_signal() => println!("stopping on {signal}: running requests may finish within {DRAIN_TIMEOUT:?}"),
    }
    server.stop().await
}

async fn stop_signal() -> &'static str {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        // Without handlers the signals' own default ends the process.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

/// A running server.
pub struct Server {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    api: JoinHandle<Result<(), tonic::transport::Error>>,
    engine: JoinHandle<anyhow::Result<()>>,
}

impl Server {
    /// Starts the shards, loads the checkpoint, and listens. `say` gets lines for a person: progress, plan, readiness.
    ///
    /// # Errors
    /// Every fault of the model folder at once, a port in use, memory that the host does not have, a shard that dies.
    pub async fn start(config: Config, say: &mut (dyn FnMut(&str) + Send)) -> anyhow::Result<Server> {
        let (files, listener) = open(&config).await?;
        let started = start_shards(&config, &files, say).await?;
        let monitor = started.group.monitor();
        let model = model_info(&config, &files, &started)?;
        let scheduler = Scheduler::new(scheduler_config(&config, &model, &started));
        let description = &started.description;
        let prompts = PromptEncoder::new(files.tokenizer, files.template, description.image_token_id)?;
        let pictures = PicturePreparer::new(files.picture, picture_limits(&config, model.max_image_tokens));
        let (engine, handle) = Engine::new(scheduler, started.group);
        let frontend = Frontend {
            prompts: Arc::new(prompts),
            pictures,
            defaults: files.generation,
            engine: handle,
            max_context_tokens: model.max_context_tokens,
        };
        let address = listener.local_addr()?;
        say(&ready_line(&config, &model, address));
        let (stop, stopped) = oneshot::channel();
        let api = tokio::spawn(serve_api(listener, frontend, model, monitor, stopped).await?);
        let engine = tokio::spawn(async { engine.run().await.map_err(anyhow::Error::from) });
        Ok(Server { address, stop, api, engine })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until the shards are lost, and says why.
    pub async fn lost(&mut self) -> anyhow::Error {
        match (&mut self.engine).await {
            Ok(Ok(())) => anyhow!("the engine stopped"),
            Ok(Err(error)) => error,
            Err(panic) => anyhow!("the engine panicked: {panic}"),
        }
    }

    /// Takes no more requests, lets the running ones finish within [`DRAIN_TIMEOUT`], and stops the shards.
    ///
    /// # Errors
    /// When the server ended badly.
    pub async fn stop(self) -> anyhow::Result<()> {
        let _ = self.stop.send(());
        let mut api = self.api;
        match tokio::time::timeout(DRAIN_TIMEOUT, &mut api).await {
            Ok(ended) => ended??,
            // Dropping the service drops the requests, and with them the last handles of the engine.
            Err(_) => api.abort(),
        }
        if !self.engine.is_finished() {
            self.engine.await??;
        }
        Ok(())
    }
}

/// Reads the model folder and takes the address, and reports what is wrong with either together.
async fn open(config: &Config) -> anyhow::Result<(ModelFiles, TcpListener)> {
    let folder = config.args.model.clone();
    let files = tokio::task::spawn_blocking(move || ModelFiles::open(&folder)).await?;
    let listener = TcpListener::bind(config.listen).await;
    let mut faults = Vec::new();
    let files = files.map_err(|error| faults.push(error.to_string())).ok();
    let listener = listener.map_err(|error| faults.push(format!("--listen {}: {error}", config.listen))).ok();
    // What only the shards can tell is worth telling now too: one more start would be needed to learn it.
    faults.extend(lockstep_shard::check_folder(&config.args.model));
    match (files, listener) {
        (Some(files), Some(listener)) if faults.is_empty() => Ok((files, listener)),
        _ => Err(anyhow!("{}", faults.join("\n"))),
    }
}

async fn start_shards(
    config: &Config,
    files: &ModelFiles,
    say: &mut (dyn FnMut(&str) + Send),
) -> anyhow::Result<Started> {
    let args = &config.args;
    let max_image_tokens = max_image_tokens(config, files);
    let merged = files.picture.merge_size * files.picture.merge_size;
    let group = GroupConfig {
        program: config.program.clone(),
        model_dir: args.model.clone(),
        world_size: args.world_size,
        device: args.device.name(),
        dtype: args.dtype.name(),
        threads: args.threads,
        max_context_tokens: config.max_context_tokens,
        max_step_tokens: args.max_step_tokens,
        max_media_patches: max_image_tokens * merged,
        max_step_sequences: args.max_running,
        kv_capacity_tokens: args.kv_tokens.unwrap_or(config.max_context_tokens.into()),
        feature_capacity_tokens: args.feature_tokens.unwrap_or(u64::from(max_image_tokens).max(MIN_FEATURE_TOKENS)),
        image_mean: files.picture.image_mean,
        image_std: files.picture.image_std,
    };
    Group::start(group, say).await.context("starting the shards")
}

/// Tokens of the largest picture.
fn max_image_tokens(config: &Config, files: &ModelFiles) -> u32 {
    let side = u64::from(files.picture.factor());
    let largest = (files.picture.max_pixels / (side * side)).max(1) as u32;
    config.args.max_image_tokens.unwrap_or(largest)
}

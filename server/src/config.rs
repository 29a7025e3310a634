//! What `lockstep serve` takes, checked once.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use lockstep_shard::service::ListenAddress;

use crate::limits::{
    DEFAULT_CONNECTIONS, DEFAULT_CONTEXT_TOKENS, DEFAULT_DRAIN_TIMEOUT, DEFAULT_GPU_MEMORY,
    DEFAULT_LIBRARY_BYTES, DEFAULT_MEDIA_BYTES, DEFAULT_SILENCE_TIMEOUT, MAX_WORLD_SIZE, MIN_SILENCE_TIMEOUT,
};
use crate::shards::{DType, DeviceKind, GpuConfig, Sums};

/// Serve a checkpoint.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// Folder of a Qwen2.5-VL checkpoint in the Hugging Face layout
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Number of tensor-parallel shards, 1 to 8
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub world_size: u32,
    /// Shards that run already, in the order of their ranks, each started as `lockstep shard --listen ADDRESS`: tcp:HOST:PORT or
    /// unix:/path. They load --model by that name, and are reached again after a fault; whoever runs them starts them again. Ranks
    /// on CPUs meet in memory: they must be on this host, of this user, and see this process. Nothing protects a tcp address: it must
    /// be out of reach of anybody else [default: the server starts its own]
    #[arg(
        long,
        value_name = "ADDRESS,...",
        value_delimiter = ',',
        conflicts_with_all = ["world_size", "shard_program"]
    )]
    pub shards: Vec<ListenAddress>,
    /// Where the shards compute
    #[arg(long, value_enum, default_value = "cpu")]
    pub device: DeviceKind,
    /// Element type of weights and of the cache of keys and values
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: DType,
    /// The GPU of each shard with --device cuda, as the driver counts them; 0,0 has two shards share one [default: 0, 1, ...]
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    pub gpus: Vec<u32>,
    /// Part of a GPU's memory that the shards on it may take together, with --device cuda. What weights and activations leave of it
    /// goes to the cache of keys and values, unless --kv-tokens says how many
    #[arg(long, value_name = "PART", default_value_t = DEFAULT_GPU_MEMORY)]
    pub gpu_memory: f64,
    /// What sums of activations over GPUs go through [default: peers; host where shards share a GPU]
    #[arg(long, value_enum)]
    pub sums: Option<Sums>,
    /// Compute on GPUs so that a request's tokens do not depend on what runs beside it, on how its prompt was cut, or on shards that
    /// died and started again, as on CPUs they never do. Slower
    #[arg(long)]
    pub repeatable: bool,
    /// On GPUs, give each step its kernels one by one, not as a graph that was kept of a step like it. Slower; to look for faults
    #[arg(long)]
    pub no_graphs: bool,
    /// Folder for kernels compiled for GPUs; `none`: they are compiled at each start [default: lockstep in $XDG_CACHE_HOME or in
    /// ~/.cache]
    #[arg(long, value_name = "DIR")]
    pub kernel_cache: Option<String>,
    /// Address to listen on; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8470")]
    pub listen: String,
    /// Name that clients see [default: the folder's name]
    #[arg(long)]
    pub name: Option<String>,
    /// The most tokens that a prompt and its answer have together [default: 32768, or less where the checkpoint or
    /// --kv-tokens allows less]
    #[arg(long, value_name = "TOKENS")]
    pub max_context_tokens: Option<u32>,
    /// Tokens that all running requests together can hold in the cache [default: one full context; on GPUs, all that --gpu-memory
    /// leaves room for]
    #[arg(long, value_name = "TOKENS")]
    pub kv_tokens: Option<u64>,
    /// Compute every prompt whole, also where an earlier request of the same client and cache salt began with the same text,
    /// pictures and videos
    #[arg(long)]
    pub no_prefix_cache: bool,
    /// The most tokens (28 x 28 pixels each) of one picture, or of two frames of a video; what would have more is refused
    /// [default: the checkpoint's max_pixels, within --feature-tokens]
    #[arg(long, value_name = "TOKENS")]
    pub max_image_tokens: Option<u32>,
    /// Tokens of encoded pictures and videos that are kept at a time, and so the most of all those in a request [default: a
    /// full context or the largest picture, at least 4096]
    #[arg(long, value_name = "TOKENS")]
    pub feature_tokens: Option<u64>,
    /// The most tokens that one step computes, of all requests together; at least --max-running. A token of a picture or
    /// video counts when it is encoded, and again in the prompt. Fewer: shorter gaps in running streams beside large prompts,
    /// pictures and videos
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub max_step_tokens: u32,
    /// The most answers that are written at a time; others wait. A request has one, or as many as its `n`
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub max_running: u32,
    /// The most answers that wait; beyond it RESOURCE_EXHAUSTED
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_waiting: u32,
    /// Bytes that the pictures and videos of all requests together hold, as sent and as pixels; beyond it RESOURCE_EXHAUSTED
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_MEDIA_BYTES)]
    pub max_media_bytes: u64,
    /// Bytes of uploaded pictures and videos that are kept for requests that name them by id
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_LIBRARY_BYTES)]
    pub library_bytes: u64,
    /// An ffmpeg that decodes videos of other codecs and containers than the server's own: HEVC, VP9, AV1, WebM,
    /// ... It runs confined, with the libraries of the system's folders [default: such videos are refused]
    #[arg(long, value_name = "PATH")]
    pub ffmpeg: Option<PathBuf>,
    /// The most connections at a time; one too many is closed at once
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CONNECTIONS)]
    pub max_connections: u32,
    /// How long running requests may go on after a first SIGTERM or SIGINT; new ones are refused at once
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "30")]
    pub drain_timeout: Duration,
    /// How long a shard may be silent while it has work, or not answer at all, before it is killed and started again,
    /// or reached again where it is one of --shards. What counts is that something moves, not how long a step takes
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "2")]
    pub silence_timeout: Duration,
    /// Threads of each shard [default: the processors divided by the shards]
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    /// What runs a shard, in place of this program: for a wrapper that chooses where or under what the shard runs, such as a
    /// script around numactl or strace -D. It gets `shard --listen ADDRESS --parent PID`, behind `--otlp URL` where that is
    /// set, and must become a shard of the same build (exec, not a child): a shard ends unless PID is its parent
    #[arg(long, value_name = "PATH")]
    pub shard_program: Option<PathBuf>,
}

impl ServeArgs {
    /// The settings that `lockstep serve --model FOLDER` has.
    pub fn new(model: &Path) -> Self {
        ServeArgs {
            model: model.to_owned(),
            world_size: 1,
            shards: vec![],
            device: DeviceKind::Cpu,
            gpus: vec![],
            gpu_memory: DEFAULT_GPU_MEMORY,
            sums: None,
            repeatable: false,
            no_graphs: false,
            kernel_cache: None,
            dtype: DType::Bf16,
            listen: lockstep_client::DEFAULT_SERVER.to_owned(),
            name: None,
            max_context_tokens: None,
            kv_tokens: None,
            no_prefix_cache: false,
            max_image_tokens: None,
            feature_tokens: None,
            max_step_tokens: 512,
            max_running: 64,
            max_waiting: 256,
            max_media_bytes: DEFAULT_MEDIA_BYTES,
            library_bytes: DEFAULT_LIBRARY_BYTES,
            ffmpeg: None,
            max_connections: DEFAULT_CONNECTIONS,
            drain_timeout: DEFAULT_DRAIN_TIMEOUT,
            silence_timeout: DEFAULT_SILENCE_TIMEOUT,
            threads: None,
            shard_program: None,
        }
    }
}

/// Checked settings of a server.
#[derive(Clone, Debug)]
pub struct Config {
    /// As given.
    pub args: ServeArgs,
    /// Where to listen.
    pub listen: SocketAddr,
    /// The program for other videos, as an absolute path without links.
    pub ffmpeg: Option<PathBuf>,
    /// What runs a shard, if not this program; likewise.
    pub shard_program: Option<PathBuf>,
    /// Name that clients see.
    pub name: String,
    /// Where shards send their parts of traces; nowhere unless told.
    pub otlp: Option<String>,
    /// The most tokens that a prompt and its answer have together, as asked for, or [`DEFAULT_CONTEXT_TOKENS`].
    pub max_context_tokens: u32,
}

impl Config {
    /// Checks the arguments.
    ///
    /// # Errors
    /// Every argument at fault, a line each.
    pub fn new(args: ServeArgs) -> anyhow::Result<Self> {
        let mut faults = Vec::new();
        if args.shards.len() > MAX_WORLD_SIZE as usize {
            faults.push(format!("--shards: there are {}, at most {MAX_WORLD_SIZE}", args.shards.len()));
        }
        for (index, address) in args.shards.iter().enumerate() {
            if args.shards[..index].contains(address) {
                faults.push(format!("--shards {address}: is there twice"));
            }
        }
        if !(1..=MAX_WORLD_SIZE).contains(&args.world_size) {
            faults.push(format!("--world-size {}: must be 1 to {MAX_WORLD_SIZE}", args.world_size));
        }
        gpu_faults(&args, &mut faults);
        if !args.model.is_dir() {
            faults.push(format!("--model {}: is not a folder", args.model.display()));
        }
        let listen =
            resolve(&args.listen).map_err(|why| faults.push(format!("--listen {}: {why}", args.listen))).ok();
        let mut program = |flag: &str, path: &Option<PathBuf>| {
            let path = path.as_deref()?;
            executable(path).map_err(|why| faults.push(format!("{flag} {}: {why}", path.display()))).ok()
        };
        let ffmpeg = program("--ffmpeg", &args.ffmpeg);
        let shard_program = program("--shard-program", &args.shard_program);
        for (flag, value) in [
            ("--max-context-tokens", args.max_context_tokens.map(u64::from)),
            ("--kv-tokens", args.kv_tokens),
            ("--max-image-tokens", args.max_image_tokens.map(u64::from)),
            ("--feature-tokens", args.feature_tokens),
            ("--max-step-tokens", Some(args.max_step_tokens.into())),
            ("--max-running", Some(args.max_running.into())),
            ("--max-waiting", Some(args.max_waiting.into())),
            ("--max-media-bytes", Some(args.max_media_bytes)),
            ("--library-bytes", Some(args.library_bytes)),
            ("--max-connections", Some(args.max_connections.into())),
            ("--threads", args.threads.map(u64::from)),
        ] {
            if value == Some(0) {
                faults.push(format!("{flag} 0: must be at least 1"));
            }
        }
        if args.silence_timeout < MIN_SILENCE_TIMEOUT {
            let given = args.silence_timeout.as_secs_f64();
            let least = MIN_SILENCE_TIMEOUT.as_secs_f64();
            faults.push(format!("--silence-timeout {given}: must be at least {least}"));
        }
        if args.max_step_tokens < args.max_running {
            faults.push("--max-step-tokens: must be at least --max-running, one token for each".to_owned());
        }
        let (Some(listen), true) = (listen, faults.is_empty()) else {
            anyhow::bail!("{}", faults.join("\n"));
        };
        let name = args.name.clone().unwrap_or_else(|| folder_name(&args.model));
        let max_context_tokens = args.max_context_tokens.unwrap_or(DEFAULT_CONTEXT_TOKENS);
        Ok(Config { args, listen, ffmpeg, shard_program, name, otlp: None, max_context_tokens })
    }

    /// Number of shards.
    pub fn world_size(&self) -> u32 {
        let elsewhere = self.args.shards.len() as u32;
        if elsewhere > 0 { elsewhere } else { self.args.world_size }
    }

    /// The GPUs of the shards, where these compute on GPUs.
    pub fn gpu(&self) -> Option<GpuConfig> {
        let ServeArgs { device, gpus, gpu_memory, sums, repeatable, no_graphs, kernel_cache, .. } =
            &self.args;
        if *device == DeviceKind::Cpu {
            return None;
        }
        let ordinals = if gpus.is_empty() { (0..self.world_size()).collect() } else { gpus.clone() };
        // Kernels of shards that share a GPU run at the same time only under MPS, and otherwise wait for whole turns of one another.
        let default = if are_distinct(&ordinals) { Sums::Peers } else { Sums::Host };
        Some(GpuConfig {
            ordinals,
            memory: *gpu_memory,
            sums: sums.unwrap_or(default),
            repeatable: *repeatable,
            no_graphs: *no_graphs,
            kernel_cache: kernel_cache.clone().unwrap_or_default(),
        })
    }
}

/// Ranks over which NCCL's sums are the same bits whatever else is in them: two numbers have one sum. Of more, the order in which
/// an element's addends are added depends on where in the buffer it is.
const MOST_REPEATABLE_NCCL: usize = 2;

/// What is wrong with what is said of GPUs.
fn gpu_faults(args: &ServeArgs, faults: &mut Vec<String>) {
    if !(args.gpu_memory > 0.0 && args.gpu_memory <= 1.0) {
        faults.push(format!("--gpu-memory {}: must be above 0 and at most 1", args.gpu_memory));
    }
    if args.device == DeviceKind::Cpu {
        for (flag, is_there) in [
            ("--gpus", !args.gpus.is_empty()),
            ("--sums", args.sums.is_some()),
            ("--kernel-cache", args.kernel_cache.is_some()),
            ("--no-graphs", args.no_graphs),
        ] {
            if is_there {
                faults.push(format!("{flag}: is for --device cuda"));
            }
        }
        return;
    }
    if args.dtype == DType::F32 {
        faults.push("--dtype f32: GPUs compute in bf16".to_owned());
    }
    let shards = if args.shards.is_empty() { args.world_size as usize } else { args.shards.len() };
    if !args.gpus.is_empty() && args.gpus.len() != shards {
        faults.push(format!("--gpus: names {}, there are {shards} shards", args.gpus.len()));
    }
    if args.sums == Some(Sums::Nccl) && !are_distinct(&args.gpus) {
        faults.push("--sums nccl: shards share a GPU, which NCCL refuses".to_owned());
    }
    if args.sums == Some(Sums::Nccl) && args.repeatable && shards > MOST_REPEATABLE_NCCL {
        faults.push(format!(
            "--sums nccl: the order in which NCCL adds depends on how many rows a step has; with --repeatable it is for up to \
             {MOST_REPEATABLE_NCCL} shards"
        ));
    }
}

fn are_distinct(ordinals: &[u32]) -> bool {
    ordinals.iter().enumerate().all(|(i, ordinal)| !ordinals[..i].contains(ordinal))
}

/// Seconds as a person writes them: `2`, `0.5`.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "is not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

fn resolve(listen: &str) -> Result<SocketAddr, String> {
    use std::net::ToSocketAddrs;
    let mut addresses = listen.to_socket_addrs().map_err(|error| error.to_string())?;
    addresses.next().ok_or_else(|| "names no address".to_owned())
}

/// Where a program is, if somebody may run it.
fn executable(path: &Path) -> Result<PathBuf, String> {
    let path = path.canonicalize().map_err(|error| error.to_string())?;
    let facts = path.metadata().map_err(|error| error.to_string())?;
    if !facts.is_file() || facts.permissions().mode() & 0o111 == 0 {
        return Err("is not a program".into());
    }
    Ok(path)
}

fn folder_name(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    path.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

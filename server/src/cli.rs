//! The one binary's verbs.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::{Config, ServeArgs};
use crate::demo::DemoArgs;
use crate::media::video::ConfineArgs;
use crate::telemetry::{Service, Telemetry};

/// Low-latency, tensor-parallel serving of Qwen2.5-VL over gRPC.
#[derive(Parser)]
#[command(name = "lockstep", version)]
struct Cli {
    /// What to log on standard error: off, error, warn, info, debug, trace, or a filter such as lockstep=debug
    #[arg(long, global = true, value_name = "FILTER", default_value = "warn")]
    log: String,
    /// Where `serve` sends traces of requests, and metrics, over OTLP (gRPC, without TLS), for example http://localhost:4317
    /// [default: nowhere]
    #[arg(long, global = true, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otlp: Option<String>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Serve a checkpoint: start its shards, load it, and answer over gRPC
    ///
    /// What is wrong with the flags or with the checkpoint's files is said before anything is loaded. When requests are
    /// taken, a line begins with "ready:" and the address. SIGTERM or SIGINT stops the server: requests that it has may
    /// finish within --drain-timeout; a second signal stops it at once.
    Serve(Box<ServeArgs>),
    /// Run one shard; `serve` starts these by itself, unless it is given --shards
    Shard(lockstep_shard::ShardArgs),
    /// Decode the video on standard input; `serve` starts these by itself
    #[command(hide = true)]
    Decode,
    /// Give up what decoders do not take, and become another program; `serve` starts these by itself
    #[command(hide = true)]
    Confine(ConfineArgs),
    Ask(Box<lockstep_client::AskArgs>),
    Bench(Box<lockstep_client::BenchArgs>),
    /// See the whole system work, on a small checkpoint that answers questions about shapes
    Demo(DemoArgs),
}

/// Runs the verb that the command line names.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = match EnvFilter::try_new(&cli.log) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("lockstep: --log {}: {error}", cli.log);
            return ExitCode::from(2);
        }
    };
    match run(cli.verb, filter, cli.otlp) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lockstep: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb, log: EnvFilter, otlp: Option<String>) -> anyhow::Result<()> {
    // Their memory is bounded: they take no threads.
    match verb {
        Verb::Decode => return Ok(crate::media::video::decode_from_stdin()?),
        Verb::Confine(args) => return Ok(crate::media::video::confine_and_become(&args)?),
        _ => {}
    }
    let service = match verb {
        Verb::Shard(_) => Service::Shard,
        _ => Service::Server,
    };
    let mut runtime = match verb {
        // A shard's cores belong to its compute threads; one thread is enough for its messages.
        Verb::Shard(_) => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime.enable_all().build()?;
    let result = runtime.block_on(async {
        // Clients have no requests of their own to trace; the standard variable may well be set for others.
        let otlp = otlp.filter(|url| !url.is_empty() && matches!(verb, Verb::Serve(_) | Verb::Shard(_)));
        let _telemetry = Telemetry::start(log, otlp.as_deref(), service)?;
        match verb {
            Verb::Serve(args) => crate::serve::serve(Config { otlp, ..Config::new(*args)? }).await,
            Verb::Shard(args) => lockstep_shard::serve(args).await,
            Verb::Ask(args) => lockstep_client::ask(*args).await,
            Verb::Bench(args) => lockstep_client::bench(*args).await,
            Verb::Demo(args) => crate::demo::demo(args).await,
            Verb::Decode | Verb::Confine(_) => unreachable!("taken above"),
        }
    });
    // A picture that is still being decoded is nobody's any more.
    runtime.shutdown_background();
    result
}

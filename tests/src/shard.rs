//! Shards of the tests' own: the real program around a model that is not quite the real one.

use std::sync::Arc;

use clap::Parser;
use lockstep_shard::ShardArgs;
use lockstep_shard::entry::serve_with;
use lockstep_shard::service::worker::Load;

/// What `lockstep serve --shard-program` starts a shard with.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    Shard(ShardArgs),
}

/// What this program was started with.
pub fn arguments() -> ShardArgs {
    let Verb::Shard(arguments) = Arguments::parse().verb;
    arguments
}

/// Runs a shard that loads with `load`, until the server ends it.
///
/// # Errors
/// The server is gone, or the address cannot be listened on.
pub fn main(load: Arc<Load>) -> anyhow::Result<()> {
    let arguments = arguments();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve_with(arguments, load))
}

//! Shards of the tests' own: the program around a model that is not quite the real one.

use std::sync::Arc;

use clap::Parser;
use lockstep_proto::shard::shard_service_server::ShardServiceServer;
use lockstep_shard::service::worker::Load;
use lockstep_shard::service::{ListenAddress, Shard};
use lockstep_shard::{ShardArgs, process};
use tokio::net::UnixListener;
use tonic::transport::Server;

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

/// Runs a shard that loads with `load`, until the server ends it.
///
/// # Errors
/// The server is gone, or the address cannot be listened on.
pub fn main(load: Arc<Load>) -> anyhow::Result<()> {
    let Verb::Shard(arguments) = Arguments::parse().verb;
    process::end_on_panic();
    if let Some(parent) = arguments.parent {
        process::die_with_parent(parent)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let ListenAddress::Unix(path) = &arguments.listen else { anyhow::bail!("a socket of this host") };
        let listener = UnixListener::bind(path)?;
        let incoming = futures::stream::unfold(listener, |listener| async move {
            let stream = listener.accept().await.map(|(stream, _)| stream);
            Some((stream, listener))
        });
        let service = ShardServiceServer::new(Shard::new(load)).max_decoding_message_size(256 << 20);
        Ok(Server::builder().add_service(service).serve_with_incoming(incoming).await?)
    })
}

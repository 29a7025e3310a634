//! The verb `shard`: one rank as a process.

use std::{fs, io, os::unix::fs::FileTypeExt, path::Path, sync::Arc};

use anyhow::Context;
use clap::Args;
use lockstep_proto::shard::shard_service_server::ShardServiceServer;
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::Server;

use crate::{
    process,
    service::{ListenAddress, Shard, load, worker::Load},
};

/// The largest message that a shard takes: a step that admits many long sequences.
const MAX_MESSAGE_BYTES: usize = 256 << 20;

/// Arguments of `lockstep shard`.
#[derive(Clone, Debug, Args)]
pub struct ShardArgs {
    /// Where to listen: unix:/path or tcp:HOST:PORT. A tcp address has no lock: whoever reaches it can do with the shard, and with the
    /// files of its user, what a server can.
    #[arg(long, value_name = "ADDRESS")]
    pub listen: ListenAddress,
    /// Process that started this one, and that it dies with [default: it lives on its own].
    #[arg(long, value_name = "PID")]
    pub parent: Option<u32>,
}

/// What server and shard must have in common: the version, and a hash of this crate's sources and of the protocol.
pub fn build_id() -> &'static str {
    concat!(env!("CARGO_PKG_VERSION"), "+", env!("LOCKSTEP_BUILD_HASH"))
}

/// Serves as one rank until the process is ended. Loading and steps are asked for over the connection.
///
/// # Errors
/// The parent is gone, or the address cannot be listened on.
pub async fn serve(args: ShardArgs) -> anyhow::Result<()> {
    serve_with(args, Arc::new(load::load)).await
}

/// The same with another way to load, such as one of [`load::load_with`].
///
/// # Errors
/// As [`serve`].
pub async fn serve_with(args: ShardArgs, load: Arc<Load>) -> anyhow::Result<()> {
    process::end_on_panic();
    if let Some(parent) = args.parent {
        process::die_with_parent(parent)?;
        if let Err(error) = process::be_killed_first() {
            tracing::warn!(%error, "cannot ask to be the out-of-memory killer's first choice");
        }
        ignore_interrupts();
    }
    let service = ShardServiceServer::new(Shard::new(load))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let router = Server::builder().tcp_nodelay(true).add_service(service);
    tracing::info!(address = %args.listen, build_id = build_id(), "shard listens");
    match &args.listen {
        ListenAddress::Unix(path) => {
            let listener = bind(path).with_context(|| format!("--listen {}", args.listen))?;
            router.serve_with_incoming(UnixListenerStream::new(listener)).await?;
        }
        ListenAddress::Tcp(address) => {
            let listener =
                TcpListener::bind(address).await.with_context(|| format!("--listen {}", args.listen))?;
            router.serve_with_incoming(TcpListenerStream::new(listener)).await?;
        }
    }
    Ok(())
}

/// Listens at a socket, also where a process that has ended has left one.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let bound = UnixListener::bind(path);
    let in_use = bound.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse);
    let is_left = || {
        let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
        let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        is_socket && std::os::unix::net::UnixStream::connect(path).is_err_and(refused)
    };
    if !in_use || !is_left() {
        return bound;
    }
    fs::remove_file(path)?;
    UnixListener::bind(path)
}

/// Leaves it to the parent to end this process: a terminal sends Ctrl-C to both, and the parent has requests to finish.
fn ignore_interrupts() {
    tokio::spawn(async { while tokio::signal::ctrl_c().await.is_ok() {} });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_that_was_left_is_taken_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.sock");
        let first = bind(&path).unwrap();
        assert!(bind(&path).is_err(), "somebody listens there");
        drop(first);
        assert!(path.exists());
        drop(bind(&path).unwrap());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "a file").unwrap();
        assert!(bind(&path).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "a file");
    }
}

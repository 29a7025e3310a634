//! The connection to one rank.

use std::{
    future::{Future, poll_fn},
    io,
    path::PathBuf,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};
use hyper_util::rt::TokioIo;
use lockstep_proto::shard::{self as pb, load_response::Event, shard_service_client::ShardServiceClient};
use lockstep_shard::service::ListenAddress;
use tokio::{
    net::{TcpStream, UnixStream},
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};
use tower::service_fn;

use super::{
    error::{RankError, RankFault},
    meeting::Meeting,
    process::{Exit, ExitWatch, ended},
    types::{LoadProgress, Loaded, MemoryPlan, ResidentMemory},
};
use crate::limits::{GRACE, LISTEN_TIMEOUT, MEMORY_TIMEOUT, OPEN_TIMEOUT};

/// The largest message to or from a shard: a step that admits many long sequences.
const MAX_MESSAGE_BYTES: usize = 256 << 20;
/// Bytes of pixels in one message.
const PIXEL_CHUNK_BYTES: usize = 1 << 20;
/// Steps on their way to a rank: the one that runs, and the next.
const QUEUED_STEPS: usize = 2;
const LISTEN_POLL: Duration = Duration::from_millis(10);

/// Where a rank listens, and whether it lives.
#[derive(Clone)]
pub(super) struct Member {
    pub rank: u32,
    /// Who asks.
    pub group: u64,
    pub address: ListenAddress,
    pub exit: ExitWatch,
}

/// One rank, connected. Clones share the connection.
#[derive(Clone)]
pub(super) struct Rank {
    number: u32,
    group: u64,
    exit: ExitWatch,
    client: ShardServiceClient<Channel>,
}

/// The stream of steps to one rank, and of its answers.
pub(super) struct Steps {
    rank: u32,
    requests: mpsc::Sender<pb::RunRequest>,
    answers: Streaming<pb::RunResponse>,
}

impl Rank {
    /// Connects, as soon as the rank listens at its address.
    pub async fn connect(member: Member) -> Result<Self, RankError> {
        let Member { rank: number, group, address, exit } = member;
        let connecting = async {
            loop {
                match open_channel(&address).await {
                    Ok(channel) => return channel,
                    Err(_) => sleep(LISTEN_POLL).await,
                }
            }
        };
        let channel = tokio::select! {
            connected = timeout(LISTEN_TIMEOUT, connecting) => connected.map_err(|_| {
                let words = format!("does not listen at {address} after {LISTEN_TIMEOUT:?}");
                RankError { rank: number, fault: RankFault::Unreachable(words) }
            })?,
            exit = ended(exit.clone()) => return Err(died(number, exit)),
        };
        let client = ShardServiceClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { number, group, exit, client })
    }

    /// Loads the model.
    pub async fn load(
        &self,
        request: pb::LoadRequest,
        progress: &watch::Sender<Vec<LoadProgress>>,
    ) -> Result<Loaded, RankError> {
        let mut client = self.client.clone();
        let rank = self.number as usize;
        self.unless_it_dies(async {
            let mut events = client.load(request).await?.into_inner();
            let mut plan = None;
            while let Some(message) = events.message().await? {
                match message.event {
                    Some(Event::Plan(told)) => plan = Some(MemoryPlan::from(told)),
                    Some(Event::Progress(pb::LoadProgress { loaded_bytes, total_bytes })) => {
                        let told = LoadProgress { loaded_bytes, total_bytes };
                        progress.send_modify(|ranks| ranks[rank] = told);
                    }
                    Some(Event::Description(told)) => {
                        let plan = plan.ok_or_else(|| Status::internal("told no memory plan"))?;
                        let weights_checksum = told.weights_checksum;
                        return Ok(Loaded { plan, description: told.into(), weights_checksum });
                    }
                    None => return Err(Status::internal("told an event of an unknown kind")),
                }
            }
            Err(Status::internal("ended loading without telling what the model is"))
        })
        .await
    }

    /// Makes the loaded rank part of a new epoch, and returns when it has met the others.
    pub async fn regroup(&self, meeting: &Meeting) -> Result<(), RankError> {
        let mut client = self.client.clone();
        let Meeting { group, epoch, path, .. } = meeting;
        let request = pb::RegroupRequest { group: *group, epoch: *epoch, collective_path: path.clone() };
        self.unless_it_dies(async { client.regroup(request).await.map(|_| ()) }).await
    }

    /// How far its work is; none where it does not say within `patience`.
    pub async fn progress(&self, patience: Duration) -> Option<pb::GetProgressResponse> {
        let mut client = self.client.clone();
        let answer =
            timeout(patience, client.get_progress(pb::GetProgressRequest { group: self.group })).await;
        Some(answer.ok()?.ok()?.into_inner())
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Whether its process has ended.
    pub fn is_dead(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Opens the stream of steps.
    pub async fn steps(&self) -> Result<Steps, RankError> {
        let mut client = self.client.clone();
        let (requests, queue) = mpsc::channel(QUEUED_STEPS);
        let opening =
            self.unless_it_dies(async { Ok(client.run(ReceiverStream::new(queue)).await?.into_inner()) });
        let answers = timeout(OPEN_TIMEOUT, opening)
            .await
            .unwrap_or(Err(RankError { rank: self.number, fault: RankFault::Silent(OPEN_TIMEOUT) }))?;
        Ok(Steps { rank: self.number, requests, answers })
    }

    /// Places pixels, where the header names no file that has them. The header's group is this rank's.
    pub async fn put_media(&self, header: pb::MediaHeader, pixels: Bytes) -> Result<(), RankError> {
        let mut client = self.client.clone();
        let header = pb::MediaHeader { group: self.group, ..header };
        let header = pb::put_media_request::Piece::Header(header);
        let chunks = (0..pixels.len()).step_by(PIXEL_CHUNK_BYTES).map(move |start| {
            let end = (start + PIXEL_CHUNK_BYTES).min(pixels.len());
            pb::put_media_request::Piece::Chunk(pixels.slice(start..end))
        });
        let pieces = std::iter::once(header).chain(chunks);
        let messages = pieces.map(|piece| pb::PutMediaRequest { piece: Some(piece) });
        let messages = tokio_stream::iter(messages);
        self.unless_it_dies(async { client.put_media(messages).await.map(|_| ()) }).await
    }

    /// Asks for the memory that the rank holds. Errors where it does not say within [`MEMORY_TIMEOUT`].
    pub async fn memory(&self) -> Result<ResidentMemory, RankError> {
        let mut client = self.client.clone();
        let asking = self.unless_it_dies(async {
            Ok(client.get_memory(pb::GetMemoryRequest {}).await?.into_inner().into())
        });
        let silent = RankError { rank: self.number, fault: RankFault::Silent(MEMORY_TIMEOUT) };
        timeout(MEMORY_TIMEOUT, asking).await.unwrap_or(Err(silent))
    }

    /// Returns when the rank's process has ended.
    pub async fn death(&self) -> RankError {
        died(self.number, ended(self.exit.clone()).await)
    }

    async fn unless_it_dies<T>(&self, work: impl Future<Output = Result<T, Status>>) -> Result<T, RankError> {
        unless_it_dies(self.number, &self.exit, work).await
    }
}

impl Steps {
    /// Sends a step. A rank that takes no more of them says why on the stream of answers.
    pub fn send(&self, request: pb::RunRequest) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.requests.try_send(request) {
            unreachable!("no more than {QUEUED_STEPS} steps are in flight");
        }
    }

    /// The next answer.
    pub fn poll_answer(&mut self, context: &mut Context<'_>) -> Poll<Result<pb::RunResponse, RankError>> {
        let answer = ready!(self.answers.poll_next_unpin(context));
        let answer = answer.unwrap_or_else(|| Err(Status::unavailable("ended the stream of answers")));
        Poll::Ready(answer.map_err(|status| answered(self.rank, &status)))
    }

    /// Passes over answers until there is an error.
    pub async fn error(&mut self) -> RankError {
        loop {
            if let Err(error) = poll_fn(|context| self.poll_answer(context)).await {
                return error;
            }
        }
    }
}

/// A connection to what listens at an address.
async fn open_channel(address: &ListenAddress) -> Result<Channel, tonic::transport::Error> {
    // The endpoint's own address is for the protocol's headers only: the connectors know the way.
    let endpoint = Endpoint::from_static("http://shard");
    match address {
        ListenAddress::Unix(socket) => {
            let connect = |socket: PathBuf| async { UnixStream::connect(socket).await.map(TokioIo::new) };
            let socket = socket.clone();
            endpoint.connect_with_connector(service_fn(move |_| connect(socket.clone()))).await
        }
        ListenAddress::Tcp(address) => {
            let address = address.clone();
            endpoint.connect_with_connector(service_fn(move |_| connect_tcp(address.clone()))).await
        }
    }
}

async fn connect_tcp(address: String) -> io::Result<TokioIo<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(TokioIo::new(stream))
}

fn answered(rank: u32, status: &Status) -> RankError {
    let fault = RankFault::Answered { code: status.code(), words: status.message().into() };
    RankError { rank, fault }
}

fn died(rank: u32, exit: Exit) -> RankError {
    RankError { rank, fault: RankFault::Died { status: exit.status, last_words: exit.last_words } }
}

/// Does `work` with a rank. The end of its process ends the work; and a broken connection, which is often seen first, is
/// told as what it is.
async fn unless_it_dies<T>(
    rank: u32,
    exit: &ExitWatch,
    work: impl Future<Output = Result<T, Status>>,
) -> Result<T, RankError> {
    let status = tokio::select! {
        done = work => match done {
            Ok(done) => return Ok(done),
            Err(status) => status,
        },
        exit = ended(exit.clone()) => return Err(died(rank, exit)),
    };
    match timeout(GRACE, ended(exit.clone())).await {
        Ok(exit) => Err(died(rank, exit)),
        Err(_) => Err(answered(rank, &status)),
    }
}

/// Waits for all ranks, and gives their results in rank order. After the first failure the others have a short time to
/// fail too: one that waits for a dead one may never answer.
///
/// # Errors
/// Of all ranks that failed.
pub(super) async fn all<T>(
    work: impl IntoIterator<Item = impl Future<Output = Result<T, RankError>>>,
) -> Result<Vec<T>, Vec<RankError>> {
    let numbered = work.into_iter().enumerate();
    let mut pending: FuturesUnordered<_> =
        numbered.map(|(rank, work)| async move { (rank, work.await) }).collect();
    let mut done = vec![];
    let mut errors = vec![];
    let mut deadline = None;
    loop {
        let next = match deadline {
            None => pending.next().await,
            Some(deadline) => tokio::select! {
                next = pending.next() => next,
                () = sleep_until(deadline) => None,
            },
        };
        match next {
            Some((rank, Ok(result))) => done.push((rank, result)),
            Some((_, Err(error))) => {
                errors.push(error);
                deadline.get_or_insert_with(|| Instant::now() + 2 * GRACE);
            }
            None => break,
        }
    }
    if !errors.is_empty() {
        errors.sort_by_key(|error| error.rank);
        return Err(errors);
    }
    done.sort_by_key(|(rank, _)| *rank);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

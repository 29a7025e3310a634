//! A stream that runs beside what a test does to the server, and must not notice.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_proto::v1::stream_generate_response::Event;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::hostile::ask;
use crate::server::Server;

/// A client over a connection of its own.
pub type Service = InferenceServiceClient<Channel>;

/// Bytes of the largest message that a server takes.
pub const MAX_REQUEST_BYTES: usize = 64 << 20;

/// Connects to a server, and sends it also what is too long for it.
///
/// # Errors
/// When nobody is there.
pub async fn connect(server: &Server) -> anyhow::Result<Service> {
    let channel = Channel::from_shared(format!("http://{}", server.address()))?;
    let service = Service::new(channel.connect().await?);
    Ok(service.max_encoding_message_size(2 * MAX_REQUEST_BYTES).max_decoding_message_size(MAX_REQUEST_BYTES))
}

/// A request whose answer does not end by itself, and is drawn with a seed.
pub fn endless() -> v1::StreamGenerateRequest {
    let mut request = ask(vec![v1::part::Part::Text("Tell me everything.".to_owned())]);
    request.logprobs = Some(0);
    request.sampling = Some(v1::Sampling { temperature: Some(0.8), seed: Some(11), ..Default::default() });
    request.stopping = Some(v1::Stopping { ignore_eos: Some(true), ..Default::default() });
    v1::StreamGenerateRequest { request: Some(request) }
}

/// A token and the bits of its log-probability.
pub type Token = (u32, u32);

/// The endless stream, running: again and again, since there is an end to every context.
pub struct Beside {
    done: watch::Sender<bool>,
    streamed: JoinHandle<anyhow::Result<Streamed>>,
    count: Arc<AtomicU64>,
}

impl Beside {
    /// Begins the stream and waits for its first tokens.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn begin(mut service: Service) -> anyhow::Result<Self> {
        let mut stream = service.stream_generate(endless()).await?.into_inner();
        let (mut tokens, mut longest, mut total) = (Vec::new(), Vec::new(), 0);
        while tokens.is_empty() {
            tokens.extend(next(&mut stream).await?.unwrap_or_default());
        }
        let (done, is_done) = watch::channel(false);
        let count = Arc::new(AtomicU64::new(0));
        let counted = count.clone();
        let streamed = tokio::spawn(async move {
            while !*is_done.borrow() {
                if let Some(more) = next(&mut stream).await? {
                    counted.fetch_add(more.len() as u64, Ordering::Relaxed);
                    tokens.extend(more);
                    continue;
                }
                total += tokens.len();
                longest = agreed(longest, std::mem::take(&mut tokens))?;
                stream = service.stream_generate(endless()).await?.into_inner();
            }
            total += tokens.len();
            Ok(Streamed { tokens: agreed(longest, tokens)?, total })
        });
        Ok(Self { done, streamed, count })
    }

    /// How many tokens have come since it began.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Ends the stream, and tells what came.
    ///
    /// # Errors
    /// When it broke, or was another stream the second time.
    pub async fn end(self) -> anyhow::Result<Streamed> {
        // Nobody listens any more if the stream has ended, which its task then tells.
        let _ = self.done.send(true);
        self.streamed.await?
    }
}

/// What came in the endless stream.
pub struct Streamed {
    /// Its tokens, as far as it went when it went furthest.
    pub tokens: Vec<Token>,
    /// Tokens of all times that it went.
    pub total: usize,
}

/// The longer of two runs of one stream.
fn agreed(one: Vec<Token>, other: Vec<Token>) -> anyhow::Result<Vec<Token>> {
    let (short, long) = if one.len() < other.len() { (one, other) } else { (other, one) };
    anyhow::ensure!(
        long.starts_with(&short),
        "the stream changed: {} and {} tokens",
        short.len(),
        long.len()
    );
    Ok(long)
}

/// The first `count` tokens of the endless stream.
///
/// # Errors
/// When it ends before.
pub async fn first(mut service: Service, count: usize) -> anyhow::Result<Vec<Token>> {
    let mut stream = service.stream_generate(endless()).await?.into_inner();
    let mut tokens = Vec::new();
    while tokens.len() < count {
        tokens.extend(next(&mut stream).await?.ok_or_else(|| anyhow::anyhow!("the context is full"))?);
    }
    tokens.truncate(count);
    Ok(tokens)
}

/// The tokens of the next message; none where the context is full.
async fn next(stream: &mut Streaming<v1::StreamGenerateResponse>) -> anyhow::Result<Option<Vec<Token>>> {
    let event = stream.message().await?.and_then(|message| message.event);
    match event.ok_or_else(|| anyhow::anyhow!("the stream ended"))? {
        Event::Delta(delta) => {
            let chosen = delta.logprobs.iter().map(|position| position.chosen.as_ref());
            let logprobs = chosen.map(|chosen| chosen.map_or(0.0, |chosen| chosen.logprob).to_bits());
            Ok(Some(delta.token_ids.iter().copied().zip(logprobs).collect()))
        }
        Event::Started(_) => Ok(Some(Vec::new())),
        Event::Finished(finished) if finished.reason() == v1::FinishReason::Length => Ok(Some(Vec::new())),
        Event::Completed(_) => Ok(None),
        other => anyhow::bail!("the stream ended: {other:?}"),
    }
}

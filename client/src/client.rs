//! The connection to a server.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use lockstep_proto::v1::{self, inference_service_client::InferenceServiceClient};
use tonic::{
    Code, Response, Status,
    transport::{Channel, Endpoint},
};

use crate::{Answer, AnswerStream, Error, Media, Model, Refusal, Request, error::innermost};

/// Bytes that a server may have sent over a connection before they are read. Many streams send many small pieces, and the HTTP/2
/// library closes a connection on which some thousands of them wait unread; how many may wait follows from this.
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;

/// A connection to a Lockstep server. Cheap to clone; clones share the connection.
#[derive(Debug, Clone)]
pub struct Client {
    service: InferenceServiceClient<Channel>,
    timeout: Option<Duration>,
    max_message_bytes: usize,
}

/// How to connect.
#[derive(Debug, Clone)]
pub struct ClientBuilder {
    connect_timeout: Duration,
    timeout: Option<Duration>,
    max_message_bytes: usize,
}

/// What a conversation would cost.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenCount {
    /// Tokens of the prompt, pictures and videos included.
    pub prompt_tokens: u32,
    /// One for each picture and video, in order.
    pub media: Vec<Media>,
    /// The most tokens that a prompt and its answer may have together.
    pub max_context_tokens: u32,
}

impl Default for ClientBuilder {
    fn default() -> Self {
        ClientBuilder {
            connect_timeout: Duration::from_secs(5),
            timeout: None,
            // gRPC's usual 4 MiB is less than one photograph from a present-day camera.
            max_message_bytes: 64 << 20,
        }
    }
}

impl ClientBuilder {
    /// How long to try to connect. Default: 5 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// The time that every request may take, unless it sets its own. Default: no bound.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// The largest message to send or to take, in bytes. Default: 64 MiB.
    pub fn max_message_bytes(mut self, bytes: usize) -> Self {
        self.max_message_bytes = bytes;
        self
    }

    /// Connects to `address`, of the form `host:port`.
    pub async fn connect(self, address: &str) -> Result<Client, Error> {
        let refuse = |reason: String| Error::Address { address: address.to_owned(), reason };
        let endpoint = endpoint(address).map_err(refuse)?;
        let endpoint = endpoint
            .connect_timeout(self.connect_timeout)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(20))
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        // Not tonic's own bound, since name resolution is outside of that.
        let connected = tokio::time::timeout(self.connect_timeout, endpoint.connect()).await;
        let unreachable = |reason: String| Error::Connect { address: address.to_owned(), reason };
        let channel = connected
            .map_err(|_| unreachable(format!("no answer within {:?}", self.connect_timeout)))?
            .map_err(|error| unreachable(innermost(&error).to_string()))?;
        let service = InferenceServiceClient::new(channel).max_decoding_message_size(self.max_message_bytes);
        Ok(Client { service, timeout: self.timeout, max_message_bytes: self.max_message_bytes })
    }
}

fn endpoint(address: &str) -> Result<Endpoint, String> {
    if address.contains('/') || address.contains('@') {
        return Err("it has a scheme, a path or a user".to_owned());
    }
    let (host, port) = address.rsplit_once(':').ok_or("it has no port")?;
    if host.is_empty() {
        return Err("it has no host".to_owned());
    }
    if port.parse::<u16>().is_err() {
        return Err(format!("{port:?} is not a port"));
    }
    Endpoint::from_shared(format!("http://{address}")).map_err(|error| innermost(&error).to_string())
}

impl Client {
    /// Connects to `address`, of the form `host:port`, with the defaults of [`ClientBuilder`].
    pub async fn connect(address: &str) -> Result<Self, Error> {
        Client::builder().connect(address).await
    }

    /// Settings for a connection.
    pub fn builder() -> ClientBuilder {
        ClientBuilder::default()
    }

    /// Asks, and returns when the answer is complete.
    pub async fn generate(&self, request: &Request) -> Result<Answer, Error> {
        let deadline = self.deadline(request);
        let call = || async {
            let mut service = self.service.clone();
            bounded(service.generate(self.prepared(request.to_wire(), deadline)?), deadline).await
        };
        self.with_media(request, deadline, call).await?.try_into()
    }

    /// Asks, and returns the answer while it is being written. Dropping the stream cancels the request.
    pub async fn stream(&self, request: &Request) -> Result<AnswerStream, Error> {
        let deadline = self.deadline(request);
        let call = || async {
            let mut service = self.service.clone();
            let wire = v1::StreamGenerateRequest { request: Some(request.to_wire()) };
            bounded(service.stream_generate(self.prepared(wire, deadline)?), deadline).await
        };
        Ok(AnswerStream::new(self.with_media(request, deadline, call).await?, deadline))
    }

    /// Tells what a conversation would cost, before anything is computed.
    pub async fn count_tokens(&self, request: &Request) -> Result<TokenCount, Error> {
        let deadline = self.deadline(request);
        let call = || async {
            let mut service = self.service.clone();
            let cache_salt = request.salt().map(str::to_owned);
            let wire = v1::CountTokensRequest { chat: Some(request.to_chat()), cache_salt };
            bounded(service.count_tokens(self.prepared(wire, deadline)?), deadline).await
        };
        let count = self.with_media(request, deadline, call).await?;
        Ok(TokenCount {
            prompt_tokens: count.prompt_tokens,
            media: count.media.into_iter().map(Media::try_from).collect::<Result<_, _>>()?,
            max_context_tokens: count.max_context_tokens,
        })
    }

    /// Describes the model that is served.
    pub async fn model(&self) -> Result<Model, Error> {
        let deadline = self.timeout.map(|timeout| Instant::now() + timeout);
        let mut service = self.service.clone();
        let call = service.get_model(self.prepared(v1::GetModelRequest {}, deadline)?);
        Ok(bounded(call, deadline).await?.into())
    }

    /// Checks the size, and tells the server the deadline (`grpc-timeout`), so that it stops work that nobody waits for.
    fn prepared<T: prost::Message>(
        &self,
        message: T,
        deadline: Option<Instant>,
    ) -> Result<tonic::Request<T>, Error> {
        // Not tonic's own bound, whose words are lost on the way back through the connection.
        let (bytes, max_bytes) = (message.encoded_len(), self.max_message_bytes);
        if bytes > max_bytes {
            return Err(Error::TooLarge { bytes, max_bytes });
        }
        let mut request = tonic::Request::new(message);
        if let Some(deadline) = deadline {
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        Ok(request)
    }

    pub(crate) fn service(&self) -> InferenceServiceClient<Channel> {
        self.service.clone()
    }

    /// The time that a request may take which sets none itself.
    pub(crate) fn own_timeout(&self) -> Option<Duration> {
        self.timeout
    }

    fn deadline(&self, request: &Request) -> Option<Instant> {
        request.own_timeout().or(self.timeout).map(|timeout| Instant::now() + timeout)
    }
}

/// The answer of a call. A deadline that passed is called so.
pub(crate) async fn bounded<T>(
    call: impl Future<Output = Result<Response<T>, Status>>,
    deadline: Option<Instant>,
) -> Result<T, Error> {
    match call.await {
        Ok(response) => Ok(response.into_inner()),
        // tonic's client gives up at the deadline by itself, but calls it CANCELLED.
        Err(status)
            if status.code() == Code::Cancelled && deadline.is_some_and(|at| Instant::now() >= at) =>
        {
            Err(deadline_exceeded())
        }
        Err(status) => Err(status.into()),
    }
}

/// What a call ends with when the server has not answered by its deadline.
pub(crate) fn deadline_exceeded() -> Error {
    Error::Refused(Refusal {
        code: Code::DeadlineExceeded,
        message: "the answer did not come in time".to_owned(),
        violations: Vec::new(),
        retry_after: None,
        partial: None,
    })
}

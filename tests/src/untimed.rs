//! A connection that sends `grpc-timeout` and then waits for the server's own word. tonic's channel gives up by itself at the
//! same moment, so that a test through it could not tell who was faster.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use tonic::body::Body;
use tonic::codegen::{Service, http};

/// A client over such a connection.
pub type Client = InferenceServiceClient<Untimed>;

/// An HTTP/2 connection without a clock.
#[derive(Clone, Debug)]
pub struct Untimed(SendRequest<Body>);

/// Connects to a server at HOST:PORT.
///
/// # Errors
/// When nobody is there.
pub async fn connect(address: &str) -> anyhow::Result<Client> {
    connect_taking(address, 1 << 20).await
}

/// Connects to a server at HOST:PORT, and takes at most `window_bytes` of an answer that nobody reads.
///
/// # Errors
/// When nobody is there.
pub async fn connect_taking(address: &str, window_bytes: u32) -> anyhow::Result<Client> {
    let stream = tokio::net::TcpStream::connect(address).await?;
    let mut settings = Builder::new(TokioExecutor::new());
    settings.initial_stream_window_size(window_bytes);
    let (sender, connection) = settings.handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let origin = http::Uri::try_from(format!("http://{address}"))?;
    Ok(InferenceServiceClient::with_origin(Untimed(sender), origin))
}

/// A request that the server shall answer within `timeout`.
pub fn within<T>(timeout: Duration, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(timeout);
    request
}

impl Service<http::Request<Body>> for Untimed {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = hyper::Result<http::Response<Incoming>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

//! Calls whose messages are sent byte by byte, and not always to their end.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use futures::StreamExt;
use futures::channel::mpsc;
use futures::future::BoxFuture;
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;

/// Pieces that wait to be sent.
const PIECES: usize = 16;
/// What every call is addressed to, and has as headers.
const AUTHORITY: &str = "lockstep";
const SERVICE: &str = "/lockstep.v1.InferenceService/";
const HEADERS: [(&str, &str); 2] = [("content-type", "application/grpc"), ("te", "trailers")];

/// An HTTP/2 connection.
pub struct Connection(SendRequest<Body>);

/// A call that is being made. Dropping it resets its stream.
pub struct Call {
    pieces: Option<mpsc::Sender<Bytes>>,
    answer: BoxFuture<'static, hyper::Result<http::Response<Incoming>>>,
}

impl Connection {
    /// Connects to a server at HOST:PORT.
    ///
    /// # Errors
    /// When nobody is there.
    pub async fn open(address: &str) -> anyhow::Result<Self> {
        let stream = tokio::net::TcpStream::connect(address).await?;
        let (sender, connection) = Builder::new(TokioExecutor::new()).handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self(sender))
    }

    /// Begins to call a method of the service, with more headers.
    pub fn call(&self, method: &str, headers: &[(&str, &str)]) -> Call {
        let (sender, pieces) = mpsc::channel(PIECES);
        let uri = format!("http://{AUTHORITY}{SERVICE}{method}");
        let mut request = http::Request::post(uri).version(http::Version::HTTP_2);
        for (name, value) in HEADERS.iter().chain(headers) {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::new(Pieces(pieces))).expect("the headers are valid");
        let answer = self.0.clone().send_request(request);
        Call { pieces: Some(sender), answer: Box::pin(answer) }
    }
}

impl Call {
    /// Sends bytes.
    pub fn send(&mut self, bytes: Bytes) {
        let pieces = self.pieces.as_mut().expect("it goes on");
        pieces.try_send(bytes).expect("few pieces wait");
    }

    /// Says that nothing more comes.
    pub fn half_close(&mut self) {
        self.pieces = None;
    }

    /// The status of the answer; `None` where it begins as a good one does.
    ///
    /// # Errors
    /// When the stream or the connection ended without one.
    pub async fn answer(&mut self) -> hyper::Result<Option<Status>> {
        Ok(Status::from_header_map((&mut self.answer).await?.headers()))
    }

    /// HTTP's own status.
    ///
    /// # Errors
    /// When the stream or the connection ended without one.
    pub async fn http_status(&mut self) -> hyper::Result<http::StatusCode> {
        Ok((&mut self.answer).await?.status())
    }
}

/// A message as gRPC frames it.
pub fn framed(message: &impl prost::Message) -> Bytes {
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(message.encoded_len() as u32);
    message.encode(&mut framed).expect("the buffer grows");
    framed.freeze()
}

/// The size of a call's headers as HTTP/2 counts it: names, values, and 32 bytes for each.
pub fn header_bytes(method: &str, headers: &[(&str, &str)]) -> usize {
    let path = format!("{SERVICE}{method}");
    let own = [(":method", "POST"), (":scheme", "http"), (":authority", AUTHORITY), (":path", &path)];
    let all = own.iter().chain(&HEADERS).chain(headers);
    all.map(|(name, value)| name.len() + value.len() + 32).sum()
}

/// What a client sends of a message.
struct Pieces(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.0.poll_next_unpin(cx).map(|piece| piece.map(|bytes| Ok(Frame::data(bytes))))
    }
}

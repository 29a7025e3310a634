//! Connections of clients: a bounded number of them, none of which stays silent.

use std::future::ready;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures::{Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::deadline::{Alarm, Deadline};
use crate::limits::GREETING_TIMEOUT;

/// Takes connections, at most `max` at a time. One too many is closed at once, so that its client hears of it instead of
/// waiting for a place.
pub fn accept(listener: TcpListener, max: usize) -> impl Stream<Item = io::Result<Connection>> {
    let places = Arc::new(Semaphore::new(max));
    TcpListenerStream::new(listener).filter_map(move |accepted| ready(admit(accepted, &places)))
}

fn admit(accepted: io::Result<TcpStream>, places: &Arc<Semaphore>) -> Option<io::Result<Connection>> {
    let admitted = accepted.map(|stream| {
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!("a connection was closed: as many as --max-connections allows are open");
            return None;
        };
        // A token is a small packet that must not wait for the next one. A stream that is gone already fails when it is read.
        let _ = stream.set_nodelay(true);
        let greeting = Some(Alarm::new(Deadline::within(Instant::now(), GREETING_TIMEOUT)));
        Some(Connection { stream, greeting, _place: place })
    });
    admitted.transpose()
}

/// A connection, which holds its place until it is dropped.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    /// Rings when nothing was heard; none once something was. From then on HTTP/2's own pings find who is gone.
    greeting: Option<Alarm>,
    _place: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        if read.is_ready() {
            this.greeting = None;
        }
        match &mut this.greeting {
            Some(greeting) => greeting.poll_rung(cx).map(|()| Err(io::ErrorKind::TimedOut.into())),
            None => read,
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn one_connection_too_many_is_closed_and_a_closed_one_makes_room() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut incoming = Box::pin(accept(listener, 1));
        let _first = TcpStream::connect(address).await.unwrap();
        let held = incoming.next().await.unwrap().unwrap();
        let mut second = TcpStream::connect(address).await.unwrap();
        let mut byte = [0];
        tokio::select! {
            admitted = incoming.next() => panic!("it was admitted: {admitted:?}"),
            read = second.read(&mut byte) => assert!(!matches!(read, Ok(1..)), "{read:?}"),
        }
        drop(held);
        let _third = TcpStream::connect(address).await.unwrap();
        incoming.next().await.unwrap().unwrap();
    }
}

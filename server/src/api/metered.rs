//! Headers and messages are counted while they arrive: what clients are sending is bounded over all of them, not only one by
//! one. And none takes forever, since what has arrived is held meanwhile.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;

use super::fault::Refusal;
use crate::budget::{ByteBudget, Reservation};
use crate::deadline::{Alarm, Deadline, Expired, Phase};
use crate::limits::MAX_RECEIVE_TIME;

/// A service whose requests' messages are taken from a budget. Handlers find the reservation with [`received`].
#[derive(Clone)]
pub struct Metered<S> {
    inner: S,
    budget: ByteBudget,
}

impl<S> Metered<S> {
    /// `inner`, metered.
    pub fn new(inner: S, budget: ByteBudget) -> Self {
        Self { inner, budget }
    }
}

impl<S: NamedService> NamedService for Metered<S> {
    const NAME: &'static str = S::NAME;
}

impl<S: Service<http::Request<Body>>> Service<http::Request<Body>> for Metered<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> S::Future {
        let reservation = Arc::new(self.budget.open());
        request.extensions_mut().insert(reservation.clone());
        let deadline: Deadline = request.extensions().get().copied().unwrap_or_default();
        let headers = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        self.inner.call(request.map(|inner| {
            let body = MeteredBody::new(inner, reservation, deadline);
            Body::new(MeteredBody { uncounted: headers, ..body })
        }))
    }
}

/// The reservation of a request's message. The bytes count as held until it is dropped, so that it must live as long as
/// what was sent is looked at.
///
/// # Panics
/// If the service is not [`Metered`].
pub fn received<T>(request: &mut tonic::Request<T>) -> Arc<Reservation> {
    request.extensions_mut().remove().expect("the service is metered")
}

struct MeteredBody {
    inner: Body,
    reservation: Arc<Reservation>,
    deadline: Deadline,
    /// Rings at the deadline, or after [`MAX_RECEIVE_TIME`].
    patience: Alarm,
    /// Bytes of headers, until the first piece of the message is asked for.
    uncounted: usize,
}

impl MeteredBody {
    fn new(inner: Body, reservation: Arc<Reservation>, deadline: Deadline) -> Self {
        let slowest = Deadline::within(Instant::now(), MAX_RECEIVE_TIME);
        Self {
            inner,
            reservation,
            deadline,
            patience: Alarm::new(deadline.or_earlier(slowest)),
            uncounted: 0,
        }
    }

    fn out_of_time(&self) -> Refusal {
        if self.deadline.has_passed(Instant::now()) {
            Expired(Phase::Receiving).into()
        } else {
            Refusal::Slow
        }
    }
}

impl HttpBody for MeteredBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let headers = std::mem::take(&mut self.uncounted) as u64;
        if let Err(error) = self.reservation.grow(headers) {
            return Poll::Ready(Some(Err(Refusal::over_budget("request", error).into())));
        }
        let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(cx) else {
            ready!(self.patience.poll_rung(cx));
            return Poll::Ready(Some(Err(self.out_of_time().into())));
        };
        let bytes = match &frame {
            Some(Ok(frame)) => frame.data_ref().map_or(0, Bytes::len),
            _ => 0,
        };
        Poll::Ready(match self.reservation.grow(bytes as u64) {
            Ok(()) => frame,
            Err(error) => Some(Err(Refusal::over_budget("request", error).into())),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use tonic::Code;

    use super::*;

    /// Sends as many pieces of ten bytes as it says.
    struct Pieces(usize);

    impl HttpBody for Pieces {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            if self.0 == 0 {
                return Poll::Ready(None);
            }
            self.0 -= 1;
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"0123456789")))))
        }
    }

    async fn receive(budget: &ByteBudget, pieces: usize) -> Result<Arc<Reservation>, Status> {
        let reservation = Arc::new(budget.open());
        let mut body = MeteredBody::new(Body::new(Pieces(pieces)), reservation.clone(), Deadline::default());
        while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            frame?;
        }
        Ok(reservation)
    }

    #[tokio::test]
    async fn headers_count_before_a_message_begins() {
        let budget = ByteBudget::new(50);
        let reservation = Arc::new(budget.open());
        let body = MeteredBody::new(Body::new(Silence), reservation.clone(), Deadline::default());
        let mut body = MeteredBody { uncounted: 45, ..body };
        assert!(futures::poll!(poll_fn(|cx| Pin::new(&mut body).poll_frame(cx))).is_pending());
        let refused = receive(&budget, 1).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    }

    /// Sends nothing and does not end.
    struct Silence;

    impl HttpBody for Silence {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Pending
        }
    }

    #[tokio::test]
    async fn a_message_that_never_ends_is_given_up_at_the_deadline() {
        let reservation = Arc::new(ByteBudget::new(1).open());
        let deadline = Deadline::within(Instant::now(), Duration::from_millis(2));
        let mut body = MeteredBody::new(Body::new(Silence), reservation, deadline);
        let frame = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
        let status = frame.expect("a frame").expect_err("an end");
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        assert!(status.message().contains("receiving"), "{status}");
    }

    #[tokio::test]
    async fn what_arrives_is_held_until_the_request_is_done_with_it() {
        let budget = ByteBudget::new(50);
        let first = receive(&budget, 3).await.unwrap();
        let refused = receive(&budget, 3).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        let second = receive(&budget, 2).await.unwrap();
        drop((first, second));
        assert!(receive(&budget, 5).await.is_ok());
        let refused = receive(&budget, 6).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "no retry would help: {refused}");
    }
}

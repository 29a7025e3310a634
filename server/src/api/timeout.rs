//! `grpc-timeout`: from the header of a request to its deadline.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tower::Layer;

use super::fault::Refusal;
use crate::deadline::{Deadline, Phase};

const GRPC_TIMEOUT: &str = "grpc-timeout";

/// Gives requests their deadlines, which handlers find with [`deadline`], and ends what its handler does not end itself.
///
/// tonic's own service, which is around this one, has a timer for the same header, and calls it CANCELLED. That timer is
/// started after the deadline was set and is polled after the service inside, so that it never comes first.
#[derive(Clone, Copy, Debug, Default)]
pub struct TimeoutLayer;

/// A service whose requests have deadlines.
#[derive(Clone, Debug)]
pub struct Timed<S> {
    inner: S,
}

impl<S> Layer<S> for TimeoutLayer {
    type Service = Timed<S>;

    fn layer(&self, inner: S) -> Timed<S> {
        Timed { inner }
    }
}

impl<S> Service<http::Request<Body>> for Timed<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let arrived = Instant::now();
        let deadline = match request.headers().get(GRPC_TIMEOUT).map(parse) {
            None => Deadline::default(),
            Some(Some(timeout)) => Deadline::of_request(arrived, timeout),
            Some(None) => {
                let rule = "must be 1 to 8 digits and one of the units H, M, S, m, u, n";
                return Box::pin(async move { Ok(answer(Refusal::field(GRPC_TIMEOUT, rule))) });
            }
        };
        request.extensions_mut().insert(deadline);
        let answered = self.inner.call(request);
        Box::pin(async move {
            match deadline.bound(Phase::Answering, answered).await {
                Ok(answered) => answered,
                Err(expired) => Ok(answer(expired.into())),
            }
        })
    }
}

/// The deadline of a request; none if there is no [`TimeoutLayer`].
pub fn deadline<T>(request: &tonic::Request<T>) -> Deadline {
    request.extensions().get().copied().unwrap_or_default()
}

fn answer(refusal: Refusal) -> http::Response<Body> {
    Status::from(refusal).into_http()
}

/// `Timeout` of the specification of gRPC over HTTP/2. Its zero is taken too: clients send it when nothing is left.
fn parse(value: &http::HeaderValue) -> Option<Duration> {
    let (unit, digits) = value.as_bytes().split_last()?;
    if !(1..=8).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count = digits.iter().fold(0, |count: u64, digit| count * 10 + u64::from(digit - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(count * 3_600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tonic::Code;

    use super::*;

    fn parsed(value: &'static str) -> Option<Duration> {
        parse(&http::HeaderValue::from_static(value))
    }

    #[test]
    fn timeouts_are_read_as_the_specification_writes_them() {
        let hour = Duration::from_secs(3_600);
        for (value, timeout) in [
            ("1H", hour),
            ("90M", hour + hour / 2),
            ("7S", Duration::from_secs(7)),
            ("250m", Duration::from_millis(250)),
            ("00000250m", Duration::from_millis(250)),
            ("30000000u", Duration::from_secs(30)),
            ("1n", Duration::from_nanos(1)),
            ("0n", Duration::ZERO),
            ("99999999H", hour * 99_999_999),
        ] {
            assert_eq!(parsed(value), Some(timeout), "{value}");
        }
    }

    #[test]
    fn anything_else_is_no_timeout() {
        for value in
            ["", "S", "5", "5s", "5 S", " 5S", "-5S", "+5S", "5.5S", "123456789S", "5SS", "soon", "5h"]
        {
            assert_eq!(parsed(value), None, "{value:?}");
        }
    }

    /// Answers with the deadline that it finds, or never.
    #[derive(Clone)]
    struct Handler {
        answers: bool,
    }

    impl Service<http::Request<Body>> for Handler {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            let deadline: Deadline = *request.extensions().get().expect("the layer has set it");
            let Handler { answers } = *self;
            Box::pin(async move {
                if !answers {
                    std::future::pending::<()>().await;
                }
                let mut response = http::Response::new(Body::default());
                response.extensions_mut().insert(deadline);
                Ok(response)
            })
        }
    }

    async fn call(answers: bool, timeout: Option<&'static str>) -> http::Response<Body> {
        let mut service = TimeoutLayer.layer(Handler { answers });
        let mut request = http::Request::new(Body::default());
        if let Some(timeout) = timeout {
            request.headers_mut().insert(GRPC_TIMEOUT, http::HeaderValue::from_static(timeout));
        }
        poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
        service.call(request).await.unwrap()
    }

    fn status(response: &http::Response<Body>) -> Status {
        Status::from_header_map(response.headers()).expect("it ended with a status")
    }

    #[tokio::test]
    async fn handlers_find_their_deadline() {
        let found = |response: http::Response<Body>| *response.extensions().get::<Deadline>().unwrap();
        assert_eq!(found(call(true, None).await), Deadline::default());
        assert_ne!(found(call(true, Some("1H")).await), Deadline::default());
    }

    #[tokio::test]
    async fn what_does_not_answer_is_ended() {
        let status = status(&call(false, Some("3m")).await);
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    }

    #[tokio::test]
    async fn a_malformed_timeout_is_named() {
        let status = status(&call(true, Some("soon")).await);
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().starts_with("grpc-timeout: must be"), "{status}");
    }
}

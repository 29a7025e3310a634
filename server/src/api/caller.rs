//! What a call brings beside its message.

use std::sync::Arc;

use tonic::Request;

use super::metered::received;
use super::timeout::deadline;
use crate::budget::Reservation;
use crate::deadline::Deadline;
use crate::request::Namespace;
use crate::telemetry::Trace;

/// What is known of a call before its message is read.
#[derive(Debug)]
pub struct Caller {
    /// When it must be answered.
    pub deadline: Deadline,
    /// The bytes that its message holds.
    pub message: Arc<Reservation>,
    /// Its trace.
    pub trace: Trace,
    /// The value of its `authorization` metadata. Nobody checks it here: it tells callers apart.
    key: Option<Vec<u8>>,
}

impl Caller {
    /// The caller of a request to `method`.
    ///
    /// # Panics
    /// If the service is not [`Metered`](super::metered::Metered).
    pub fn of<T>(method: &'static str, request: &mut Request<T>) -> Self {
        let metadata = request.metadata();
        let trace = Trace::of_call(method, metadata);
        let key = metadata.get("authorization").map(|value| value.as_bytes().to_vec());
        Self { deadline: deadline(request), message: received(request), trace, key }
    }

    /// A caller in this process, without a deadline.
    pub fn with_key(key: Option<&[u8]>, message: Reservation) -> Self {
        let key = key.map(<[u8]>::to_vec);
        Self { deadline: Deadline::default(), message: message.into(), trace: Trace::none(), key }
    }

    /// Whom media and caches belong to that are used with a salt.
    pub fn namespace(&self, salt: Option<&str>) -> Namespace {
        Namespace::new(self.key.as_deref(), salt)
    }
}

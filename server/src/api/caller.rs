//! What a call brings beside its message.

use std::sync::Arc;

use tonic::Request;

use super::metered::received;
use super::timeout::deadline;
use crate::budget::Reservation;
use crate::deadline::Deadline;
use crate::request::Namespace;

/// What is known of a call before its message is read.
#[derive(Clone, Debug)]
pub struct Caller {
    /// When it must be answered.
    pub deadline: Deadline,
    /// The bytes that its message holds.
    pub message: Arc<Reservation>,
    /// The value of its `authorization` metadata. Nobody checks it here: it tells callers apart.
    key: Option<Vec<u8>>,
}

impl Caller {
    /// The caller of a request.
    ///
    /// # Panics
    /// If the service is not [`Metered`](super::metered::Metered).
    pub fn of<T>(request: &mut Request<T>) -> Self {
        let key = request.metadata().get("authorization").map(|value| value.as_bytes().to_vec());
        Self { deadline: deadline(request), message: received(request), key }
    }

    /// A caller without a deadline.
    #[cfg(test)]
    pub fn with_key(key: Option<&[u8]>, message: Reservation) -> Self {
        Self { deadline: Deadline::default(), message: message.into(), key: key.map(<[u8]>::to_vec) }
    }

    /// Whom media and caches belong to that are used with a salt.
    pub fn namespace(&self, salt: Option<&str>) -> Namespace {
        Namespace::new(self.key.as_deref(), salt)
    }
}

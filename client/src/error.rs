//! What can go wrong between a caller and the server, with the code and the fields at fault kept.

use std::{error::Error as StdError, fmt, time::Duration};

use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::Partial;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is not of the form `host:port`.
    #[error("{address:?} is not a server address: {reason}; give host:port")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No connection could be made.
    #[error("cannot reach a server at {address}: {reason}")]
    Connect {
        /// Where a server was expected.
        address: String,
        /// The innermost cause.
        reason: String,
    },
    /// The request is larger than the client sends.
    #[error(
        "the request has {bytes} bytes, but at most {max_bytes} are sent; send fewer or smaller pictures"
    )]
    TooLarge {
        /// Size of the request as it would travel.
        bytes: usize,
        /// The bound, [`ClientBuilder::max_message_bytes`](crate::ClientBuilder::max_message_bytes).
        max_bytes: usize,
    },
    /// The server, or the connection to it, refused the call.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The server broke the protocol.
    #[error("the server's answer breaks the protocol: {0}")]
    Protocol(String),
}

impl Error {
    /// The gRPC status code, where there is one.
    pub fn code(&self) -> Option<Code> {
        match self {
            Error::Refused(refusal) => Some(refusal.code),
            Error::Connect { .. } => Some(Code::Unavailable),
            Error::Address { .. } | Error::TooLarge { .. } | Error::Protocol(_) => None,
        }
    }

    /// The fields of the request that are at fault; empty where the error is about something else.
    pub fn violations(&self) -> &[FieldViolation] {
        match self {
            Error::Refused(refusal) => &refusal.violations,
            _ => &[],
        }
    }

    /// How long the server asks to wait before another try.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Error::Refused(refusal) => refusal.retry_after,
            _ => None,
        }
    }

    /// What there was of the answer when its deadline passed; none where the server's word did not come in time either.
    pub fn partial(&self) -> Option<&Partial> {
        match self {
            Error::Refused(refusal) => refusal.partial.as_deref(),
            _ => None,
        }
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Error::Refused(status.into())
    }
}

/// A gRPC status, taken apart.
#[derive(Debug, Clone, PartialEq)]
pub struct Refusal {
    /// The status code.
    pub code: Code,
    /// The server's own words.
    pub message: String,
    /// The fields at fault (`google.rpc.BadRequest`).
    pub violations: Vec<FieldViolation>,
    /// How long to wait before another try (`google.rpc.RetryInfo`).
    pub retry_after: Option<Duration>,
    /// What there was of the answer when its deadline passed.
    pub partial: Option<Box<Partial>>,
}

/// One field of a request that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// Path of the field, for example `chat.messages[0].parts[1].image`.
    pub field: String,
    /// The rule that it breaks.
    pub description: String,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        let violations = status.get_details_bad_request().map_or_else(Vec::new, |bad_request| {
            bad_request
                .field_violations
                .into_iter()
                .map(|violation| FieldViolation {
                    field: violation.field,
                    description: violation.description,
                })
                .collect()
        });
        let retry_after = status.get_details_retry_info().and_then(|retry| retry.retry_delay);
        let message = match status.source() {
            // tonic's own words for a broken connection are only "transport error"; the reason is in the chain.
            Some(source) => format!("{}: {}", status.message(), innermost(source)),
            None => status.message().to_owned(),
        };
        let partial = Partial::find(&status).map(Box::new);
        Refusal { code: status.code(), message, violations, retry_after, partial }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", code_name(self.code))?;
        if !self.message.is_empty() {
            write!(out, ": {}", self.message)?;
        }
        for violation in &self.violations {
            write!(out, "\n  {}: {}", violation.field, violation.description)?;
        }
        if let Some(wait) = self.retry_after {
            write!(out, "\n  try again in {:.1} s", wait.as_secs_f64())?;
        }
        Ok(())
    }
}

impl StdError for Refusal {}

/// The name that the gRPC specification gives a code, for example `INVALID_ARGUMENT`.
pub(crate) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// The last error of a chain: where the chain is tonic's, the only one that says what happened.
pub(crate) fn innermost<'a>(error: &'a (dyn StdError + 'static)) -> &'a (dyn StdError + 'static) {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost
}

#[cfg(test)]
mod tests {
    use lockstep_proto::v1;
    use prost::Message;
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn a_status_keeps_its_fields_and_its_retry_hint() {
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("sampling.temperature", "must be at most 100");
        details.add_bad_request_violation("chat.messages", "must not be empty");
        details.set_retry_info(Some(Duration::from_millis(1500)));
        let status = Status::with_error_details(Code::InvalidArgument, "2 fields are at fault", details);

        let error = Error::from(status);

        assert_eq!(error.code(), Some(Code::InvalidArgument));
        assert_eq!(error.retry_after(), Some(Duration::from_millis(1500)));
        assert_eq!(error.violations().len(), 2);
        assert_eq!(error.violations()[0].field, "sampling.temperature");
        assert_eq!(
            error.to_string(),
            "INVALID_ARGUMENT: 2 fields are at fault\n  sampling.temperature: must be at most 100\n  \
             chat.messages: must not be empty\n  try again in 1.5 s"
        );
    }

    #[test]
    fn an_expired_answer_is_found_in_the_details() {
        let usage = Some(v1::Usage { prompt_tokens: 9, cached_tokens: 0, completion_tokens: 2 });
        let timings = Some(v1::Timings { total_ms: 500.0, ..Default::default() });
        let choice = v1::Choice { text: "It is".into(), token_ids: vec![5, 6], ..Default::default() };
        let answer = v1::GenerateResponse { started: None, choices: vec![choice], usage, timings };
        let error = expired("lockstep.v1.GenerateResponse", answer.encode_to_vec());
        let partial = error.partial().expect("a partial answer");
        assert_eq!((partial.text.as_str(), &partial.token_ids[..]), ("It is", &[5, 6][..]));
        assert_eq!((partial.usage.completion_tokens, partial.timings.total_ms), (2, 500.0));

        let completed = v1::Completed { usage, timings };
        let error = expired("lockstep.v1.Completed", completed.encode_to_vec());
        let partial = error.partial().expect("what a stream used");
        assert_eq!((partial.text.as_str(), partial.usage.completion_tokens), ("", 2));
        assert_eq!(expired("lockstep.v1.Usage", Vec::new()).partial(), None);
    }

    /// A status with two details, the second of which is of the type `name`.
    fn expired(name: &str, value: Vec<u8>) -> Error {
        let code = Code::DeadlineExceeded;
        let mut status = tonic_types::pb::Status { code: code.into(), ..Default::default() };
        for (name, value) in [("google.rpc.ErrorInfo", Vec::new()), (name, value)] {
            status.details.push(Default::default());
            let any = status.details.last_mut().expect("it was just pushed");
            any.type_url = format!("type.googleapis.com/{name}");
            any.value = value;
        }
        Status::with_details(code, "deadline exceeded", status.encode_to_vec().into()).into()
    }

    #[test]
    fn a_bare_status_has_neither() {
        let error = Error::from(Status::unavailable("shard 1 died"));
        assert_eq!(error.to_string(), "UNAVAILABLE: shard 1 died");
        assert!(error.violations().is_empty());
        assert_eq!((error.retry_after(), error.partial()), (None, None));
    }
}

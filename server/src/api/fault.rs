//! The one place where errors become gRPC statuses.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::expired;
use crate::budget::BudgetError;
use crate::deadline::Expired;
use crate::limits::{MAX_RECEIVE_TIME, RETRY_AFTER};

/// The faults of a request, collected while it is read.
#[derive(Debug, Default)]
pub struct Faults {
    invalid: Vec<FieldViolation>,
    later: Vec<(String, String)>,
    missing: Vec<FieldViolation>,
    over_budget: Option<Refusal>,
}

impl Faults {
    /// Notes that `field` breaks a rule.
    pub fn invalid(&mut self, field: impl Into<String>, rule: impl Into<String>) {
        self.invalid.push(FieldViolation::new(field, rule));
    }

    /// Notes that `field` asks for what this version cannot do.
    pub fn later(&mut self, field: impl Into<String>, what: impl Into<String>) {
        self.later.push((field.into(), what.into()));
    }

    /// Notes that what `field` names is not there.
    pub fn missing(&mut self, field: impl Into<String>, what: impl Into<String>) {
        self.missing.push(FieldViolation::new(field, what));
    }

    /// Notes that what `field` asks for holds more bytes than are left.
    pub fn over_budget(&mut self, field: &str, error: BudgetError) {
        self.over_budget.get_or_insert_with(|| Refusal::over_budget(field, error));
    }

    /// All faults as one refusal. A request that breaks a rule is told so before it is told what is not there.
    ///
    /// # Errors
    /// The faults, if there are any.
    pub fn into_result(self) -> Result<(), Refusal> {
        if !self.invalid.is_empty() {
            Err(Refusal::Invalid(self.invalid))
        } else if !self.later.is_empty() {
            Err(Refusal::Unimplemented(self.later))
        } else if !self.missing.is_empty() {
            Err(Refusal::NotFound(self.missing))
        } else if let Some(refusal) = self.over_budget {
            Err(refusal)
        } else {
            Ok(())
        }
    }
}

/// Why a request is not served.
#[derive(Debug)]
pub enum Refusal {
    /// Fields that break a rule.
    Invalid(Vec<FieldViolation>),
    /// Fields that ask for what this version cannot do.
    Unimplemented(Vec<(String, String)>),
    /// Fields that name what is not there.
    NotFound(Vec<FieldViolation>),
    /// No room now; worth another try.
    Exhausted(String),
    /// The client's time is over.
    Expired(Expired),
    /// The request's message took too long to arrive.
    Slow,
    /// The shards are gone.
    Unavailable(String),
    /// A fault of our own.
    Internal(String),
}

impl Refusal {
    /// One field that breaks a rule.
    pub fn field(field: impl Into<String>, rule: impl Into<String>) -> Self {
        Refusal::Invalid(vec![FieldViolation::new(field, rule)])
    }

    /// A field that holds more bytes than are left, now or ever.
    pub fn over_budget(field: &str, error: BudgetError) -> Self {
        match error {
            BudgetError::TooLarge { .. } => Refusal::field(field, error.to_string()),
            BudgetError::Exhausted { .. } => Refusal::Exhausted(error.to_string()),
        }
    }
}

impl From<Expired> for Refusal {
    fn from(expired: Expired) -> Self {
        Refusal::Expired(expired)
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Status {
        match refusal {
            Refusal::Invalid(violations) => with_fields(Code::InvalidArgument, violations),
            Refusal::NotFound(violations) => with_fields(Code::NotFound, violations),
            Refusal::Unimplemented(fields) => {
                let list: Vec<_> = fields
                    .iter()
                    .map(|(field, what)| format!("{field}: {what} is not implemented yet"))
                    .collect();
                let violations = fields
                    .into_iter()
                    .map(|(field, what)| FieldViolation::new(field, what))
                    .collect::<Vec<_>>();
                Status::with_error_details(
                    Code::Unimplemented,
                    list.join("; "),
                    ErrorDetails::with_bad_request(violations),
                )
            }
            Refusal::Exhausted(why) => {
                let details = ErrorDetails::with_retry_info(Some(RETRY_AFTER));
                Status::with_error_details(Code::ResourceExhausted, why, details)
            }
            Refusal::Expired(expired) => expired::status(expired),
            Refusal::Slow => {
                let seconds = MAX_RECEIVE_TIME.as_secs();
                Status::deadline_exceeded(format!("the request did not arrive within {seconds} s"))
            }
            Refusal::Unavailable(why) => Status::unavailable(why),
            Refusal::Internal(why) => Status::internal(why),
        }
    }
}

fn with_fields(code: Code, violations: Vec<FieldViolation>) -> Status {
    let list: Vec<_> = violations.iter().map(|v| format!("{}: {}", v.field, v.description)).collect();
    Status::with_error_details(code, list.join("; "), ErrorDetails::with_bad_request(violations))
}

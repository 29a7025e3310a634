//! The one place where errors become gRPC statuses.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::expired;
use crate::budget::BudgetError;
use crate::deadline::Expired;
use crate::limits::{MAX_DETAILS_BYTES, MAX_RECEIVE_TIME, RETRY_AFTER};

/// Bytes of a field's path that are told.
const MAX_FIELD_BYTES: usize = 128;
/// Bytes of what is wrong with a field that are told.
const MAX_RULE_BYTES: usize = 512;
/// Faults that a status's words name; its details name more.
const FAULTS_IN_WORDS: usize = 4;
/// Bytes of a status's words about fields. They travel twice: in a header of their own, where some bytes take three, and in the details.
const MAX_WORDS_BYTES: usize = 640;
/// Bytes of the details beside words and violations.
const ENVELOPE_BYTES: usize = 128;

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
                let later =
                    |(field, what)| FieldViolation::new(field, format!("{what} is not implemented yet"));
                with_fields(Code::Unimplemented, fields.into_iter().map(later).collect())
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

/// A status that names the fields at fault, as many of them as fit into the headers that clients take.
fn with_fields(code: Code, mut violations: Vec<FieldViolation>) -> Status {
    for violation in &mut violations {
        cut(&mut violation.field, MAX_FIELD_BYTES);
        cut(&mut violation.description, MAX_RULE_BYTES);
    }
    let told = violations.iter().take(FAULTS_IN_WORDS);
    let told: Vec<_> = told.map(|fault| format!("{}: {}", fault.field, fault.description)).collect();
    let mut words = told.join("; ");
    cut(&mut words, MAX_WORDS_BYTES);
    if violations.len() > told.len() {
        words += &format!("; and {} more", violations.len() - told.len());
    }
    let mut room = MAX_DETAILS_BYTES - ENVELOPE_BYTES - words.len();
    violations.truncate(violations.iter().take_while(|violation| fits(violation, &mut room)).count());
    Status::with_error_details(code, words, ErrorDetails::with_bad_request(violations))
}

/// Takes the bytes of a violation from `room`, if there are as many.
fn fits(violation: &FieldViolation, room: &mut usize) -> bool {
    // Tags and lengths take up to eight.
    let bytes = violation.field.len() + violation.description.len() + 8;
    let left = room.checked_sub(bytes);
    *room = left.unwrap_or(0);
    left.is_some()
}

fn cut(text: &mut String, most: usize) {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most));
        text.push('…');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(count: usize, rule: &str) -> Status {
        let mut faults = Faults::default();
        for i in 0..count {
            faults.missing(format!("chat.messages[{i}].parts[1].image.media_id"), rule);
        }
        faults.into_result().unwrap_err().into()
    }

    fn fields(status: &Status) -> usize {
        status.get_details_bad_request().unwrap().field_violations.len()
    }

    #[test]
    fn faults_that_fit_are_all_told() {
        let status = refused(3, "is gone");
        assert_eq!(fields(&status), 3);
        let words = "chat.messages[0].parts[1].image.media_id: is gone; \
                     chat.messages[1].parts[1].image.media_id: is gone; \
                     chat.messages[2].parts[1].image.media_id: is gone";
        assert_eq!(status.message(), words);
    }

    #[test]
    fn many_faults_stay_within_what_clients_take() {
        for (count, rule) in [(64, "is gone"), (4_096, "is gone"), (100, &*"long ".repeat(10_000))] {
            let status = refused(count, rule);
            let bytes = status.details().len();
            assert!(bytes <= MAX_DETAILS_BYTES, "{bytes}");
            assert!(status.message().len() < MAX_WORDS_BYTES + 32, "{status}");
            assert!(fields(&status) > 3 && status.message().contains(" more"), "{status}");
        }
    }
}

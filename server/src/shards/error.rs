//! What goes wrong with ranks, told with the rank.

use std::{fmt, io, sync::Arc, time::Duration};

use tonic::Code;

/// Why a group did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The system refused something.
    #[error("cannot {what}: {source}")]
    System {
        /// What was to be done.
        what: String,
        /// Its answer.
        source: io::Error,
    },
    /// Some ranks failed: all that did.
    #[error("{}", tell_together(.0))]
    Ranks(Vec<RankError>),
    /// A rank that was started again did not read the same weights as before: the files, or what they lie on, have changed.
    #[error("shard {rank} read other weights than when the server started")]
    OtherWeights {
        /// Its rank.
        rank: u32,
    },
    /// The ranks do not agree on what they loaded.
    #[error("ranks 0 and {rank} disagree on {field}: {first} and {other}")]
    Disagreement {
        /// The rank that disagrees with rank 0.
        rank: u32,
        /// On what.
        field: &'static str,
        /// What rank 0 says.
        first: String,
        /// What the other says.
        other: String,
    },
}

impl StartError {
    /// Whether the same may go well the next time: a rank was killed, or held up.
    pub(super) fn may_pass(&self) -> bool {
        let from_outside = |error: &RankError| match &error.fault {
            RankFault::Died { status, .. } => status.contains("signal"),
            RankFault::Silent(_) => true,
            // The connection broke: of a rank elsewhere no more is known when it is killed.
            RankFault::Answered { code: Code::Unknown | Code::Cancelled, .. } => true,
            RankFault::Answered { .. } | RankFault::Unreachable(_) | RankFault::Confused(_) => false,
        };
        matches!(self, Self::Ranks(errors) if errors.iter().any(from_outside))
    }

    /// Whether a rank is another server's, or cannot be reached for now.
    pub(super) fn is_unavailable(&self) -> bool {
        let unavailable =
            |error: &RankError| matches!(error.fault, RankFault::Answered { code: Code::Unavailable, .. });
        matches!(self, Self::Ranks(errors) if errors.iter().any(unavailable))
    }

    /// Ranks that do not move while they load.
    pub(super) fn silent(ranks: Vec<u32>, silence: Duration) -> Self {
        Self::Ranks(
            ranks.into_iter().map(|rank| RankError { rank, fault: RankFault::Silent(silence) }).collect(),
        )
    }
}

/// Why a group is no longer of use, until it is put together again.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GroupError {
    /// The process of a rank ended.
    #[error("shard {rank} died ({status}){}", quote(.last_words))]
    ShardDied {
        /// Its rank.
        rank: u32,
        /// How the process ended.
        status: String,
        /// What it wrote last to standard error.
        last_words: Vec<String>,
    },
    /// A rank answered with an error, or with nonsense.
    #[error("shard {rank} failed: {words}")]
    ShardFailed {
        /// Its rank.
        rank: u32,
        /// What it said, or what was wrong with that.
        words: String,
    },
    /// Ranks do not answer, or hold up the others, and nothing says why.
    #[error("{} silent for {silence:?}", name_ranks(.ranks))]
    Silent {
        /// Which.
        ranks: Vec<u32>,
        /// How long that was.
        silence: Duration,
    },
    /// Nothing is in flight, and nothing is planned, for sequences that wait.
    #[error("{sequences} sequences wait, and the scheduler plans nothing")]
    Stuck {
        /// How many.
        sequences: usize,
    },
    /// The group could not be put together again.
    #[error("{0}")]
    NotRestarted(Arc<StartError>),
    /// The system gave no file for pixels.
    #[error("cannot write pixels for the shards: {0}")]
    Pixels(String),
    /// The ranks' replicated states differ.
    #[error("the ranks diverged in step {step}: their states hash to {hashes:x?}")]
    Diverged {
        /// In which step.
        step: u64,
        /// Hash of each rank's state.
        hashes: Vec<u64>,
    },
}

/// Something is wrong with a group: ask [`super::Group::diagnose`] what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

/// What went wrong with one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankError {
    /// The rank.
    pub rank: u32,
    /// What.
    pub fault: RankFault,
}

/// What may go wrong with a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RankFault {
    /// Its process ended.
    Died {
        /// How.
        status: String,
        /// What it wrote last to standard error.
        last_words: Vec<String>,
    },
    /// It answered with an error.
    Answered {
        /// Kind of the error.
        code: Code,
        /// Its words.
        words: String,
    },
    /// It cannot be reached.
    Unreachable(String),
    /// It does not keep to the protocol.
    Confused(String),
    /// It did not move for so long.
    Silent(Duration),
}

impl fmt::Display for RankFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Died { status, last_words } => write!(f, "died ({status}){}", quote(last_words)),
            Self::Answered { words, .. } => f.write_str(words),
            Self::Unreachable(words) | Self::Confused(words) => f.write_str(words),
            Self::Silent(silence) => write!(f, "is silent for {silence:?}"),
        }
    }
}

impl RankFault {
    /// Whether it comes from the rank itself, and not from another one or from the way there.
    fn is_own(&self) -> bool {
        match self {
            Self::Answered { code, .. } => {
                !matches!(code, Code::Aborted | Code::Unavailable | Code::Unknown | Code::Cancelled)
            }
            Self::Confused(_) => true,
            Self::Died { .. } | Self::Unreachable(_) | Self::Silent(_) => false,
        }
    }
}

impl RankError {
    /// How much an error tells about the cause, less being more: when a rank dies, those that wait for it fail too.
    fn remoteness(&self) -> u8 {
        match &self.fault {
            RankFault::Died { .. } => 0,
            RankFault::Answered { code: Code::Aborted, .. } => 2,
            RankFault::Answered { .. }
            | RankFault::Unreachable(_)
            | RankFault::Confused(_)
            | RankFault::Silent(_) => 1,
        }
    }
}

impl GroupError {
    /// The error nearest to the cause. The others go to the log.
    ///
    /// # Panics
    /// If there is none.
    pub(super) fn nearest_to_cause(mut errors: Vec<RankError>) -> Self {
        errors.sort_by_key(RankError::remoteness);
        let mut errors = errors.into_iter();
        let RankError { rank, fault } = errors.next().expect("a failure has a cause");
        for RankError { rank, fault } in errors.filter(|error| error.rank != rank) {
            tracing::warn!(rank, "another shard failed too: {fault}");
        }
        match fault {
            RankFault::Died { status, last_words } => Self::ShardDied { rank, status, last_words },
            RankFault::Answered { words, .. }
            | RankFault::Unreachable(words)
            | RankFault::Confused(words) => Self::ShardFailed { rank, words },
            RankFault::Silent(silence) => Self::Silent { ranks: vec![rank], silence },
        }
    }
}

impl GroupError {
    /// Ranks whose processes are not to be trusted any more, beside those that have ended.
    pub(super) fn suspects(&self) -> Vec<u32> {
        match self {
            Self::ShardDied { rank, .. } | Self::ShardFailed { rank, .. } => vec![*rank],
            Self::Silent { ranks, .. } => ranks.clone(),
            Self::Diverged { hashes, .. } => diverged(hashes),
            Self::NotRestarted(error) => match &**error {
                StartError::Ranks(errors) => {
                    // Who was only left alone is not at fault, where anybody is.
                    let is_cause = |error: &&RankError| error.remoteness() < 2;
                    let causes: Vec<u32> = errors.iter().filter(is_cause).map(|error| error.rank).collect();
                    if causes.is_empty() { errors.iter().map(|error| error.rank).collect() } else { causes }
                }
                StartError::Disagreement { rank, .. } | StartError::OtherWeights { rank } => vec![*rank],
                StartError::System { .. } => vec![],
            },
            Self::Pixels(_) | Self::Stuck { .. } => vec![],
        }
    }

    /// Ranks whose weights are not to be trusted any more, though their processes may live: they differ from the others, or could
    /// not be put together with them. One that was only out of reach is not among them.
    pub(super) fn distrusted(&self) -> Vec<u32> {
        match self {
            Self::Diverged { hashes, .. } => diverged(hashes),
            Self::NotRestarted(error) => match &**error {
                StartError::Ranks(errors) => {
                    let failed = errors.iter().filter(|error| error.fault.is_own());
                    failed.map(|error| error.rank).collect()
                }
                StartError::Disagreement { rank, .. } | StartError::OtherWeights { rank } => vec![*rank],
                StartError::System { .. } => vec![],
            },
            _ => vec![],
        }
    }
}

/// What turns a refusal of the system into an error.
pub(super) fn cannot(what: &str) -> impl FnOnce(io::Error) -> StartError {
    let what = what.to_owned();
    move |source| StartError::System { what, source }
}

/// The ranks that are not of one mind with most; all, where no mind is that of most.
fn diverged(hashes: &[u64]) -> Vec<u32> {
    let count = |hash: &u64| hashes.iter().filter(|other| *other == hash).count();
    let most = hashes.iter().find(|hash| 2 * count(hash) > hashes.len());
    (0..).zip(hashes).filter(|(_, hash)| Some(*hash) != most).map(|(rank, _)| rank).collect()
}

fn name_ranks(ranks: &[u32]) -> String {
    let numbers: Vec<String> = ranks.iter().map(u32::to_string).collect();
    let (noun, verb) = if ranks.len() == 1 { ("shard", "is") } else { ("shards", "are") };
    format!("{noun} {} {verb}", numbers.join(", "))
}

fn quote(last_words: &[String]) -> String {
    if last_words.is_empty() {
        return String::new();
    }
    format!(", its last words:\n  {}", last_words.join("\n  "))
}

/// All errors, those nearest to the cause first, and each once where several ranks say the same.
fn tell_together(errors: &[RankError]) -> String {
    let mut told: Vec<(u8, String, Vec<u32>)> = vec![];
    for error in errors {
        let words = error.fault.to_string();
        match told.iter_mut().find(|(_, known, _)| *known == words) {
            Some((_, _, ranks)) => ranks.push(error.rank),
            None => told.push((error.remoteness(), words, vec![error.rank])),
        }
    }
    told.sort_by_key(|(remoteness, ..)| *remoteness);
    let lines = told.into_iter().map(|(_, words, ranks)| {
        let numbers: Vec<String> = ranks.iter().map(u32::to_string).collect();
        let noun = if ranks.len() == 1 { "shard" } else { "shards" };
        format!("{noun} {}: {words}", numbers.join(", "))
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(rank: u32, code: Code, words: &str) -> RankError {
        RankError { rank, fault: RankFault::Answered { code, words: words.into() } }
    }

    #[test]
    fn the_cause_is_told_and_not_its_effects() {
        let fault = RankFault::Died { status: "signal: 9".into(), last_words: vec!["oh".into()] };
        let errors = vec![
            answered(0, Code::Aborted, "the group fell apart"),
            answered(1, Code::Internal, "broken"),
            RankError { rank: 2, fault },
        ];
        let error = GroupError::nearest_to_cause(errors);
        assert_eq!(error.to_string(), "shard 2 died (signal: 9), its last words:\n  oh");
    }

    #[test]
    fn who_differs_from_most_is_suspected() {
        for (hashes, suspects) in [
            (&[7, 7, 8][..], &[2][..]),
            (&[7, 8], &[0, 1]),
            (&[8, 7, 7, 9, 7], &[0, 3]),
            (&[1, 1, 2, 2], &[0, 1, 2, 3]),
        ] {
            let error = GroupError::Diverged { step: 0, hashes: hashes.into() };
            assert_eq!(error.suspects(), suspects, "{hashes:?}");
        }
    }

    #[test]
    fn ranks_that_say_the_same_are_told_once() {
        let errors = vec![
            answered(0, Code::Aborted, "left alone"),
            answered(1, Code::Internal, "no config.json"),
            answered(2, Code::Internal, "no config.json"),
        ];
        let words = StartError::Ranks(errors).to_string();
        assert_eq!(words, "shards 1, 2: no config.json\nshard 0: left alone");
    }
}

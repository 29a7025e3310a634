//! The running answers to a request: what comes next in any of them, until all have ended.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedReceiver;

use super::Prepared;
use crate::api::fault::Refusal;
use crate::deadline::{Alarm, Deadline, Phase};
use crate::engine::Update;
use crate::output::{OutputStream, StopStrings};
use crate::prompt::Vocabulary;
use crate::scheduler::{FinishReason, SampledToken};
use crate::telemetry::Trace;

/// How an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// An end token.
    StopToken(u32),
    /// A stop string.
    StopString(String),
    /// No more tokens allowed.
    Length,
}

/// Where the time of a request went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// Waiting for a place.
    pub queue: Duration,
    /// Decoding and resizing pictures and videos.
    pub media: Duration,
    /// Vision encoding.
    pub vision: Duration,
    /// From the first step to the first token, without vision encoding.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// From arrival to the end.
    pub total: Duration,
}

/// What comes next in the answers to a request. `choice` says in which of them.
#[derive(Debug)]
pub enum Output {
    /// A token, and the text that became certain with it.
    Token {
        /// Which answer.
        choice: usize,
        /// Text; may be empty.
        text: String,
        /// The token.
        token: SampledToken,
    },
    /// The end of one answer, and text that was held back.
    Finished {
        /// Which answer.
        choice: usize,
        /// Text; may be empty.
        text: String,
        /// Why.
        ending: Ending,
    },
    /// The first answer is being worked on. The first output, unless the deadline passes before.
    Begun,
    /// All answers have ended. The last output.
    Completed {
        /// What it took.
        usage: Usage,
        /// Where the time went.
        times: Times,
    },
    /// The deadline passed: some answer is not complete, and there will be no more of it. The last output.
    Expired {
        /// Text that was held back, of each answer; may be empty.
        texts: Vec<String>,
        /// What the answers were waiting for.
        phase: Phase,
        /// What it took.
        usage: Usage,
        /// Where the time went.
        times: Times,
    },
}

/// What a request used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, tokens that were found computed by the first answer.
    pub cached_tokens: u32,
    /// Tokens generated, of all answers.
    pub completion_tokens: u32,
}

/// The running answers to a request. Dropping them cancels them.
pub struct Generation {
    /// What was understood.
    pub prepared: Prepared,
    /// The seed in use.
    pub seed: u64,
    choices: Choices,
    alarm: Alarm,
    trace: Trace,
    end_tokens: Vec<u32>,
    clock: Clock,
    /// Found computed.
    cached_tokens: u32,
    /// Of all answers.
    num_tokens: u32,
    /// How answers have ended so far.
    ending: Option<&'static str>,
    /// The last output was given.
    completed: bool,
}

pub(super) struct Choices {
    all: Vec<Choice>,
    /// Who is looked at first, so that none is behind another for long.
    turn: usize,
}

/// One of the answers.
struct Choice {
    updates: UnboundedReceiver<Update>,
    output: OutputStream,
    /// A stop string appeared; the end is not told yet.
    stopped: Option<String>,
    ended: bool,
}

impl Choices {
    pub(super) fn new(
        updates: Vec<UnboundedReceiver<Update>>,
        vocabulary: &Arc<Vocabulary>,
        stops: &StopStrings,
    ) -> Self {
        let choices = updates.into_iter().map(|updates| {
            let output = OutputStream::new(vocabulary.clone(), stops.clone());
            Choice { updates, output, stopped: None, ended: false }
        });
        Choices { all: choices.collect(), turn: 0 }
    }

    /// What comes next to any answer that has not ended, and to which; none where an engine is gone.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<(usize, Option<Update>)> {
        let count = self.all.len();
        for index in (self.turn..self.turn + count).map(|index| index % count) {
            let choice = &mut self.all[index];
            if choice.ended {
                continue;
            }
            if let Poll::Ready(update) = choice.updates.poll_recv(context) {
                self.turn = index + 1;
                return Poll::Ready((index, update));
            }
        }
        Poll::Pending
    }
}

impl Generation {
    pub(super) fn new(
        prepared: Prepared,
        seed: u64,
        choices: Choices,
        end_tokens: Vec<u32>,
        clock: Clock,
        deadline: Deadline,
        trace: Trace,
    ) -> Self {
        let alarm = Alarm::new(deadline);
        let (cached_tokens, num_tokens, ending, completed) = (0, 0, None, false);
        Generation {
            prepared,
            seed,
            choices,
            alarm,
            trace,
            end_tokens,
            clock,
            cached_tokens,
            num_tokens,
            ending,
            completed,
        }
    }

    /// How many answers there are.
    pub fn num_choices(&self) -> usize {
        self.choices.all.len()
    }

    /// What comes next; nothing after the last output or an error.
    ///
    /// # Errors
    /// When the shards are lost, or no token can be drawn.
    pub async fn next(&mut self) -> Option<Result<Output, Refusal>> {
        if self.completed {
            return None;
        }
        let output = self.output().await;
        let ending = match &output {
            Ok(Output::Begun | Output::Token { .. } | Output::Finished { .. }) => return Some(output),
            Ok(Output::Completed { .. }) => self.ending.unwrap_or_default(),
            Ok(Output::Expired { .. }) => "deadline",
            Err(Refusal::Unavailable(_)) => "lost",
            Err(_) => "failed",
        };
        self.completed = true;
        self.trace.note("completion_tokens", self.num_tokens as usize);
        self.trace.ended(ending);
        self.choices.all.iter_mut().for_each(|choice| choice.updates.close());
        Some(output)
    }

    async fn output(&mut self) -> Result<Output, Refusal> {
        if let Some((index, stop)) = self.take_stopped() {
            return Ok(self.finish(index, String::new(), Ending::StopString(stop)));
        }
        if self.choices.all.iter().all(|choice| choice.ended) {
            let times = self.clock.times_until(self.clock.last_token.unwrap_or_else(Instant::now));
            return Ok(Output::Completed { usage: self.usage(), times });
        }
        loop {
            let choices = &mut self.choices;
            let Some((index, update)) = self.alarm.bound(poll_fn(|context| choices.poll(context))).await
            else {
                return Ok(self.expired());
            };
            match update {
                Some(Update::Scheduled { at, cached_tokens }) => {
                    let is_first = self.clock.scheduled.is_none();
                    self.clock.scheduled(at);
                    if is_first {
                        self.trace.begin("prefill");
                        self.trace.note("cached_tokens", cached_tokens as usize);
                        self.cached_tokens = cached_tokens;
                        return Ok(Output::Begun);
                    }
                }
                Some(Update::Encoded(micros)) => self.clock.vision += Duration::from_micros(micros),
                Some(Update::Token(token, at)) => return Ok(self.token(index, token, at)),
                Some(Update::Finished(reason)) => {
                    let piece = self.choices.all[index].output.finish();
                    let ending = piece.stopped.map_or(reason.into(), Ending::StopString);
                    return Ok(self.finish(index, piece.text, ending));
                }
                Some(Update::Failed(failure)) => return Err(Refusal::Internal(failure.to_string())),
                Some(Update::Lost(why)) => return Err(Refusal::Unavailable(why.to_string())),
                None if self.alarm.has_rung() => return Ok(self.expired()),
                None => return Err(Refusal::Unavailable("the engine stopped".to_owned())),
            }
        }
    }

    fn take_stopped(&mut self) -> Option<(usize, String)> {
        let choices = self.choices.all.iter_mut().enumerate();
        choices.filter_map(|(index, choice)| Some((index, choice.stopped.take()?))).next()
    }

    /// What it took so far.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prepared.token_ids.len() as u32,
            cached_tokens: self.cached_tokens,
            completion_tokens: self.num_tokens,
        }
    }

    fn token(&mut self, index: usize, token: SampledToken, at: Instant) -> Output {
        if self.num_tokens == 0 {
            self.trace.begin("decode");
        }
        self.num_tokens += 1;
        self.clock.token(at);
        if self.end_tokens.contains(&token.token_id) {
            return Output::Token { choice: index, text: String::new(), token };
        }
        let choice = &mut self.choices.all[index];
        let piece = choice.output.push(token.token_id);
        if piece.stopped.is_some() {
            // A closed channel is how the engine learns that nobody wants more.
            choice.updates.close();
            choice.stopped = piece.stopped;
        }
        Output::Token { choice: index, text: piece.text, token }
    }

    fn finish(&mut self, index: usize, text: String, ending: Ending) -> Output {
        self.choices.all[index].ended = true;
        let name = ending.name();
        self.ending = Some(if self.ending.is_none_or(|other| other == name) { name } else { "several" });
        Output::Finished { choice: index, text, ending }
    }

    fn expired(&mut self) -> Output {
        let phase = match (self.clock.scheduled, self.num_tokens) {
            (None, _) => Phase::Queue,
            (Some(_), 0) => Phase::Prefill,
            (Some(_), _) => Phase::Generation,
        };
        let running =
            |choice: &mut Choice| if choice.ended { String::new() } else { choice.output.finish().text };
        let texts = self.choices.all.iter_mut().map(running).collect();
        let times = self.clock.times_until(Instant::now());
        Output::Expired { texts, phase, usage: self.usage(), times }
    }
}

impl Ending {
    /// A name for traces.
    fn name(&self) -> &'static str {
        match self {
            Ending::StopToken(_) => "stop token",
            Ending::StopString(_) => "stop string",
            Ending::Length => "length",
        }
    }
}

impl From<FinishReason> for Ending {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::StopToken(id) => Ending::StopToken(id),
            FinishReason::Length => Ending::Length,
        }
    }
}

/// The moments of a request.
pub(super) struct Clock {
    arrived: Instant,
    submitted: Instant,
    media: Duration,
    vision: Duration,
    scheduled: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Clock {
    pub(super) fn new(arrived: Instant, submitted: Instant, media: Duration) -> Self {
        let (scheduled, first_token, last_token) = (None, None, None);
        Clock { arrived, submitted, media, vision: Duration::ZERO, scheduled, first_token, last_token }
    }

    fn scheduled(&mut self, at: Instant) {
        self.scheduled.get_or_insert(at);
    }

    fn token(&mut self, at: Instant) {
        self.first_token.get_or_insert(at);
        self.last_token = Some(at);
    }

    /// Where the time went until `end`; what had not begun then took none.
    fn times_until(&self, end: Instant) -> Times {
        let scheduled = self.scheduled.unwrap_or(end);
        let first = self.first_token.unwrap_or(end);
        Times {
            queue: scheduled.saturating_duration_since(self.submitted),
            media: self.media,
            vision: self.vision,
            prefill: first.saturating_duration_since(scheduled).saturating_sub(self.vision),
            decode: end.saturating_duration_since(first),
            total: end.saturating_duration_since(self.arrived),
        }
    }
}

//! An answer that is being written.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use futures::{Stream, StreamExt};
use lockstep_proto::v1;
use tokio::time::Sleep;
use tonic::Streaming;

use crate::{Answer, Choice, Completed, Delta, Error, Event, Finished, Started, client::deadline_exceeded};

/// The events of an answer, as they come. Dropping it cancels the request on the server.
///
/// The order is kept by the type: `Started` first, then `Delta`s and `Finished`s, `Completed` last. A stream that ends
/// without `Completed` yields an error, so that a cut answer is never taken for a whole one.
#[derive(Debug)]
pub struct AnswerStream {
    events: Streaming<v1::StreamGenerateResponse>,
    // The server keeps the deadline too; this one holds when the network no longer carries its word.
    deadline: Option<Pin<Box<Sleep>>>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Opened,
    Started,
    Ended,
}

impl AnswerStream {
    pub(crate) fn new(events: Streaming<v1::StreamGenerateResponse>, deadline: Option<Instant>) -> Self {
        let deadline = deadline.map(|at| Box::pin(tokio::time::sleep_until(at.into())));
        AnswerStream { events, deadline, state: State::Opened }
    }

    /// The next event; `None` after `Completed` or an error.
    pub async fn next(&mut self) -> Option<Result<Event, Error>> {
        StreamExt::next(self).await
    }

    /// Waits for the rest and puts it together. Meant for a stream of which nothing was taken yet.
    pub async fn collect(mut self) -> Result<Answer, Error> {
        let mut parts = AnswerParts::default();
        while let Some(event) = self.next().await {
            if let Some(answer) = parts.add(event?)? {
                return Ok(answer);
            }
        }
        Err(Error::Protocol("events were taken from the stream before".to_owned()))
    }

    fn check(&mut self, event: &Event) -> Result<(), Error> {
        let expected = match event {
            Event::Started(_) => State::Opened,
            _ => State::Started,
        };
        if self.state != expected {
            return Err(Error::Protocol("`started` is not its first event, or comes twice".to_owned()));
        }
        self.state = if matches!(event, Event::Completed(_)) { State::Ended } else { State::Started };
        Ok(())
    }
}

impl Stream for AnswerStream {
    type Item = Result<Event, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.state == State::Ended {
            return Poll::Ready(None);
        }
        let item = match self.events.poll_next_unpin(context) {
            Poll::Ready(Some(Ok(response))) => {
                Event::try_from(response).and_then(|event| self.check(&event).map(|()| event))
            }
            Poll::Ready(Some(Err(status))) => Err(status.into()),
            Poll::Ready(None) => Err(Error::Protocol("it ends before `completed`".to_owned())),
            Poll::Pending => match self.deadline.as_mut().map(|deadline| deadline.as_mut().poll(context)) {
                Some(Poll::Ready(())) => Err(deadline_exceeded()),
                _ => return Poll::Pending,
            },
        };
        if item.is_err() {
            self.state = State::Ended;
        }
        Poll::Ready(Some(item))
    }
}

/// Puts a whole answer together from its events.
#[derive(Debug, Default)]
pub(crate) struct AnswerParts {
    started: Option<Started>,
    choices: Vec<PartialChoice>,
}

#[derive(Debug, Default)]
struct PartialChoice {
    text: String,
    token_ids: Vec<u32>,
    logprobs: Vec<crate::PositionLogprobs>,
    finished: Option<Finished>,
}

impl AnswerParts {
    /// Takes one event; the answer is whole, and returned, with the last one.
    pub(crate) fn add(&mut self, event: Event) -> Result<Option<Answer>, Error> {
        match event {
            Event::Started(started) => self.started = Some(started),
            Event::Delta(Delta { choice, text, token_ids, logprobs }) => {
                let choice = self.choice(choice)?;
                choice.text.push_str(&text);
                choice.token_ids.extend(token_ids);
                choice.logprobs.extend(logprobs);
            }
            Event::Finished(finished) => {
                let choice = self.choice(finished.choice)?;
                choice.finished = Some(finished);
            }
            Event::Completed(completed) => return self.complete(completed).map(Some),
        }
        Ok(None)
    }

    /// Text and tokens of each answer so far, also of those that have none yet and come before one that has.
    pub(crate) fn so_far(&self) -> impl Iterator<Item = (&str, &[u32])> {
        self.choices.iter().map(|choice| (choice.text.as_str(), &choice.token_ids[..]))
    }

    fn choice(&mut self, index: u32) -> Result<&mut PartialChoice, Error> {
        // A bound on what a broken server can make this process allocate.
        const MAX_CHOICES: usize = 1024;
        let index = index as usize;
        if index >= MAX_CHOICES {
            return Err(Error::Protocol(format!("it has a choice {index}")));
        }
        if index >= self.choices.len() {
            self.choices.resize_with(index + 1, PartialChoice::default);
        }
        Ok(&mut self.choices[index])
    }

    fn complete(&mut self, Completed { usage, timings }: Completed) -> Result<Answer, Error> {
        let started = self.started.take().ok_or_else(|| Error::Protocol("it lacks `started`".to_owned()))?;
        let choices: Vec<Choice> = std::mem::take(&mut self.choices)
            .into_iter()
            .enumerate()
            .map(|(index, PartialChoice { text, token_ids, logprobs, finished })| {
                let finished = finished
                    .ok_or_else(|| Error::Protocol(format!("choice {index} is not finished at its end")))?;
                Ok(Choice { text, token_ids, logprobs, finished })
            })
            .collect::<Result<_, Error>>()?;
        if choices.is_empty() {
            return Err(Error::Protocol("it ends without an answer".to_owned()));
        }
        Ok(Answer { started, choices, usage, timings })
    }
}

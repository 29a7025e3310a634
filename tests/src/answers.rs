//! What a client gets of a request, in a form that is the same only if it is the same bit for bit.

use std::pin::pin;

use anyhow::{Context, bail};
use futures::{Stream, StreamExt};
use lockstep_proto::v1;
use lockstep_proto::v1::stream_generate_response::Event;
use tonic::Status;

/// A token and the bits of its log-probability.
type Token = (u32, u32);

/// One of the answers to a request, as far as it came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// At each position the token that was drawn, and the most probable ones, if they were asked for.
    pub logprobs: Vec<(Token, Vec<Token>)>,
    /// How it ended: a reason, and the text or token that was it. None where somebody left before.
    pub end: Option<(i32, Option<String>, Option<u32>)>,
}

impl Answer {
    fn add(&mut self, text: &str, tokens: &[u32], logprobs: &[v1::PositionLogprobs]) {
        self.text.push_str(text);
        self.tokens.extend(tokens);
        let bits = |token: &v1::TokenLogprob| (token.token_id, token.logprob.to_bits());
        self.logprobs.extend(logprobs.iter().map(|position| {
            let chosen = position.chosen.as_ref().expect("a position has a token");
            (bits(chosen), position.top.iter().map(bits).collect())
        }));
    }

    fn finish(&mut self, finished: v1::Finished) {
        self.end = Some((finished.reason, finished.stop_string, finished.stop_token_id));
    }

    /// Where it is not the beginning of another answer, or not all of it though it ended; in words.
    pub fn difference(&self, whole: &Answer) -> Option<String> {
        let first = |same: &dyn Fn(usize) -> bool, count: usize| (0..count).find(|i| !same(*i));
        let (got, expected) = (&self.tokens, &whole.tokens);
        if let Some(i) = first(&|i| got.get(i) == expected.get(i), got.len()) {
            return Some(format!("token {i} is {:?}, not {:?}", got.get(i), expected.get(i)));
        }
        let (got, expected) = (&self.logprobs, &whole.logprobs);
        if let Some(i) = first(&|i| got.get(i) == expected.get(i), got.len()) {
            let words = format!("{:x?}, not {:x?}", got.get(i), expected.get(i));
            return Some(format!("the tokens are the same; the log-probabilities of token {i} are {words}"));
        }
        if !whole.text.starts_with(&self.text) {
            return Some(format!("the text is {:?}, not {:?}", self.text, whole.text));
        }
        if self.end.is_some() && self != whole {
            return Some(format!("it ended as {self:?}, not as {whole:?}"));
        }
        None
    }
}

/// Complete answers.
///
/// # Errors
/// One of them is not finished.
pub fn of_response(response: v1::GenerateResponse) -> anyhow::Result<Vec<Answer>> {
    let answers = response.choices.into_iter().map(|choice| {
        let mut answer = Answer::default();
        answer.add(&choice.text, &choice.token_ids, &choice.logprobs);
        answer.finish(choice.finished.context("an end")?);
        Ok(answer)
    });
    answers.collect()
}

/// Takes a stream with `n` answers to its end, or until `leave_after` messages have come.
///
/// # Errors
/// The stream's own, or it ended before it was complete.
pub async fn of_stream(
    stream: impl Stream<Item = Result<v1::StreamGenerateResponse, Status>>,
    n: usize,
    leave_after: usize,
) -> anyhow::Result<Vec<Answer>> {
    let mut stream = pin!(stream);
    let mut answers = vec![Answer::default(); n];
    for _ in 0..leave_after {
        let message = stream.next().await.context("the stream ended")??;
        match message.event.context("an event")? {
            Event::Started(_) => {}
            Event::Delta(delta) => {
                let answer = answers.get_mut(delta.choice as usize).context("a choice that was asked for")?;
                answer.add(&delta.text, &delta.token_ids, &delta.logprobs);
            }
            Event::Finished(finished) => {
                let answer =
                    answers.get_mut(finished.choice as usize).context("a choice that was asked for")?;
                answer.finish(finished);
            }
            Event::Completed(_) => {
                if stream.next().await.transpose()?.is_some()
                    || answers.iter().any(|answer| answer.end.is_none())
                {
                    bail!("it is not complete");
                }
                break;
            }
        }
    }
    Ok(answers)
}

//! One request from its domain form to its last token: media, prompt, engine, text.

mod answers;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::join_all;

use self::answers::{Choices, Clock};
pub use self::answers::{Ending, Generation, Output, Times, Usage};
use crate::api::fault::{Faults, Refusal};
use crate::budget::{self, Reservation};
use crate::checkpoint::GenerationDefaults;
use crate::deadline::{Deadline, Phase};
use crate::engine::{EngineError, EngineHandle, Pixels, Submission};
use crate::limits::MAX_DECODED_PIXELS;
use crate::media::{Blame, MediaError, MediaKind, MediaPreparer, Medium, MediumInfo, MediumInput};
use crate::prompt::{self, Chat, Prompt, PromptEncoder, PromptError};
use crate::request::{MediumPart, Message, Namespace, Part, PartIndex, Request, Stopping, media};
use crate::scheduler::{self, MediaHash, NewSequence, PrefixKey, SubmitError};
use crate::telemetry::Trace;
use crate::workers::WorkersError;

/// Everything that requests share.
pub struct Frontend {
    /// Chat template and tokenizer.
    pub prompts: Arc<PromptEncoder>,
    /// Pictures and videos.
    pub media: MediaPreparer,
    /// Defaults of sampling, and end tokens.
    pub defaults: GenerationDefaults,
    /// The way into the engine.
    pub engine: EngineHandle,
    /// The most tokens that a prompt and its answer have together.
    pub max_context_tokens: u32,
    /// What a request may hold at the most.
    pub capacity: Capacity,
}

/// What a request may hold at the most. The scheduler refuses more than that, too, but only what is decoded gets there.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// Blocks for the features of its media.
    pub feature_blocks: u32,
    /// Tokens of features in a block.
    pub feature_block_tokens: u32,
    /// Answers.
    pub max_waiting: u32,
}

impl Capacity {
    /// Refuses media whose features do not fit, counted wherever they stand.
    fn check_features(&self, media_tokens: impl Iterator<Item = u64>) -> Result<(), Refusal> {
        let block_tokens = u64::from(self.feature_block_tokens);
        let blocks =
            media_tokens.fold(0, |sum: u64, tokens| sum.saturating_add(tokens.div_ceil(block_tokens)));
        if blocks > self.feature_blocks.into() {
            let (tokens, most) = (blocks * block_tokens, u64::from(self.feature_blocks) * block_tokens);
            let why = format!("its media take {tokens} tokens of features together; at most {most}");
            return Err(Refusal::field("chat", why));
        }
        Ok(())
    }

    /// Refuses more answers than may ever wait together.
    fn check_choices(&self, num_choices: u32) -> Result<(), Refusal> {
        if num_choices > self.max_waiting.max(1) {
            let refused = SubmitError::TooManyForks { sequences: num_choices, max_waiting: self.max_waiting };
            return Err(Refusal::field("n", refused.to_string()));
        }
        Ok(())
    }
}

/// A conversation as the model will see it.
pub struct Prepared {
    /// The prompt, media expanded.
    pub token_ids: Vec<u32>,
    /// Its media, in order.
    pub media: Vec<PreparedMedium>,
    /// Time that decoding and resizing took.
    pub media_time: Duration,
}

/// A picture or video of a conversation.
pub struct PreparedMedium {
    /// Where it stands in the conversation.
    pub place: PartIndex,
    /// Index of its first pad token.
    pub first_token: u32,
    /// What it is, and its pixels until the engine has them.
    pub medium: Medium,
}

impl Frontend {
    /// Builds the prompt of a conversation and, if it leaves room for an answer, decodes its media. `message` is the
    /// reservation of what was sent; the pixels get one of their own, which goes with them. When the deadline passes, processes
    /// that decode videos end; decoding of pictures that has begun goes on to its end, and holds both reservations until then.
    ///
    /// # Errors
    /// As [`Frontend::understand`]; a prompt that is too long, too many pixels for now, each medium that cannot be decoded.
    async fn prepare(
        &self,
        messages: &[Message],
        message: &Arc<Reservation>,
        deadline: Deadline,
        trace: &mut Trace,
    ) -> Result<Prepared, Refusal> {
        let (prompt, infos) = self.understand(messages, message, deadline, trace).await?;
        self.check_length(prompt.token_ids.len())?;
        let pixel_bytes = infos.iter().fold(0, |sum: u64, (_, info)| sum.saturating_add(info.pixel_bytes()));
        let reservation = message.branch(pixel_bytes).map_err(|error| Refusal::over_budget("chat", error))?;
        let reservation = Arc::new(reservation);
        let started = Instant::now();
        trace.begin("media");
        trace.note("media", infos.len());
        let work = media(messages).map(|(place, part)| {
            let input = input(part, |file| held(file, [message, &reservation]));
            async move { (place, self.media.prepare(input).await) }
        });
        let media = all_media(deadline.bound(Phase::Media, join_all(work)).await?)?;
        let media_time = started.elapsed();
        let media = media.into_iter().zip(prompt.media).map(|((place, medium), span)| {
            let first_token = span.first_token as u32;
            let pixels = budget::held(medium.pixels, reservation.clone());
            PreparedMedium { place, first_token, medium: Medium { pixels, ..medium } }
        });
        Ok(Prepared { token_ids: prompt.token_ids, media: media.collect(), media_time })
    }

    /// What a conversation would cost, told by its media's headers: the length of its prompt, and what each medium is.
    /// `message` is the reservation of what was sent.
    ///
    /// # Errors
    /// As [`Frontend::start`], but for faults that only decoding finds and for a prompt that is too long.
    pub async fn price(
        &self,
        messages: &[Message],
        message: &Arc<Reservation>,
        deadline: Deadline,
        trace: &mut Trace,
    ) -> Result<(usize, Vec<(PartIndex, MediumInfo)>), Refusal> {
        let (prompt, infos) = self.understand(messages, message, deadline, trace).await?;
        Ok((prompt.token_ids.len(), infos))
    }

    /// The prompt of a conversation, and what its media are: all that their headers tell. A request is refused by the
    /// same numbers that its price is told in, since both come from here.
    ///
    /// # Errors
    /// Each medium whose headers are at fault, with its field, the prompt's own fault, or the deadline.
    async fn understand(
        &self,
        messages: &[Message],
        message: &Arc<Reservation>,
        deadline: Deadline,
        trace: &mut Trace,
    ) -> Result<(Prompt, Vec<(PartIndex, MediumInfo)>), Refusal> {
        trace.begin("headers");
        let measures = media(messages).map(|(place, part)| {
            let input = input(part, |file| held(file, [message]));
            async move { (place, self.media.measure(input).await) }
        });
        let infos = all_media(deadline.bound(Phase::Media, join_all(measures)).await?)?;
        check_decoding(infos.iter().map(|(_, info)| info.decoded_pixels))?;
        self.capacity.check_features(infos.iter().map(|(_, info)| info.num_tokens))?;
        trace.begin("prompt");
        let prompt = self.encode(messages, infos.iter().map(|(_, info)| info));
        let prompt = deadline.bound(Phase::Prompt, prompt).await??;
        Ok((prompt, infos))
    }

    /// Checks that an uploaded file begins as a medium of its kind does.
    ///
    /// # Errors
    /// If it does not, or too many files wait to be looked at.
    pub async fn check_upload(&self, kind: MediaKind, file: Bytes) -> Result<(), Refusal> {
        let Err(error) = self.media.inspect(kind, file).await else { return Ok(()) };
        Err(match error.blame() {
            Blame::Fields(faults) => Refusal::field("chunk", words(faults)),
            Blame::Load(why) => Refusal::Exhausted(why),
            Blame::Server(why) => Refusal::Internal(why),
        })
    }

    async fn encode(
        &self,
        messages: &[Message],
        media: impl Iterator<Item = &MediumInfo>,
    ) -> Result<Prompt, Refusal> {
        let chat = prompt_chat(messages, media);
        self.prompts.encode_off_thread(chat).await.map_err(prompt_refusal)
    }

    /// Prepares a request and hands it to the engine. `message` is the reservation of what was sent.
    ///
    /// # Errors
    /// Whatever keeps it from being served: a server that is stopping, each medium at fault, with its field, too many pixels for
    /// now, the prompt's own fault, a full queue, the deadline.
    pub async fn start(
        &self,
        request: Request,
        message: Arc<Reservation>,
        mut trace: Trace,
    ) -> Result<Generation, Refusal> {
        let arrived = Instant::now();
        let deadline = request.deadline;
        self.engine.check_open().map_err(refusal)?;
        self.capacity.check_choices(request.num_choices)?;
        let mut prepared = self.prepare(&request.messages, &message, deadline, &mut trace).await?;
        trace.note("prompt_tokens", prepared.token_ids.len());
        trace.begin("queue");
        // From here on the media are pixels.
        drop((request.messages, message));
        let sampling = request.sampling.with_defaults(&self.defaults, request.logprobs);
        let left = self.max_context_tokens - prepared.token_ids.len() as u32;
        let max_new_tokens = request.stopping.max_tokens.map_or(left, |asked| asked.min(left));
        let namespace = request.namespace;
        let keys: Vec<MediaHash> =
            prepared.media.iter().map(|prepared| cache_key(&prepared.medium, namespace)).collect();
        let media = prepared.media.iter().zip(&keys).map(|(prepared, hash)| {
            let info = &prepared.medium.info;
            scheduler::Medium {
                hash: *hash,
                first_token: prepared.first_token,
                num_tokens: info.num_tokens as u32,
                grid: info.grid,
                seconds_per_grid_t: info.seconds_per_grid_t,
            }
        });
        let sequence = NewSequence {
            id: self.engine.next_id(),
            token_ids: prepared.token_ids.clone(),
            media: media.collect(),
            sampling: sampling.clone(),
            max_new_tokens,
            end_token_ids: self.end_tokens(&request.stopping),
            priority: request.priority,
            prefix_key: PrefixKey(namespace.0),
            forks: (1..request.num_choices).map(|_| self.engine.next_id()).collect(),
        };
        // The engine has them from here on: until the sequence ends, since a fault may have it computed again.
        let pixels = prepared.media.iter_mut().zip(keys).map(|(prepared, hash)| {
            let medium = &mut prepared.medium;
            (hash, Pixels { grid: medium.info.grid, data: std::mem::take(&mut medium.pixels) })
        });
        let pixels: HashMap<_, _> = pixels.collect();
        let end_tokens = sequence.end_token_ids.clone();
        let submitted = Instant::now();
        let submission = Submission { sequence, pixels, trace: trace.context(), deadline };
        let updates = deadline.bound(Phase::Queue, self.engine.submit(submission)).await?.map_err(refusal)?;
        let choices = Choices::new(updates, self.prompts.tokenizer().vocabulary(), &request.stopping.stop);
        let clock = Clock::new(arrived, submitted, prepared.media_time);
        Ok(Generation::new(prepared, sampling.seed, choices, end_tokens, clock, deadline, trace))
    }

    /// Tokens that end an answer by themselves.
    fn end_tokens(&self, stopping: &Stopping) -> Vec<u32> {
        let own = if stopping.ignore_eos { &[][..] } else { &self.defaults.eos_token_ids[..] };
        own.iter().chain(&stopping.stop_token_ids).copied().collect()
    }

    /// Refuses a prompt that leaves no room for an answer.
    fn check_length(&self, prompt_tokens: usize) -> Result<(), Refusal> {
        let context = self.max_context_tokens;
        if prompt_tokens >= context as usize {
            let why = format!("the prompt has {prompt_tokens} tokens; with its answer it may have {context}");
            return Err(Refusal::field("chat", why));
        }
        Ok(())
    }
}

/// A medium as it was sent, each of its files passed through `held`.
fn input(part: MediumPart<'_>, held: impl Fn(&Bytes) -> Bytes) -> MediumInput {
    match part {
        MediumPart::Image(image) => MediumInput::Image(held(&image.data), image.options),
        MediumPart::Video(video) => MediumInput::Video(video.map_files(held)),
    }
}

/// A file that keeps these reservations for as long as a worker looks at it, also when its request is over.
fn held<const N: usize>(file: &Bytes, reservations: [&Arc<Reservation>; N]) -> Bytes {
    reservations.into_iter().fold(file.clone(), |file, reservation| budget::held(file, reservation.clone()))
}

/// The media, or the faults of all of them.
fn all_media<T>(results: Vec<(PartIndex, Result<T, MediaError>)>) -> Result<Vec<(PartIndex, T)>, Refusal> {
    let mut media = Vec::with_capacity(results.len());
    let mut faults = Faults::default();
    let mut other = None;
    for (place, result) in results {
        let error = match result {
            Ok(medium) => {
                media.push((place, medium));
                continue;
            }
            Err(error) => error,
        };
        match error.blame() {
            Blame::Fields(found) => {
                let PartIndex { message, part } = place;
                for (field, problem) in found {
                    faults.invalid(format!("chat.messages[{message}].parts[{part}].{field}"), problem);
                }
            }
            Blame::Load(why) => other = Some(Refusal::Exhausted(why)),
            Blame::Server(why) => {
                tracing::error!("{why}");
                other = Some(Refusal::Internal(why));
            }
        }
    }
    faults.into_result()?;
    other.map_or(Ok(media), Err)
}

/// What is wrong, without the fields.
fn words(faults: Vec<(String, String)>) -> String {
    faults.into_iter().map(|(_, problem)| problem).collect::<Vec<_>>().join("; ")
}

/// Refuses media that take too long to decode, all together: each medium's own bound says nothing of many.
fn check_decoding(pixels: impl Iterator<Item = u64>) -> Result<(), Refusal> {
    let pixels = pixels.fold(0, u64::saturating_add);
    if pixels > MAX_DECODED_PIXELS {
        let why = format!("its media have {pixels} pixels to decode together; at most {MAX_DECODED_PIXELS}");
        return Err(Refusal::field("chat", why));
    }
    Ok(())
}

fn prompt_chat<'a>(messages: &[Message], mut media: impl Iterator<Item = &'a MediumInfo>) -> Chat {
    let mut medium = |kind: MediaKind| {
        let info = media.next().expect("one for each medium");
        prompt::Part::Medium(prompt::Medium { kind, num_tokens: info.num_tokens as usize })
    };
    let mut part = |part: &Part| match part {
        Part::Text(text) => prompt::Part::Text(text.clone()),
        Part::Image(_) => medium(MediaKind::Image),
        Part::Video(_) => medium(MediaKind::Video),
    };
    let messages = messages.iter().map(|message| prompt::Message {
        role: message.role,
        parts: message.parts.iter().map(&mut part).collect(),
    });
    Chat { messages: messages.collect(), tools: Vec::new() }
}

fn prompt_refusal(error: PromptError) -> Refusal {
    if let Some((field, problem)) = error.fault() {
        return Refusal::field(format!("chat.{field}"), problem);
    }
    match error {
        PromptError::TimedOut | PromptError::Workers(WorkersError::Overloaded { .. }) => {
            Refusal::Exhausted(error.to_string())
        }
        other => Refusal::Internal(other.to_string()),
    }
}

/// Media of different namespaces are different media to the caches.
fn cache_key(medium: &Medium, namespace: Namespace) -> MediaHash {
    MediaHash(blake3::keyed_hash(&namespace.0, &medium.hash).into())
}

fn refusal(error: EngineError) -> Refusal {
    match error {
        EngineError::Refused(error @ SubmitError::QueueFull { .. }) => Refusal::Exhausted(error.to_string()),
        EngineError::Refused(error @ SubmitError::TooManyForks { .. }) => {
            Refusal::field("n", error.to_string())
        }
        EngineError::Refused(error) => Refusal::field("chat", error.to_string()),
        EngineError::Busy => Refusal::Exhausted(error.to_string()),
        EngineError::Lost(why) => Refusal::Unavailable(why.to_string()),
    }
}

#[cfg(test)]
mod tests;

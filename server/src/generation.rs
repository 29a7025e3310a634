//! One request from its domain form to its last token: media, prompt, engine, text.

mod answers;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::join_all;

use self::answers::{Choices, Clock};
pub use self::answers::{Ending, Generation, Output, Times};
use crate::api::fault::{Faults, Refusal};
use crate::budget::{self, Reservation};
use crate::checkpoint::GenerationDefaults;
use crate::deadline::{Deadline, Phase};
use crate::engine::{EngineError, EngineHandle, Pixels, Submission};
use crate::media::{Measure, MediaKind, Picture, PictureError, PicturePreparer};
use crate::prompt::{self, Chat, Prompt, PromptEncoder, PromptError};
use crate::request::{Image, Message, Namespace, Part, PartIndex, Request, Stopping, images};
use crate::scheduler::{MediaHash, Medium, NewSequence, SubmitError};
use crate::telemetry::Trace;
use crate::workers::WorkersError;

/// Everything that requests share.
pub struct Frontend {
    /// Chat template and tokenizer.
    pub prompts: Arc<PromptEncoder>,
    /// Pictures.
    pub pictures: PicturePreparer,
    /// Defaults of sampling, and end tokens.
    pub defaults: GenerationDefaults,
    /// The way into the engine.
    pub engine: EngineHandle,
    /// The most tokens that a prompt and its answer have together.
    pub max_context_tokens: u32,
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

/// A picture of a conversation.
pub struct PreparedMedium {
    /// Where it stands in the conversation.
    pub place: PartIndex,
    /// Index of its first pad token.
    pub first_token: u32,
    /// Its sizes, and its pixels until the engine has them.
    pub picture: Picture,
}

impl Frontend {
    /// Builds the prompt of a conversation and, if it leaves room for an answer, decodes its pictures. `message` is the
    /// reservation of what was sent; the pixels get one of their own, which goes with them. Decoding that has begun when the
    /// deadline passes goes on to its end, and holds both until then.
    ///
    /// # Errors
    /// As [`Frontend::understand`]; a prompt that is too long, too many pixels for now, each picture that cannot be decoded.
    async fn prepare(
        &self,
        messages: &[Message],
        message: &Arc<Reservation>,
        deadline: Deadline,
        trace: &mut Trace,
    ) -> Result<Prepared, Refusal> {
        let (prompt, measures) = self.understand(messages, message, deadline, trace).await?;
        self.check_length(prompt.token_ids.len())?;
        let pixel_bytes = measures.iter().map(|(_, measure)| measure.size.pixel_bytes()).sum();
        let reservation = message.branch(pixel_bytes).map_err(|error| Refusal::over_budget("chat", error))?;
        let reservation = Arc::new(reservation);
        let started = Instant::now();
        trace.begin("media");
        trace.note("media", measures.len());
        let pictures = images(messages).map(|(place, image)| {
            let file = budget::held(file(image, message), reservation.clone());
            async move { (place, self.pictures.prepare(file, image.options).await) }
        });
        let pictures = all_pictures(deadline.bound(Phase::Media, join_all(pictures)).await?)?;
        let media_time = started.elapsed();
        let media = pictures.into_iter().zip(prompt.media).map(|((place, picture), span)| {
            let first_token = span.first_token as u32;
            let pixels = budget::held(picture.pixels, reservation.clone());
            PreparedMedium { place, first_token, picture: Picture { pixels, ..picture } }
        });
        Ok(Prepared { token_ids: prompt.token_ids, media: media.collect(), media_time })
    }

    /// What a conversation would cost, told by its pictures' headers: the length of its prompt, and each picture's measure.
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
    ) -> Result<(usize, Vec<(PartIndex, Measure)>), Refusal> {
        let (prompt, measures) = self.understand(messages, message, deadline, trace).await?;
        Ok((prompt.token_ids.len(), measures))
    }

    /// The prompt of a conversation, and its pictures' measures: all that their headers tell. A request is refused by the
    /// same numbers that its price is told in, since both come from here.
    ///
    /// # Errors
    /// Each picture whose header is at fault, with its field, the prompt's own fault, or the deadline.
    async fn understand(
        &self,
        messages: &[Message],
        message: &Arc<Reservation>,
        deadline: Deadline,
        trace: &mut Trace,
    ) -> Result<(Prompt, Vec<(PartIndex, Measure)>), Refusal> {
        trace.begin("headers");
        let measures = images(messages).map(|(place, image)| async move {
            (place, self.pictures.measure(file(image, message), image.options).await)
        });
        let measures = all_pictures(deadline.bound(Phase::Media, join_all(measures)).await?)?;
        trace.begin("prompt");
        let sizes = measures.iter().map(|(_, measure)| measure.size.num_tokens as usize);
        let prompt = deadline.bound(Phase::Prompt, self.encode(messages, sizes)).await??;
        Ok((prompt, measures))
    }

    /// Checks that an uploaded file begins as a medium of its kind does.
    ///
    /// # Errors
    /// If it does not, or too many files wait to be looked at.
    pub async fn check_upload(&self, kind: MediaKind, file: Bytes) -> Result<(), Refusal> {
        match kind {
            MediaKind::Image => match self.pictures.inspect(file).await {
                Ok(_) => Ok(()),
                Err(error) if error.faults().is_empty() => Err(Refusal::Exhausted(error.to_string())),
                Err(error) => Err(Refusal::field("chunk", error.to_string())),
            },
            MediaKind::Video => Err(Refusal::Unimplemented(vec![("header.kind".into(), "video".into())])),
        }
    }

    async fn encode(
        &self,
        messages: &[Message],
        sizes: impl Iterator<Item = usize>,
    ) -> Result<Prompt, Refusal> {
        let chat = prompt_chat(messages, sizes);
        self.prompts.encode_off_thread(chat).await.map_err(prompt_refusal)
    }

    /// Prepares a request and hands it to the engine. `message` is the reservation of what was sent.
    ///
    /// # Errors
    /// Whatever keeps it from being served: each picture at fault, with its field, too many pixels for now, the prompt's own
    /// fault, a full queue, the deadline.
    pub async fn start(
        &self,
        request: Request,
        message: Arc<Reservation>,
        mut trace: Trace,
    ) -> Result<Generation, Refusal> {
        let arrived = Instant::now();
        let deadline = request.deadline;
        let mut prepared = self.prepare(&request.messages, &message, deadline, &mut trace).await?;
        trace.note("prompt_tokens", prepared.token_ids.len());
        trace.begin("queue");
        // From here on the pictures are pixels.
        drop((request.messages, message));
        let sampling = request.sampling.with_defaults(&self.defaults, request.logprobs);
        let left = self.max_context_tokens - prepared.token_ids.len() as u32;
        let max_new_tokens = request.stopping.max_tokens.map_or(left, |asked| asked.min(left));
        let namespace = request.namespace;
        let keys: Vec<MediaHash> =
            prepared.media.iter().map(|medium| cache_key(&medium.picture, namespace)).collect();
        let media = prepared.media.iter().zip(&keys).map(|(medium, hash)| Medium {
            hash: *hash,
            first_token: medium.first_token,
            num_tokens: medium.picture.num_tokens as u32,
            grid: medium.picture.grid,
            seconds_per_grid_t: 0.0,
        });
        let sequence = NewSequence {
            id: self.engine.next_id(),
            token_ids: prepared.token_ids.clone(),
            media: media.collect(),
            sampling: sampling.clone(),
            max_new_tokens,
            end_token_ids: self.end_tokens(&request.stopping),
            priority: request.priority,
            forks: (1..request.num_choices).map(|_| self.engine.next_id()).collect(),
        };
        // Moved, not shared: the engine lets go of pixels while the answer still streams.
        let pixels = prepared.media.iter_mut().zip(keys).map(|(medium, hash)| {
            let picture = &mut medium.picture;
            (hash, Pixels { grid: picture.grid, data: std::mem::take(&mut picture.pixels) })
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

/// A picture's file, which keeps the reservation of what was sent for as long as a worker looks at it, also when its
/// request is over.
fn file(image: &Image, message: &Arc<Reservation>) -> Bytes {
    budget::held(image.data.clone(), message.clone())
}

/// The pictures, or every picture's faults.
fn all_pictures<T>(
    results: Vec<(PartIndex, Result<T, PictureError>)>,
) -> Result<Vec<(PartIndex, T)>, Refusal> {
    let mut pictures = Vec::with_capacity(results.len());
    let mut faults = Faults::default();
    let mut busy = None;
    for (place, result) in results {
        match result {
            Ok(picture) => pictures.push((place, picture)),
            Err(error) => {
                let found = error.faults();
                if found.is_empty() {
                    busy = Some(Refusal::Exhausted(error.to_string()));
                }
                for (field, problem) in found {
                    let PartIndex { message, part } = place;
                    faults.invalid(format!("chat.messages[{message}].parts[{part}].image.{field}"), problem);
                }
            }
        }
    }
    faults.into_result()?;
    busy.map_or(Ok(pictures), Err)
}

fn prompt_chat(messages: &[Message], mut sizes: impl Iterator<Item = usize>) -> Chat {
    let mut part = |part: &Part| match part {
        Part::Text(text) => prompt::Part::Text(text.clone()),
        Part::Image(_) => prompt::Part::Image { num_tokens: sizes.next().expect("a size for each picture") },
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
fn cache_key(picture: &Picture, namespace: Namespace) -> MediaHash {
    MediaHash(blake3::keyed_hash(&namespace.0, &picture.hash).into())
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

//! Every bound that a request can meet, in one place.

use std::time::Duration;

/// Messages in one conversation.
pub const MAX_MESSAGES: usize = 1_024;
/// Parts in one conversation.
pub const MAX_PARTS: usize = 4_096;
/// Pictures in one conversation.
pub const MAX_MEDIA: usize = 64;
/// Bytes of one request message on the wire.
pub const MAX_REQUEST_BYTES: usize = 64 << 20;
/// Stop tokens in one request.
pub const MAX_STOP_TOKENS: usize = 64;
/// Alternatives in log-probabilities.
pub const MAX_LOGPROBS: u32 = 20;
/// Largest temperature, repetition penalty and other factors.
pub const MAX_FACTOR: f32 = 100.0;
/// Tokens with a bias in one request.
pub const MAX_LOGIT_BIASES: usize = 1_024;
/// Largest bias of a token, up or down. More would make no difference: it allows a token alone, or forbids it.
pub const MAX_LOGIT_BIAS: f32 = 100.0;
/// Largest presence and frequency penalty, up or down.
pub const MAX_ANSWER_PENALTY: f32 = 2.0;
/// Bytes of a cache salt.
pub const MAX_CACHE_SALT_BYTES: usize = 256;
/// Commands that wait for the engine.
pub const ENGINE_QUEUE: usize = 1_024;
/// Requests of one connection at a time.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 1_024;
/// When a refused client may try again.
pub const RETRY_AFTER: Duration = Duration::from_millis(500);
/// How long a stopping server waits for running requests.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a server that has stopped waits for its clients to take their last answers.
pub const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

/// Bytes that all requests together hold, unless told otherwise: their messages until the pictures in them are decoded,
/// and the pictures' pixels until they are encoded.
pub const DEFAULT_MEDIA_BYTES: u64 = 4 << 30;
/// Pixels of a picture's file, by its header: a bound on the memory that decoding takes.
pub const MAX_SOURCE_PIXELS: u64 = 64 << 20;
/// Tokens of vision features that are kept unless told otherwise, at least.
pub const MIN_FEATURE_TOKENS: u64 = 4_096;

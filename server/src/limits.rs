//! The bounds of requests, of connections, of what they hold, and of the shards' group. The bounds of a file's format stand beside its reader (`media/`), and how much work
//! goes on at a time beside the workers that do it.

use std::time::Duration;

/// Messages in one conversation.
pub const MAX_MESSAGES: usize = 1_024;
/// Parts in one conversation.
pub const MAX_PARTS: usize = 4_096;
/// Pictures and videos in one conversation.
pub const MAX_MEDIA: usize = 64;
/// Frames of one video, also where they are given one by one.
pub const MAX_FRAMES: u32 = 768;
/// Bytes of one request message on the wire.
pub const MAX_REQUEST_BYTES: usize = 64 << 20;
/// Bytes of an uploaded file.
pub const MAX_UPLOAD_BYTES: u64 = 256 << 20;
/// Bytes of text in a conversation: more than fill any context that the family has.
pub const MAX_PROMPT_BYTES: usize = 1 << 20;
/// How long a conversation may wait for and spend on its encoding.
pub const MAX_PROMPT_TIME: Duration = Duration::from_secs(10);
/// Stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 16;
/// Bytes of a stop string: also the most text that is held back.
pub const MAX_STOP_BYTES: usize = 256;
/// Stop tokens in one request.
pub const MAX_STOP_TOKENS: usize = 64;
/// Answers to one request.
pub const MAX_CHOICES: u32 = 16;
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
/// Bytes of one answer message on the wire.
pub const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Bytes of one message to the services for health and reflection, which no budget counts.
pub const MAX_CONTROL_BYTES: usize = 64 << 10;
/// How long a request's message may take to arrive. What arrived is held meanwhile, also of clients that never end.
pub const MAX_RECEIVE_TIME: Duration = Duration::from_secs(60);
/// How much earlier than its client a request gives up (a tenth of the time that it has, if that is less): the answer, with
/// what was produced, must be there before the client stops listening.
pub const DEADLINE_MARGIN: Duration = Duration::from_millis(20);
/// Bytes of a status's details. They travel in a header, where base64 makes a third more of them, and many gRPC clients take
/// 8 KiB of headers.
pub const MAX_DETAILS_BYTES: usize = 4 << 10;

/// Connections at a time, unless told otherwise.
pub const DEFAULT_CONNECTIONS: u32 = 1_024;
/// Files that a server may open beside its connections: shards, pixels on their way to them, the checkpoint's.
pub const OWN_FILES: u64 = 128;
/// How long a new connection may stay silent.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// After this much silence a connection is asked whether its client is still there.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// How long the answer to that may take.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Requests of one connection at a time.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 1_024;
/// Bytes of a request's headers.
pub const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Bytes that a connection, and one request of it, may have sent before the server has looked at them.
pub const RECEIVE_WINDOW_BYTES: u32 = 1 << 20;
/// Requests that a connection may have taken back before the server has looked at them; beyond it the connection is closed,
/// since making and resetting requests is cheaper than counting them ("rapid reset").
pub const MAX_PENDING_RESETS: usize = 128;
/// Requests of a connection that the server may have ended for breaking HTTP/2's rules; beyond it the connection is closed.
pub const MAX_ERROR_RESETS: usize = 1_024;

/// When a refused client may try again.
pub const RETRY_AFTER: Duration = Duration::from_millis(500);
/// How long a stopping server waits for running requests, unless told otherwise.
pub const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Tokens of a prompt and its answer, unless told otherwise: what the checkpoints were trained on without rope scaling.
pub const DEFAULT_CONTEXT_TOKENS: u32 = 32_768;

/// Ranks of a group: the most GPUs of one node.
pub const MAX_WORLD_SIZE: u32 = 8;
/// How long a shard may be silent, unless told otherwise.
pub const DEFAULT_SILENCE_TIMEOUT: Duration = Duration::from_secs(2);
/// The least that may be told. Less would take a pause of the scheduler of a busy machine for silence.
pub const MIN_SILENCE_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a shard's process may take until it listens.
pub const LISTEN_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a loaded rank may take to open the stream of steps.
pub const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a rank may take to say what it holds.
pub const MEMORY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the others are listened to after one rank failed. Who died or failed first is rarely who is heard first.
pub const GRACE: Duration = Duration::from_millis(500);
/// Restarts of the shards, one after the other, without a token from any sequence. After them the engine ends.
pub const MAX_RESTARTS: u32 = 5;
/// Faults while the shards worked on a sequence, without a token from it. After them it ends: it may be what kills them.
pub const MAX_FAULTS_OF_A_SEQUENCE: u32 = 3;
/// Shards that lived for so long are not held to be in a circle of restarts.
pub const STABLE_AFTER: Duration = Duration::from_secs(10);
/// How often a group is started that dies while it loads at first.
pub const MAX_FIRST_STARTS: u32 = 3;
/// How long a shard that was started elsewhere may take to answer, before the group's next attempt to get together. Whoever keeps it
/// running may be starting it again.
pub const REACH_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a server waits for shards elsewhere that another one uses. They are kept for that for five seconds.
pub const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a rank may take to leave the old group and to meet the others. It finishes the piece of work that it is at before,
/// and they start and read what they will load.
pub const REGROUP_TIMEOUT: Duration = Duration::from_secs(90);
/// How long a shard that is killed is waited for. To give back the memory of a large model takes seconds; one that the system does
/// not let go, in a driver or on a disk that does not answer, is left behind.
pub const KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a server that has stopped waits for its clients to take their last answers.
pub const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

/// Bytes that all requests together hold, unless told otherwise: their messages until the media in them are decoded,
/// and the media's pixels until they are encoded.
pub const DEFAULT_MEDIA_BYTES: u64 = 4 << 30;
/// Bytes of uploaded files that are kept, unless told otherwise.
pub const DEFAULT_LIBRARY_BYTES: u64 = 1 << 30;
/// How many times the shorter side of a picture the longer one may be.
pub const MAX_ASPECT_RATIO: u64 = 200;
/// Pixels of a picture's file, by its header: a bound on the memory that decoding takes.
pub const MAX_SOURCE_PIXELS: u64 = 64 << 20;
/// How long a video may be, and how far apart its frames.
pub const MAX_VIDEO_SECONDS: f64 = 4.0 * 3600.0;
/// Seconds between temporal patches, of two frames each, that any medium may have.
pub const MAX_SECONDS_PER_GRID_T: f64 = 2.0 * MAX_VIDEO_SECONDS;
/// Frames per second of video that a request may ask for.
pub const MAX_FPS: f64 = 1e6;
/// Pixels of all pictures and of all frames of all videos' files in one request, taken or not: what decoding costs. Five minutes
/// of 1920 x 1080 at 30 frames a second.
pub const MAX_DECODED_PIXELS: u64 = 9_000 * 1920 * 1088;
/// How long decoding one video may take on a clock.
pub const MAX_VIDEO_DECODING: Duration = Duration::from_secs(120);
/// Seconds of a processor's time that decoding one video may take. Fewer than on the clock: a video that takes too long is found
/// out by this, and a machine that is too busy by the other.
pub const MAX_VIDEO_CPU_SECONDS: u64 = 90;
/// Tokens of vision features that are kept unless told otherwise, at least.
pub const MIN_FEATURE_TOKENS: u64 = 4_096;

/// Part of a GPU's memory that the shards on it take. The rest is for the driver's own, and for what others do there.
pub const DEFAULT_GPU_MEMORY: f64 = 0.9;

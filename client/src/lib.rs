//! A Rust client of Lockstep with a typed API, and the verbs `ask` and `bench` on it.
//!
//! ```no_run
//! use lockstep_client::{Client, Image, Request};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::connect("127.0.0.1:8470").await?;
//! let request = Request::new().user((Image::open("cat.jpg")?, "What is this?")).max_tokens(100);
//! let answer = client.generate(&request).await?;
//! println!("{}", answer.text());
//! # Ok(())
//! # }
//! ```
//!
//! [`Client::stream`] gives the same answer as [`Event`]s while it is being written; dropping the [`AnswerStream`]
//! cancels the request on the server. Every failure is an [`Error`] that keeps the status code and the fields at fault.
//!
//! The crate speaks the public API only: it knows neither the server's code nor the shards'.

#![forbid(unsafe_code)]

mod answer;
mod ask;
mod bench;
mod client;
mod error;
#[cfg(test)]
mod fake;
mod model;
mod request;
mod stream;
#[cfg(test)]
mod tests;
mod upload;

pub use answer::{
    Answer, Choice, Completed, Delta, Event, FinishReason, Finished, Media, MediaKind, Partial,
    PositionLogprobs, Started, Timings, TokenLogprob, Usage,
};
pub use ask::{AskArgs, ask};
pub use bench::{BenchArgs, bench};
pub use client::{Client, ClientBuilder, TokenCount};
pub use error::{Error, FieldViolation, Refusal};
pub use model::{Model, ShardMemory};
pub use request::{Image, ImageError, IntoParts, Message, Part, Request, Role};
pub use stream::AnswerStream;
pub use tonic::Code;
pub use upload::MediaId;

/// Where `ask` and `bench` look for the server unless told otherwise; what `lockstep serve` listens on by default.
pub const DEFAULT_SERVER: &str = "127.0.0.1:8470";

/// The README's Rust compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;

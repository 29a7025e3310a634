//! The command line of `bench`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, value_parser};

use crate::{DEFAULT_SERVER, ask::seconds};

/// The command line of `bench`.
#[derive(Debug, Clone, Args)]
#[command(
    about = "Measure how fast a server answers",
    long_about = "Measure how fast a server answers.\n\n\
        With the default --concurrency 1 the figures are those of a single stream: under \"on the server\", decode is the \
        time of one decode step at batch 1, prefill that of a prompt of --prompt-tokens, and vision that of encoding \
        --image. More concurrency measures throughput."
)]
pub struct BenchArgs {
    /// Where the server is.
    #[arg(long, value_name = "HOST:PORT", default_value = DEFAULT_SERVER)]
    pub(crate) server: String,

    /// Requests in flight at a time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=4096))]
    pub(crate) concurrency: u32,

    /// Requests to measure.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = value_parser!(u32).range(1..))]
    pub(crate) requests: u32,

    /// Tokens of each prompt, chat template included, picture not.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = value_parser!(u32).range(1..))]
    pub(crate) prompt_tokens: u32,

    /// Tokens of each answer; all of them are generated, since the model's own end is ignored.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = value_parser!(u32).range(1..))]
    pub(crate) max_tokens: u32,

    /// A picture to send with each request.
    #[arg(long, value_name = "FILE", group = "picture")]
    pub(crate) image: Option<PathBuf>,

    /// Measure one stream's gaps between tokens instead: alone, for --max-tokens tokens, and while a request with this picture
    /// waits for its first one.
    #[arg(long, value_name = "FILE", group = "picture", conflicts_with_all = ["concurrency", "requests", "warmup"])]
    pub(crate) beside_picture: Option<PathBuf>,

    /// The same with a prompt of this many tokens instead of a picture.
    #[arg(long, value_name = "TOKENS", value_parser = value_parser!(u32).range(1..),
        conflicts_with_all = ["picture", "concurrency", "requests", "warmup"])]
    pub(crate) beside_prompt: Option<u32>,

    /// Exact width of the picture for the model, a multiple of 28.
    #[arg(long, value_name = "PIXELS", requires = "picture", requires = "resized_height")]
    pub(crate) resized_width: Option<u32>,

    /// Exact height of the picture for the model, a multiple of 28.
    #[arg(long, value_name = "PIXELS", requires = "picture", requires = "resized_width")]
    pub(crate) resized_height: Option<u32>,

    /// Requests before the measured ones [default: as many as --concurrency].
    #[arg(long, value_name = "N")]
    pub(crate) warmup: Option<u32>,

    /// Seed of the prompts and of sampling.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,

    /// The time that an answer may take, in seconds [default: as long as it takes].
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) timeout: Option<Duration>,

    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

//! The gaps between the tokens of one stream, alone and while the picture or the long prompt of another request is computed.

use std::{
    io::{self, Write},
    path::PathBuf,
    time::Instant,
};

use anyhow::ensure;
use serde::Serialize;

use super::{
    args::BenchArgs,
    report::{Spread, milliseconds, write_spread},
    run::{Load, client_of, picture_of, time_one},
};
use crate::{AnswerStream, Event};

/// What comes beside the stream.
#[derive(Clone, Debug)]
pub(crate) enum Newcomer {
    /// A picture of this file, after a short prompt.
    Picture(PathBuf),
    /// A prompt of so many tokens.
    Prompt(u32),
}

/// What `bench --beside-picture` and `--beside-prompt` print.
#[derive(Debug, Serialize)]
pub(crate) struct BesideReport {
    server: String,
    newcomer: NewcomerSummary,
    /// Between the tokens before the newcomer was sent.
    pub(crate) alone_ms: Spread,
    /// Between the tokens from then until the newcomer's first token.
    pub(crate) beside_ms: Spread,
    pub(crate) num_beside: usize,
    /// By the server's own clock: of the newcomer.
    media_ms: f64,
    vision_ms: f64,
    prefill_ms: f64,
    /// From sending the newcomer to its first token.
    ttft_ms: f64,
}

#[derive(Debug, Serialize)]
struct NewcomerSummary {
    /// Of its prompt, picture included.
    prompt_tokens: u32,
    picture: Option<PictureSummary>,
}

#[derive(Debug, Serialize)]
struct PictureSummary {
    path: String,
    resized_width: u32,
    resized_height: u32,
    tokens: u32,
}

/// Lets one stream run for `--max-tokens` tokens, then sends the newcomer beside it, until that has its first token.
pub(crate) async fn measure_beside(args: &BenchArgs, newcomer: &Newcomer) -> anyhow::Result<BesideReport> {
    ensure!(args.max_tokens > 1, "--max-tokens {}: one token has no gap", args.max_tokens);
    let client = client_of(args).await?;
    let (path, prompt_tokens) = match newcomer {
        Newcomer::Picture(path) => (Some(path.as_path()), args.prompt_tokens),
        Newcomer::Prompt(tokens) => (None, *tokens),
    };
    let picture = picture_of(args, path)?;
    let mut of_stream = Load::prepare(args, &client, None, 2).await?;
    of_stream.warm_up(&client, 1).await?;
    let of_newcomer = BenchArgs { prompt_tokens, ..args.clone() };
    let of_newcomer = Load::prepare(&of_newcomer, &client, picture, 1).await?.salted_like(&of_stream);

    // The stream outlasts the newcomer: it ends when it is dropped.
    let mut stream = client.stream(&of_stream.request(1).max_tokens(u32::MAX)).await?;
    let mut times = Vec::new();
    while times.len() < args.max_tokens as usize {
        times.extend(next_token(&mut stream).await?);
    }
    let num_alone = times.len();
    let request = of_newcomer.request(0).max_tokens(1);
    let asking = time_one(&client, &request);
    tokio::pin!(asking);
    let sample = loop {
        tokio::select! {
            biased;
            sample = &mut asking => break sample?,
            token = next_token(&mut stream) => times.extend(token?),
        }
    };
    // The gap that ends together with the newcomer's first token counts, too.
    let num_before = times.len();
    while times.len() == num_before {
        times.extend(next_token(&mut stream).await?);
    }
    drop(stream);

    let gaps: Vec<f64> = times.windows(2).map(|pair| milliseconds(pair[1] - pair[0])).collect();
    let (alone, beside) = gaps.split_at(num_alone - 1);
    let num_beside = beside.len();
    let spread = |gaps: &[f64]| Spread::new(gaps.to_vec());
    let (Some(alone_ms), Some(beside_ms)) = (spread(alone), spread(beside)) else {
        anyhow::bail!("no token of the stream came beside the other request");
    };
    let picture = match (path, sample.medium) {
        (Some(path), Some((resized_width, resized_height, tokens))) => {
            Some(PictureSummary { path: path.display().to_string(), resized_width, resized_height, tokens })
        }
        (Some(_), None) => anyhow::bail!("the server tells of no picture"),
        (None, _) => None,
    };
    Ok(BesideReport {
        server: args.server.clone(),
        newcomer: NewcomerSummary { prompt_tokens: sample.prompt_tokens, picture },
        alone_ms,
        beside_ms,
        num_beside,
        media_ms: sample.timings.media_ms,
        vision_ms: sample.timings.vision_ms,
        prefill_ms: sample.timings.prefill_ms,
        ttft_ms: milliseconds(sample.ttft),
    })
}

/// When the next event came, if it has a token.
async fn next_token(stream: &mut AnswerStream) -> anyhow::Result<Option<Instant>> {
    match stream.next().await {
        Some(Ok(Event::Delta(delta))) if !delta.token_ids.is_empty() => Ok(Some(Instant::now())),
        Some(Ok(Event::Completed(_))) | None => {
            anyhow::bail!("the stream ended before the other request began: its context is full")
        }
        Some(Ok(_)) => Ok(None),
        Some(Err(error)) => Err(error.into()),
    }
}

impl BesideReport {
    /// Writes the report for people.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let NewcomerSummary { prompt_tokens, picture } = &self.newcomer;
        write!(out, "one stream at {}, and a prompt of {prompt_tokens} tokens", self.server)?;
        if let Some(PictureSummary { path, resized_width, resized_height, tokens }) = picture {
            write!(out, " with {path} as {resized_width}x{resized_height} ({tokens} tokens)")?;
        }
        writeln!(out, "\n")?;
        writeln!(out, "{:<30}{:>10}{:>10}{:>10}{:>10}", "milliseconds", "min", "median", "p95", "max")?;
        write_spread(out, "between tokens, alone", Some(self.alone_ms))?;
        write_spread(out, "between tokens, beside it", Some(self.beside_ms))?;
        let Self { num_beside, media_ms, vision_ms, prefill_ms, ttft_ms, .. } = self;
        writeln!(
            out,
            "\n{num_beside} tokens came beside it, whose first token took {ttft_ms:.0} ms: \
             media {media_ms:.0} ms, vision {vision_ms:.0} ms, prefill {prefill_ms:.0} ms"
        )
    }
}

//! The gaps between the tokens of one stream, alone and while a picture of another request is encoded.

use std::{
    io::{self, Write},
    path::Path,
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

/// What `bench --beside-picture` prints.
#[derive(Debug, Serialize)]
pub(crate) struct BesideReport {
    server: String,
    picture: PictureSummary,
    /// Between the tokens before the picture was sent.
    pub(crate) alone_ms: Spread,
    /// Between the tokens from then until the first token about the picture.
    pub(crate) beside_ms: Spread,
    pub(crate) num_beside: usize,
    /// By the server's own clock: of the request with the picture.
    media_ms: f64,
    vision_ms: f64,
    prefill_ms: f64,
    /// From sending the picture to the first token about it.
    ttft_ms: f64,
}

#[derive(Debug, Serialize)]
struct PictureSummary {
    path: String,
    resized_width: u32,
    resized_height: u32,
    tokens: u32,
}

/// Lets one stream run for `--max-tokens` tokens, then asks about the picture beside it, until that has its first token.
pub(crate) async fn measure_beside(args: &BenchArgs, path: &Path) -> anyhow::Result<BesideReport> {
    ensure!(args.max_tokens > 1, "--max-tokens {}: one token has no gap", args.max_tokens);
    let client = client_of(args).await?;
    let picture = picture_of(args, Some(path))?;
    let mut of_stream = Load::prepare(args, &client, None, 2).await?;
    of_stream.warm_up(&client, 1).await?;
    let of_picture = Load::prepare(args, &client, picture, 1).await?.salted_like(&of_stream);

    // The stream outlasts the picture: it ends when it is dropped.
    let mut stream = client.stream(&of_stream.request(1).max_tokens(u32::MAX)).await?;
    let mut times = Vec::new();
    while times.len() < args.max_tokens as usize {
        times.extend(next_token(&mut stream).await?);
    }
    let num_alone = times.len();
    let request = of_picture.request(0).max_tokens(1);
    let asking = time_one(&client, &request);
    tokio::pin!(asking);
    let sample = loop {
        tokio::select! {
            biased;
            sample = &mut asking => break sample?,
            token = next_token(&mut stream) => times.extend(token?),
        }
    };
    drop(stream);

    let gaps: Vec<f64> = times.windows(2).map(|pair| milliseconds(pair[1] - pair[0])).collect();
    let (alone, beside) = gaps.split_at(num_alone - 1);
    let num_beside = beside.len();
    let spread = |gaps: &[f64]| Spread::new(gaps.to_vec());
    let (Some(alone_ms), Some(beside_ms)) = (spread(alone), spread(beside)) else {
        anyhow::bail!("no token of the stream came while the picture was encoded");
    };
    let Some((resized_width, resized_height, tokens)) = sample.medium else {
        anyhow::bail!("the server tells of no picture");
    };
    Ok(BesideReport {
        server: args.server.clone(),
        picture: PictureSummary { path: path.display().to_string(), resized_width, resized_height, tokens },
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
            anyhow::bail!("the stream ended before the picture was encoded: its context is full")
        }
        Some(Ok(_)) => Ok(None),
        Some(Err(error)) => Err(error.into()),
    }
}

impl BesideReport {
    /// Writes the report for people.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let PictureSummary { path, resized_width, resized_height, tokens } = &self.picture;
        writeln!(
            out,
            "one stream at {}, and {path} as {resized_width}x{resized_height} ({tokens} tokens)\n",
            self.server
        )?;
        writeln!(out, "{:<30}{:>10}{:>10}{:>10}{:>10}", "milliseconds", "min", "median", "p95", "max")?;
        write_spread(out, "between tokens, alone", Some(self.alone_ms))?;
        write_spread(out, "between tokens, beside it", Some(self.beside_ms))?;
        let Self { num_beside, media_ms, vision_ms, prefill_ms, ttft_ms, .. } = self;
        writeln!(
            out,
            "\n{num_beside} tokens came beside the picture, whose first token took {ttft_ms:.0} ms: \
             media {media_ms:.0} ms, vision {vision_ms:.0} ms, prefill {prefill_ms:.0} ms"
        )
    }
}

//! Sending the load and timing the answers.

use std::{
    io::{self, StdoutLock, Write},
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use futures::{StreamExt, stream};
use serde::Serialize;

use super::{
    args::BenchArgs,
    beside::{Newcomer, measure_beside},
    prompt::PromptMaker,
    report::{Report, Tally},
};
use crate::{Client, Code, Error, Event, Image, Part, Request, Timings, ask::connect};

/// Runs `bench` and prints its report. An error if any of the measured requests failed; the report is printed all the
/// same.
pub async fn bench(args: BenchArgs) -> anyhow::Result<()> {
    let picture = args.beside_picture.clone().map(Newcomer::Picture);
    if let Some(newcomer) = picture.or(args.beside_prompt.map(Newcomer::Prompt)) {
        let report = measure_beside(&args, &newcomer).await?;
        return print(&args, &report, |out| report.write(out));
    }
    let report = measure(&args).await?;
    print(&args, &report, |out| report.write(out))?;
    let failed = report.num_failed();
    anyhow::ensure!(failed == 0, "{failed} of {} requests failed", args.requests);
    Ok(())
}

fn print(
    args: &BenchArgs,
    report: &impl Serialize,
    write: impl FnOnce(&mut StdoutLock<'_>) -> io::Result<()>,
) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let written = if args.json {
        serde_json::to_writer_pretty(&mut out, report).map_err(io::Error::from).and_then(|()| writeln!(out))
    } else {
        write(&mut out)
    };
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// One request, timed from here.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    /// From sending to the first token.
    pub(crate) ttft: Duration,
    /// From the first token to the last, by the number of tokens that came after the first event with tokens.
    pub(crate) tpot: Option<Duration>,
    /// From sending to the end.
    pub(crate) latency: Duration,
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    /// Width and height for the model, and tokens, of the picture.
    pub(crate) medium: Option<(u32, u32, u32)>,
    pub(crate) timings: Timings,
}

/// Warms the server up, measures, and asks for the shards' memory.
pub(crate) async fn measure(args: &BenchArgs) -> anyhow::Result<Report> {
    let image = picture_of(args, args.image.as_deref())?;
    let client = client_of(args).await?;

    let warmup = args.warmup.unwrap_or(args.concurrency) as usize;
    let mut load = Load::prepare(args, &client, image, warmup + args.requests as usize).await?;
    load.warm_up(&client, warmup).await?;

    let start = Instant::now();
    let samples = load.send(&client, args.concurrency as usize, warmup..load.prompts.len()).await;
    let wall = start.elapsed();

    let mut tally = Tally::default();
    for sample in samples {
        tally.add(sample.and_then(|sample| load.whole(sample)));
    }
    Ok(Report::new(args, &client.model().await?, wall, &tally))
}

/// The picture of a file, at the size that was asked for.
pub(crate) fn picture_of(args: &BenchArgs, path: Option<&Path>) -> anyhow::Result<Option<Image>> {
    let image = path.map(Image::open).transpose()?;
    let (Some(width), Some(height)) = (args.resized_width, args.resized_height) else { return Ok(image) };
    Ok(image.map(|image| image.resized_width(width).resized_height(height)))
}

pub(crate) async fn client_of(args: &BenchArgs) -> anyhow::Result<Client> {
    let builder = args.timeout.map_or_else(Client::builder, |timeout| Client::builder().timeout(timeout));
    connect(builder, &args.server).await
}

/// The requests of a run, none like another, so that no cache helps.
pub(crate) struct Load {
    prompts: Vec<String>,
    image: Option<Image>,
    max_tokens: u32,
    seed: u64,
    /// Differs between runs, for servers that remember the last run's pictures. None where the server takes no salts.
    salt: Option<String>,
}

impl Load {
    pub(crate) async fn prepare(
        args: &BenchArgs,
        client: &Client,
        image: Option<Image>,
        count: usize,
    ) -> anyhow::Result<Self> {
        let mut maker = PromptMaker::new(client, args.prompt_tokens);
        let mut prompts = Vec::with_capacity(count);
        for index in 0..count {
            prompts.push(maker.make(args.seed.wrapping_mul(1 << 32).wrapping_add(index as u64)).await?);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let salt = Some(format!("bench-{}-{}", args.seed, now.as_nanos()));
        Ok(Load { prompts, image, max_tokens: args.max_tokens, seed: args.seed, salt })
    }

    /// The same requests, with salts only if `other` has some.
    pub(crate) fn salted_like(self, other: &Load) -> Self {
        Load { salt: self.salt.filter(|_| other.salt.is_some()), ..self }
    }

    pub(crate) fn request(&self, index: usize) -> Request {
        let mut parts: Vec<Part> = self.image.iter().cloned().map(Part::from).collect();
        parts.push(self.prompts[index].as_str().into());
        let request = Request::new()
            .user(parts)
            .max_tokens(self.max_tokens)
            .ignore_eos(true)
            .seed(self.seed.wrapping_add(index as u64));
        match &self.salt {
            Some(salt) => request.cache_salt(format!("{salt}-{index}")),
            None => request,
        }
    }

    /// The first `count` requests. A request that fails here ends the run: the rest would fail as well.
    pub(crate) async fn warm_up(&mut self, client: &Client, count: usize) -> anyhow::Result<()> {
        if count == 0 {
            return Ok(());
        }
        let first = time_one(client, &self.request(0)).await;
        if matches!(&first, Err(error) if error.code() == Some(Code::Unimplemented)) {
            self.salt = None;
            time_one(client, &self.request(0)).await?;
        } else {
            first?;
        }
        for sample in self.send(client, count, 1..count).await {
            sample?;
        }
        Ok(())
    }

    async fn send(
        &self,
        client: &Client,
        concurrency: usize,
        indices: std::ops::Range<usize>,
    ) -> Vec<Result<Sample, Error>> {
        stream::iter(indices)
            .map(|index| {
                let (client, request) = (client.clone(), self.request(index));
                async move { time_one(&client, &request).await }
            })
            .buffer_unordered(concurrency)
            .collect()
            .await
    }

    /// Refuses a sample of another length than asked for: its figures would not be comparable.
    fn whole(&self, sample: Sample) -> Result<Sample, Error> {
        if sample.completion_tokens == self.max_tokens {
            return Ok(sample);
        }
        Err(Error::Protocol(format!(
            "{} tokens asked for, {} came",
            self.max_tokens, sample.completion_tokens
        )))
    }
}

pub(crate) async fn time_one(client: &Client, request: &Request) -> Result<Sample, Error> {
    let sent = Instant::now();
    let mut stream = client.stream(request).await?;
    let mut started = None;
    // When tokens first came, and when last; how many came after the first time.
    let mut first_at: Option<Instant> = None;
    let mut last_at = sent;
    let mut num_after_first = 0;
    let mut completed = None;
    while let Some(event) = stream.next().await {
        match event? {
            Event::Started(event) => started = Some(event),
            Event::Delta(delta) if !delta.token_ids.is_empty() => {
                last_at = Instant::now();
                if first_at.is_none() {
                    first_at = Some(last_at);
                } else {
                    num_after_first += delta.token_ids.len() as u32;
                }
            }
            Event::Delta(_) | Event::Finished(_) => {}
            Event::Completed(event) => completed = Some(event),
        }
    }
    let lacks = |what: &str| Error::Protocol(format!("it lacks {what}"));
    let started = started.ok_or_else(|| lacks("`started`"))?;
    let completed = completed.ok_or_else(|| lacks("`completed`"))?;
    let first_at = first_at.ok_or_else(|| lacks("tokens"))?;
    Ok(Sample {
        ttft: first_at - sent,
        tpot: (num_after_first > 0).then(|| (last_at - first_at) / num_after_first),
        latency: sent.elapsed(),
        prompt_tokens: started.prompt_tokens,
        completion_tokens: completed.usage.completion_tokens,
        medium: started.media.first().map(|media| (media.resized_width, media.resized_height, media.tokens)),
        timings: completed.timings,
    })
}

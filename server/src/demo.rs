//! `lockstep demo`: the whole system on one machine, on a small checkpoint that has learnt to answer.

pub mod checkpoint;
pub mod draw;
pub mod exhibits;
pub mod questions;
pub mod scenes;
pub mod sheet;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use image::ImageFormat;
use lockstep_client::{Client, Completed, Event, Media, Request};
use rand::SeedableRng;
use rand::rngs::StdRng;

use self::exhibits::Exhibit;
use self::questions::{Expected, Question, boxed};
use self::sheet::{Answered, Entry, sheet};
use crate::config::{Config, ServeArgs};
use crate::serve::Server;

/// See the whole system work, on a small checkpoint that answers questions about shapes.
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// Number of tensor-parallel shards, 1 to 8
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub world_size: u32,
    /// Seed of the pictures: another number, other pictures [default: random]
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u32>,
    /// PNG file for all pictures, with questions, answers and boxes [default: lockstep-demo.png, here or among temporary files]
    #[arg(long, value_name = "FILE")]
    pub sheet: Option<PathBuf>,
}

/// More than the longest answer.
const MAX_TOKENS: u32 = 80;

/// Runs the demonstration.
///
/// # Errors
/// When the server does not start, an answer fails, or the sheet cannot be written.
pub async fn demo(args: DemoArgs) -> anyhow::Result<()> {
    let folder = tempfile::tempdir().context("making a folder for the checkpoint")?;
    checkpoint::write(folder.path())?;
    let seed = args.seed.unwrap_or_else(rand::random);
    let exhibits = exhibits::all(&mut StdRng::seed_from_u64(seed.into()))?;
    let (path, mut file) = create_sheet(args.sheet.as_deref())?;
    introduce();
    let server = Server::start(config(folder.path(), &args)?, &mut |line| println!("{line}")).await?;
    let entries = show(&server.address().to_string(), &exhibits).await;
    server.stop().await?;
    let entries = entries?;
    let answers: Vec<_> = entries.iter().flat_map(|entry| &entry.answers).collect();
    let right = answers.iter().filter(|answer| answer.is_right).count();
    let told = format!("{right} of {} answers are right (--seed {seed})", answers.len());
    let picture = sheet(&format!("Lockstep demo: {told}"), &entries);
    println!();
    println!("{told}. {} shows them all.", path.display());
    picture.write_to(&mut file, ImageFormat::Png).with_context(|| format!("writing {}", path.display()))?;
    say_what_next();
    Ok(())
}

/// The file for the sheet, before anything is asked for it.
fn create_sheet(asked: Option<&Path>) -> anyhow::Result<(PathBuf, File)> {
    const NAME: &str = "lockstep-demo.png";
    let create = |path: PathBuf| {
        let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        anyhow::Ok((path, file))
    };
    match asked {
        Some(path) => create(path.to_owned()).context("--sheet"),
        None => create(NAME.into()).or_else(|_| create(std::env::temp_dir().join(NAME))),
    }
}

fn introduce() {
    println!("Lockstep demo");
    println!();
    println!(
        "The checkpoint is Lockstep's own: the architecture of Qwen2.5-VL with 3 million parameters. It was trained"
    );
    println!(
        "on drawings of coloured shapes, and knows nothing else of the world. The pictures and films below are drawn"
    );
    println!(
        "now; it has seen neither them nor the photographs behind them. So small a model is wrong now and then."
    );
    println!();
}

fn config(folder: &Path, args: &DemoArgs) -> anyhow::Result<Config> {
    Config::new(ServeArgs {
        world_size: args.world_size,
        listen: "127.0.0.1:0".to_owned(),
        name: Some("shapes".to_owned()),
        kv_tokens: Some(4_096),
        max_context_tokens: Some(1_024),
        max_image_tokens: Some(256),
        ..ServeArgs::new(folder)
    })
}

async fn show(server: &str, exhibits: &[Exhibit]) -> anyhow::Result<Vec<Entry>> {
    let client = Client::connect(server).await?;
    let mut entries = vec![];
    for exhibit in exhibits {
        println!();
        println!("{}", exhibit.title);
        let mut answers = vec![];
        for question in &exhibit.questions {
            let answer = ask(&client, exhibit, question).await?;
            let is_right = question.is_right(&answer);
            let bounds = matches!(question.expected, Expected::Bounds(_)).then(|| boxed(&answer)).flatten();
            answers.push(Answered { question: question.text.clone(), answer, bounds, is_right });
        }
        entries.push(Entry { pictures: exhibit.shown.clone(), title: exhibit.title.clone(), answers });
    }
    Ok(entries)
}

/// Streams one answer to the terminal, with whether it is right.
async fn ask(client: &Client, exhibit: &Exhibit, question: &Question) -> anyhow::Result<String> {
    let asked = exhibit.parts.iter().cloned().chain([question.text.as_str().into()]).collect::<Vec<_>>();
    let mut stream = client.stream(&Request::new().user(asked).max_tokens(MAX_TOKENS)).await?;
    let mut answer = String::new();
    let mut seen = String::new();
    while let Some(event) = stream.next().await {
        match event? {
            Event::Started(started) => {
                seen = started.media.iter().map(describe).collect::<Vec<_>>().join(" and ");
                print!("  {}\n  > ", question.text);
            }
            Event::Delta(delta) => {
                // A model may say anything, but not to the terminal.
                print!("{}", delta.text.replace(char::is_control, "\u{fffd}"));
                std::io::stdout().flush()?;
                answer.push_str(&delta.text);
            }
            Event::Finished(_) => {
                println!("   {}", if question.is_right(&answer) { "(right)" } else { "(WRONG)" });
            }
            Event::Completed(Completed { usage, timings }) => println!(
                "    {seen}; {} tokens in, {} of them from the cache, {} out; vision {:.1} ms, prefill {:.1} ms, decode {:.1} ms",
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens,
                timings.vision_ms,
                timings.prefill_ms,
                timings.decode_ms,
            ),
        }
    }
    Ok(answer)
}

fn describe(media: &Media) -> String {
    let frames = match media.timestamps_s.len() {
        0 => String::new(),
        frames => format!("{frames} frames of "),
    };
    format!("{frames}{} x {}", media.resized_width, media.resized_height)
}

fn say_what_next() {
    println!();
    println!(
        "To get answers about everything else, serve Qwen/Qwen2.5-VL-7B-Instruct from its folder, and ask it:"
    );
    println!();
    println!("  lockstep serve --model /path/to/Qwen2.5-VL-7B-Instruct --world-size 2");
    println!("  lockstep ask --image tests/pictures/cat.jpg \"What is this?\"");
    println!("  lockstep ask --video tests/videos/bunny.mp4 \"What happens?\"");
    println!();
    println!("(`cargo run --release --` stands for `lockstep` in a source tree.)");
}

//! The command line of `ask`, with its parts in the order in which they were typed.

use std::{path::PathBuf, time::Duration};

use clap::{ArgMatches, Args, Command, FromArgMatches, error::ErrorKind};

use super::media::{MediumArg, MediumKind, Setting};
use crate::{DEFAULT_SERVER, Message, Part, Request, Role};

/// The command line of `ask`.
///
/// Derived parsers keep the values of each option together and so lose the order between texts and media; this type
/// recovers it from the values' places on the command line.
#[derive(Debug, Clone)]
pub struct AskArgs {
    /// The parts of the first message, in the order of the command line.
    pub(crate) parts: Vec<PartArg>,
    /// Everything else.
    pub(crate) flags: Flags,
}

/// A part as it was typed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum PartArg {
    /// A text.
    Text(String),
    /// A picture or video.
    Medium(MediumArg),
}

/// What clap parses; texts, media and what is said of media are read again in their order.
#[derive(Debug, Clone, Args)]
#[command(about = "Ask a server a question about pictures and videos", long_about = None)]
pub(crate) struct Flags {
    /// What to ask. Texts, pictures and videos are sent in the order of the command line.
    #[arg(value_name = "TEXT")]
    texts: Vec<String>,

    /// A picture: PNG, JPEG, WebP, GIF (first frame), BMP or TIFF.
    #[arg(long = "image", short = 'i', value_name = "FILE")]
    images: Vec<PathBuf>,

    /// A video: MP4 (H.264), GIF or animated WebP; others where the server has an ffmpeg.
    #[arg(long = "video", value_name = "FILE")]
    videos: Vec<PathBuf>,

    /// A video of the pictures of a folder, in the order of their names and all taken; --fps says how many make a second.
    #[arg(long = "frames", value_name = "DIR")]
    frames: Vec<PathBuf>,

    /// Enlarge the picture, or each frame of the video, before this flag to at least N pixels; before the first picture or
    /// video: all of them.
    #[arg(long, value_name = "N")]
    min_pixels: Vec<u32>,

    /// Reduce it to at most N pixels, likewise.
    #[arg(long, value_name = "N")]
    max_pixels: Vec<u32>,

    /// Take F frames per second of the video before this flag, before the first: of every video [default: 2]; after --frames:
    /// F pictures make a second.
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    fps: Vec<f64>,

    /// Take at most N frames of the video before this flag; before the first: of every video.
    #[arg(long, value_name = "N")]
    max_frames: Vec<u32>,

    /// Reduce all frames of the video before this flag to at most N pixels together, two neighbours counted as one; before the
    /// first: of every video.
    #[arg(long, value_name = "N")]
    total_pixels: Vec<u64>,

    /// Exact width for the model of the picture before this flag, a multiple of 28; before the first picture: of every
    /// picture.
    #[arg(long, value_name = "PIXELS")]
    resized_width: Vec<u32>,

    /// Exact height for the model, likewise.
    #[arg(long, value_name = "PIXELS")]
    resized_height: Vec<u32>,

    /// Instructions to the model, instead of the checkpoint's own.
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,

    /// Where the server is.
    #[arg(long, value_name = "HOST:PORT", default_value = DEFAULT_SERVER)]
    pub(crate) server: String,

    /// The most tokens to generate [default: what is left of the context].
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<u32>,

    /// Temperature of sampling; 0 is greedy [default: the checkpoint's].
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,

    /// Draw from the N most probable tokens; 0 is all [default: the checkpoint's].
    #[arg(long, value_name = "N")]
    pub(crate) top_k: Option<u32>,

    /// Draw from the fewest tokens that have this part of the probability [default: the checkpoint's].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,

    /// Draw from tokens at least this fraction as probable as the most probable [default: 0, all].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,

    /// The same seed and question give the same answer [default: drawn by the server].
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,

    /// Penalty on tokens that were used before; 1 is none [default: the checkpoint's].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) repetition_penalty: Option<f32>,

    /// Penalty on tokens that the answer has already [default: 0].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f32>,

    /// Penalty on tokens that the answer has already, for each time [default: 0].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,

    /// Make a token more or less likely: added to its logit. May be given several times.
    #[arg(long, value_name = "ID=BIAS", value_parser = token_bias)]
    pub(crate) logit_bias: Vec<(u32, f32)>,

    /// A text that ends the answer. May be given several times.
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,

    /// Go on past the model's own end of the answer.
    #[arg(long)]
    pub(crate) ignore_eos: bool,

    /// Give N answers to the question, drawn apart; with --chat the first goes on.
    #[arg(long = "n", short = 'n', value_name = "N")]
    pub(crate) n: Option<u32>,

    /// Give each token's log-probability, and those of the N most probable tokens.
    #[arg(long, value_name = "N")]
    pub(crate) logprobs: Option<u32>,

    /// The time that an answer may take, in seconds [default: as long as it takes].
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) timeout: Option<Duration>,

    /// Go on with the conversation: read further questions from standard input, one a line, until its end or /exit.
    #[arg(long)]
    pub(crate) chat: bool,

    /// Print one JSON object instead of the text; with --chat one a line for each answer.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Parses a positive number of seconds.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("not a positive number of seconds".to_owned()),
    }
}

/// Parses a token and its bias, as in `5=-2.5`.
fn token_bias(text: &str) -> Result<(u32, f32), String> {
    let (token, bias) = text.split_once('=').ok_or("not of the form ID=BIAS")?;
    let token = token.parse().map_err(|_| format!("{token:?} is not a token id"))?;
    let bias = bias.parse().map_err(|_| format!("{bias:?} is not a number"))?;
    Ok((token, bias))
}

impl Args for AskArgs {
    fn augment_args(command: Command) -> Command {
        Flags::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Flags::augment_args_for_update(command)
    }
}

impl FromArgMatches for AskArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let flags = Flags::from_arg_matches(matches)?;
        let parts = parts_in_order(matches)?;
        if parts.is_empty() && !flags.chat {
            return Err(clap::Error::raw(
                ErrorKind::MissingRequiredArgument,
                "nothing to ask: give a text, a picture with --image, a video with --video, or --chat\n",
            ));
        }
        Ok(AskArgs { parts, flags })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = AskArgs::from_arg_matches(matches)?;
        Ok(())
    }
}

/// What stands at one place of the command line.
enum Piece {
    Text(String),
    Medium(MediumKind, PathBuf),
    Setting(Setting),
}

fn parts_in_order(matches: &ArgMatches) -> Result<Vec<PartArg>, clap::Error> {
    let mut pieces = placed(matches, "texts", Piece::Text);
    for (name, kind) in
        [("images", MediumKind::Image), ("videos", MediumKind::Video), ("frames", MediumKind::Frames)]
    {
        pieces.extend(placed(matches, name, |path| Piece::Medium(kind, path)));
    }
    pieces.extend(placed(matches, "min_pixels", |n| Piece::Setting(Setting::MinPixels(n))));
    pieces.extend(placed(matches, "max_pixels", |n| Piece::Setting(Setting::MaxPixels(n))));
    pieces.extend(placed(matches, "resized_width", |n| Piece::Setting(Setting::ResizedWidth(n))));
    pieces.extend(placed(matches, "resized_height", |n| Piece::Setting(Setting::ResizedHeight(n))));
    pieces.extend(placed(matches, "fps", |n| Piece::Setting(Setting::Fps(n))));
    pieces.extend(placed(matches, "max_frames", |n| Piece::Setting(Setting::MaxFrames(n))));
    pieces.extend(placed(matches, "total_pixels", |n| Piece::Setting(Setting::TotalPixels(n))));
    pieces.sort_by_key(|(index, _)| *index);

    let mut parts = Vec::new();
    let mut for_all = Vec::new();
    let mut last_medium = None;
    for (_, piece) in pieces {
        match piece {
            Piece::Text(text) => parts.push(PartArg::Text(text)),
            Piece::Medium(kind, path) => {
                last_medium = Some(parts.len());
                parts.push(PartArg::Medium(MediumArg::new(kind, path, &for_all)));
            }
            Piece::Setting(setting) => match last_medium.map(|index: usize| &mut parts[index]) {
                Some(PartArg::Medium(medium)) => medium.set(setting).map_err(wrong)?,
                _ => for_all.push(setting),
            },
        }
    }
    let media = || {
        parts.iter().filter_map(|part| if let PartArg::Medium(medium) = part { Some(medium) } else { None })
    };
    if let Some(setting) = for_all.iter().find(|setting| !media().any(|medium| setting.fits(medium.kind))) {
        return Err(wrong(format!(
            "{} is given, but nothing that it is for: {}",
            setting.flag(),
            setting.whom()
        )));
    }
    media().try_for_each(MediumArg::check).map_err(wrong)?;
    Ok(parts)
}

fn wrong(words: String) -> clap::Error {
    clap::Error::raw(ErrorKind::MissingRequiredArgument, words + "\n")
}

/// The values of one argument, each with its index on the command line.
fn placed<T: Clone + Send + Sync + 'static>(
    matches: &ArgMatches,
    name: &str,
    piece: impl Fn(T) -> Piece,
) -> Vec<(usize, Piece)> {
    let indices = matches.indices_of(name).into_iter().flatten();
    let values = matches.get_many::<T>(name).into_iter().flatten().cloned();
    indices.zip(values.map(piece)).collect()
}

impl AskArgs {
    /// Reads the pictures and videos; the parts of the first message. What every turn of a conversation sends again, it sends by
    /// its id.
    pub(crate) fn load_parts(&self) -> anyhow::Result<Vec<Part>> {
        let load = |part: &PartArg| match part {
            PartArg::Text(text) => Ok(Part::Text(text.clone())),
            PartArg::Medium(medium) => medium.load(),
        };
        let by_id = |part| if self.flags.chat { Part::by_id(part) } else { part };
        self.parts.iter().map(|part| load(part).map(by_id)).collect()
    }

    /// The request without the turns of the conversation.
    pub(crate) fn base_request(&self) -> Request {
        let flags = &self.flags;
        let mut request = Request::new();
        if let Some(system) = &flags.system {
            request = request.message(Message::new(Role::System, system.as_str()));
        }
        if let Some(tokens) = flags.max_tokens {
            request = request.max_tokens(tokens);
        }
        if let Some(temperature) = flags.temperature {
            request = request.temperature(temperature);
        }
        if let Some(top_k) = flags.top_k {
            request = request.top_k(top_k);
        }
        if let Some(top_p) = flags.top_p {
            request = request.top_p(top_p);
        }
        if let Some(min_p) = flags.min_p {
            request = request.min_p(min_p);
        }
        if let Some(seed) = flags.seed {
            request = request.seed(seed);
        }
        if let Some(penalty) = flags.repetition_penalty {
            request = request.repetition_penalty(penalty);
        }
        if let Some(penalty) = flags.presence_penalty {
            request = request.presence_penalty(penalty);
        }
        if let Some(penalty) = flags.frequency_penalty {
            request = request.frequency_penalty(penalty);
        }
        for (token_id, bias) in &flags.logit_bias {
            request = request.logit_bias(*token_id, *bias);
        }
        for text in &flags.stop {
            request = request.stop(text);
        }
        if flags.ignore_eos {
            request = request.ignore_eos(true);
        }
        if let Some(n) = flags.n {
            request = request.n(n);
        }
        if let Some(alternatives) = flags.logprobs {
            request = request.logprobs(alternatives);
        }
        if let Some(timeout) = flags.timeout {
            request = request.timeout(timeout);
        }
        request
    }
}

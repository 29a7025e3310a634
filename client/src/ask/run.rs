//! Asking, and printing the answer while it is being written.

use std::io::{self, IsTerminal, Write};

use tokio::io::{AsyncBufRead, AsyncBufReadExt, BufReader};

use super::{
    args::AskArgs,
    summary::{CutSummary, Summary, write_logprobs},
};
use crate::{
    Answer, Client, ClientBuilder, Event, Message, Part, PositionLogprobs, Role, stream::AnswerParts,
};

/// Runs `ask`: sends the question, prints the answer, and with `--chat` goes on with lines from standard input.
///
/// An error is meant for the person at the terminal: its display is one clear message with the fields at fault. A reader
/// of standard output that goes away ends the run quietly, and the request with it.
pub async fn ask(args: AskArgs) -> anyhow::Result<()> {
    let mut console = Console {
        input: BufReader::new(tokio::io::stdin()),
        output: io::stdout(),
        notes: io::stderr(),
        interactive: io::stdin().is_terminal() && io::stderr().is_terminal(),
    };
    let reader_is_gone = |error: &anyhow::Error| {
        error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    match run(&args, &mut console).await {
        Err(error) if reader_is_gone(&error) => Ok(()),
        result => result,
    }
}

/// Where questions come from and answers go.
pub(crate) struct Console<I, O, N> {
    /// Further questions.
    pub(crate) input: I,
    /// Answers.
    pub(crate) output: O,
    /// Prompts and remarks.
    pub(crate) notes: N,
    /// Whether a person types and reads.
    pub(crate) interactive: bool,
}

/// `ask` on any console.
pub(crate) async fn run<I, O, N>(args: &AskArgs, console: &mut Console<I, O, N>) -> anyhow::Result<()>
where
    I: AsyncBufRead + Unpin,
    O: Write,
    N: Write,
{
    let parts = args.load_parts()?;
    let client = connect(Client::builder(), &args.flags.server).await?;
    let mut history = Vec::new();
    if !parts.is_empty() {
        turn(args, &client, &mut history, parts, console).await?;
    }
    if args.flags.chat { chat(args, &client, history, console).await } else { Ok(()) }
}

/// Connects, or says what a person can do about it.
pub(crate) async fn connect(builder: ClientBuilder, server: &str) -> anyhow::Result<Client> {
    builder.connect(server).await.map_err(|error| match error {
        error @ crate::Error::Connect { .. } => anyhow::anyhow!(
            "{error}\nstart one with `lockstep serve --model DIR`, or say where it is with --server HOST:PORT"
        ),
        error => error.into(),
    })
}

/// Goes on until the input ends or says `/exit`. A turn that fails is reported and forgotten, since the person may well
/// want to go on; that it failed is told by the exit code.
async fn chat<I, O, N>(
    args: &AskArgs,
    client: &Client,
    mut history: Vec<Message>,
    console: &mut Console<I, O, N>,
) -> anyhow::Result<()>
where
    I: AsyncBufRead + Unpin,
    O: Write,
    N: Write,
{
    let mut failed = 0;
    loop {
        if console.interactive {
            write!(console.notes, "> ")?;
            console.notes.flush()?;
        }
        let mut line = String::new();
        if console.input.read_line(&mut line).await? == 0 {
            break;
        }
        match line.trim() {
            "" => continue,
            "/exit" => break,
            question => match turn(args, client, &mut history, vec![question.into()], console).await {
                Ok(()) => {}
                Err(error) if error.is::<io::Error>() => return Err(error),
                Err(error) => {
                    failed += 1;
                    writeln!(console.notes, "error: {error:#}")?;
                }
            },
        }
    }
    anyhow::ensure!(failed == 0, "{failed} of the questions got no answer");
    Ok(())
}

/// Asks one question. The question and its answer enter the history together, or not at all.
async fn turn<I, O: Write, N: Write>(
    args: &AskArgs,
    client: &Client,
    history: &mut Vec<Message>,
    parts: Vec<Part>,
    console: &mut Console<I, O, N>,
) -> anyhow::Result<()> {
    let question = Message { role: Role::User, parts };
    let request = args.base_request().messages(history.iter().cloned()).message(question.clone());
    let mut stream = client.stream(&request).await?;
    let mut parts = AnswerParts::default();
    let answer = loop {
        let Some(event) = stream.next().await else {
            anyhow::bail!("the answer ended early");
        };
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                // Whether this can still be written does not matter beside the error.
                let _ = print_cut(args, &parts, &error, console);
                return Err(error.into());
            }
        };
        // Several answers are written at the same time, and printed one after the other at the end.
        if let Event::Delta(delta) = &event
            && !args.flags.json
            && !has_several(args)
            && !delta.text.is_empty()
        {
            console.output.write_all(delta.text.as_bytes())?;
            console.output.flush()?;
        }
        if let Some(answer) = parts.add(event)? {
            break answer;
        }
    };
    print_end(args, &answer, console)?;
    history.push(question);
    history.push(Message::new(Role::Assistant, answer.text()));
    Ok(())
}

fn has_several(args: &AskArgs) -> bool {
    args.flags.n.is_some_and(|n| n > 1)
}

/// Prints one of several answers.
fn print_choice<I, O: Write, N: Write>(
    index: usize,
    text: &str,
    logprobs: &[PositionLogprobs],
    console: &mut Console<I, O, N>,
) -> io::Result<()> {
    writeln!(console.output, "[{}]\n{text}", index + 1)?;
    console.output.flush()?;
    write_logprobs(&mut console.notes, logprobs)
}

/// Prints what came of an answer that was cut, so that the error starts on a line of its own.
fn print_cut<I, O: Write, N: Write>(
    args: &AskArgs,
    parts: &AnswerParts,
    error: &crate::Error,
    console: &mut Console<I, O, N>,
) -> anyhow::Result<()> {
    if args.flags.json {
        let summary = CutSummary::new(parts.so_far(), has_several(args), error);
        writeln!(console.output, "{}", serde_json::to_string(&summary)?)?;
    } else if has_several(args) {
        for (index, (text, _)) in parts.so_far().enumerate() {
            print_choice(index, text, &[], console)?;
        }
    } else if parts.so_far().any(|(text, _)| !text.is_empty()) {
        writeln!(console.output)?;
    }
    Ok(console.output.flush()?)
}

/// Why each answer ended.
fn reasons(answer: &Answer) -> String {
    let reasons: Vec<_> = answer.choices.iter().map(|choice| choice.finished.reason.name()).collect();
    reasons.join(", ")
}

fn print_end<I, O: Write, N: Write>(
    args: &AskArgs,
    answer: &Answer,
    console: &mut Console<I, O, N>,
) -> anyhow::Result<()> {
    if args.flags.json {
        let summary = serde_json::to_string(&Summary::new(answer, args.flags.logprobs.is_some()))?;
        writeln!(console.output, "{summary}")?;
    } else if has_several(args) {
        for (index, choice) in answer.choices.iter().enumerate() {
            print_choice(index, &choice.text, &choice.logprobs, console)?;
        }
    } else {
        writeln!(console.output)?;
        write_logprobs(&mut console.notes, &answer.first().logprobs)?;
    }
    console.output.flush()?;
    if console.interactive && !args.flags.json {
        writeln!(
            console.notes,
            "[{} + {} tokens, {}, {:.2} s]",
            answer.usage.prompt_tokens,
            answer.usage.completion_tokens,
            reasons(answer),
            answer.timings.total_ms / 1e3
        )?;
    }
    Ok(())
}

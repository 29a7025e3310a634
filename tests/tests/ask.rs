//! The verb `ask`, as a person runs it, against a real server.

use std::io::Write;
use std::process::{Command, Stdio};

use lockstep_tests::golden::{self, root};
use lockstep_tests::server::{Server, binary};
use serde_json::Value;

fn server() -> anyhow::Result<Server> {
    let arguments = ["--dtype", "f32", "--world-size", "2", "--max-image-tokens", "1024"];
    Server::start(&root().join("tests/checkpoints/a"), &arguments)
}

fn ask(server: &Server, arguments: &[&str]) -> anyhow::Result<std::process::Output> {
    let mut command = Command::new(binary()?);
    command.current_dir(root()).args(["ask", "--server", server.address()]).args(arguments);
    Ok(command.stdin(Stdio::null()).output()?)
}

fn json(server: &Server, arguments: &[&str]) -> anyhow::Result<Value> {
    let output = ask(server, &[arguments, &["--json"]].concat())?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

#[test]
fn parts_are_sent_in_the_order_of_the_command_line() -> anyhow::Result<()> {
    let server = server()?;
    let [a, b] = ["tests/pictures/noise_33x29.png", "tests/pictures/scene_112x140.png"];
    let greedy = ["--temperature", "0", "--max-tokens", "12", "--ignore-eos", "--logprobs", "3"];
    let one =
        json(&server, &[&["Look:", "--image", a, "and", "--image", b, "Compare."], &greedy[..]].concat())?;
    let other =
        json(&server, &[&["Look:", "--image", b, "and", "--image", a, "Compare."], &greedy[..]].concat())?;
    for field in
        ["text", "token_ids", "prompt_tokens", "logprobs", "media", "finish_reason", "usage", "timings_ms"]
    {
        assert!(!one[field].is_null(), "{field} is missing: {one}");
    }
    assert_eq!(one["token_ids"].as_array().map(Vec::len), Some(12));
    assert_eq!(one["logprobs"].as_array().map(Vec::len), Some(12));
    let reversed: Vec<Value> = other["media"].as_array().expect("media").iter().rev().cloned().collect();
    let width = |media: &Value| media["resized_width"].as_u64();
    let widths: Vec<_> = one["media"].as_array().expect("media").iter().map(width).collect();
    assert_eq!(widths, reversed.iter().map(width).collect::<Vec<_>>());
    assert_eq!(one["prompt_tokens"], other["prompt_tokens"]);
    Ok(())
}

#[test]
fn an_answer_is_the_references_and_the_same_with_its_seed() -> anyhow::Result<()> {
    let server = server()?;
    let golden = golden::read("a")?;
    let case = golden.cases.iter().find(|case| case.only_text().is_some()).expect("a text case");
    let max_tokens = case.greedy.len().to_string();
    let text = case.only_text().expect("one text");
    let arguments = [
        text,
        "--temperature",
        "0",
        "--repetition-penalty",
        "1",
        "--ignore-eos",
        "--max-tokens",
        &max_tokens,
    ];
    let answer = json(&server, &arguments)?;
    let tokens: Vec<u64> =
        answer["token_ids"].as_array().expect("ids").iter().filter_map(Value::as_u64).collect();
    assert_eq!(tokens, case.greedy.iter().map(|id| u64::from(*id)).collect::<Vec<_>>());

    let drawn = |seed: &str| {
        json(&server, &["Hello", "--temperature", "1", "--seed", seed, "--max-tokens", "24", "--ignore-eos"])
    };
    assert_eq!(drawn("1")?["token_ids"], drawn("1")?["token_ids"]);
    assert_ne!(drawn("1")?["token_ids"], drawn("2")?["token_ids"]);
    Ok(())
}

#[test]
fn a_conversation_goes_on() -> anyhow::Result<()> {
    let server = server()?;
    let mut command = Command::new(binary()?);
    command.args([
        "ask",
        "--server",
        server.address(),
        "--chat",
        "--max-tokens",
        "5",
        "--ignore-eos",
        "Hello",
    ]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().expect("piped").write_all(b"And then?\nGoodbye.\n")?;
    let output = child.wait_with_output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn what_goes_wrong_is_said_with_the_field() -> anyhow::Result<()> {
    let server = server()?;
    let output = ask(&server, &["--image", "tests/goldens/a.json", "What is this?"])?;
    assert_eq!(output.status.code(), Some(1));
    let output = ask(&server, &["--image", "no/such/file.png", "What is this?"])?;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no/such/file.png"));
    let output = ask(&server, &["Hello", "--temperature", "-1"])?;
    assert!(!output.status.success());
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("temperature"),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

//! The library against a fake server.

use std::time::Duration;

use clap::{CommandFactory, Parser};

use crate::{
    AskArgs, BenchArgs, Client, Code, Error, Event, FinishReason, Image, MediaId, Request,
    fake::{Fake, Upload, transcript},
};

/// The verbs as the binary takes them.
#[derive(Debug, clap::Parser)]
enum Verb {
    /// Ask.
    Ask(Box<AskArgs>),
    /// Bench.
    Bench(BenchArgs),
}

#[test]
fn the_verbs_fit_a_command_of_many() {
    let mut command = Verb::command();
    command.build();
    command.clone().debug_assert();
    for (verb, option) in [("ask", "--min-pixels"), ("bench", "--concurrency")] {
        let help = command.find_subcommand_mut(verb).unwrap().render_long_help().to_string();
        assert!(help.contains(option) && help.contains("127.0.0.1:8470"), "{help}");
        assert!(!help.contains("What clap parses") && !help.contains("The command line"), "{help}");
    }
    assert!(matches!(Verb::try_parse_from(["lockstep", "ask", "Hi"]), Ok(Verb::Ask(_))));
    assert!(matches!(Verb::try_parse_from(["lockstep", "bench"]), Ok(Verb::Bench(_))));
}

#[tokio::test]
async fn a_streamed_answer_is_the_whole_answer() {
    let fake = Fake::start().await;
    let client = Client::connect(&fake.address).await.unwrap();
    let request =
        Request::new().system("Be brief.").user((Image::new("cat"), "what is this?")).logprobs(2).seed(7);

    let whole = client.generate(&request).await.unwrap();
    let streamed = client.stream(&request).await.unwrap().collect().await.unwrap();

    assert_eq!(whole, streamed);
    assert_eq!(whole.text(), "You said: what is this?");
    assert_eq!(whole.first().token_ids, [100, 101, 102, 103, 104]);
    assert_eq!(whole.first().logprobs[1].top.len(), 2);
    assert_eq!(whole.first().finished.reason, FinishReason::StopToken);
    assert_eq!((whole.started.seed, whole.started.media[0].resized_width), (7, 644));
    let expected = ["ROLE_SYSTEM: Be brief.", "ROLE_USER: <cat> | what is this?"];
    assert_eq!(transcript(&fake.seen()[0]), expected);
    assert_eq!(fake.seen()[0], fake.seen()[1]);
}

#[tokio::test]
async fn events_come_in_their_order() {
    let fake = Fake::start().await;
    let client = Client::connect(&fake.address).await.unwrap();
    let mut stream = client.stream(&Request::new().user("hi")).await.unwrap();
    let mut kinds = Vec::new();
    while let Some(event) = stream.next().await {
        kinds.push(match event.unwrap() {
            Event::Started(_) => "started",
            Event::Delta(_) => "delta",
            Event::Finished(_) => "finished",
            Event::Completed(_) => "completed",
        });
    }
    assert_eq!(kinds, ["started", "delta", "delta", "delta", "finished", "completed"]);
    assert!(stream.next().await.is_none());
}

#[tokio::test]
async fn dropping_a_stream_cancels_the_request() {
    let fake = Fake::start().await;
    let client = Client::connect(&fake.address).await.unwrap();
    let mut stream = client.stream(&Request::new().user("endless")).await.unwrap();
    for _ in 0..5 {
        stream.next().await.unwrap().unwrap();
    }
    drop(stream);
    fake.cancelled().await;
    // The connection goes on.
    assert_eq!(client.generate(&Request::new().user("hi")).await.unwrap().text(), "You said: hi");
}

#[tokio::test]
async fn a_refusal_names_its_fields() {
    let fake = Fake::start().await;
    let client = Client::connect(&fake.address).await.unwrap();
    let request = Request::new().user("refuse");
    for error in [client.generate(&request).await.unwrap_err(), client.stream(&request).await.unwrap_err()] {
        assert_eq!(error.code(), Some(Code::InvalidArgument));
        let fields: Vec<_> = error.violations().iter().map(|violation| violation.field.as_str()).collect();
        assert_eq!(fields, ["sampling.temperature", "chat.messages[0].parts[0].image"]);
    }
    let error = client.generate(&Request::new().user("busy")).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::ResourceExhausted));
    assert_eq!(error.retry_after(), Some(Duration::from_secs(2)));
}

#[tokio::test]
async fn a_cut_answer_is_never_taken_for_a_whole_one() {
    let fake = Fake::start().await;
    let client = Client::connect(&fake.address).await.unwrap();
    let error = client.stream(&Request::new().user("cut")).await.unwrap().collect().await.unwrap_err();
    assert!(matches!(error, Error::Protocol(_)), "{error}");
}

#[tokio::test]
async fn a_silent_server_is_given_up_at_the_deadline() {
    let fake = Fake::start().await;
    let client = Client::builder().timeout(Duration::from_millis(100)).connect(&fake.address).await.unwrap();
    let request = Request::new().user("stall");
    let unary = client.generate(&request).await.unwrap_err();
    let streamed = client.stream(&request).await.unwrap().collect().await.unwrap_err();
    assert_eq!(unary.code(), Some(Code::DeadlineExceeded), "{unary}");
    assert_eq!(streamed.code(), Some(Code::DeadlineExceeded), "{streamed}");
    let own = request.timeout(Duration::from_millis(50));
    assert_eq!(client.generate(&own).await.unwrap_err().code(), Some(Code::DeadlineExceeded));
}

#[tokio::test]
async fn cost_and_model_are_told() {
    let fake = Fake::start().await;
    let client = Client::connect(&fake.address).await.unwrap();
    let count = client.count_tokens(&Request::new().user("three more words")).await.unwrap();
    assert_eq!((count.prompt_tokens, count.max_context_tokens), (23, 32768));
    let model = client.model().await.unwrap();
    assert_eq!((model.name.as_str(), model.world_size), ("fake", 2));
    assert_eq!(model.shards[1].rank, 1);
}

#[tokio::test]
async fn an_address_must_be_one() {
    for address in ["", "localhost", ":8470", "host:port", "http://host:8470", "host:8470/path", "host:99999"]
    {
        let error = Client::connect(address).await.unwrap_err();
        assert!(matches!(error, Error::Address { .. }), "{address}: {error}");
    }
}

#[tokio::test]
async fn no_server_is_said_with_its_address() {
    // Bound and dropped: nobody listens there.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = Client::connect(&free.to_string()).await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    let message = error.to_string();
    assert!(message.contains(&free.to_string()) && message.contains("refused"), "{message}");
}

#[tokio::test]
async fn a_message_over_the_bound_is_refused() {
    let fake = Fake::start().await;
    let client = Client::builder().max_message_bytes(1 << 10).connect(&fake.address).await.unwrap();
    let error = client.generate(&Request::new().user(Image::new(vec![0; 2 << 10]))).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { bytes: 2049.., max_bytes: 1024 }), "{error}");
    assert!(fake.seen().is_empty());
}

#[tokio::test]
async fn a_picture_by_id_is_uploaded_when_it_is_not_there() {
    let fake = Fake::start().await;
    let client = Client::connect(&fake.address).await.unwrap();
    let large = "large ".repeat(400_000);
    let pictures = (Image::new(large.clone()).by_id(), Image::new("cat"), Image::new("dog").by_id());
    let request = Request::new().user(pictures).user("which?").cache_salt("salt");

    let count = client.count_tokens(&request).await.unwrap();
    let streamed = client.stream(&request).await.unwrap().collect().await.unwrap();

    assert_eq!((count.prompt_tokens, streamed.text()), (21, "You said: which?"));
    let upload = |file: &str, num_pieces| Upload { file: file.into(), salt: Some("salt".into()), num_pieces };
    assert_eq!(*fake.uploads(), [upload(&large, 4), upload("dog", 2)]);
    let id = "<id of 32 bytes>";
    assert_eq!(transcript(&fake.seen()[0])[0], format!("ROLE_USER: {id} | <cat> | {id}"));

    // The server forgets one of them.
    fake.uploads().retain(|upload| upload.file != "dog");
    assert_eq!(client.generate(&request).await.unwrap().text(), "You said: which?");
    assert_eq!(*fake.uploads(), [upload(&large, 4), upload("dog", 2)]);
}

#[tokio::test]
async fn an_upload_can_be_made_beforehand() {
    let fake = Fake::start().await;
    let client = Client::connect(&fake.address).await.unwrap();
    let picture = Image::new("cat");
    assert_eq!(client.upload(&picture, None).await.unwrap(), MediaId::of(b"cat"));
    client.generate(&Request::new().user((picture.by_id(), "what?"))).await.unwrap();
    assert_eq!((fake.uploads().len(), fake.seen().len()), (1, 1));
}

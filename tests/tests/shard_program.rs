//! `--shard-program`: what runs a shard.

use std::os::unix::fs::PermissionsExt;

use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_tests::golden::root;
use lockstep_tests::hostile::ask;
use lockstep_tests::server::{Server, binary};

#[tokio::test]
async fn a_wrapper_starts_every_shard() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let [wrapper, told] = ["wrapper", "told"].map(|name| folder.path().join(name));
    let script =
        format!("#!/bin/sh\necho \"$@\" >>{}\nexec {} \"$@\"\n", told.display(), binary()?.display());
    std::fs::write(&wrapper, script)?;
    std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o700))?;
    let program = wrapper.to_str().expect("a path of words");
    for otlp in [vec![], vec!["--otlp", "http://127.0.0.1:1"]] {
        std::fs::write(&told, "")?;
        let arguments = [vec!["--world-size", "2", "--shard-program", program], otlp.clone()].concat();
        let server = Server::start(&root().join("tests/checkpoints/a"), &arguments)?;
        let told = std::fs::read_to_string(&told)?;
        assert_eq!(told.lines().count(), 2, "{told}");
        for line in told.lines() {
            let words: Vec<_> = line.split(' ').collect();
            let (first, rest) = words.split_at(otlp.len());
            assert_eq!(first, otlp);
            assert_eq!((rest[0], rest[1], rest[3]), ("shard", "--listen", "--parent"), "{line}");
            assert_eq!(rest[4], server.pid().to_string());
        }
        let mut client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
        let text = lockstep_proto::v1::part::Part::Text("Hello".to_owned());
        client.generate(ask(vec![text])).await?;
        assert_eq!(server.stop()?.code, Some(0));
    }
    Ok(())
}

#[test]
fn what_is_no_program_is_refused_and_what_is_no_shard_is_said() -> anyhow::Result<()> {
    let run = |program: &str| {
        Server::run_to_end(
            &root().join("tests/checkpoints/a"),
            &["--shard-program", program, "--max-running", "0"],
        )
    };
    for (program, why) in [("/nowhere/shard", "No such file"), ("/", "is not a program")] {
        let ended = run(program)?;
        assert_eq!(ended.code, Some(1));
        for words in [&format!("--shard-program {program}: {why}"), "--max-running 0"] {
            assert!(ended.output.contains(words), "{words:?} is not said:\n{}", ended.output);
        }
    }
    let ended = Server::run_to_end(&root().join("tests/checkpoints/a"), &["--shard-program", "/bin/false"])?;
    assert_eq!(ended.code, Some(1));
    assert!(ended.output.contains("exit status: 1"), "{}", ended.output);
    Ok(())
}

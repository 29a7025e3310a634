#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use lockstep::fuzzing::Prompts;

static PROMPTS: LazyLock<Prompts> =
    LazyLock::new(|| Prompts::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../checkpoints/a")));

libfuzzer_sys::fuzz_target!(|data: &[u8]| PROMPTS.check(data));

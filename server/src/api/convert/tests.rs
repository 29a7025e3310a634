//! What requests become, and what is said about the fields that cannot become anything.

use super::*;
use crate::budget::ByteBudget;

const VOCAB_SIZE: u32 = 1000;

fn proto(sampling: v1::Sampling) -> v1::GenerateRequest {
    let part = v1::Part { part: Some(v1::part::Part::Text("Hello".into())) };
    let message = v1::Message { role: v1::Role::User.into(), parts: vec![part] };
    let chat = Some(v1::Chat { messages: vec![message], tools: vec![] });
    v1::GenerateRequest { chat, sampling: Some(sampling), ..Default::default() }
}

fn taken(proto: v1::GenerateRequest) -> Result<Request, Refusal> {
    let caller = Caller::with_key(None, ByteBudget::new(0).open());
    request(proto, &caller, &rules(MediaLibrary::new(0)))
}

fn converted(sampling: v1::Sampling) -> Result<Sampling, Refusal> {
    taken(proto(sampling)).map(|request| request.sampling)
}

fn rules(library: MediaLibrary) -> Rules {
    Rules { vocab_size: VOCAB_SIZE, processor: PictureProcessor::default(), library: Arc::new(library) }
}

/// The fields at fault, in the order in which they are told.
fn faults(sampling: v1::Sampling) -> Vec<String> {
    fields(converted(sampling).unwrap_err())
}

fn fields(refusal: Refusal) -> Vec<String> {
    match refusal {
        Refusal::Invalid(violations) => violations.into_iter().map(|violation| violation.field).collect(),
        other => panic!("{other:?} is not INVALID_ARGUMENT"),
    }
}

#[test]
fn every_count_is_taken_up_to_its_bound_and_not_beyond() {
    type Set = fn(&mut v1::GenerateRequest, usize);
    fn parts(request: &mut v1::GenerateRequest) -> &mut Vec<v1::Part> {
        &mut request.chat.as_mut().unwrap().messages[0].parts
    }
    let bounds: [(&str, usize, Set); 10] = [
        ("chat.messages", MAX_MESSAGES, |request, count| {
            let messages = &mut request.chat.as_mut().unwrap().messages;
            *messages = vec![messages[0].clone(); count];
        }),
        ("chat.messages.parts", MAX_PARTS, |request, count| {
            *parts(request) = vec![parts(request)[0].clone(); count];
        }),
        ("chat.messages.parts", MAX_MEDIA, |request, count| {
            let source = Some(v1::image::Source::Data(Bytes::from_static(b"a picture")));
            let image = v1::part::Part::Image(v1::Image { source, ..Default::default() });
            *parts(request) = vec![v1::Part { part: Some(image) }; count];
        }),
        ("chat.messages[0].parts[0].video.frames.frames", MAX_FRAMES as usize, |request, count| {
            let frames = v1::VideoFrames {
                frames: vec![Bytes::from_static(b"a picture"); count],
                rate: Some(1.0),
                ..Default::default()
            };
            let source = Some(v1::video::Source::Frames(frames));
            let video = v1::part::Part::Video(v1::Video { source, ..Default::default() });
            *parts(request) = vec![v1::Part { part: Some(video) }];
        }),
        ("stopping.stop", MAX_STOP_STRINGS, |request, count| {
            request.stopping.get_or_insert_default().stop = vec!["stop".into(); count];
        }),
        ("stopping.stop[0]", MAX_STOP_BYTES, |request, bytes| {
            request.stopping.get_or_insert_default().stop = vec!["s".repeat(bytes)];
        }),
        ("stopping.stop_token_ids", MAX_STOP_TOKENS, |request, count| {
            request.stopping.get_or_insert_default().stop_token_ids = vec![1; count];
        }),
        ("n", MAX_CHOICES as usize, |request, count| request.n = Some(count as u32)),
        ("logprobs", MAX_LOGPROBS as usize, |request, count| request.logprobs = Some(count as u32)),
        ("cache_salt", MAX_CACHE_SALT_BYTES, |request, bytes| request.cache_salt = Some("s".repeat(bytes))),
    ];
    for (field, bound, set) in bounds {
        let mut request = proto(v1::Sampling::default());
        set(&mut request, bound);
        assert!(taken(request.clone()).is_ok(), "{bound} of {field} are taken");
        set(&mut request, bound + 1);
        assert_eq!(fields(taken(request).unwrap_err()), [field], "{} of {field}", bound + 1);
    }
}

#[test]
fn all_of_sampling_is_taken() {
    let sampling = v1::Sampling {
        temperature: Some(100.0),
        top_p: Some(1.0),
        top_k: Some(u32::MAX),
        min_p: Some(1.0),
        repetition_penalty: Some(0.5),
        presence_penalty: Some(-2.0),
        frequency_penalty: Some(2.0),
        logit_bias: [(999, -100.0), (0, 100.0), (5, 0.0)].into(),
        seed: Some(0),
    };
    let expected = Sampling {
        temperature: Some(100.0),
        top_p: Some(1.0),
        top_k: Some(u32::MAX),
        min_p: Some(1.0),
        repetition_penalty: Some(0.5),
        presence_penalty: Some(-2.0),
        frequency_penalty: Some(2.0),
        logit_bias: vec![(0, 100.0), (5, 0.0), (999, -100.0)],
        seed: Some(0),
    };
    assert_eq!(converted(sampling).unwrap(), expected);
    assert_eq!(converted(v1::Sampling::default()).unwrap(), Sampling::default());
}

#[test]
fn every_number_of_sampling_is_checked() {
    type Set = fn(&mut v1::Sampling, f32);
    const NOT_FINITE: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let fields: [(&str, &[f32], Set); 7] = [
        ("temperature", &[-0.1, 100.5], |s, bad| s.temperature = Some(bad)),
        ("top_p", &[0.0, -0.5, 1.001], |s, bad| s.top_p = Some(bad)),
        ("min_p", &[-0.001, 1.001], |s, bad| s.min_p = Some(bad)),
        ("repetition_penalty", &[0.0, -1.0, 100.5], |s, bad| s.repetition_penalty = Some(bad)),
        ("presence_penalty", &[-2.001, 2.001], |s, bad| s.presence_penalty = Some(bad)),
        ("frequency_penalty", &[-2.001, 2.001], |s, bad| s.frequency_penalty = Some(bad)),
        ("logit_bias[7]", &[-100.5, 100.5], |s, bad| {
            s.logit_bias.insert(7, bad);
        }),
    ];
    for (name, out_of_range, set) in fields {
        for bad in out_of_range.iter().chain(&NOT_FINITE) {
            let mut sampling = v1::Sampling::default();
            set(&mut sampling, *bad);
            assert_eq!(faults(sampling), [format!("sampling.{name}")], "{bad}");
        }
    }
}

#[test]
fn all_faults_of_sampling_are_told_at_once() {
    let sampling = v1::Sampling {
        temperature: Some(f32::NAN),
        top_p: Some(0.0),
        top_k: None,
        min_p: Some(2.0),
        repetition_penalty: Some(0.0),
        presence_penalty: Some(3.0),
        frequency_penalty: Some(-3.0),
        logit_bias: [(VOCAB_SIZE, f32::NAN), (1, 1.0), (2, 101.0)].into(),
        seed: None,
    };
    let expected = [
        "sampling.temperature",
        "sampling.top_p",
        "sampling.min_p",
        "sampling.repetition_penalty",
        "sampling.presence_penalty",
        "sampling.frequency_penalty",
        "sampling.logit_bias[2]",
        "sampling.logit_bias[1000]",
        "sampling.logit_bias[1000]",
    ];
    assert_eq!(faults(sampling), expected);
}

#[test]
fn too_many_biases_are_one_fault() {
    let biases = |count: u32| v1::Sampling {
        // The last of them are beyond the vocabulary.
        logit_bias: (0..count).map(|token| (token, 1.0)).collect(),
        ..Default::default()
    };
    assert_eq!(faults(biases(MAX_LOGIT_BIASES as u32 + 1)), ["sampling.logit_bias"]);
    assert_eq!(faults(biases(MAX_LOGIT_BIASES as u32)).len(), MAX_LOGIT_BIASES - VOCAB_SIZE as usize);
    assert_eq!(converted(biases(VOCAB_SIZE)).unwrap().logit_bias.len(), VOCAB_SIZE as usize);
}

/// A conversation of pictures that are named by their ids.
fn by_ids(ids: &[&[u8]], cache_salt: Option<&str>) -> v1::GenerateRequest {
    let image = |id: &&[u8]| v1::Image {
        source: Some(v1::image::Source::MediaId(Bytes::copy_from_slice(id))),
        ..Default::default()
    };
    let parts = ids.iter().map(|id| v1::Part { part: Some(v1::part::Part::Image(image(id))) });
    let message = v1::Message { role: v1::Role::User.into(), parts: parts.collect() };
    v1::GenerateRequest {
        chat: Some(v1::Chat { messages: vec![message], tools: vec![] }),
        cache_salt: cache_salt.map(str::to_owned),
        ..Default::default()
    }
}

#[test]
fn uploaded_media_are_found_by_those_who_uploaded_them() {
    let (key, salt) = (Some(&b"Bearer a"[..]), Some("salt"));
    let file = Bytes::from_static(b"0123456789");
    let id = MediaId::of(&file);
    let library = MediaLibrary::new(1 << 20);
    library.insert(Namespace::new(key, salt), MediaKind::Image, id, file.clone()).unwrap();
    let rules = rules(library);
    let budget = ByteBudget::new(25);
    let ask =
        |key, salt, ids: &[&[u8]]| request(by_ids(ids, salt), &Caller::with_key(key, budget.open()), &rules);

    let found = ask(key, salt, &[&id.0, &id.0]).unwrap();
    let file_of = |part: MediumPart<'_>| match part {
        MediumPart::Image(image) => image.data.clone(),
        MediumPart::Video(video) => panic!("{video:?} is no picture"),
    };
    let files: Vec<_> = media(&found.messages).map(|(_, part)| file_of(part)).collect();
    assert_eq!(files, [file.clone(), file]);
    for (key, salt) in [(None, salt), (key, None), (Some(&b"Bearer b"[..]), salt)] {
        let Err(Refusal::NotFound(violations)) = ask(key, salt, &[&id.0]) else { panic!("{key:?} {salt:?}") };
        assert_eq!(violations[0].field, "chat.messages[0].parts[0].image.media_id");
    }
    // Each use counts as if it had been sent.
    assert!(matches!(ask(key, salt, &[&id.0[..]; 3]), Err(Refusal::Invalid(_))));
    let held = budget.reserve(10).unwrap();
    assert!(matches!(ask(key, salt, &[&id.0[..]; 2]), Err(Refusal::Exhausted(_))));
    drop(held);
    assert!(ask(key, salt, &[&id.0[..]; 2]).is_ok());
}

#[test]
fn an_id_of_another_length_is_a_fault() {
    let caller = Caller::with_key(None, ByteBudget::new(100).open());
    let missing = [0; 32];
    let refused = request(by_ids(&[&[], &missing, &[0; 33]], None), &caller, &rules(MediaLibrary::new(100)));
    let Err(Refusal::Invalid(violations)) = refused else { panic!("{refused:?}") };
    let fields: Vec<_> = violations.iter().map(|violation| violation.field.as_str()).collect();
    let field = |part| format!("chat.messages[0].parts[{part}].image.media_id");
    assert_eq!(fields, [field(0), field(2)]);
}

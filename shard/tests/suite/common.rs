//! Goldens, pictures, scripts of steps, and groups of ranks as threads.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use fast_image_resize::{
    FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer, images::Image, pixels::U8x3,
};
use lockstep_shard::{
    collective::{DEFAULT_SLOT_BYTES, SharedMemory},
    config::Config,
    device::{DType, DeviceKind, FEATURE_BLOCK_TOKENS, KV_BLOCK_TOKENS},
    model::stages::stages,
    runner::{
        Step, StepError, StepResult,
        step::{Admission, Chunk, Encode, Grid, MediaHash, MediaSpan, SampledToken, Sampling, SeqId},
    },
    service::{gate::Gate, gpu::GpuOptions, load, options::LoadOptions, worker::Loaded},
};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// A path in the repository, which `LOCKSTEP_REPOSITORY` names where tests run elsewhere than they were built.
pub fn repository(path: &str) -> PathBuf {
    let elsewhere = std::env::var_os("LOCKSTEP_REPOSITORY").map(PathBuf::from);
    elsewhere.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).join(path)
}

/// A JSON file of the repository.
pub fn json(path: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(repository(path)).unwrap()).unwrap()
}

/// A list of numbers.
pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A list of floats.
pub fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

/// Pixels of a medium.
#[derive(Clone)]
pub struct Picture {
    pub hash: MediaHash,
    pub grid: Grid,
    pub pixels: Vec<u8>,
}

/// What is asked of a rank: a prompt with its pictures.
#[derive(Clone)]
pub struct Request {
    pub token_ids: Vec<u32>,
    pub media: Vec<MediaSpan>,
    pub pictures: Vec<Picture>,
    pub sampling: Sampling,
}

/// Greedy, with log-probabilities of the 20 best.
pub fn greedy() -> Sampling {
    Sampling { logprobs: Some(20), ..Sampling::default() }
}

/// The request of a golden case.
pub fn request(checkpoint: &str, case: &Value) -> Request {
    let pad = json(&format!("{checkpoint}/config.json"))["image_token_id"].as_u64().unwrap() as u32;
    let token_ids = ids(&case["input_ids"]);
    let files = case["messages"].as_array().unwrap().iter();
    let files = files
        .flat_map(|message| message["parts"].as_array().unwrap())
        .filter_map(|part| part["image"].as_str());
    let (mut media, mut pictures, mut at) = (Vec::new(), Vec::new(), 0);
    for (i, file) in files.enumerate() {
        let grid = ids(&case["grids"][i]);
        let grid = Grid { t: grid[0], h: grid[1], w: grid[2] };
        let size = ids(&case["resized"][i]);
        let pixels = resized(file, size[0], size[1]);
        let sha256 = Sha256::digest(&pixels);
        assert_eq!(format!("{sha256:x}"), case["pixel_sha256"][i].as_str().unwrap(), "{file}");
        let hash = MediaHash(sha256.into());
        at += token_ids[at..].iter().position(|id| *id == pad).unwrap();
        media.push(MediaSpan { hash, first_token: at, grid, seconds_per_grid_t: None });
        at += grid.num_patches() as usize / 4;
        pictures.push(Picture { hash, grid, pixels });
    }
    Request { token_ids, media, pictures, sampling: greedy() }
}

/// A picture on white, resized as the reference resizes: bicubic, horizontal pass first.
fn resized(file: &str, width: u32, height: u32) -> Vec<u8> {
    let picture = image::open(repository(file)).unwrap().to_rgba8();
    let mut rgb = image::RgbImage::new(picture.width(), picture.height());
    for (to, from) in rgb.pixels_mut().zip(picture.pixels()) {
        let [r, g, b, a] = from.0.map(u32::from);
        to.0 = [r, g, b].map(|c| ((c * a + 255 * (255 - a) + 127) / 255) as u8);
    }
    // The library's vertical pass comes first: transposed, it is the horizontal one.
    let turned = image::imageops::flip_horizontal(&image::imageops::rotate90(&rgb));
    let (turned_width, turned_height) = turned.dimensions();
    let source = Image::from_vec_u8(turned_width, turned_height, turned.into_raw(), PixelType::U8x3).unwrap();
    let mut target = Image::new(height, width, PixelType::U8x3);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
    // Typed views, so that the library is compiled for this kind of pixel only.
    let (source, mut view) = source.typed_image::<U8x3>().zip(target.typed_image_mut()).unwrap();
    Resizer::new().resize_typed(&source, &mut view, &options).unwrap();
    let target = image::RgbImage::from_raw(height, width, target.into_vec()).unwrap();
    image::imageops::flip_horizontal(&image::imageops::rotate90(&target)).into_raw()
}

/// Steps for requests that all enter at once: each step gives every sequence up to `chunk` of its known tokens, until
/// each has drawn `new_tokens`.
pub struct Script {
    pub chunk: usize,
    pub new_tokens: usize,
}

impl Script {
    /// The steps. Sequence `i` is request `i`.
    pub fn steps(&self, group: &Group, requests: &[Request]) -> Vec<Step> {
        let mut steps = vec![enter(requests, group.vision_stages())];
        steps.extend(self.compute(requests, lengths(&steps[0].admissions)));
        steps
    }

    /// The same, but after the first `count` steps all sequences lose their blocks. As at a server they leave, and enter again
    /// with the tokens that they have drawn by then, which begin `answers`.
    pub fn steps_with_preemption(
        &self,
        group: &Group,
        requests: &[Request],
        count: usize,
        answers: &[Vec<SampledToken>],
    ) -> Vec<Step> {
        let mut steps = self.steps(group, requests);
        steps.truncate(count);
        let enters_again = |(entered, answer): (&Admission, &Vec<SampledToken>)| {
            let chunks = steps.iter().flat_map(|step| &step.chunks).filter(|chunk| chunk.id == entered.id);
            let drawn: usize = chunks.map(|chunk| chunk.max_new_tokens).sum();
            let token_ids = [entered.token_ids.clone(), token_ids(&answer[..drawn])].concat();
            Admission { token_ids, ..entered.clone() }
        };
        let admissions: Vec<Admission> = steps[0].admissions.iter().zip(answers).map(enters_again).collect();
        let mut rest = self.compute(requests, lengths(&admissions));
        let releases = admissions.iter().map(|admission| admission.id).collect();
        rest[0].admissions = admissions;
        steps.push(Step { releases, ..Step::default() });
        steps.extend(rest);
        steps
    }

    /// The steps that compute sequences from their first token to their last, of which they know so many.
    fn compute(&self, requests: &[Request], mut known: Vec<usize>) -> Vec<Step> {
        let mut steps = vec![];
        let mut free_block = 0;
        let mut tables = vec![0; requests.len()];
        let mut computed = vec![0; requests.len()];
        let last = requests.iter().map(|request| request.token_ids.len() + self.new_tokens);
        let last: Vec<usize> = last.collect();
        while known != last {
            let mut step = Step::default();
            for (i, known) in known.iter_mut().enumerate().filter(|(i, known)| **known != last[*i]) {
                let (start, length) = (computed[i], self.chunk.min(*known - computed[i]));
                let end = start + length;
                let needed = end.div_ceil(KV_BLOCK_TOKENS) - tables[i];
                let new_blocks = (free_block..free_block + needed as u32).collect();
                free_block += needed as u32;
                tables[i] += needed;
                computed[i] = end;
                let max_new_tokens = usize::from(end == *known);
                *known += max_new_tokens;
                step.chunks.push(Chunk { id: SeqId(i as u64), start, length, new_blocks, max_new_tokens });
            }
            steps.push(step);
        }
        steps
    }
}

/// How many tokens each sequence enters with.
fn lengths(admissions: &[Admission]) -> Vec<usize> {
    admissions.iter().map(|admission| admission.token_ids.len()).collect()
}

/// The step that admits requests and encodes their pictures, each once.
fn enter(requests: &[Request], vision_stages: usize) -> Step {
    let mut step = Step::default();
    let mut free_block = 0;
    for (i, request) in requests.iter().enumerate() {
        for picture in &request.pictures {
            if step.encodes.iter().any(|encode| encode.hash == picture.hash) {
                continue;
            }
            let blocks = (picture.grid.num_patches() as usize / 4).div_ceil(FEATURE_BLOCK_TOKENS) as u32;
            step.encodes.push(Encode {
                hash: picture.hash,
                feature_blocks: (free_block..free_block + blocks).collect(),
                from: 0,
                to: picture.grid.num_patches() / 4 * vision_stages as u64,
            });
            free_block += blocks;
        }
        step.admissions.push(Admission {
            id: SeqId(i as u64),
            token_ids: request.token_ids.clone(),
            num_prompt_tokens: request.token_ids.len(),
            media: request.media.clone(),
            sampling: request.sampling.clone(),
            num_computed_tokens: 0,
            blocks: vec![],
        });
    }
    step
}

/// A checkpoint and how it is loaded.
#[derive(Clone)]
pub struct Group {
    pub checkpoint: String,
    pub world_size: usize,
    pub dtype: DType,
    pub threads: usize,
    pub device: DeviceKind,
    pub gpu: GpuOptions,
}

impl Group {
    pub fn new(checkpoint: &str, world_size: usize, dtype: DType) -> Self {
        let gpu = GpuOptions::none();
        Self { checkpoint: checkpoint.into(), world_size, dtype, threads: 1, device: DeviceKind::Cpu, gpu }
    }

    /// Stages of its vision tower.
    pub fn vision_stages(&self) -> usize {
        stages(&Config::open(&repository(&self.checkpoint)).unwrap().vision).len()
    }

    /// How a rank of it is loaded, for epoch 1.
    pub fn options(&self, rank: usize, collective_path: PathBuf) -> LoadOptions {
        let mine = self.gpu.ordinals.get(rank);
        let sharing = self.gpu.ordinals.iter().filter(|ordinal| Some(*ordinal) == mine).count();
        let processor = json(&format!("{}/preprocessor_config.json", self.checkpoint));
        LoadOptions {
            group: 9,
            epoch: 1,
            rank,
            world_size: self.world_size,
            loading_ranks: self.world_size,
            model_dir: repository(&self.checkpoint),
            device: self.device,
            dtype: self.dtype,
            collective_path,
            max_context_tokens: 512,
            max_step_tokens: 4096,
            max_frame_patches: 256,
            waiting_pixel_bytes: 1 << 20,
            max_step_sequences: 64,
            kv_blocks: 512,
            feature_blocks: 64,
            threads: self.threads,
            cpus: vec![],
            image_mean: floats(&processor["image_mean"]).try_into().unwrap(),
            image_std: floats(&processor["image_std"]).try_into().unwrap(),
            gpu: GpuOptions { loading_ranks: sharing.max(1), ..self.gpu.clone() },
        }
    }

    /// Runs steps on all ranks, each a thread. All must agree on everything; the answers are rank 0's.
    pub fn run(&self, requests: &[Request], steps: &[Step]) -> Vec<StepResult> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("collective");
        if self.world_size > 1 {
            SharedMemory::create(&path, self.world_size, DEFAULT_SLOT_BYTES).unwrap();
        }
        let mut answers: Vec<Vec<StepResult>> = thread::scope(|scope| {
            let ranks: Vec<_> = (0..self.world_size)
                .map(|rank| self.options(rank, path.clone()))
                .map(|options| scope.spawn(move || run_rank(&options, requests, steps)))
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        for (rank, others) in answers.iter().enumerate() {
            for (step, (other, first)) in others.iter().zip(&answers[0]).enumerate() {
                assert_eq!(other.state_hash, first.state_hash, "rank {rank}, step {step}");
                assert_eq!(other.sampled, first.sampled, "rank {rank}, step {step}");
            }
        }
        answers.swap_remove(0)
    }

    /// What each request's sequence draws.
    pub fn answers(&self, requests: &[Request], script: &Script) -> Vec<Vec<SampledToken>> {
        self.drawn(requests, &script.steps(self, requests))
    }

    /// What sequence `i` draws in these steps, for each request `i`.
    pub fn drawn(&self, requests: &[Request], steps: &[Step]) -> Vec<Vec<SampledToken>> {
        let mut answers = vec![Vec::new(); requests.len()];
        for sampled in self.run(requests, steps).into_iter().flat_map(|result| result.sampled) {
            answers[sampled.id.0 as usize].extend(sampled.tokens);
        }
        answers
    }
}

/// Loads a rank and runs steps on it.
pub fn run_rank(options: &LoadOptions, requests: &[Request], steps: &[Step]) -> Vec<StepResult> {
    let gate = Gate::new(options.epoch, options.threads);
    let mut loaded = load::load(options, &gate, &mut |_| ()).unwrap();
    let results = run_steps(&mut loaded, requests, steps).unwrap();
    let mut pictures = requests.iter().flat_map(|request| &request.pictures);
    let waits = pictures.any(|picture| loaded.media.shape(&picture.hash).is_some());
    assert!(!waits, "pixels are let go of when they are encoded");
    results
}

/// Runs steps on a rank, putting pictures before they are encoded, until one fails.
pub fn run_steps(
    loaded: &mut Loaded,
    requests: &[Request],
    steps: &[Step],
) -> Result<Vec<StepResult>, StepError> {
    let media = Arc::clone(&loaded.media);
    let mut results = Vec::new();
    let pictures: Vec<&Picture> = requests.iter().flat_map(|request| &request.pictures).collect();
    for step in steps {
        let put = |encode: &Encode| {
            let picture = pictures.iter().find(|picture| picture.hash == encode.hash).unwrap();
            let Picture { hash, grid, pixels } = picture;
            let mut upload = media.begin(media.epoch(), *hash, *grid, pixels.len()).unwrap().unwrap();
            upload.push(pixels).unwrap();
            upload.finish().unwrap();
        };
        // Pixels wait in bounded memory: of many media that begin, one at a time is put and encoded, in steps before the
        // others.
        if step.encodes.len() > 1 && step.encodes.iter().all(|encode| encode.from == 0) {
            for encode in &step.encodes {
                put(encode);
                loaded.rank.run(Step { encodes: vec![encode.clone()], ..Step::default() })?;
            }
            results.push(loaded.rank.run(Step { encodes: vec![], ..step.clone() })?);
        } else {
            step.encodes.iter().filter(|encode| encode.from == 0).for_each(put);
            results.push(loaded.rank.run(step.clone())?);
        }
    }
    Ok(results)
}

/// Token ids of an answer.
pub fn token_ids(answer: &[SampledToken]) -> Vec<u32> {
    answer.iter().map(|token| token.token_id).collect()
}

/// A token, the bits of its log-probability, and those of the most probable ones.
pub type TokenBits = (u32, u32, Vec<(u32, u32)>);

/// What must not change by a bit.
pub fn bits(answer: &[SampledToken]) -> Vec<TokenBits> {
    let top = |token: &SampledToken| token.top.iter().map(|(id, logprob)| (*id, logprob.to_bits())).collect();
    answer.iter().map(|token| (token.token_id, token.logprob.unwrap().to_bits(), top(token))).collect()
}

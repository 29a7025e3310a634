//! Bits that flip: in what ranks have alike, in the file of a checkpoint, on the way.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use lockstep_shard::{
    check_folder,
    collective::{Alone, Checker, Collective, DEFAULT_SLOT_BYTES, GroupLost, SharedMemory},
    config::Config,
    device::{
        DType,
        cpu::{CpuDevice, CpuOptions},
    },
    model::{Model, Normalization, Parallel},
    progress::Progress,
    runner::Step,
    service::{gate::Gate, load::load_with},
    weights::Checkpoint,
};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use sha2::{Digest, Sha256};

use super::common::{Group, Request, Script, json, repository, request, run_steps};

const CHECKPOINT: &str = "tests/checkpoints/a";

/// Flips one bit of what one all-reduce gives, and counts them.
struct Flipping {
    inner: Box<dyn Collective>,
    flipped: Option<u64>,
    reduced: Arc<AtomicU64>,
}

impl Collective for Flipping {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce_sum(&self, data: &mut [f32]) -> Result<(), GroupLost> {
        self.inner.all_reduce_sum(data)?;
        let number = self.reduced.fetch_add(1, Ordering::SeqCst);
        if self.flipped == Some(number) {
            let any = &mut data[number as usize * 31 % data.len()];
            *any = f32::from_bits(any.to_bits() ^ 1 << 23);
        }
        Ok(())
    }

    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, GroupLost> {
        self.inner.all_gather(mine)
    }

    fn begin_elsewhere(&self) -> Result<(), GroupLost> {
        self.inner.begin_elsewhere()
    }

    fn check(&self) -> Result<(), GroupLost> {
        self.inner.check()
    }

    fn checker(&self) -> Checker {
        self.inner.checker()
    }

    fn barrier(&self) -> Result<(), GroupLost> {
        self.inner.barrier()
    }
}

/// For each rank and step: the hash, and how many all-reduces there have been.
fn run(group: &Group, request: &Request, steps: &[Step], flip: Option<(usize, u64)>) -> Vec<Vec<(u64, u64)>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("collective");
    SharedMemory::create(&path, group.world_size, DEFAULT_SLOT_BYTES).unwrap();
    thread::scope(|scope| {
        let work = |rank: usize| {
            let options = group.options(rank, path.clone());
            move || {
                let reduced = Arc::<AtomicU64>::default();
                let counted = reduced.clone();
                let flipped = flip.filter(|(on, _)| *on == rank).map(|(_, number)| number);
                let load = load_with(Arc::new(move |inner: Box<dyn Collective>| {
                    Box::new(Flipping { inner, flipped, reduced: counted.clone() })
                }));
                let mut loaded = load(&options, &Gate::new(1, 1), &mut |_| ()).unwrap();
                let run = |step| {
                    let results =
                        run_steps(&mut loaded, std::slice::from_ref(request), std::slice::from_ref(step));
                    (results.unwrap()[0].state_hash, reduced.load(Ordering::SeqCst))
                };
                steps.iter().map(run).collect::<Vec<_>>()
            }
        };
        let ranks: Vec<_> = (0..group.world_size).map(|rank| scope.spawn(work(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Of rows of a picture and of text that draws nothing, too, and on the rank whose features are read as on the other.
#[test]
fn a_bit_that_flips_after_any_reduction_is_seen_in_the_hash_of_that_step() {
    let golden = json("tests/goldens/a.json");
    let cases = golden["cases"].as_array().unwrap();
    let case = cases.iter().find(|case| case["name"] == "many_windows").unwrap();
    let request = request(CHECKPOINT, case);
    let group = Group::new(CHECKPOINT, 2, DType::F32);
    let script = Script { chunk: 100, new_tokens: 2 };
    let mut steps = script.steps(&group, std::slice::from_ref(&request));
    // The picture in three pieces.
    let encode = steps[0].encodes.remove(0);
    let mut pieces = vec![0, encode.to / 5, encode.to / 2, encode.to];
    pieces.dedup();
    for (i, ends) in pieces.windows(2).enumerate() {
        let mut piece = encode.clone();
        (piece.from, piece.to) = (ends[0], ends[1]);
        if i > 0 {
            piece.feature_blocks.clear();
        }
        steps.insert(1 + i, Step { encodes: vec![piece], ..Step::default() });
    }
    let undisturbed = run(&group, &request, &steps, None);
    assert_eq!(undisturbed[0], undisturbed[1]);
    let total = undisturbed[0].last().unwrap().1;
    assert!(total > 20, "{total}");
    for flip in 0..total {
        let ranks = run(&group, &request, &steps, Some((flip as usize % 2, flip)));
        let at = undisturbed[0].iter().position(|(_, reduced)| *reduced > flip).unwrap();
        let differs = ranks[0].iter().zip(&ranks[1]).position(|(one, other)| one.0 != other.0);
        assert_eq!(differs, Some(at), "flip {flip} of {total}");
    }
}

fn copy_of(checkpoint: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(repository(checkpoint).join(file), folder.path().join(file)).unwrap();
    }
    folder
}

/// Flips a bit of the file's tensors.
fn flip(folder: &Path, rng: &mut SmallRng) -> impl FnOnce() + use<> {
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let whole = bytes.clone();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[rng.random_range(data..whole.len())] ^= 1 << rng.random_range(0..8);
    // Another file: that of before may be mapped.
    let replace = move |bytes: &[u8]| {
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
    };
    replace(&bytes);
    move || replace(&whole)
}

#[test]
fn a_bit_that_flips_in_a_file_changes_the_checksum_of_a_slice() {
    let mut rng = SmallRng::seed_from_u64(9);
    let folder = copy_of("tests/checkpoints/e");
    let checksums = || {
        [0, 1].map(|rank| {
            let device = CpuDevice::new(CpuOptions {
                threads: 1,
                cpus: Vec::new(),
                workspace_bytes: 0,
                instruction_set: None,
                collective: Box::new(Alone),
                progress: Arc::new(Progress::new(1)),
            })
            .unwrap();
            let config = Config::open(folder.path()).unwrap();
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let normalization = Normalization { mean: [0.5; 3], std: [0.5; 3] };
            let parallel = Parallel { rank, world_size: 2 };
            let model =
                Model::load(&device, &checkpoint, &config, normalization, parallel, DType::Bf16, &mut |_| {
                    Ok(())
                });
            model.unwrap().weights_checksum()
        })
    };
    let whole = checksums();
    assert_ne!(whole[0], whole[1]);
    for _ in 0..20 {
        let restore = flip(folder.path(), &mut rng);
        assert_ne!(checksums(), whole);
        restore();
    }
    assert_eq!(checksums(), whole);
}

#[test]
fn a_file_that_is_not_the_one_that_was_published_is_refused_by_name() {
    let mut rng = SmallRng::seed_from_u64(5);
    let folder = copy_of("tests/checkpoints/e");
    let sums = folder.path().join("SHA256SUMS");
    assert!(check_folder(folder.path()).faults.is_empty());
    let sum = Sha256::digest(fs::read(folder.path().join("model.safetensors")).unwrap());
    fs::write(&sums, format!("{sum:x}  model.safetensors\n{sum:x}  README.md\n")).unwrap();
    assert!(check_folder(folder.path()).faults.is_empty());
    let restore = flip(folder.path(), &mut rng);
    let faults = check_folder(folder.path()).faults;
    assert_eq!(faults.len(), 1, "{faults:?}");
    assert!(faults[0].contains("model.safetensors: its SHA-256 is "), "{faults:?}");
    restore();
    assert!(check_folder(folder.path()).faults.is_empty());
    fs::write(&sums, "model.safetensors\n").unwrap();
    assert!(check_folder(folder.path()).faults[0].contains("SHA256SUMS: line 1 is not a sum and a name"));
}

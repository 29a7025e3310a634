//! A rank goes from epoch to epoch, as its server sees it. The other rank of its group is the test.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use lockstep_proto::shard as pb;
use lockstep_shard::{
    collective::{Collective, DEFAULT_SLOT_BYTES, GroupLost, SharedMemory},
    device::DeviceError,
    runner::{
        MediaStore, Step, StepError, StepResult,
        step::{Fault, Sampled, SeqId},
    },
    service::{
        gate::Gate,
        options::LoadOptions,
        worker::{LoadError, LoadEvent, Loaded, Rank},
    },
};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tonic::{Code, Status};

use super::service::{Client, Served, Steps, load, load_request, serve, step};

/// A rank of which each step is a meeting. A step that releases sequence 13 is wrong; one that releases 14 meets nobody and has a
/// long answer.
struct Meeting {
    gate: Arc<Gate>,
    collective: Option<Box<dyn Collective>>,
    done: Arc<AtomicUsize>,
}

impl Rank for Meeting {
    fn run(&mut self, step: Step) -> Result<StepResult, StepError> {
        if step.releases == [SeqId(13)] {
            return Err(StepError::invalid("releases[0]", Fault::UnknownSequence(SeqId(13))));
        }
        if step.releases == [SeqId(14)] {
            let one = Sampled { id: SeqId(1), tokens: vec![], failure: None };
            return Ok(StepResult { state_hash: 1, sampled: vec![one; 1 << 14], vision_us: 0, step_us: 0 });
        }
        let collective = self.collective.as_ref().ok_or(DeviceError::GroupLost)?;
        collective.barrier().map_err(DeviceError::from)?;
        self.done.fetch_add(1, Ordering::SeqCst);
        Ok(StepResult { state_hash: 1, sampled: vec![], vision_us: 0, step_us: 0 })
    }

    fn regroup(&mut self, epoch: u64, path: &Path) -> Result<(), LoadError> {
        self.collective = None;
        let shared = SharedMemory::join(path, 0, 2, DEFAULT_SLOT_BYTES)?;
        let aborter = shared.aborter();
        let collective = self.gate.enter(epoch, shared, Some(aborter)).map_err(DeviceError::from)?;
        collective.barrier().map_err(DeviceError::from)?;
        self.collective = Some(Box::new(collective));
        Ok(())
    }
}

/// A loaded rank 0 of 2, and what meets it as rank 1.
struct Pair {
    served: Served,
    folder: tempfile::TempDir,
    done: Arc<AtomicUsize>,
}

impl Pair {
    /// A rank that is not loaded yet.
    async fn idle() -> Self {
        let (folder, done) = (tempfile::tempdir().unwrap(), Arc::<AtomicUsize>::default());
        let counted = done.clone();
        let load = move |options: &LoadOptions, gate: &Arc<Gate>, _: &mut dyn FnMut(LoadEvent)| {
            if options.model_dir.ends_with("broken") {
                return Err(LoadError::Checkpoint("broken".into()));
            }
            let mut rank = Meeting { gate: gate.clone(), collective: None, done: counted.clone() };
            rank.regroup(options.epoch, &options.collective_path)?;
            let media = Arc::new(MediaStore::new(0, options.epoch));
            Ok(Loaded { description: pb::ModelDescription::default(), media, rank: Box::new(rank) })
        };
        Self { served: serve(Arc::new(load)).await, folder, done }
    }

    /// A rank that is loaded, for epoch 4, and its peer.
    async fn loaded() -> (Self, Peer) {
        let mut pair = Self::idle().await;
        let mut client = pair.client();
        let (request, peer) = (pair.load_request(), pair.peer(4));
        let (loaded, peer) = tokio::join!(load(&mut client, request), peer.meet());
        loaded.unwrap();
        (pair, peer.unwrap())
    }

    fn client(&mut self) -> Client {
        self.served.client.clone()
    }

    fn path(&self, epoch: u64) -> PathBuf {
        self.folder.path().join(epoch.to_string())
    }

    fn load_request(&self) -> pb::LoadRequest {
        let collective_path = self.path(4).display().to_string();
        pb::LoadRequest { world_size: 2, collective_path, ..load_request() }
    }

    /// Makes the file of an epoch, and joins it as the other rank.
    fn peer(&self, epoch: u64) -> Peer {
        SharedMemory::create(&self.path(epoch), 2, DEFAULT_SLOT_BYTES).unwrap();
        Peer(SharedMemory::join(&self.path(epoch), 1, 2, DEFAULT_SLOT_BYTES).unwrap())
    }

    fn regroup(&mut self, epoch: u64) -> impl Future<Output = Result<(), Status>> + Send + 'static {
        let (mut client, collective_path) = (self.client(), self.path(epoch).display().to_string());
        async move {
            let request = pb::RegroupRequest { epoch, collective_path, group: 9 };
            client.regroup(request).await.map(|_| ())
        }
    }

    async fn progress(&mut self) -> pb::GetProgressResponse {
        self.client().get_progress(pb::GetProgressRequest::default()).await.unwrap().into_inner()
    }

    /// Waits until the rank has begun so many meetings in an epoch.
    async fn begun(&mut self, epoch: u64, collectives: u64) {
        loop {
            let progress = self.progress().await;
            if progress.epoch == epoch && progress.collectives == collectives {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// The other rank of a group.
struct Peer(SharedMemory);

impl Peer {
    /// Meets the rank.
    async fn meet(self) -> Result<Self, GroupLost> {
        tokio::task::spawn_blocking(move || self.0.barrier().map(|()| self)).await.unwrap()
    }
}

fn of_epoch(epoch: u64, number: u64) -> pb::RunRequest {
    pb::RunRequest { epoch, ..step(number) }
}

#[tokio::test]
async fn a_rank_that_waits_in_a_step_goes_on_in_another_epoch() {
    let (mut pair, peer) = Pair::loaded().await;
    let mut old = Steps::open(&mut pair.client()).await.unwrap();
    let (answer, peer) = tokio::join!(old.run(of_epoch(4, 0)), peer.meet());
    assert_eq!(answer.unwrap().step, 0);
    let peer = peer.unwrap();
    // Its peer does not come to the next one, and another step waits behind it.
    old.sender.send(of_epoch(4, 1)).await.unwrap();
    old.sender.send(of_epoch(4, 2)).await.unwrap();
    pair.begun(4, 3).await;

    let new_peer = pair.peer(5);
    let regrouped = pair.regroup(5);
    let (regrouped, new_peer) = tokio::join!(regrouped, new_peer.meet());
    regrouped.unwrap();
    assert!(peer.meet().await.is_err(), "the old group is over for its other rank, too");
    // At once, while the old stream is open still.
    let mut new = Steps::open(&mut pair.client()).await.unwrap();
    let (answer, new_peer) = tokio::join!(new.run(of_epoch(5, 0)), new_peer.unwrap().meet());
    assert_eq!((answer.unwrap().epoch, new_peer.is_ok()), (5, true));
    let progress = pair.progress().await;
    assert_eq!((progress.epoch, progress.collectives, progress.steps), (5, 2, 1));
    assert_eq!(pair.done.load(Ordering::SeqCst), 2);

    let ended = old.answers.message().await.unwrap_err();
    assert_eq!(ended.code(), Code::Aborted, "{ended}");
    let late = old.sender.send(of_epoch(4, 3)).await;
    assert!(late.is_err() || old.answers.message().await.is_ok_and(|answer| answer.is_none()));
}

#[tokio::test]
async fn a_step_of_another_epoch_changes_nothing() {
    let (mut pair, mut peer) = Pair::loaded().await;
    for epoch in [3, 5] {
        let mut steps = Steps::open(&mut pair.client()).await.unwrap();
        let error = steps.run(of_epoch(epoch, 0)).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition);
        assert!(error.message().contains(&format!("the step is of epoch {epoch}, this rank of epoch 4")));
        drop(steps);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut steps = Steps::open(&mut pair.client()).await.unwrap();
    let answer;
    (answer, peer) = {
        let (answer, peer) = tokio::join!(steps.run(of_epoch(4, 0)), peer.meet());
        (answer, peer.unwrap())
    };
    assert_eq!((answer.unwrap().step, pair.done.load(Ordering::SeqCst)), (0, 1));
    drop(peer);
}

#[tokio::test]
async fn after_a_failed_step_nobody_waits_and_the_rank_can_be_regrouped() {
    for wrong in [of_epoch(4, 7), pb::RunRequest { releases: vec![13], ..of_epoch(4, 0) }] {
        let (mut pair, peer) = Pair::loaded().await;
        let mut steps = Steps::open(&mut pair.client()).await.unwrap();
        steps.run(wrong).await.unwrap_err();
        assert!(peer.meet().await.is_err(), "the rank that failed will not come");
        drop(steps);
        tokio::time::sleep(Duration::from_millis(50)).await;
        let later = Steps::open(&mut pair.client()).await.unwrap().run(of_epoch(4, 0)).await.unwrap_err();
        assert!(later.message().contains("an earlier step failed"), "{later}");

        let (regrouped, peer) = (pair.regroup(9), pair.peer(9));
        let (regrouped, peer) = tokio::join!(regrouped, peer.meet());
        regrouped.unwrap();
        let mut steps = Steps::open(&mut pair.client()).await.unwrap();
        let (answer, _peer) = tokio::join!(steps.run(of_epoch(9, 0)), peer.unwrap().meet());
        answer.unwrap();
    }
}

#[tokio::test]
async fn a_later_epoch_is_joined_in_place_of_one_that_is_waited_for() {
    let (mut pair, _peer) = Pair::loaded().await;
    let _absent = pair.peer(5);
    let first = tokio::spawn(pair.regroup(5));
    pair.begun(5, 1).await;
    let refused = Steps::open(&mut pair.client()).await.err().expect("it is between epochs");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let (second, peer) = (pair.regroup(6), pair.peer(6));
    let (second, peer) = tokio::join!(second, peer.meet());
    let first = first.await.unwrap().unwrap_err();
    assert_eq!((first.code(), first.message()), (Code::Aborted, "epoch 5 was given up for epoch 6"));
    assert!(second.is_ok() && peer.is_ok());
}

/// Whatever the order in which calls are served, the latest epoch is the one that is joined.
#[tokio::test]
async fn of_many_calls_at_once_the_latest_epoch_wins() {
    let mut rng = SmallRng::seed_from_u64(1);
    let (mut pair, _peer) = Pair::loaded().await;
    let mut epoch = 4;
    for _ in 0..20 {
        let calls = rng.random_range(1..5);
        let peers: Vec<Peer> = (1..=calls).map(|i| pair.peer(epoch + i)).collect();
        let mut running = Vec::new();
        for i in 1..=calls {
            running.push(tokio::spawn(pair.regroup(epoch + i)));
            tokio::time::sleep(Duration::from_micros(rng.random_range(0..2000))).await;
        }
        epoch += calls;
        let mut peers = peers.into_iter().rev();
        let latest = peers.next().unwrap().meet().await.expect("the latest epoch is met");
        for (i, call) in running.into_iter().enumerate() {
            let joined = call.await.unwrap();
            let is_latest = i as u64 + 1 == calls;
            assert!(joined.is_ok() == is_latest, "{i} of {calls}: {joined:?}");
        }
        let mut steps = Steps::open(&mut pair.client()).await.unwrap();
        let (answer, _peer) = tokio::join!(steps.run(of_epoch(epoch, 0)), latest.meet());
        answer.unwrap();
    }
}

#[tokio::test]
async fn a_stream_that_nobody_reads_holds_up_nothing() {
    let (mut pair, _peer) = Pair::loaded().await;
    let steps = Steps::open(&mut pair.client()).await.unwrap();
    let silent = |number| pb::RunRequest { releases: vec![14], ..of_epoch(4, number) };
    // Their answers are far more than connections and queues hold: the rank cannot get rid of them.
    const SENT: u64 = 500;
    for number in 0..SENT {
        steps.sender.send(silent(number)).await.unwrap();
    }
    let mut done = 0;
    while done == 0 || pair.progress().await.steps > done {
        done = pair.progress().await.steps;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(done < SENT);
    let (regrouped, peer) = (pair.regroup(5), pair.peer(5));
    let (regrouped, peer) = tokio::join!(regrouped, peer.meet());
    assert!(regrouped.is_ok() && peer.is_ok());
}

#[tokio::test]
async fn what_cannot_be_regrouped_says_why() {
    let mut pair = Pair::idle().await;
    let idle = pair.regroup(5).await.unwrap_err();
    assert_eq!((idle.code(), pair.progress().await.epoch), (Code::FailedPrecondition, 0));
    let mut client = pair.client();
    let broken = pb::LoadRequest { model_dir: "/broken".into(), ..pair.load_request() };
    load(&mut client, broken).await.unwrap_err();
    assert_eq!(pair.regroup(5).await.unwrap_err().code(), Code::FailedPrecondition);

    let mut pair = Pair::idle().await;
    let (mut client, request, peer) = (pair.client(), pair.load_request(), pair.peer(4));
    let loading = tokio::spawn(async move { load(&mut client, request).await });
    pair.begun(4, 1).await;
    assert_eq!(pair.regroup(5).await.unwrap_err().code(), Code::FailedPrecondition);
    let _peer = peer.meet().await.unwrap();
    loading.await.unwrap().unwrap();
    for epoch in [3, 4] {
        let early = pair.regroup(epoch).await.unwrap_err();
        assert_eq!(early.code(), Code::InvalidArgument);
        assert_eq!(early.message(), format!("epoch: is {epoch}, it must be larger than 4"));
    }
    let nowhere = pb::RegroupRequest { epoch: 5, group: 9, ..Default::default() };
    let nowhere = pair.client().regroup(nowhere).await.unwrap_err();
    assert_eq!(nowhere.code(), Code::InvalidArgument);
    assert!(nowhere.message().starts_with("collective_path: "), "{nowhere}");

    // A file that is not there: this epoch is lost, the next one is not.
    let missing = pair.regroup(5).await.unwrap_err();
    assert_eq!(missing.code(), Code::FailedPrecondition);
    assert!(missing.message().starts_with("collective_path: cannot share"), "{missing}");
    let (regrouped, peer) = (pair.regroup(6), pair.peer(6));
    let (regrouped, peer) = tokio::join!(regrouped, peer.meet());
    assert!(regrouped.is_ok() && peer.is_ok());
}

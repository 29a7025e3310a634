//! All ranks together: running steps, and noticing that something is wrong.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use lockstep_proto::shard as pb;
use opentelemetry::trace::SpanContext;
use tokio::{sync::watch, time::timeout};

use super::{
    config::{GroupConfig, Placement},
    convert,
    error::{Broken, GroupError, RankError, RankFault},
    meeting::Meeting,
    pixels::PixelFile,
    rank::{Rank, Steps, all},
    restart::Processes,
    types::{ModelDescription, ResidentMemory},
    watchdog::Watchdog,
};
use crate::limits::GRACE;
use crate::scheduler::{MediaHash, SeqId, StepPlan, StepResult};

/// A loaded group of shards. Dropping it kills those that are children of this process; [`Group::shutdown`] also waits for their
/// end.
pub struct Group {
    pub(super) config: GroupConfig,
    pub(super) description: ModelDescription,
    /// Of each rank's slices of the weights, as it read them first.
    pub(super) weights_checksums: Vec<u64>,
    /// Of the epoch that it is in.
    pub(super) meeting: Meeting,
    pub(super) ranks: watch::Sender<Arc<[Rank]>>,
    pub(super) steps: Vec<Steps>,
    pub(super) watchdog: Watchdog,
    /// Whether a step is in flight.
    pub(super) works: Arc<AtomicBool>,
    pub(super) processes: Processes,
    /// Plans that are sent and not answered.
    in_flight: VecDeque<StepPlan>,
    /// What each rank answered to those, as far as the others have not.
    answers: Vec<VecDeque<pb::RunResponse>>,
    /// Traces of sequences that no step has admitted yet.
    traces: HashMap<SeqId, SpanContext>,
    /// What was noticed first, when something went wrong.
    symptom: Option<Symptom>,
    /// Ranks at fault, until the group is put together again.
    pub(super) suspects: BTreeSet<u32>,
}

/// Ranks that are loaded and have met, with their streams of steps.
pub(super) struct Joined {
    pub description: ModelDescription,
    /// By rank, as for `ranks` and `steps`.
    pub weights_checksums: Vec<u64>,
    pub ranks: Vec<Rank>,
    pub steps: Vec<Steps>,
}

/// What is noticed first of a fault. Often an effect of it.
enum Symptom {
    Rank(RankError),
    Fault(GroupError),
}

/// What can be done with a group beside its steps. Cheap to clone, and the same through all restarts.
#[derive(Clone)]
pub struct GroupHandle {
    ranks: watch::Receiver<Arc<[Rank]>>,
    placement: Placement,
}

impl Group {
    /// A group of ranks that have met.
    pub(super) fn of(
        mut config: GroupConfig,
        processes: Processes,
        meeting: Meeting,
        joined: Joined,
    ) -> Self {
        let Joined { description, weights_checksums, ranks, steps } = joined;
        // What was left to the ranks is settled: one that loads again has what the others kept, however much is free then.
        config.kv_capacity_tokens = u64::from(description.kv_blocks) * u64::from(description.kv_block_tokens);
        let works = Arc::new(AtomicBool::new(false));
        Self {
            watchdog: Watchdog::of_steps(ranks.clone(), config.silence, works.clone()),
            answers: ranks.iter().map(|_| VecDeque::new()).collect(),
            ranks: watch::Sender::new(ranks.into()),
            config,
            description,
            weights_checksums,
            meeting,
            steps,
            works,
            processes,
            in_flight: VecDeque::new(),
            traces: HashMap::new(),
            symptom: None,
            suspects: BTreeSet::new(),
        }
    }

    /// Lets the ranks add to the trace of a sequence that the next step admits.
    pub fn trace(&mut self, id: SeqId, request: SpanContext) {
        self.traces.insert(id, request);
    }

    /// Sends a step to all ranks, which may be at an earlier one still.
    pub fn send(&mut self, plan: StepPlan) {
        let request = convert::run_request(&plan, (self.meeting.group, self.meeting.epoch), &self.traces);
        self.traces.clear();
        self.works.store(true, Ordering::Relaxed);
        self.steps.iter().for_each(|steps| steps.send(request.clone()));
        self.in_flight.push_back(plan);
    }

    /// The result of the first step in flight. Waits for a fault where there is none. May be dropped and called again.
    ///
    /// # Errors
    /// A rank died, failed or is silent, or the ranks diverged: [`Group::diagnose`] says which.
    pub async fn receive(&mut self) -> Result<StepResult, Broken> {
        let Self { steps, answers, watchdog, in_flight, .. } = &mut *self;
        let answered = poll_fn(|context| poll_answers(steps, answers, in_flight.is_empty(), context));
        let symptom = tokio::select! {
            answered = answered => match answered {
                Ok(()) => return self.conclude(),
                Err(error) => Symptom::Rank(error),
            },
            (ranks, silence) = watchdog.alarm() => Symptom::Fault(GroupError::Silent { ranks, silence }),
        };
        Err(self.broken(symptom))
    }

    /// Compares what all ranks answered to the first step in flight.
    fn conclude(&mut self) -> Result<StepResult, Broken> {
        let plan = self.in_flight.pop_front().expect("an answer is to a plan");
        self.works.store(!self.in_flight.is_empty(), Ordering::Relaxed);
        let take = |answers: &mut VecDeque<_>| answers.pop_front().expect("every rank has answered");
        let answers: Vec<pb::RunResponse> = self.answers.iter_mut().map(take).collect();
        let hashes: Vec<u64> = answers.iter().map(|answer| answer.state_hash).collect();
        if hashes.iter().any(|hash| *hash != hashes[0]) {
            return Err(self.broken(Symptom::Fault(GroupError::Diverged { step: plan.step, hashes })));
        }
        let (epoch, mut first) = (self.meeting.epoch, None);
        for (rank, answer) in (0..).zip(answers) {
            let mut failed = |words| Symptom::Fault(GroupError::ShardFailed { rank, words });
            if (answer.epoch, answer.step) != (epoch, plan.step) {
                let symptom = failed(format!("answers step {} of epoch {}", answer.step, answer.epoch));
                return Err(self.broken(symptom));
            }
            if rank == 0 {
                let checked = convert::step_result(&plan, epoch, answer).map_err(&mut failed);
                first = Some(checked.map_err(|symptom| self.broken(symptom))?);
            }
        }
        Ok(first.expect("a group has a rank 0"))
    }

    /// Places the pixels of a medium at all ranks: `grid` in patches (time, height, width), `pixels` as
    /// frames x height x width x 3. They stay there until they are encoded, or the medium is evicted.
    ///
    /// # Errors
    /// A rank died, is silent, or did not take them; or there is no place to write them.
    pub async fn put_media(&mut self, hash: MediaHash, grid: [u32; 3], pixels: Bytes) -> Result<(), Broken> {
        let handle = self.handle();
        // A step that ends meanwhile is not looked at before this is done, so that standing still is no sign of anything.
        self.works.store(false, Ordering::Relaxed);
        let symptom = tokio::select! {
            placed = handle.put_media(self.meeting.epoch, hash, grid, pixels) => match placed {
                Ok(()) => {
                    self.works.store(!self.in_flight.is_empty(), Ordering::Relaxed);
                    return Ok(());
                }
                Err(error) => Symptom::Fault(error),
            },
            (ranks, silence) = self.watchdog.alarm() => Symptom::Fault(GroupError::Silent { ranks, silence }),
        };
        Err(self.broken(symptom))
    }

    /// Takes it that the group is of no more use, for a reason that it does not know of itself.
    pub fn give_up(&mut self, why: GroupError) -> Broken {
        self.broken(Symptom::Fault(why))
    }

    fn broken(&mut self, symptom: Symptom) -> Broken {
        self.symptom = Some(symptom);
        Broken
    }

    /// What is wrong, after something was noticed. Listens to all ranks for a short time: who died or failed first is rarely who is
    /// heard first.
    ///
    /// # Panics
    /// If nothing was noticed.
    pub async fn diagnose(&mut self) -> GroupError {
        let first = match self.symptom.take().expect("something was noticed") {
            Symptom::Fault(error) => return error,
            Symptom::Rank(first) => first,
        };
        let ranks = self.ranks.borrow().clone();
        let others = self.steps.iter_mut().zip(ranks.iter()).filter(|(_, rank)| rank.number() != first.rank);
        let mut errors: FuturesUnordered<BoxFuture<'_, RankError>> = FuturesUnordered::new();
        others.for_each(|(steps, _)| errors.push(Box::pin(steps.error())));
        ranks.iter().for_each(|rank| errors.push(Box::pin(rank.death())));
        let mut heard = vec![first];
        let listening = async {
            while let Some(error) = errors.next().await {
                let is_cause = matches!(error.fault, RankFault::Died { .. });
                heard.push(error);
                if is_cause {
                    return;
                }
            }
        };
        let _ = timeout(GRACE, listening).await;
        GroupError::nearest_to_cause(heard)
    }

    /// Forgets what is in flight.
    pub(super) fn forget_steps(&mut self) {
        self.steps.clear();
        self.in_flight.clear();
        self.answers.iter_mut().for_each(VecDeque::clear);
        self.traces.clear();
        self.symptom = None;
        self.works.store(false, Ordering::Relaxed);
    }

    /// What all ranks say of the model, with the blocks that the poorest of them has.
    pub fn description(&self) -> &ModelDescription {
        &self.description
    }

    /// For what goes on beside the steps.
    pub fn handle(&self) -> GroupHandle {
        GroupHandle { ranks: self.ranks.subscribe(), placement: self.config.placement }
    }

    /// Kills the shards that are children of this process, and returns when they are gone, or left behind. Those that run elsewhere
    /// wait for the next server.
    pub async fn shutdown(self) {
        self.processes.shutdown().await;
    }
}

/// Takes answers as they come, until every rank has one more than was concluded. An error comes through at any time.
fn poll_answers(
    steps: &mut [Steps],
    answers: &mut [VecDeque<pb::RunResponse>],
    idle: bool,
    context: &mut Context<'_>,
) -> Poll<Result<(), RankError>> {
    let mut complete = !idle;
    for (steps, answers) in steps.iter_mut().zip(answers) {
        while answers.is_empty() {
            match steps.poll_answer(context) {
                Poll::Ready(Ok(answer)) => answers.push_back(answer),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => break,
            }
        }
        complete &= !answers.is_empty();
    }
    if complete { Poll::Ready(Ok(())) } else { Poll::Pending }
}

impl GroupHandle {
    /// The ranks as they are now.
    fn ranks(&self) -> Arc<[Rank]> {
        self.ranks.borrow().clone()
    }

    async fn put_media(
        &self,
        epoch: u64,
        hash: MediaHash,
        grid: [u32; 3],
        pixels: Bytes,
    ) -> Result<(), GroupError> {
        let size_bytes = pixels.len() as u64;
        let header = |path| pb::MediaHeader {
            hash: convert::media_hash(&hash),
            grid: Some(convert::grid(grid)),
            size_bytes,
            path,
            epoch,
            ..Default::default()
        };
        let ranks = self.ranks();
        let placed = match self.placement {
            Placement::Files => {
                let file = PixelFile::write(pixels).await;
                let file = file.map_err(|error| GroupError::Pixels(error.to_string()))?;
                // The file lives until all ranks have answered: by then they have opened it, or never will.
                all(ranks.iter().map(|rank| rank.put_media(header(file.path()), Bytes::new()))).await
            }
            Placement::Chunks { .. } => {
                all(ranks.iter().map(|rank| rank.put_media(header(String::new()), pixels.clone()))).await
            }
        };
        placed.map_err(GroupError::nearest_to_cause)?;
        Ok(())
    }

    /// The memory that each rank holds, in rank order.
    ///
    /// # Errors
    /// A rank died, or did not answer.
    pub async fn memory(&self) -> Result<Vec<ResidentMemory>, GroupError> {
        let ranks = self.ranks();
        all(ranks.iter().map(Rank::memory)).await.map_err(GroupError::nearest_to_cause)
    }
}

//! How a GPU's rank meets the others.
//!
//! What is small and on the host anyway (how a group meets, lists of candidates) goes through the host's collective. Sums of
//! activations go through the memory of the GPUs, through NCCL, or, where a group does without both, through the host as well.
//! The best candidates go through the memory of the GPUs, or through the host.
//! All ranks go the same way: what one of them cannot, none does.
#![allow(unsafe_code)]

use std::{rc::Rc, sync::Arc};

use super::arena::Lent;
use super::driver::{Address, Event, Gpu, PinnedBuffer};
use super::nccl::Communicator;
use super::peers::{Exchange, MAX_MESSAGE_BYTES, Peers, all_agree};
use super::watcher::{Waits, Watcher};
use crate::collective::Collective;
use crate::device::{DeviceError, Result};

/// Elements that are summed through the host at a time.
const PIECE_LEN: usize = 512 << 10;

/// What sums of activations over ranks may go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sums {
    /// The memory of the GPUs, which read one another's; larger messages NCCL. What cannot be falls back to what can, at all
    /// ranks.
    Peers,
    /// NCCL.
    Nccl,
    /// The memory of the host: slow.
    Host,
}

/// Which ways there are.
#[derive(Clone, Copy, Debug)]
pub struct Ways {
    /// What was asked for.
    pub sums: Sums,
    /// Whether NCCL is there.
    pub has_nccl: bool,
    /// Whether an element's bits must not depend on where in a message it is. NCCL's do.
    pub is_repeatable: bool,
}

/// A rank's group.
pub struct Group {
    /// None where nothing waits for other ranks on the GPU. It goes first: with it ends all of that, before a part of the way
    /// waits for the stream.
    watcher: Option<Watcher>,
    way: Way,
    host: Rc<dyn Collective>,
    gpu: Rc<Gpu>,
}

/// What sums of activations go through.
enum Way {
    /// There is nobody to meet.
    Alone,
    Peers {
        peers: Peers,
        /// What sums messages beyond [`MAX_MESSAGE_BYTES`]. Without it they are summed in pieces of that.
        larger: Option<Arc<Communicator>>,
    },
    Nccl(Arc<Communicator>),
    Host(HostSums),
}

impl Group {
    /// Meets the other ranks, which have to do the same. Where sums go through the memory of GPUs, `exchange` is this rank's part
    /// of it.
    ///
    /// # Errors
    /// The group fell apart, or NCCL does not come up.
    pub fn new(
        gpu: &Rc<Gpu>,
        host: Box<dyn Collective>,
        ways: Ways,
        exchange: Option<&Rc<Exchange>>,
    ) -> Result<Self> {
        let host: Rc<dyn Collective> = host.into();
        let way = match (ways.sums, exchange) {
            _ if host.world_size() == 1 => Way::Alone,
            (Sums::Peers, Some(exchange)) => Self::best_way(gpu, &host, ways, exchange)?,
            (Sums::Nccl, _) => Way::Nccl(Arc::new(Communicator::new(gpu, &*host)?)),
            (Sums::Peers | Sums::Host, _) => Way::Host(HostSums::new(gpu)?),
        };
        let watcher = way.waits().map(|waits| Watcher::start(host.checker(), waits)).transpose()?;
        Ok(Self { watcher, way, host, gpu: gpu.clone() })
    }

    /// The best way that all ranks have.
    fn best_way(
        gpu: &Rc<Gpu>,
        host: &Rc<dyn Collective>,
        ways: Ways,
        exchange: &Rc<Exchange>,
    ) -> Result<Way> {
        let peers = Peers::meet(gpu, host, exchange)?;
        // NCCL refuses ranks that share a GPU, and adds in an order that depends on where in a message an element is.
        let gpus = host.all_gather(&gpu.uuid()?)?;
        let are_distinct = gpus.iter().enumerate().all(|(rank, gpu)| !gpus[..rank].contains(gpu));
        let has_nccl = all_agree(&**host, ways.has_nccl && are_distinct && !ways.is_repeatable)?;
        let nccl = if has_nccl { Some(Arc::new(Communicator::new(gpu, &**host)?)) } else { None };
        let (way, larger) = match (&peers, &nccl) {
            (Some(_), Some(_)) => ("the memory of GPUs", "NCCL"),
            (Some(_), None) => ("the memory of GPUs", "the memory of GPUs, in pieces"),
            (None, Some(_)) => ("NCCL", "NCCL"),
            (None, None) => ("the host", "the host"),
        };
        tracing::info!(way, larger, "what sums over ranks go through");
        Ok(match (peers, nccl) {
            (Some(peers), larger) => Way::Peers { peers, larger },
            (None, Some(communicator)) => Way::Nccl(communicator),
            (None, None) => Way::Host(HostSums::new(gpu)?),
        })
    }

    /// The host's collective.
    pub fn host(&self) -> &dyn Collective {
        &*self.host
    }

    /// The ranks whose memory is read, if that is how a message of so many bytes is summed.
    ///
    /// # Errors
    /// The group fell apart, as far as is known now.
    pub fn peers(&mut self, bytes: usize) -> Result<Option<&mut Peers>> {
        match &mut self.way {
            Way::Peers { peers, larger } if bytes <= MAX_MESSAGE_BYTES || larger.is_none() => {
                self.host.check()?;
                Ok(Some(peers))
            }
            _ => Ok(None),
        }
    }

    /// A place for a part of a sum, of so many bytes, where other ranks read it. None if there is none.
    pub fn lend(&self, bytes: usize) -> Option<Lent> {
        if let Way::Peers { peers, .. } = &self.way { peers.lend(bytes) } else { None }
    }

    /// Sums `count` elements of bf16 over the ranks, in place, in the stream's order: every rank ends with the same bits.
    ///
    /// # Panics
    /// They are summed by [`Group::peers`].
    ///
    /// # Errors
    /// The group fell apart, as far as is known now, or the GPU failed.
    pub fn all_reduce_sum(&mut self, at: Address, count: usize) -> Result<()> {
        match &mut self.way {
            // It is counted, and ends with its epoch, as any other.
            Way::Alone => Ok(self.host.all_reduce_sum(&mut [])?),
            Way::Nccl(communicator) | Way::Peers { larger: Some(communicator), .. } => {
                self.host.begin_elsewhere()?;
                communicator.all_reduce_sum(at, count, &self.gpu, &*self.host)
            }
            Way::Peers { larger: None, .. } => panic!("a message that peers sum in pieces"),
            Way::Host(sums) => sums.all_reduce_sum(at, count, &self.gpu, &*self.host),
        }
    }

    /// Whether the group is whole, as far as is known.
    ///
    /// # Errors
    /// It is not.
    pub fn check(&self) -> Result<()> {
        self.host.check()?;
        self.check_sums()?;
        self.communicator().map_or(Ok(()), |communicator| communicator.check())
    }

    /// Whether the sums of a step can be kept in a graph. Those through the host cannot, and those through NCCL are not: it ends a
    /// communicator only when no graph has it any more, and a graph that waits for a rank that is lost cannot be given up before.
    /// Messages of a step that is kept are small enough for peers.
    pub fn fits_graphs(&self) -> bool {
        matches!(self.way, Way::Alone | Way::Peers { .. })
    }

    /// Whether some sums go through NCCL.
    pub fn uses_nccl(&self) -> bool {
        self.communicator().is_some()
    }

    /// Waits for an event of the stream.
    ///
    /// # Errors
    /// The group fell apart meanwhile, so that what was summed means nothing, or the GPU failed.
    pub fn wait(&self, event: &Event) -> Result<()> {
        let look = || {
            self.check().or_else(|error| {
                // What waits for another rank would wait for ever; the rest ends by itself.
                if let Some(watcher) = &self.watcher {
                    watcher.end_waits();
                }
                self.gpu.synchronize()?;
                Err(error)
            })
        };
        self.gpu.wait_until(|| event.has_come(), look)?;
        self.check_sums()
    }

    /// Whether no sum so far was given up.
    fn check_sums(&self) -> Result<()> {
        if let Way::Peers { peers, .. } = &self.way {
            peers.check()?;
        }
        let is_cut_short = self.communicator().is_some_and(Communicator::is_cut_short);
        if is_cut_short { Err(DeviceError::GroupLost) } else { Ok(()) }
    }

    fn communicator(&self) -> Option<&Communicator> {
        match &self.way {
            Way::Nccl(communicator) | Way::Peers { larger: Some(communicator), .. } => Some(communicator),
            _ => None,
        }
    }
}

impl Way {
    /// What waits for other ranks on the GPU. It must end before this does.
    fn waits(&self) -> Option<Waits> {
        match self {
            Self::Alone | Self::Host(_) => None,
            Self::Nccl(communicator) => Some(Waits { abort: None, communicator: Some(communicator.clone()) }),
            Self::Peers { peers, larger } => {
                // SAFETY: whoever has the way ends what waits before.
                let abort = unsafe { peers.abort_word() };
                Some(Waits { abort: Some(abort), communicator: larger.clone() })
            }
        }
    }
}

/// Bytes of the host that sums through it take: pinned ones, and others.
pub const HOST_SUMS_BYTES: [usize; 2] = [PIECE_LEN * size_of::<half::bf16>(), PIECE_LEN * size_of::<f32>()];

/// Sums through the host's memory.
struct HostSums {
    pinned: PinnedBuffer,
    sums: Vec<f32>,
}

impl HostSums {
    fn new(gpu: &Rc<Gpu>) -> Result<Self> {
        Ok(Self { pinned: PinnedBuffer::new(gpu, HOST_SUMS_BYTES[0])?, sums: vec![0.0; PIECE_LEN] })
    }

    fn all_reduce_sum(&mut self, at: Address, count: usize, gpu: &Gpu, host: &dyn Collective) -> Result<()> {
        for first in (0..count).step_by(PIECE_LEN) {
            let len = PIECE_LEN.min(count - first);
            let (at, bytes) = (at + 2 * first as Address, 2 * len);
            self.pinned.receive(at, 0, bytes)?;
            gpu.synchronize()?;
            let sums = &mut self.sums[..len];
            for (sum, addend) in sums.iter_mut().zip(self.pinned.as_slice().as_chunks::<2>().0) {
                *sum = half::bf16::from_le_bytes(*addend).to_f32();
            }
            host.all_reduce_sum(sums)?;
            for (to, sum) in self.pinned.as_mut_slice().as_chunks_mut::<2>().0.iter_mut().zip(sums) {
                *to = half::bf16::from_f32(*sum).to_le_bytes();
            }
            self.pinned.send(0, bytes, at)?;
            // The next piece takes the same memory.
            gpu.synchronize()?;
        }
        Ok(())
    }
}

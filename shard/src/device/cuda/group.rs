//! How a GPU's rank meets the others.
//!
//! What is small and on the host anyway (candidates, the end of a step) goes through the host's collective. Sums of
//! activations go through the memory of the GPUs, through NCCL, or, where a group does without both, through the host as well.
//! All ranks go the same way: what one of them cannot, none does.

use std::rc::Rc;

use super::arena::Lent;
use super::driver::{Address, Event, Gpu, PinnedBuffer};
use super::nccl::Communicator;
use super::peers::{Exchange, MAX_MESSAGE_BYTES, Peers, all_agree};
use crate::collective::Collective;
use crate::device::Result;

/// Elements that are summed through the host at a time.
const PIECE_LEN: usize = 512 << 10;

/// Looks at an event between two looks at the group.
const LOOKS: usize = 64;

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
        larger: Option<Communicator>,
    },
    Nccl(Communicator),
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
            (Sums::Nccl, _) => Way::Nccl(Communicator::new(&*host)?),
            (Sums::Peers | Sums::Host, _) => Way::Host(HostSums::new(gpu)?),
        };
        Ok(Self { way, host, gpu: gpu.clone() })
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
        let nccl = if has_nccl { Some(Communicator::new(&**host)?) } else { None };
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
                self.host.check()?;
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
        match &self.way {
            Way::Alone | Way::Host(_) => Ok(()),
            Way::Nccl(communicator) => communicator.check(),
            Way::Peers { peers, larger } => {
                peers.check()?;
                larger.as_ref().map_or(Ok(()), Communicator::check)
            }
        }
    }

    /// Whether the sums of a step can be kept in a graph. Those through the host cannot, and those through NCCL are not: it ends a
    /// communicator only when no graph has it any more, and a graph that waits for a rank that is lost cannot be given up before.
    /// Messages of a step that is kept are small enough for peers.
    pub fn fits_graphs(&self) -> bool {
        matches!(self.way, Way::Alone | Way::Peers { .. })
    }

    /// Waits for an event of the stream.
    ///
    /// # Errors
    /// The group fell apart meanwhile, so that what was summed means nothing, or the GPU failed.
    pub fn wait(&mut self, event: &Event) -> Result<()> {
        loop {
            for _ in 0..LOOKS {
                if event.has_come()? {
                    return if let Way::Peers { peers, .. } = &self.way { peers.check() } else { Ok(()) };
                }
                std::hint::spin_loop();
            }
            // Where threads are more than processors, somebody may have to do what is waited for.
            std::thread::yield_now();
            if let Err(error) = self.check() {
                // What waits for another rank would wait for ever; the rest ends by itself.
                self.abort();
                self.gpu.synchronize()?;
                return Err(error);
            }
        }
    }

    /// Ends what waits for other ranks.
    fn abort(&mut self) {
        match &mut self.way {
            Way::Alone | Way::Host(_) => {}
            Way::Nccl(communicator) => communicator.abort(),
            Way::Peers { peers, larger } => {
                peers.abort();
                if let Some(communicator) = larger {
                    communicator.abort();
                }
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // All of it before any part of it waits for the stream.
        self.abort();
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

//! Sums over ranks whose GPUs read one another's memory, in one shot: each reads the parts of all and adds them in the order of
//! ranks (see `kernels/reduce.cu`).
//!
//! A rank has one allocation that the others open: two buffers for its parts, which calls use in turn, and flags by which the
//! kernels of ranks meet. It has it as long as its device, for a rank that leaves a group cannot know whether a kernel of
//! another rank still reads: what is opened is closed when a group ends, and what is shared only when the device ends.
//!
//! **A kernel that waits for a rank that is gone** is ended by a word in the host's memory, which a thread of the host's writes when
//! the group has fallen apart (see `watcher.rs`). The kernel notes in another word that its results mean nothing.
//!
//! **Ranks that share a GPU** wait in kernels for one another, which must run at the same time. Those of several processes take
//! turns by the millisecond, unless they run under NVIDIA's MPS: sums end, slowly.
#![allow(unsafe_code)]

use std::{cell::Cell, rc::Rc};

use super::arena::Lent;
use super::driver::{Address, DeviceBuffer, Gpu};
use super::ipc::{Handle, OpenedBuffer, SharedWord, SharedWords, Uuid, share};
use super::kernels::{MAX_RANKS, PerRank};
use crate::collective::Collective;
use crate::device::{DeviceError, Result};

/// The largest message that is summed in one shot, where there is NCCL for larger ones: 64 rows of 8192 elements. A rank reads
/// the parts of all others whole, and of 1 MiB from 7 others over NVLink that takes about as long as NCCL takes to begin; beyond
/// it NCCL moves less. No measurement yet.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// The most blocks of a call, and so the flags that there are: about one for each multiprocessor.
pub const MAX_BLOCKS: usize = 128;

/// Shared memory is a multiple of this: the driver shares whole pages, and nothing else is to lie in them.
const PAGE_BYTES: usize = 2 << 20;

const FLAGS_OFFSET: usize = 2 * MAX_MESSAGE_BYTES;
const EPOCHS_OFFSET: usize = FLAGS_OFFSET + MAX_BLOCKS * MAX_RANKS * size_of::<u32>();
const END_OFFSET: usize = EPOCHS_OFFSET + MAX_BLOCKS * size_of::<u32>();

/// Words that the host shares with the kernels: not 0 when nothing is to be waited for any longer, and not 0 when a wait was given
/// up, so that results mean nothing.
const ABORT: usize = 0;
const STATUS: usize = 1;

/// What a rank shares with the others.
pub struct Exchange {
    memory: DeviceBuffer,
    words: SharedWords<2>,
}

impl Exchange {
    /// Reserves it.
    ///
    /// # Errors
    /// There is no more memory.
    pub fn new(gpu: &Rc<Gpu>) -> Result<Self> {
        let memory = DeviceBuffer::new(gpu, Self::bytes(), "sums over ranks")?;
        Ok(Self { memory, words: SharedWords::new(gpu)? })
    }

    /// Bytes of the GPU that it takes.
    pub const fn bytes() -> usize {
        END_OFFSET.next_multiple_of(PAGE_BYTES)
    }
}

/// What a kernel is given to meet those of the other ranks.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The ranks' parts.
    pub inputs: PerRank,
    /// The ranks' flags.
    pub flags: PerRank,
    /// This rank.
    pub rank: u32,
    /// Number of ranks.
    pub world_size: u32,
    /// Where blocks count their calls.
    pub epochs: Address,
    /// Where the host says that nothing is to be waited for.
    pub abort: Address,
    /// Where it is noted that a wait was given up.
    pub status: Address,
}

/// The ranks of a group that reach one another's memory.
pub struct Peers {
    exchange: Rc<Exchange>,
    /// Where each rank's memory is for this one.
    bases: Vec<Address>,
    host: Rc<dyn Collective>,
    /// Which of the buffers the next call reads.
    turn: usize,
    /// Calls of what is being kept as a graph, if anything is.
    kept: Option<usize>,
    /// Whether the part of the next call is being written.
    is_lent: Rc<Cell<bool>>,
    _opened: Vec<OpenedBuffer>,
    gpu: Rc<Gpu>,
}

impl Peers {
    /// Meets the other ranks, which have to do the same. None if any of them cannot reach the memory of all others: that is then so
    /// for all.
    ///
    /// # Errors
    /// The group fell apart, or the GPU failed.
    pub fn meet(gpu: &Rc<Gpu>, host: &Rc<dyn Collective>, exchange: &Rc<Exchange>) -> Result<Option<Self>> {
        let mine = Card::new(gpu, exchange)?;
        let cards = host.all_gather(&mine.to_bytes())?;
        let cards: Vec<Card> = cards.iter().map(|bytes| Card::from_bytes(bytes)).collect();
        // All ranks have left the group before by now, and no kernel of it runs: what is zeroed here stays so until a call of this
        // group. Other ranks make one after the next meeting.
        exchange.words.store(ABORT, 0);
        exchange.words.store(STATUS, 0);
        let flags = exchange.memory.address() + FLAGS_OFFSET as Address;
        gpu.fill(flags, 0, END_OFFSET - FLAGS_OFFSET)?;
        gpu.synchronize()?;
        let reached: Result<Vec<_>> = cards.iter().map(|card| reach(gpu, card, &mine)).collect();
        if let Err(error) = &reached {
            tracing::warn!(%error, "sums over ranks cannot go through the memory of GPUs");
        }
        if !all_agree(&**host, reached.is_ok())? {
            return Ok(None);
        }
        let (bases, opened): (Vec<_>, Vec<_>) = reached?.into_iter().unzip();
        Ok(Some(Self {
            exchange: exchange.clone(),
            bases,
            host: host.clone(),
            turn: 0,
            kept: None,
            is_lent: Rc::default(),
            _opened: opened.into_iter().flatten().collect(),
            gpu: gpu.clone(),
        }))
    }

    /// Where this rank's part of the next call is to be.
    pub fn input(&self) -> Address {
        self.bases[self.host.rank()] + (self.turn * MAX_MESSAGE_BYTES) as Address
    }

    /// The same, to be written in place of activations of so many bytes: if they fit, and no other ones have it. The call before
    /// may be on its way still, and uses the other buffer.
    pub fn lend(&self, bytes: usize) -> Option<Lent> {
        if !(1..=MAX_MESSAGE_BYTES).contains(&bytes) || self.is_lent.replace(true) {
            return None;
        }
        Some(Lent::new(self.input(), self.is_lent.clone()))
    }

    /// Begins a call: its part is written, and nothing is lent.
    ///
    /// # Errors
    /// The group fell apart, as far as is known now.
    pub fn begin(&mut self) -> Result<Call> {
        assert!(!self.is_lent.get(), "a part that was begun is summed before another");
        match &mut self.kept {
            Some(calls) => *calls += 1,
            None => self.host.begin_elsewhere()?,
        }
        let rank = self.host.rank();
        let per_rank = |offset: usize| {
            let mut addresses = PerRank::default();
            for (to, base) in addresses.0.iter_mut().zip(&self.bases) {
                *to = base + offset as Address;
            }
            addresses
        };
        let call = Call {
            inputs: per_rank(self.turn * MAX_MESSAGE_BYTES),
            flags: per_rank(FLAGS_OFFSET),
            rank: rank as u32,
            world_size: self.bases.len() as u32,
            epochs: self.bases[rank] + EPOCHS_OFFSET as Address,
            abort: self.exchange.words.address(ABORT),
            status: self.exchange.words.address(STATUS),
        };
        self.turn = 1 - self.turn;
        Ok(call)
    }

    /// Which of the two buffers the next call reads.
    pub fn turn(&self) -> usize {
        self.turn
    }

    /// From now on calls are not made but kept as a graph.
    pub fn keep(&mut self) {
        assert_eq!(self.turn, 0, "the turn of what is kept as a graph");
        self.kept = Some(0);
    }

    /// Calls that were kept, none of which is made yet.
    pub fn kept(&mut self) -> usize {
        self.turn = 0;
        self.kept.take().unwrap_or(0)
    }

    /// Begins so many calls that were kept.
    ///
    /// # Errors
    /// The group fell apart, as far as is known now.
    pub fn repeat(&mut self, calls: usize) -> Result<()> {
        (0..calls).try_for_each(|_| self.host.begin_elsewhere())?;
        self.turn = calls % 2;
        Ok(())
    }

    /// Whether what was summed so far is what it should be.
    ///
    /// # Errors
    /// A wait for another rank was given up.
    pub fn check(&self) -> Result<()> {
        if self.exchange.words.load(STATUS) == 0 { Ok(()) } else { Err(DeviceError::GroupLost) }
    }

    /// The word that ends what waits for other ranks, once it is not 0.
    ///
    /// # Safety
    /// The peers outlive it.
    pub unsafe fn abort_word(&self) -> SharedWord {
        // SAFETY: the words are part of the exchange, which the peers keep.
        unsafe { self.exchange.words.word(ABORT) }
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        // The others may be gone or in another epoch: nobody is waited for.
        self.exchange.words.store(ABORT, 1);
        let _ = self.gpu.synchronize();
    }
}

/// Whether it is so at all ranks.
///
/// # Errors
/// The group fell apart.
pub fn all_agree(host: &dyn Collective, mine: bool) -> Result<bool> {
    Ok(host.all_gather(&[mine.into()])?.iter().all(|theirs| theirs[..] == [1]))
}

/// Where a rank's memory is for this one, and what keeps it open.
fn reach(gpu: &Rc<Gpu>, theirs: &Card, mine: &Card) -> Result<(Address, Option<OpenedBuffer>)> {
    if !gpu.reaches(&theirs.gpu)? {
        return Err(DeviceError::Failed("GPUs of the group do not reach one another's memory".into()));
    }
    if theirs.process == mine.process {
        // A process does not open its own memory. It sees it where it is.
        if theirs.context != mine.context {
            // SAFETY: a context of this process that is not this GPU's is another GPU's. Its rank waits for this one in the meeting
            // that follows.
            unsafe { gpu.reach_context(theirs.context)? };
        }
        return Ok((theirs.address, None));
    }
    let handle = theirs.handle.ok_or_else(|| DeviceError::Failed("a rank's GPU shares no memory".into()))?;
    let opened = OpenedBuffer::open(gpu, &handle)?;
    Ok((opened.address(), Some(opened)))
}

/// What the other ranks reach a rank's memory by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Card {
    /// Drawn once by each process: numbers of processes are not of one kind where ranks are in several containers.
    process: u64,
    context: u64,
    address: Address,
    gpu: Uuid,
    /// None if its driver shares no memory.
    handle: Option<Handle>,
}

impl Card {
    const BYTES: usize = 8 + 8 + 8 + 16 + 1 + 64;

    fn new(gpu: &Gpu, exchange: &Exchange) -> Result<Self> {
        let handle = share(&exchange.memory).inspect_err(
            |error| tracing::warn!(%error, "the GPU's memory cannot be shared with other ranks"),
        );
        Ok(Self {
            process: process_number(),
            context: gpu.context()?,
            address: exchange.memory.address(),
            gpu: gpu.uuid()?,
            handle: handle.ok(),
        })
    }

    fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let numbers = [self.process, self.context, self.address];
        for (to, number) in bytes[..24].as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
            *to = number.to_le_bytes();
        }
        bytes[24..40].copy_from_slice(&self.gpu);
        if let Some(handle) = self.handle {
            bytes[40] = 1;
            bytes[41..].copy_from_slice(&handle);
        }
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let handle: Handle = bytes[41..Self::BYTES].try_into().expect("a handle");
        Self {
            process: number(0),
            context: number(8),
            address: number(16),
            gpu: bytes[24..40].try_into().expect("sixteen bytes"),
            handle: (bytes[40] == 1).then_some(handle),
        }
    }
}

/// A number of this process that no other one has, as good as certainly.
fn process_number() -> u64 {
    static NUMBER: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *NUMBER.get_or_init(rand::random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_travel_as_bytes() {
        let card =
            Card { process: 1 << 60, context: 2, address: 3 << 40, gpu: [7; 16], handle: Some([9; 64]) };
        assert_eq!(Card::from_bytes(&card.to_bytes()), card);
        let without = Card { handle: None, ..card };
        assert_eq!(Card::from_bytes(&without.to_bytes()), without);
    }

    #[test]
    fn a_process_has_one_number() {
        assert_eq!(process_number(), process_number());
    }
}

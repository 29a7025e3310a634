//! The one trait by which ranks meet.

/// Another rank died or gave up, so that a collective cannot end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the group of ranks fell apart during a collective")]
pub struct GroupLost;

/// [`Collective::check`], for another thread.
pub type Checker = Box<dyn Fn() -> Result<(), GroupLost> + Send>;

/// How the ranks of a group meet. All ranks make the same calls in the same order.
pub trait Collective: Send {
    /// This rank.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn world_size(&self) -> usize;
    /// Replaces `data` by its sum over all ranks, added in rank order: every rank ends with the same bits.
    fn all_reduce_sum(&self, data: &mut [f32]) -> Result<(), GroupLost>;
    /// Every rank's `mine`, in rank order. All ranks give the same number of bytes.
    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, GroupLost>;
    /// Begins a meeting that goes another way than this one, such as through the memory of GPUs. It is one of the meetings that are
    /// counted.
    fn begin_elsewhere(&self) -> Result<(), GroupLost> {
        self.check()
    }
    /// Whether the group is still whole, as far as is known without meeting anybody.
    fn check(&self) -> Result<(), GroupLost>;
    /// The same for another thread, which may ask at any time.
    fn checker(&self) -> Checker;
    /// Returns when every rank has called it.
    fn barrier(&self) -> Result<(), GroupLost>;
}

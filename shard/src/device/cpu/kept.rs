//! Whether weights in memory are still what was packed: they stay for as long as the process, through one group after another.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use super::memory::{Region, as_bytes};
use super::pool::Pool;
use crate::checksum::Checksum;
use crate::device::{DeviceError, Result};

/// Bytes that one thread sums up at a time.
const PIECE_BYTES: usize = 4 << 20;

/// Memory that is written once.
#[derive(Clone)]
pub enum Kept {
    /// Packed weights.
    Packed(Weak<Region>),
    /// Biases, or the weights of a norm.
    Vector(Weak<[f32]>),
}

impl From<&Arc<Region>> for Kept {
    fn from(region: &Arc<Region>) -> Self {
        Self::Packed(Arc::downgrade(region))
    }
}

impl From<&Arc<[f32]>> for Kept {
    fn from(vector: &Arc<[f32]>) -> Self {
        Self::Vector(Arc::downgrade(vector))
    }
}

/// What is held, and its checksums.
#[derive(Default)]
pub struct KeptWeights(RefCell<Vec<(Kept, u64)>>);

impl KeptWeights {
    /// Notes what a piece of memory holds now.
    pub fn keep(&self, pool: &Pool, kept: impl Into<Kept>) {
        let kept = kept.into();
        if let Some(sum) = checksum(pool, &kept) {
            self.0.borrow_mut().push((kept, sum));
        }
    }

    /// Checks that all of it still holds the same, as fast as memory can be read.
    ///
    /// # Errors
    /// It does not.
    pub fn verify(&self, pool: &Pool) -> Result<()> {
        let kept = self.0.borrow();
        let changed = |(kept, sum): &(Kept, u64)| checksum(pool, kept).is_some_and(|found| found != *sum);
        match kept.iter().position(changed) {
            None => Ok(()),
            Some(index) => Err(DeviceError::Failed(format!(
                "weights have changed in memory since they were loaded: matrix or vector {index} of {}",
                kept.len()
            ))),
        }
    }
}

/// The checksum of what is there still, over all threads.
fn checksum(pool: &Pool, kept: &Kept) -> Option<u64> {
    match kept {
        Kept::Packed(region) => Some(of_bytes(pool, region.upgrade()?.as_slice::<u8>())),
        Kept::Vector(vector) => Some(of_bytes(pool, as_bytes(&vector.upgrade()?))),
    }
}

/// The pieces are weighed by their places, so that threads may add them in any order.
fn of_bytes(pool: &Pool, bytes: &[u8]) -> u64 {
    let sum = AtomicU64::new(0);
    pool.run(bytes.len().div_ceil(PIECE_BYTES), &|index, _| {
        let end = bytes.len().min((index + 1) * PIECE_BYTES);
        let of_piece = Checksum::of(&bytes[index * PIECE_BYTES..end]);
        sum.fetch_add(of_piece.wrapping_mul(2 * index as u64 + 1), Ordering::Relaxed);
    });
    sum.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::{Counter, Progress};

    #[test]
    fn a_bit_that_flips_in_memory_is_found() {
        for num_threads in [1, 3] {
            let pool = Pool::new(num_threads, &[], Arc::new(Progress::new(num_threads))).expect("threads");
            let weights = KeptWeights::default();
            let len = 2 * PIECE_BYTES + 128;
            let mut region = Arc::new(Region::new(len, "a test", &Counter::default()).expect("room"));
            let numbers = Arc::get_mut(&mut region).expect("just made").as_mut_slice::<f32>();
            numbers.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
            let vector: Arc<[f32]> = vec![1.0, 2.0, 3.0].into();
            weights.keep(&pool, &vector);
            weights.keep(&pool, &region);
            weights.verify(&pool).expect("nothing has changed");
            for byte in [0, PIECE_BYTES - 1, PIECE_BYTES, len - 1] {
                let flip = || {
                    // SAFETY: the byte is within the region, which nobody else reads or writes now.
                    unsafe { *region.as_ptr().add(byte) ^= 0x10 }
                };
                flip();
                let error = weights.verify(&pool).expect_err("a bit has flipped").to_string();
                assert!(error.contains("matrix or vector 1 of 2"), "{error}");
                flip();
                weights.verify(&pool).expect("and back");
            }
            // What is dropped is nobody's.
            drop(region);
            weights.verify(&pool).expect("the vector is there still");
        }
    }
}

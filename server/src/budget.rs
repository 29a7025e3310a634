//! Bytes that all requests together may hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

/// Why bytes were not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BudgetError {
    /// Even alone the request would hold too much.
    #[error("it takes {bytes} bytes; all requests together may hold {max}")]
    TooLarge {
        /// What the request would hold.
        bytes: u64,
        /// The bound.
        max: u64,
    },
    /// Other requests hold too much for now.
    #[error("requests hold {used} of {max} bytes already; this one needs {bytes} more")]
    Exhausted {
        /// What this request asked for.
        bytes: u64,
        /// What is held.
        used: u64,
        /// The bound.
        max: u64,
    },
}

/// A number of bytes that reservations are taken from. Clones share it.
#[derive(Clone, Debug)]
pub struct ByteBudget {
    account: Arc<Account>,
}

#[derive(Debug)]
struct Account {
    max: u64,
    used: AtomicU64,
}

/// Bytes that a request holds; dropping it gives them back.
#[derive(Debug)]
pub struct Reservation {
    account: Arc<Account>,
    bytes: AtomicU64,
}

impl ByteBudget {
    /// A budget of `max` bytes.
    pub fn new(max: u64) -> Self {
        Self { account: Arc::new(Account { max, used: AtomicU64::new(0) }) }
    }

    /// A reservation of nothing yet.
    pub fn open(&self) -> Reservation {
        Reservation { account: self.account.clone(), bytes: AtomicU64::new(0) }
    }

    /// A reservation of `bytes`.
    ///
    /// # Errors
    /// When there are not as many left.
    pub fn reserve(&self, bytes: u64) -> Result<Reservation, BudgetError> {
        let reservation = self.open();
        reservation.grow(bytes)?;
        Ok(reservation)
    }
}

impl Reservation {
    /// Takes `more` bytes.
    ///
    /// # Errors
    /// When there are not as many left. What was reserved before stays so.
    pub fn grow(&self, more: u64) -> Result<(), BudgetError> {
        let Account { max, ref used } = *self.account;
        let bytes = self.bytes.load(Ordering::Relaxed).saturating_add(more);
        if bytes > max {
            return Err(BudgetError::TooLarge { bytes, max });
        }
        let fits = |used: u64| used.checked_add(more).filter(|sum| *sum <= max);
        used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .map_err(|used| BudgetError::Exhausted { bytes: more, used, max })?;
        self.bytes.fetch_add(more, Ordering::Relaxed);
        Ok(())
    }

    /// Takes `more` bytes as a reservation of their own, which may outlive this one. They must fit beside it.
    ///
    /// # Errors
    /// As [`Reservation::grow`].
    pub fn branch(&self, more: u64) -> Result<Reservation, BudgetError> {
        self.grow(more)?;
        self.bytes.fetch_sub(more, Ordering::Relaxed);
        Ok(Reservation { account: self.account.clone(), bytes: AtomicU64::new(more) })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.account.used.fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

/// `data` that keeps its reservation until the last of its clones and slices is dropped.
pub fn held(data: Bytes, reservation: Arc<Reservation>) -> Bytes {
    struct Held(Bytes, #[expect(dead_code, reason = "it is there to be dropped")] Arc<Reservation>);
    impl AsRef<[u8]> for Held {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    Bytes::from_owner(Held(data, reservation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_given_back() {
        let budget = ByteBudget::new(100);
        let first = budget.reserve(60).unwrap();
        assert_eq!(budget.reserve(41).unwrap_err(), BudgetError::Exhausted { bytes: 41, used: 60, max: 100 });
        let second = budget.reserve(40).unwrap();
        assert!(budget.reserve(1).is_err());
        drop(first);
        second.grow(60).unwrap();
        drop(second);
        assert!(budget.reserve(100).is_ok());
    }

    #[test]
    fn a_refused_reservation_holds_what_it_held() {
        let budget = ByteBudget::new(100);
        let reservation = budget.reserve(60).unwrap();
        assert_eq!(reservation.grow(41), Err(BudgetError::TooLarge { bytes: 101, max: 100 }));
        drop(reservation);
        assert!(budget.reserve(100).is_ok());
    }

    #[test]
    fn a_branch_fits_beside_its_origin_and_outlives_it() {
        let budget = ByteBudget::new(100);
        let files = budget.reserve(60).unwrap();
        assert_eq!(files.branch(41).unwrap_err(), BudgetError::TooLarge { bytes: 101, max: 100 });
        let pixels = files.branch(40).unwrap();
        assert!(budget.reserve(1).is_err());
        drop(files);
        assert!(budget.reserve(61).is_err());
        drop(pixels);
        assert!(budget.reserve(100).is_ok());
    }

    #[test]
    fn data_is_held_until_its_last_slice_is_gone() {
        let budget = ByteBudget::new(4);
        let data = held(Bytes::from_static(b"abcd"), budget.reserve(4).unwrap().into());
        let slice = data.slice(1..3);
        drop(data);
        assert!(budget.reserve(1).is_err());
        assert_eq!(&slice[..], b"bc");
        drop(slice);
        assert!(budget.reserve(4).is_ok());
    }
}

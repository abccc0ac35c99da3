//! The order in which a session is first read: advice for the next fill of the same tree.
//!
//! Of files that the kernel reads itself only the opens are seen; of others the units that are asked for. The first
//! [`limits::READ_ORDER_STEPS`] different ones are kept, in memory, until the session stops. A session that outlived its daemon has none.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::limits;

/// Inode of the first entry: the root is 1.
const FIRST_INODE: u64 = 2;

/// Entries and fill units in the order of their first read.
#[derive(Debug, Default)]
pub struct ReadOrder {
    full: AtomicBool,
    steps: Mutex<Steps>,
}

#[derive(Debug, Default)]
struct Steps {
    seen: HashSet<(u32, u32)>,
    order: Vec<(u32, u32)>,
}

impl ReadOrder {
    /// Notes that the unit with `offset` of `inode` is read.
    pub(super) fn note(&self, inode: u64, offset: u64) {
        if self.full.load(Ordering::Relaxed) {
            return;
        }
        let entry = u32::try_from(inode.saturating_sub(FIRST_INODE)).unwrap_or(u32::MAX);
        let step = (entry, u32::try_from(offset / limits::UNIT_BYTES).unwrap_or(u32::MAX));
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        if steps.seen.insert(step) {
            steps.order.push(step);
            self.full.store(steps.order.len() >= limits::READ_ORDER_STEPS, Ordering::Relaxed);
        }
    }

    /// Notes nothing, also of what was noted: what a predecessor saw is gone, and the rest of an order is none.
    pub(super) fn give_up(&self) {
        self.full.store(true, Ordering::Relaxed);
        *self.steps.lock().unwrap_or_else(PoisonError::into_inner) = Steps::default();
    }

    /// What was read so far.
    pub fn steps(&self) -> Vec<(u32, u32)> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).order.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_unit_counts_once_and_the_number_is_bounded() {
        let order = ReadOrder::default();
        order.note(3, 5 << 20);
        order.note(2, 0);
        order.note(3, 7 << 20);
        assert_eq!(order.steps(), [(1, 1), (0, 0)]);
        (0..2 * limits::READ_ORDER_STEPS as u64).for_each(|unit| order.note(2, unit * limits::UNIT_BYTES));
        assert_eq!(order.steps().len(), limits::READ_ORDER_STEPS);
    }
}

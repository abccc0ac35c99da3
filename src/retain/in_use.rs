//! Checkpoints that a call waits for or reads, for as long as it does: held in memory, gone with the process.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Which checkpoints are in use, by number of uses.
#[derive(Clone, Debug, Default)]
pub(super) struct InUse(Arc<Mutex<HashMap<String, usize>>>);

impl InUse {
    pub(super) fn keep(&self, ids: Vec<String>) -> Use {
        let mut uses = self.locked();
        ids.iter().for_each(|id| *uses.entry(id.clone()).or_insert(0) += 1);
        drop(uses);
        Use { of: self.clone(), ids }
    }

    pub(super) fn ids(&self) -> BTreeSet<String> {
        self.locked().keys().cloned().collect()
    }

    pub(super) fn contains(&self, id: &str) -> bool {
        self.locked().contains_key(id)
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps checkpoints from being evicted.
#[derive(Debug)]
pub struct Use {
    of: InUse,
    ids: Vec<String>,
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut uses = self.of.locked();
        for id in &self.ids {
            if let Some(count) = uses.get_mut(id) {
                *count -= 1;
                if *count == 0 {
                    uses.remove(id);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_use_is_free_when_both_are_done() {
        let uses = InUse::default();
        let one = uses.keep(vec!["a".into(), "b".into()]);
        let other = uses.keep(vec!["a".into()]);
        drop(one);
        assert_eq!(uses.ids(), BTreeSet::from(["a".to_owned()]));
        assert!(uses.contains("a") && !uses.contains("b"));
        drop(other);
        assert!(uses.ids().is_empty());
    }
}

//! One at a time per name: a job's requests, a checkpoint's session.
//!
//! A gate is a semaphore of one; whoever passes holds a permit, and gates nobody uses are forgotten.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Result};

/// Gates by name.
#[derive(Debug, Default)]
pub(super) struct Gates(Mutex<HashMap<String, Weak<Semaphore>>>);

impl Gates {
    /// Waits for the gate of `name`; it is passed until the permit is dropped.
    pub(super) async fn pass(&self, name: &str) -> Result<OwnedSemaphorePermit> {
        let gate = {
            let mut gates = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match gates.get(name).and_then(Weak::upgrade) {
                Some(gate) => gate,
                None => {
                    gates.retain(|_, gate| gate.strong_count() > 0);
                    let gate = Arc::new(Semaphore::new(1));
                    gates.insert(name.to_owned(), Arc::downgrade(&gate));
                    gate
                }
            }
        };
        gate.acquire_owned().await.map_err(|_| Error::internal("a gate was closed"))
    }
}

//! Work that blocks for a moment, in the thread that has its bytes in the processor's cache.
//!
//! What a network brings is written a few hundred KiB at a time, thousands of times a second. Handed to another thread, each of them costs two wakes, and is
//! fetched once more from the cache of the core that received it. Here the thread that has it writes it, and another takes over what else
//! that one had to do.
//!
//! A disk may take long all the same, or for ever, and whoever answers calls must not wait for it: only [`AT_A_TIME`] block so, and what is more is handed to
//! the threads for blocking work, where it waits for its turn. A thread that has nothing else to do ([`may_block_here`]) holds up nobody.

use std::cell::Cell;

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Semaphore;

use crate::error::{Error, Result};

/// As many as there are streams that bring something at full speed; a tenth of the threads for blocking work, from which others take their places.
const AT_A_TIME: usize = 32;

static PLACES: Semaphore = Semaphore::const_new(AT_A_TIME);

thread_local! {
    /// Whether the thread has nothing else to do.
    static IS_ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Says that this thread has nothing else to do than what it blocks for, for as long as it lives.
pub(crate) fn may_block_here() {
    IS_ALONE.set(true);
}

/// Does `work`, to its end also where whoever asked for it goes away. Needs a runtime, which `work` may not wait for: it may be on a thread that runs one.
///
/// # Errors
/// Those of `work`; internal where it panics on another thread.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    if IS_ALONE.get() {
        return work();
    }
    let place = PLACES.try_acquire().ok().filter(|_| Handle::current().runtime_flavor() == RuntimeFlavor::MultiThread);
    if place.is_some() {
        return tokio::task::block_in_place(work);
    }
    on_another_thread(work).await
}

/// Does `work` on one of the threads for blocking work, to its end also where whoever asked for it goes away. Needs a runtime.
///
/// # Errors
/// Those of `work`; internal where it panics.
pub(crate) async fn on_another_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::internal("a blocking task ended early").because(error))?
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Condvar, Mutex};
    use std::time::Duration;

    use super::*;

    /// Opened once, for all who wait.
    #[derive(Default)]
    struct Gate(Mutex<bool>, Condvar);

    impl Gate {
        fn wait(&self) {
            drop(self.1.wait_while(self.0.lock().unwrap(), |open| !*open).unwrap());
        }

        fn open(&self) {
            *self.0.lock().unwrap() = true;
            self.1.notify_all();
        }
    }

    #[test]
    fn others_go_on_however_many_block() {
        let threads = 2 * AT_A_TIME;
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(2).max_blocking_threads(threads);
        let runtime = runtime.build().unwrap();
        let gate = Arc::new(Gate::default());
        let waiting = Arc::clone(&gate);
        let blocked = move |number| {
            let gate = Arc::clone(&waiting);
            blocking(move || {
                gate.wait();
                Ok(number)
            })
        };
        let (went_on, heard) = std::sync::mpsc::channel();
        // A thread of its own: the runtime's clock stands still where it does.
        let watch = std::thread::spawn(move || {
            let went_on = heard.recv_timeout(Duration::from_secs(60)).is_ok();
            gate.open();
            went_on
        });
        runtime.block_on(async {
            let blocked: Vec<_> = (0..3 * threads).map(|number| tokio::spawn(blocked(number))).collect();
            for _ in 0..100 {
                tokio::spawn(tokio::task::yield_now()).await.unwrap();
            }
            let _ = went_on.send(());
            for (number, blocked) in blocked.into_iter().enumerate() {
                assert_eq!(blocked.await.unwrap().unwrap(), number);
            }
        });
        assert!(watch.join().unwrap(), "the runtime stood still");
    }

    #[test]
    fn a_thread_that_is_alone_does_it_itself() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (here, there) = std::thread::spawn(move || {
            may_block_here();
            let there = runtime.block_on(blocking(|| Ok(std::thread::current().id())));
            (std::thread::current().id(), there.unwrap())
        })
        .join()
        .unwrap();
        assert_eq!(here, there);
    }

    #[tokio::test]
    async fn where_there_is_one_thread_another_does_it() {
        let here = std::thread::current().id();
        let there = blocking(move || Ok(std::thread::current().id())).await.unwrap();
        assert_ne!(here, there);
    }
}

//! What a panic, a bug of ours, may cost: never a mount, an attachment, a lease or what was brought in.
//!
//! Where somebody holds the mounts and the kernel hands requests to a successor, ending is the one answer that is proven to be unnoticed, whatever the panic was in the
//! middle of: a reader's request waits and is answered by the successor, an ingest goes on with what is durable. So **the first panic ends the
//! process** ([`first_ends_the_process`]), before anything is unwound, for what is dropped on the way out may answer somebody. What panics again within
//! [`QUIET`] may well be one request's or one checkpoint's fault, for which the others are not to wait again and again; and where nobody holds the mounts
//! ending would cost them. Then it costs what it was in the middle of:
//!
//! | where | what becomes of it |
//! |---|---|
//! | a turn of a thread that others depend on | an error for whoever waits for it; the thread goes on ([`guarded`]) |
//! | an ingest | it is begun again from what is durable, a few times ([`ingest`](crate::ingest)) |
//! | a call, by gRPC or HTTP | its connection breaks, and its client asks again |
//! | a request of a reader | EIO, to that reader |
//! | a loop that the daemon cannot be without | the process ends in any case ([`Essential`]): whoever is left without it would notice later, and not know why |
//!
//! When the process ended for a panic last is the age of a file in the runtime directory, so it is forgotten with the host's boot.

use std::any::Any;
use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;

use crate::error::{Error, Result};

/// How long after the process has ended for a panic no other ends it.
const QUIET: Duration = Duration::from_secs(3600);

/// Panics are looked at one after the other.
static TURNS: Mutex<()> = Mutex::new(());

/// Runs `work` on a thread that others depend on: a panic in it becomes its error, and the thread goes on. The caller sees to it that what
/// `work` may have left half done is right or is put right.
///
/// # Errors
/// Those of `work`; internal for a panic.
pub fn guarded<R>(what: &str, work: impl FnOnce() -> Result<R>) -> Result<R> {
    let work = || {
        tracing::trace!("{what}");
        work()
    };
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| Err(told(what, payload.as_ref())))
}

/// [`guarded`] for what is waited for in a task.
///
/// # Errors
/// As [`guarded`].
pub async fn guarded_task<R>(what: &str, work: impl Future<Output = Result<R>>) -> Result<R> {
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|payload| Err(told(what, payload.as_ref())))
}

fn told(what: &str, payload: &(dyn Any + Send)) -> Error {
    let said = payload.downcast_ref::<&str>().map(|said| (*said).to_owned());
    let said = said.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
    let error = Error::internal(format!("a panic ended {what}")).because(said);
    tracing::error!("{}", error.report());
    error
}

/// From now on the first panic of the process ends it, and is told as it was before; `mark` is the file that says when that was last. Call it once.
pub fn first_ends_the_process(mark: PathBuf) {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        // Another of the same moment waits, rather than be unwound before the process has ended.
        let _turn = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
        if is_first(&mark) {
            std::process::abort();
        }
    }));
}

/// Whether there was none for [`QUIET`]; there is one then. Where that cannot be noted there may be many, and none is the first.
fn is_first(mark: &Path) -> bool {
    let last = fs::metadata(mark).and_then(|file| file.modified());
    // Of a clock that was set back nothing is believed.
    let is_soon = last.is_ok_and(|last| last.elapsed().is_ok_and(|elapsed| elapsed < QUIET));
    !is_soon && File::create(mark).and_then(|file| file.set_modified(std::time::SystemTime::now())).is_ok()
}

/// Ends the process when a panic drops it. Hold one in a loop that the daemon cannot be without.
#[derive(Debug)]
pub struct Essential(&'static str);

impl Essential {
    /// Of what would be missing.
    #[must_use = "it is to be held"]
    pub fn new(what: &'static str) -> Self {
        Self(what)
    }
}

impl Drop for Essential {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a panic has ended {}: ckptd ends, for a successor to go on", self.0);
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn a_panic_is_an_error_of_the_turn_it_ended_and_says_what_it_said() {
        let ended = guarded("a turn", || -> Result<()> { panic!("on {}", "purpose") });
        let report = ended.unwrap_err().report();
        assert!(report.contains("a panic ended a turn") && report.contains("on purpose"), "{report}");
        assert_eq!(guarded("a turn", || Ok(7)).unwrap(), 7);
    }

    #[test]
    fn one_panic_in_a_while_is_the_first() {
        let place = tempfile::tempdir().unwrap();
        let mark = place.path().join("panicked");
        let age = |age| File::open(&mark).unwrap().set_modified(SystemTime::now() - age).unwrap();
        assert!(is_first(&mark));
        assert!(!is_first(&mark));
        age(QUIET / 2);
        assert!(!is_first(&mark));
        age(QUIET + Duration::from_secs(1));
        assert!(is_first(&mark), "the last one was long ago");
        assert!(!is_first(&mark));
        assert!(!is_first(&place.path().join("none/panicked")), "it cannot be noted");
    }
}

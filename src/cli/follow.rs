//! Waiting for a checkpoint.
//!
//! The daemon streams the record until it settles. Filling outlives our connection and the daemon itself, so a wait that has begun
//! survives a restart of the daemon: it asks again every second, for a minute ([`Patience`]). Ctrl-C ends the wait and nothing else.

use std::future::Future;
use std::time::{Duration, Instant};

use super::connect::Daemon;
use super::console::talk;
use super::exit::{Ended, Ending};
use super::progress::Progress;
use super::text;
use crate::control::wire;
use crate::error::{Error, Kind};

/// Pause before asking again after the stream broke or ended early.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// How long a daemon that went away is waited for: an upgrade takes seconds, a host's start-up script less than a minute.
const RETURN_WITHIN: Duration = Duration::from_secs(60);

/// Waits until `checkpoint` is ready, showing progress, and gives its last record.
///
/// # Errors
/// What the checkpoint failed with; not found where it was removed; interrupted by Ctrl-C.
pub(super) async fn until_ready(daemon: &Daemon, checkpoint: &wire::Checkpoint) -> Ended<wire::Checkpoint> {
    let going_on =
        format!("{} goes on filling; `ckptctl watch {}` follows it", text::titled(checkpoint), checkpoint.id);
    let mut progress = Progress::on_stderr();
    let settled = until_settled(daemon, &checkpoint.id, |record| {
        progress.update(record);
        Ok(())
    });
    let settled = or_interrupted(settled, || going_on).await;
    drop(progress);
    ready(settled?)
}

/// The outcome of `wait`, unless Ctrl-C comes first; `going_on` then says what continues without us.
pub(super) async fn or_interrupted<T>(
    wait: impl Future<Output = Ended<T>>,
    going_on: impl FnOnce() -> String,
) -> Ended<T> {
    tokio::select! {
        outcome = wait => outcome,
        Ok(()) = tokio::signal::ctrl_c() => Err(Ending::Interrupted(going_on())),
    }
}

/// Waits until `checkpoint` (id or name) settles, telling `seen` every record, and gives the last one, whatever its state.
pub(super) async fn until_settled(
    daemon: &Daemon,
    checkpoint: &str,
    mut seen: impl FnMut(&wire::Checkpoint) -> Ended,
) -> Ended<wire::Checkpoint> {
    // From the first record on by id: names can come to mean another.
    let mut known: Option<String> = None;
    let mut patience = Patience::default();
    loop {
        let asked = known.clone().unwrap_or_else(|| checkpoint.to_owned());
        let watched = watch_once(daemon, &asked, |record| {
            known = Some(record.id.clone());
            patience.heard();
            seen(record)
        });
        let ending = match watched.await {
            Ok(Some(record)) => return Ok(record),
            Ok(None) => silent_end(checkpoint),
            Err(ending) => ending,
        };
        patience.wait_out(ending).await?;
    }
}

/// How often and how long somebody asks again whose stream broke off. Who was never answered does not wait.
#[derive(Default)]
pub(super) struct Patience {
    heard: Option<Instant>,
    told: bool,
}

impl Patience {
    /// The daemon has answered.
    pub(super) fn heard(&mut self) {
        (self.heard, self.told) = (Some(Instant::now()), false);
    }

    /// Waits before asking again, and says once that it does.
    ///
    /// # Errors
    /// `ending`, where it is not of a daemon that may return, or has not for too long.
    pub(super) async fn wait_out(&mut self, ending: Ending) -> Ended {
        let Some(heard) = self.heard else { return Err(ending) };
        match ending {
            Ending::Failed(error) if may_return(&error) && heard.elapsed() < RETURN_WITHIN => {
                if !std::mem::replace(&mut self.told, true) {
                    talk(&format!("{}; waiting for it to come back", error.chain()));
                }
            }
            ending => return Err(ending),
        }
        tokio::time::sleep(ASK_AGAIN_AFTER).await;
        Ok(())
    }
}

/// The record if it is ready, else why it never will be by itself.
///
/// # Errors
/// What the checkpoint failed with, by its own code; wrong state where it was evicted; not found where it is being removed.
pub(super) fn ready(record: wire::Checkpoint) -> Ended<wire::Checkpoint> {
    let titled = text::titled(&record);
    let error = match (record.state(), &record.error) {
        // Ready, with a failure: something of it is lost.
        (wire::CheckpointState::Failed | wire::CheckpointState::Ready, Some(failure)) => failed(failure),
        (wire::CheckpointState::Failed, None) => Error::internal(format!("{titled} failed without saying why")),
        (wire::CheckpointState::Evicted, _) => {
            Error::wrong_state("CHECKPOINT_EVICTED", format!("{titled} was evicted to make room"))
                .remedy("attach it, which fills it again")
        }
        (wire::CheckpointState::Removing, _) => {
            Error::not_found("CHECKPOINT_REMOVED", format!("{titled} is being removed"))
        }
        _ => return Ok(record),
    };
    Err(error.into())
}

fn failed(failure: &wire::Failure) -> Error {
    let error = Error::new(Kind::from_grpc_code(failure.code), failure.reason.as_str(), failure.message.as_str());
    if failure.remedy.is_empty() { error } else { error.remedy(failure.remedy.as_str()) }
}

/// Watches until the record settles; `None` when the stream ends before.
async fn watch_once(
    daemon: &Daemon,
    checkpoint: &str,
    mut seen: impl FnMut(&wire::Checkpoint) -> Ended,
) -> Ended<Option<wire::Checkpoint>> {
    let request = wire::WatchCheckpointsRequest { checkpoint: checkpoint.to_owned() };
    let mut records = daemon.ask(daemon.checkpoints().watch_checkpoints(request)).await?;
    while let Some(record) = records.message().await.map_err(|status| daemon.refusal(&status))? {
        seen(&record)?;
        if has_settled(&record) {
            return Ok(Some(record));
        }
    }
    Ok(None)
}

fn has_settled(record: &wire::Checkpoint) -> bool {
    match record.state() {
        wire::CheckpointState::Unspecified | wire::CheckpointState::New | wire::CheckpointState::Filling => false,
        wire::CheckpointState::Ready
        | wire::CheckpointState::Evicted
        | wire::CheckpointState::Failed
        | wire::CheckpointState::Removing => true,
    }
}

fn may_return(error: &Error) -> bool {
    matches!(error.kind(), Kind::Unavailable | Kind::Cancelled)
}

/// A stream that ended although there is more to say: its daemon was stopped.
pub(super) fn silent_end(watched: &str) -> Ending {
    Error::unavailable("WATCH_ENDED", format!("watching {watched}: ckptd ended the watch")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ending_of(record: wire::Checkpoint) -> Error {
        match ready(record) {
            Err(Ending::Failed(error)) => error,
            other => panic!("{other:?}"),
        }
    }

    fn record(state: wire::CheckpointState) -> wire::Checkpoint {
        wire::Checkpoint { id: "c1".into(), name: "m".into(), state: state.into(), ..Default::default() }
    }

    #[test]
    fn a_failed_checkpoint_ends_with_its_own_code_and_sentence() {
        let failure = wire::Failure {
            code: 8,
            reason: "DISK_FULL".into(),
            message: "no room for m".into(),
            remedy: "remove something".into(),
        };
        let error = ending_of(wire::Checkpoint { error: Some(failure), ..record(wire::CheckpointState::Failed) });
        assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "DISK_FULL"));
        assert_eq!(error.report(), "no room for m; remove something");
    }

    #[test]
    fn only_ready_is_well() {
        assert!(ready(record(wire::CheckpointState::Ready)).is_ok());
        assert_eq!(ending_of(record(wire::CheckpointState::Evicted)).kind(), Kind::WrongState);
        assert_eq!(ending_of(record(wire::CheckpointState::Removing)).kind(), Kind::NotFound);
        assert_eq!(ending_of(record(wire::CheckpointState::Failed)).kind(), Kind::Internal);
    }

    #[test]
    fn new_and_filling_are_waited_for() {
        assert!(!has_settled(&record(wire::CheckpointState::New)));
        assert!(!has_settled(&record(wire::CheckpointState::Filling)));
        assert!(has_settled(&record(wire::CheckpointState::Failed)));
    }
}

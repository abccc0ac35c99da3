//! Rights that end by themselves.
//!
//! A right has an end if the scheduler gave it one; [`Attachments::renew`] sets another. Reserving or attaching what a job has already
//! never makes it end earlier, so that a call that is repeated takes nothing back. When the end has passed the job is released, exactly as when that is asked for, with the event
//! `LEASE_EXPIRED`. [`expiry`] decides when that is, and what a clock that is not to be trusted means.
//!
//! One task sees to it. It sleeps on a timer of the wall clock that the kernel also ends when the clock is set, until the earliest end or until it is told
//! that a row has changed; without ends it has no timer. Whether a right is over is looked at again behind the
//! job's gate, so one that is renewed at the last moment stays. A view that cannot be taken away (somebody has mounted over it) keeps the right, with an
//! event, and is tried again.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{ClockId as Clock, clock_gettime};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Attachments;
use super::expiry::{self, Clocks, Watch};
use crate::catalog::events::{self, NewEvent};
use crate::catalog::jobs::{self, JobRow};
use crate::error::{Error, Result};
use crate::names::JobId;
use crate::units::{counted, now_unix_ms, rfc3339};

/// How soon what could not be released, or looked at, is tried again.
const AGAIN_AFTER: Duration = Duration::from_secs(60);

impl Attachments {
    /// Sets when a job's right ends by itself, `None`: when it is released. Returns the row, or `None` for a job that is not
    /// known, or not `owner`'s if that is given.
    ///
    /// # Errors
    /// Those of the catalog.
    pub async fn renew(&self, job: &JobId, owner: Option<&str>, expires_ms: Option<i64>) -> Result<Option<JobRow>> {
        let _gate = self.0.job_gates.pass(job.as_str()).await?;
        match self.row_of(job, owner).await? {
            Some(row) => self.set_end(row, expires_ms).await.map(Some),
            None => Ok(None),
        }
    }

    /// Makes a right last until `expires_ms` if that is later.
    pub(super) async fn extend(&self, row: JobRow, expires_ms: Option<i64>) -> Result<JobRow> {
        let end = expiry::extended(row.expires_ms, expires_ms);
        if end == row.expires_ms { Ok(row) } else { self.set_end(row, end).await }
    }

    async fn set_end(&self, row: JobRow, expires_ms: Option<i64>) -> Result<JobRow> {
        let job = row.job.clone();
        self.0.store.catalog().write(move |tx| jobs::set_expiry(tx, &job, expires_ms)).await?;
        self.0.ends_changed.notify_one();
        Ok(JobRow { expires_ms, ..row })
    }

    /// Releases jobs whose right is over, for as long as it runs; never ends. What is over when it begins has `grace` to be renewed.
    pub async fn end_leases(&self, grace: Duration) {
        let mut watch = Watch::default();
        let mut held_up = HashSet::new();
        loop {
            tracing::trace!("a look for rights that are over");
            let (again_ms, all_well) = match self.look(&mut watch, &mut held_up, grace).await {
                Ok(looked) => looked,
                Err(error) => {
                    tracing::warn!(error = %error.report(), "looking for rights that are over failed");
                    (None, false)
                }
            };
            tokio::select! {
                () = self.0.ends_changed.notified() => {}
                () = until(again_ms) => {}
                () = tokio::time::sleep(AGAIN_AFTER), if !all_well => {}
            }
        }
    }

    /// One look: when the next is due, and whether everything that is over was released.
    async fn look(
        &self,
        watch: &mut Watch,
        held_up: &mut HashSet<String>,
        grace: Duration,
    ) -> Result<(Option<i64>, bool)> {
        let rows = self.0.store.catalog().read(jobs::expiries).await?;
        let decision = watch.look(&rows, now(), grace);
        let mut all_well = true;
        for job in decision.over {
            // In a task of its own: a stop of the daemon must not leave half of it.
            let (attachments, released) = (self.clone(), job.clone());
            let outcome = tokio::spawn(async move { attachments.release_over(&JobId::new(released)?).await }).await;
            let outcome = outcome.unwrap_or_else(|error| Err(Error::internal("releasing ended early").because(error)));
            match outcome {
                Ok(()) => _ = held_up.remove(&job),
                Err(error) => {
                    all_well = false;
                    if held_up.insert(job.clone()) {
                        self.note_held_up(job, &error).await?;
                    }
                }
            }
        }
        Ok((decision.again_ms, all_well))
    }

    async fn release_over(&self, job: &JobId) -> Result<()> {
        let _gate = self.0.job_gates.pass(job.as_str()).await?;
        let Some(row) = self.row(job).await? else { return Ok(()) };
        let Some(end) = row.expires_ms.filter(|end| *end <= now_unix_ms()) else { return Ok(()) };
        self.unmount(&row).await?;
        let checkpoint = row.leases.first().map(|lease| lease.checkpoint.clone()).unwrap_or_default();
        let message = format!(
            "the right of job {job} to {} ended at {}, and was not renewed",
            counted(row.leases.len() as u64, "checkpoint"),
            rfc3339(end)
        );
        tracing::info!(job = job.as_str(), "{message}");
        let owner = row.owner.clone();
        let event =
            NewEvent { kind: "LEASE_EXPIRED", job: job.to_string(), checkpoint, owner, message, ..Default::default() };
        let job = job.to_string();
        let forget = move |tx: &rusqlite::Connection| {
            jobs::delete(tx, &job, now_unix_ms())?;
            events::record(tx, now_unix_ms(), &event)
        };
        self.0.store.catalog().write(forget).await
    }

    async fn note_held_up(&self, job: String, error: &Error) -> Result<()> {
        let message = format!("the right of job {job} is over and its view stays: {}", error.report());
        tracing::warn!(job, "{message}");
        let event = NewEvent { kind: "LEASE_NOT_RELEASED", job, message, ..Default::default() };
        self.0.store.catalog().write(move |tx| events::record(tx, now_unix_ms(), &event)).await
    }
}

fn now() -> Clocks {
    let ms = |spec: TimeSpec| spec.tv_sec() * 1000 + spec.tv_nsec() / 1_000_000;
    // The call cannot fail for a clock that the kernel has; one without it leaves every start to the grace.
    let boot_ms = clock_gettime(Clock::CLOCK_BOOTTIME).map_or(0, ms);
    Clocks { wall_ms: now_unix_ms(), boot_ms }
}

/// Resolves at `wall_ms`, or when somebody sets the wall clock; never for `None`.
async fn until(wall_ms: Option<i64>) {
    let Some(wall_ms) = wall_ms else { return std::future::pending().await };
    match timer(wall_ms) {
        Ok(timer) => _ = timer.readable().await,
        Err(error) => {
            tracing::warn!(%error, "no timer of the wall clock");
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    }
}

/// A descriptor that can be read from `wall_ms` on, or once the clock has been set.
fn timer(wall_ms: i64) -> std::io::Result<AsyncFd<OwnedFd>> {
    // Zero would mean no timer.
    let wall_ms = wall_ms.max(1);
    let timer = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
    let at = TimeSpec::new(wall_ms / 1000, wall_ms % 1000 * 1_000_000);
    let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
    timer.set(Expiration::OneShot(at), flags)?;
    // SAFETY: the descriptor is owned by what is made of it, and is neither replaced nor given away as long as that is there.
    let watched = unsafe { AsyncFd::register_with_interest(OwnedFd::from(timer), Interest::READABLE) };
    watched.map_err(|error| error.into_parts().1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_timer_ends_at_its_time_and_not_before() {
        let begun = now_unix_ms();
        until(Some(begun + 60)).await;
        assert!(now_unix_ms() >= begun + 60);
        until(Some(begun)).await;
        until(Some(0)).await;
    }
}

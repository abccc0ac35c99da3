//! `attach` and `detach`: show checkpoints to a job, and take the view away.

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::capture::absolute;
use super::console::{Console, talk};
use super::exit::Ended;
use super::{document, expires, text};
use crate::control::wire;
use crate::error::{Error, Result};

/// How long an attachment may take before people are told what it waits for: far above a mount, far below patience.
const SILENT_FOR: Duration = Duration::from_secs(2);

const BYTES_AWAITED: &str = "waiting for all bytes to be here; --lazy would not wait";
const LISTING_AWAITED: &str = "waiting for the listing, or for all bytes of a source that cannot be read before";

/// Show checkpoints to a job, read-only
///
/// One checkpoint is at the root of the target, several in one directory each, named like them.
#[derive(Args)]
pub(super) struct Attach {
    /// The scheduler's id of the job
    job: String,
    /// Ids or names; those the job has reserved if none is given
    #[arg(value_name = "CHECKPOINT")]
    checkpoints: Vec<String>,
    /// Id or name among the public ones, repeatable
    #[arg(long = "public-checkpoint", value_name = "CHECKPOINT")]
    public_checkpoints: Vec<String>,
    /// Empty directory to show them at [default: one made by ckptd; with --pid /opt/ml/checkpoint]
    #[arg(long, value_name = "DIR")]
    at: Option<PathBuf>,
    /// Show them in the mount namespace of this process
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pid: Option<u32>,
    /// Do not wait for bytes that are still to come; reads of them will wait
    #[arg(long)]
    lazy: bool,
    /// When the right ends by itself: a span (`90s`, `12h`, `1d6h`) or a time (RFC 3339) [default: when it is released]
    #[arg(long, value_name = "DURATION|TIME", value_parser = expires::parse)]
    expires: Option<i64>,
    /// Whose checkpoints to look among
    #[arg(long)]
    owner: Option<String>,
}

impl Attach {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let request = self.request()?;
        let daemon = console.daemon().await?;
        let mut jobs = daemon.jobs();
        let silence = if request.lazy { LISTING_AWAITED } else { BYTES_AWAITED };
        let attachment = speaking_up(silence, daemon.ask(jobs.attach_checkpoints(request))).await?;
        if !attachment.waited_for.is_empty() {
            talk(&format!("waited until all bytes were here, of {}", attachment.waited_for));
        }
        for terms in &attachment.terms {
            talk(&format!("by attaching you accept: {terms}"));
        }
        console.answer(&document::Attachment::from(&attachment), || text::attachment(&attachment))
    }

    fn request(self) -> Result<wire::AttachCheckpointsRequest> {
        Ok(wire::AttachCheckpointsRequest {
            job: self.job,
            checkpoints: references(self.checkpoints, self.public_checkpoints),
            target: self.at.map(|at| target(at, self.pid)).transpose()?.unwrap_or_default(),
            pid: self.pid.unwrap_or_default(),
            owner: self.owner.unwrap_or_default(),
            lazy: self.lazy,
            expires_unix_ms: self.expires.unwrap_or_default(),
        })
    }
}

/// Checkpoints as a request names them.
pub(super) fn references(own: Vec<String>, public: Vec<String>) -> Vec<wire::CheckpointRef> {
    let reference = |checkpoint, public| wire::CheckpointRef { checkpoint, public, subdir: String::new() };
    let own = own.into_iter().map(|checkpoint| reference(checkpoint, false));
    own.chain(public.into_iter().map(|checkpoint| reference(checkpoint, true))).collect()
}

/// The target as the daemon takes it. A relative path means our working directory, which another process' namespace need not have.
fn target(at: PathBuf, pid: Option<u32>) -> Result<String> {
    if pid.is_some() && !at.is_absolute() {
        let fault = format!("the target `{}` in another process' mount namespace is not absolute", at.display());
        return Err(Error::invalid("BAD_PATH", fault).remedy("give --at an absolute path"));
    }
    absolute(at)
}

async fn speaking_up<T>(silence: &str, wait: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::pin!(wait);
    tokio::select! {
        done = &mut wait => done,
        () = tokio::time::sleep(SILENT_FOR) => {
            talk(silence);
            wait.await
        }
    }
}

/// Take a job's view away and keep its right
///
/// Files the job has open stay readable.
#[derive(Args)]
pub(super) struct Detach {
    /// The scheduler's id of the job
    job: String,
}

impl Detach {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::DetachCheckpointsRequest { job: self.job };
        let attachment = daemon.ask(daemon.jobs().detach_checkpoints(request)).await?;
        console.answer(&document::Attachment::from(&attachment), || text::attachment(&attachment))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_ones_are_marked_and_come_last() {
        let references = references(vec!["a".into()], vec!["b".into()]);
        let seen: Vec<_> = references.iter().map(|r| (r.checkpoint.as_str(), r.public)).collect();
        assert_eq!(seen, [("a", false), ("b", true)]);
    }

    #[test]
    fn a_relative_target_is_ours_alone() {
        assert!(target("x".into(), None).unwrap().starts_with('/'));
        assert!(target("x".into(), Some(1)).is_err());
        assert_eq!(target("/x".into(), Some(1)).unwrap(), "/x");
    }
}

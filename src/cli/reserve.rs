//! `reserve` and `renew`: a right to checkpoints before the job runs, and how long it lasts.

use clap::Args;

use super::attach::references;
use super::console::Console;
use super::exit::Ended;
use super::{document, expires, text};
use crate::control::wire;

/// Keep checkpoints from being removed until the job is released
#[derive(Args)]
pub(super) struct Reserve {
    /// The scheduler's id of the job
    job: String,
    /// Ids or names
    #[arg(value_name = "CHECKPOINT", required_unless_present = "public_checkpoints")]
    checkpoints: Vec<String>,
    /// Id or name among the public ones, repeatable
    #[arg(long = "public-checkpoint", value_name = "CHECKPOINT")]
    public_checkpoints: Vec<String>,
    /// When the right ends by itself: a span (`90s`, `12h`, `1d6h`) or a time (RFC 3339) [default: when it is released]
    #[arg(long, value_name = "DURATION|TIME", value_parser = expires::parse)]
    expires: Option<i64>,
    /// Whose checkpoints to look among
    #[arg(long)]
    owner: Option<String>,
}

impl Reserve {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::ReserveCheckpointsRequest {
            job: self.job,
            checkpoints: references(self.checkpoints, self.public_checkpoints),
            owner: self.owner.unwrap_or_default(),
            expires_unix_ms: self.expires.unwrap_or_default(),
        };
        let attachment = daemon.ask(daemon.jobs().reserve_checkpoints(request)).await?;
        console.answer(&document::Attachment::from(&attachment), || text::attachment(&attachment))
    }
}

/// Set when a job's right ends by itself
#[derive(Args)]
pub(super) struct Renew {
    /// The scheduler's id of the job
    job: String,
    /// A span (`90s`, `12h`, `1d6h`) or a time (RFC 3339) [default: when it is released]
    #[arg(long, value_name = "DURATION|TIME", value_parser = expires::parse)]
    expires: Option<i64>,
}

impl Renew {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::RenewLeaseRequest { job: self.job, expires_unix_ms: self.expires.unwrap_or_default() };
        let attachment = daemon.ask(daemon.jobs().renew_lease(request)).await?;
        console.answer(&document::Attachment::from(&attachment), || text::attachment(&attachment))
    }
}

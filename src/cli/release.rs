//! `release`: the job has finished.

use clap::Args;

use super::console::Console;
use super::document;
use super::exit::Ended;
use crate::control::wire;

/// Detach a job and give up its right to checkpoints
#[derive(Args)]
pub(super) struct Release {
    /// The scheduler's id of the job
    job: String,
}

impl Release {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::ReleaseJobRequest { job: self.job.clone() };
        daemon.ask(daemon.jobs().release_job(request)).await?;
        let answer = document::Released { job: &self.job, released: true };
        console.answer(&answer, || format!("job {} released", self.job))
    }
}

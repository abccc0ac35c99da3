//! `jobs`: who holds a right to what.

use clap::Args;

use super::console::Console;
use super::exit::Ended;
use super::{document, text};
use crate::control::wire;

/// List jobs with a right to checkpoints, and where they see them
#[derive(Args)]
pub(super) struct Jobs {}

impl Jobs {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let jobs = daemon.ask_promptly(daemon.jobs().list_jobs(wire::ListJobsRequest {})).await?.jobs;
        console.answer(&document::Jobs::from(&jobs[..]), || text::job_table(&jobs))
    }
}

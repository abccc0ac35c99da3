//! `prefetch` and `estimate`: before a job runs.

use clap::Args;

use super::console::{Console, talk};
use super::exit::Ended;
use super::{document, text};
use crate::control::wire;
use crate::units::show_bytes;

/// Bring a checkpoint to this host ahead of its job
#[derive(Args)]
pub(super) struct Prefetch {
    /// Id or name
    checkpoint: String,
    /// Also into the page cache, and wait until it is there
    #[arg(long)]
    memory: bool,
}

impl Prefetch {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::PrefetchCheckpointRequest { checkpoint: self.checkpoint, memory: self.memory };
        let answer = daemon.ask(daemon.checkpoints().prefetch_checkpoint(request)).await?;
        let record = answer.checkpoint.unwrap_or_default();
        if self.memory {
            talk(&format!("{} are in the page cache", show_bytes(answer.memory_bytes)));
        }
        console.answer(&document::Checkpoint::from(&record), || text::checkpoint_line(&record))
    }
}

/// Show what is missing of a checkpoint, where it comes from, and how long that may take
#[derive(Args)]
pub(super) struct Estimate {
    /// Id or name
    checkpoint: String,
}

impl Estimate {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::EstimateCheckpointRequest { checkpoint: self.checkpoint };
        let estimate = daemon.ask_promptly(daemon.checkpoints().estimate_checkpoint(request)).await?;
        console.answer(&document::Estimate::from(&estimate), || text::estimate(&estimate))
    }
}

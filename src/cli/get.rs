//! `get`: one checkpoint.

use clap::Args;

use super::console::Console;
use super::exit::Ended;
use super::{document, text};
use crate::control::wire;

/// Show one checkpoint
#[derive(Args)]
pub(super) struct Get {
    /// Id or name
    checkpoint: String,
}

impl Get {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::GetCheckpointRequest { checkpoint: self.checkpoint };
        let record = daemon.ask_promptly(daemon.checkpoints().get_checkpoint(request)).await?;
        console.answer(&document::Checkpoint::from(&record), || text::checkpoint_details(&record))
    }
}

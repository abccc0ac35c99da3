//! `pin` and `unpin`: an operator's lasting right.

use clap::Args;

use super::console::Console;
use super::exit::Ended;
use super::{document, text};
use crate::control::wire;

/// Keep a checkpoint from being evicted, until it is unpinned
#[derive(Args)]
pub(super) struct Pin {
    /// Id or name
    checkpoint: String,
}

impl Pin {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::PinCheckpointRequest { checkpoint: self.checkpoint };
        let record = daemon.ask_promptly(daemon.checkpoints().pin_checkpoint(request)).await?;
        console.answer(&document::Checkpoint::from(&record), || text::checkpoint_line(&record))
    }
}

/// Let a pinned checkpoint be evicted again when room is needed
#[derive(Args)]
pub(super) struct Unpin {
    /// Id or name
    checkpoint: String,
}

impl Unpin {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::UnpinCheckpointRequest { checkpoint: self.checkpoint };
        let record = daemon.ask_promptly(daemon.checkpoints().unpin_checkpoint(request)).await?;
        console.answer(&document::Checkpoint::from(&record), || text::checkpoint_line(&record))
    }
}

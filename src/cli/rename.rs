//! `rename`: change a checkpoint's name.

use clap::Args;

use super::console::Console;
use super::exit::Ended;
use super::{document, text};
use crate::control::wire;

/// Change the name of a checkpoint; its id stays
#[derive(Args)]
pub(super) struct Rename {
    /// Id or present name
    checkpoint: String,
    /// New name
    name: String,
}

impl Rename {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::RenameCheckpointRequest { checkpoint: self.checkpoint, name: self.name };
        let record = daemon.ask(daemon.checkpoints().rename_checkpoint(request)).await?;
        console.answer(&document::Checkpoint::from(&record), || text::checkpoint_line(&record))
    }
}

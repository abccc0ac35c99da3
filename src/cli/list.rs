//! `list`: checkpoints of this host.

use clap::Args;

use super::console::Console;
use super::exit::Ended;
use super::{document, text};
use crate::control::wire;

/// List checkpoints in order of creation
#[derive(Args)]
pub(super) struct List {
    /// Only this owner's
    #[arg(long)]
    owner: Option<String>,
    /// Only public ones
    #[arg(long)]
    public: bool,
}

impl List {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::ListCheckpointsRequest { owner: self.owner.unwrap_or_default(), public: self.public };
        let records = daemon.ask_promptly(daemon.checkpoints().list_checkpoints(request)).await?.checkpoints;
        console.answer(&document::Checkpoints::from(&records[..]), || text::checkpoint_table(&records))
    }
}

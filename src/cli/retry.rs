//! `retry`: fill a failed checkpoint again.

use clap::Args;

use super::console::Console;
use super::exit::Ended;
use super::secret::Secrets;
use super::{document, follow, text};
use crate::control::wire;

/// Fill a failed checkpoint again, resuming with the bytes that are here
#[derive(Args)]
pub(super) struct Retry {
    /// Id or name
    checkpoint: String,
    #[command(flatten)]
    secrets: Secrets,
    /// Wait until it is ready
    #[arg(long)]
    wait: bool,
}

impl Retry {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let credentials = self.secrets.read()?;
        let daemon = console.daemon().await?;
        let request = wire::RetryCheckpointRequest { checkpoint: self.checkpoint, credentials };
        let mut record = daemon.ask(daemon.checkpoints().retry_checkpoint(request)).await?;
        if self.wait {
            record = follow::until_ready(&daemon, &record).await?;
        }
        console.answer(&document::Checkpoint::from(&record), || text::checkpoint_line(&record))
    }
}

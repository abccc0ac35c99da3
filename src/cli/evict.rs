//! `evict`: giving up bytes by hand, before pressure does.

use clap::Args;

use super::console::Console;
use super::document;
use super::exit::Ended;
use crate::control::wire;
use crate::units::show_bytes;

/// Give up the bytes of checkpoints; attaching them fetches the same again
#[derive(Args)]
pub(super) struct Evict {
    /// Ids or names
    #[arg(required = true)]
    checkpoints: Vec<String>,
}

impl Evict {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::EvictCheckpointsRequest { checkpoints: self.checkpoints };
        let answer = daemon.ask(daemon.node().evict_checkpoints(request)).await?;
        let shown = document::Evicted { evicted: &answer.evicted, freed_bytes: answer.freed_bytes };
        console.answer(&shown, || {
            let ids = if answer.evicted.is_empty() { "nothing".to_owned() } else { answer.evicted.join(", ") };
            format!("evicted {ids}, {} freed", show_bytes(answer.freed_bytes))
        })
    }
}

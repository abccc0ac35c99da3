//! `usage`: what the store occupies.

use clap::Args;

use super::console::Console;
use super::exit::Ended;
use super::{document, text};
use crate::control::wire;

/// Show what the store occupies, for what and for whom
#[derive(Args)]
pub(super) struct Usage {}

impl Usage {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let usage = daemon.ask_promptly(daemon.node().get_usage(wire::GetUsageRequest {})).await?;
        console.answer(&document::Usage::from(&usage), || text::usage(&usage))
    }
}

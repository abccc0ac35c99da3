//! `status`: the daemon itself.

use clap::Args;

use super::console::Console;
use super::exit::Ended;
use super::{document, text};
use crate::control::wire;

/// Show the daemon: version, what this kernel gives it, what it serves
#[derive(Args)]
pub(super) struct Status {}

impl Status {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let status = daemon.ask_promptly(daemon.node().get_status(wire::GetStatusRequest {})).await?;
        console.answer(&document::Status::from(&status), || text::status(&status))
    }
}

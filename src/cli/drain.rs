//! `drain`: no new work until the next start.

use clap::Args;

use super::console::Console;
use super::document;
use super::exit::Ended;
use crate::control::wire;

/// Stop taking work: filling pauses durably, what is mounted stays and is served; a restart ends it
#[derive(Args)]
pub(super) struct Drain {}

impl Drain {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        daemon.ask(daemon.node().drain(wire::DrainRequest {})).await?;
        console.answer(&document::Drained { draining: true }, || "no new work is taken".to_owned())
    }
}

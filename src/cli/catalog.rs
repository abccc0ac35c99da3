//! `catalog`: the public checkpoints that `create --catalog` makes.

use clap::Args;

use super::console::Console;
use super::exit::Ended;
use super::{document, text};
use crate::control::wire;

/// List the public checkpoints that `create --catalog` makes
#[derive(Args)]
pub(super) struct Catalog {}

impl Catalog {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::ListCatalogRequest {};
        let entries = daemon.ask_promptly(daemon.checkpoints().list_catalog(request)).await?.entries;
        console.answer(&document::Catalog::from(&entries[..]), || text::catalog_table(&entries))
    }
}

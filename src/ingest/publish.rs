//! The end of every fill: a file that is filled and digested becomes a blob and an entry of the tree.

use std::sync::Arc;

use super::Shared;
use super::progress::Progress;
use super::seal::Digested;
use crate::error::Result;
use crate::manifest::{Entry, EntryKind};
use crate::names::EntryPath;
use crate::store::Sealing;
use crate::store::filling::Filling;

/// A file of a flight that is filled and digested.
pub(super) struct Filled {
    pub(super) path: EntryPath,
    /// Its number in the flight's directory.
    pub(super) number: u64,
    pub(super) size: u64,
    pub(super) executable: bool,
    pub(super) digested: Digested,
    /// Whether its bytes are durable already.
    pub(super) synced: bool,
}

/// Seals `filled`; durable on return.
///
/// # Errors
/// Those of the store.
pub(super) async fn publish(shared: &Shared, flight: &str, progress: &Progress, filled: Filled) -> Result<Entry> {
    let Filled { path, number, size, executable, digested: Digested { digest, chunks }, synced } = filled;
    let flight = flight.to_owned();
    shared.store.publish(Sealing { flight, number, path: path.clone(), size, digest, chunks, synced }).await?;
    progress.sealed();
    Ok(Entry { path, kind: EntryKind::File { size, executable, digest } })
}

/// Ends the blocking side of a fill when the async side goes away.
pub(super) struct GiveUp(pub(super) Arc<Filling>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

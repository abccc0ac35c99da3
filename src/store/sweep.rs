//! Removal, on the publisher thread: doomed rows, then unlink or punch, then rows gone.

use super::publish::Publisher;
use crate::catalog::{blobs, checkpoints, fills, placements};
use crate::error::Result;

/// What is to be given back.
pub(super) enum Order {
    /// A checkpoint's record and what only it named.
    Checkpoint(String),
    /// A flight's rows and files, and what only it had sealed; nothing if a record needs it.
    Flight(String),
    /// Whatever nothing names.
    Unnamed,
}

/// What a removal gave back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Blobs unlinked.
    pub blobs: u64,
    /// Bytes given back to the filesystem.
    pub freed_bytes: u64,
}

/// Carries out an order. A crash at any point leaves `doomed` rows or unnamed blobs, which start-up finishes.
pub(super) fn carry_out(publisher: &Publisher, order: &Order) -> Result<Swept> {
    publisher.disk.check_healthy()?;
    let condemned = match order {
        Order::Checkpoint(id) => {
            let id = id.clone();
            publisher.catalog.write_blocking(move |tx| {
                let candidates = checkpoints::delete(tx, &id)?;
                blobs::condemn(tx, &candidates)
            })?
        }
        Order::Flight(flight) => {
            let key = flight.clone();
            let condemned = publisher.catalog.write_blocking(move |tx| {
                if checkpoints::flight_is_needed(tx, &key)? {
                    return Ok(None);
                }
                placements::forget_flight(tx, &key)?;
                let candidates = fills::delete(tx, &key)?;
                blobs::condemn(tx, &candidates).map(Some)
            })?;
            let Some(condemned) = condemned else { return Ok(Swept::default()) };
            publisher.disk.end_flight(flight)?;
            condemned
        }
        Order::Unnamed => publisher.catalog.write_blocking(|tx| {
            let candidates = blobs::unnamed(tx)?;
            blobs::condemn(tx, &candidates)
        })?,
    };
    let swept = give_back(publisher, condemned)?;
    if matches!(order, Order::Unnamed) {
        punch_again(publisher)?;
    }
    Ok(swept)
}

/// Punches what a crash between rows and punch (or a hydration that was cut short) left behind.
fn punch_again(publisher: &Publisher) -> Result<()> {
    for (blob, ranges) in publisher.catalog.write_blocking(blobs::unpunched)? {
        if publisher.holds.is_held(&blob.digest) {
            continue;
        }
        publisher.disk.punch(&blob.digest, &ranges)?;
        let stored = publisher.disk.stored_bytes(&blob.digest)?;
        publisher.catalog.write_blocking(move |tx| blobs::set_stored_bytes(tx, blob.id, stored))?;
    }
    Ok(())
}

fn give_back(publisher: &Publisher, condemned: blobs::Condemned) -> Result<Swept> {
    let mut swept = Swept::default();
    for blob in &condemned.doomed {
        swept.freed_bytes += publisher.disk.stored_bytes(&blob.digest).unwrap_or(0);
        publisher.disk.remove_blob(&blob.digest)?;
        swept.blobs += 1;
    }
    let mut trimmed = Vec::new();
    for (blob, gaps) in &condemned.remnants {
        if publisher.holds.is_held(&blob.digest) {
            continue;
        }
        let before = publisher.disk.stored_bytes(&blob.digest)?;
        publisher.disk.punch(&blob.digest, gaps)?;
        let after = publisher.disk.stored_bytes(&blob.digest)?;
        swept.freed_bytes += before.saturating_sub(after);
        trimmed.push((blob.id, after));
    }
    publisher.disk.sync_directories(condemned.doomed.iter().map(|blob| &blob.digest))?;
    publisher.catalog.write_blocking(move |tx| {
        condemned.doomed.iter().try_for_each(|blob| blobs::forget(tx, blob.id))?;
        trimmed.iter().try_for_each(|(blob, stored)| blobs::set_stored_bytes(tx, *blob, *stored))
    })?;
    Ok(swept)
}

//! How much an owner may keep here: logical bytes, by the operator's configuration.
//!
//! What counts is the sum of the owner's [charges](crate::catalog::quotas): what is kept here or is admitted to come, in its own files' sizes. What
//! is evicted does not count, since the host gave its bytes up; bringing it back is asked for like anything else. What stays in a
//! datastore takes nothing here and counts nothing. What nobody owns (public checkpoints, those of the host) has no quota: only who commands the
//! host makes such, and `store.capacity` bounds it.
//!
//! **When it is asked.** Charge and sum are of one transaction, so of two that begin together the second finds the charge of the first:
//! * what is listed with its sizes is charged before a byte of it is fetched, in the transaction that records the listing; what is sent with
//!   its size announced, before a byte is taken;
//! * what has no size (archives, streams, senders who announce nothing or too little) is charged while it fills, a step ahead ([`ahead`]), by its
//!   [`Growth`], which holds it to the limit of a checkpoint by the same figure; an archive that has to be here whole first is charged for that;
//! * when it is ready its charge becomes its size.
//!
//! A charge that does not grow is never refused: a restart or a smaller quota stops nothing that was admitted. What is refused keeps nothing.
//! Two checkpoints that wait for the same bytes are charged each.
//!
//! **What it tells**: figures of that owner alone. No charge depends on what others have, or on dedup.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rusqlite::Connection;

use super::{Shared, plan};
use crate::catalog::quotas;
use crate::error::{Error, Result};
use crate::limits;
use crate::units::show_bytes;

/// Quotas as configured, in logical bytes; 0 is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Quotas {
    /// Of every owner that is not named.
    pub default_bytes: u64,
    /// Of owners by name.
    pub owners: BTreeMap<String, u64>,
}

impl Quotas {
    /// What an owner may keep; `None`: as much as there is room for.
    pub fn of(&self, owner: &str) -> Option<u64> {
        let bytes = self.owners.get(owner).copied().unwrap_or(self.default_bytes);
        (!owner.is_empty() && bytes > 0).then_some(bytes)
    }

    fn are_none(&self) -> bool {
        self.default_bytes == 0 && self.owners.values().all(|bytes| *bytes == 0)
    }
}

/// A charge that is asked for.
#[derive(Clone, Copy, Debug)]
struct Asked {
    /// What the owner's other records are charged with.
    others_bytes: u64,
    /// Records that are to be charged, each.
    records: u64,
    /// At least.
    bytes: u64,
    /// More than that where there is room for it.
    ahead_bytes: u64,
}

impl Asked {
    /// The charge of each record under a quota; `None` where it is too much.
    fn under(self, quota_bytes: u64) -> Option<u64> {
        let room_for_each = quota_bytes.checked_sub(self.others_bytes)? / self.records.max(1);
        (self.bytes <= room_for_each).then(|| self.bytes.saturating_add(self.ahead_bytes).min(room_for_each))
    }

    fn refused(self, owner: &str, quota_bytes: u64) -> Error {
        let (used, asked) = (self.others_bytes, self.bytes.saturating_mul(self.records));
        let message = format!(
            "`{owner}` keeps {} here and may keep {}, and {} more are needed",
            show_bytes(used),
            show_bytes(quota_bytes),
            show_bytes(asked)
        );
        Error::no_space("QUOTA_EXCEEDED", message)
            .fact("owner", owner)
            .fact("used_bytes", used)
            .fact("asked_bytes", asked)
            .fact("quota_bytes", quota_bytes)
            .remedy(format!("remove checkpoints of `{owner}`, or ask an operator of this host for more; then retry"))
    }
}

/// How far ahead of what has arrived is charged: an eighth, so that a large checkpoint costs few transactions and a small one takes
/// little that it may not need.
fn ahead(bytes: u64) -> u64 {
    (bytes / 8).clamp(limits::QUOTA_STEP_MIN_BYTES, limits::QUOTA_STEP_MAX_BYTES)
}

/// Charges a record with `bytes` in all.
///
/// # Errors
/// `QUOTA_EXCEEDED` where that is more than before and too much.
pub(super) fn charge(tx: &Connection, quotas: &Quotas, id: &str, bytes: u64) -> Result<()> {
    let Some(before) = quotas::of_record(tx, id)? else { return Ok(()) };
    if let Some(quota_bytes) = quotas.of(&before.owner).filter(|_| bytes > before.bytes) {
        let others_bytes = quotas::used(tx, &before.owner)?.saturating_sub(before.bytes);
        let asked = Asked { others_bytes, records: 1, bytes, ahead_bytes: 0 };
        asked.under(quota_bytes).ok_or_else(|| asked.refused(&before.owner, quota_bytes))?;
    }
    quotas::set(tx, id, bytes)
}

/// Charges a record that joins a flight with what is listed, or with what those are charged with that wait for it already. `None`:
/// nothing of it is kept here.
///
/// # Errors
/// As [`charge`].
pub(super) fn charge_listed(
    tx: &Connection,
    quotas: &Quotas,
    id: &str,
    flight: &str,
    listed_bytes: Option<u64>,
) -> Result<()> {
    let Some(listed_bytes) = listed_bytes else { return charge(tx, quotas, id, 0) };
    let waiting = quotas::of_flight(tx, flight)?;
    let others = waiting.iter().filter(|charge| charge.checkpoint != id).map(|charge| charge.bytes);
    charge(tx, quotas, id, others.max().unwrap_or(0).max(listed_bytes))
}

/// Charges every record that waits for a flight with `bytes` at least; returns up to where the flight may grow unasked.
///
/// # Errors
/// As [`charge`].
fn charge_flight(tx: &Connection, quotas: &Quotas, flight: &str, bytes: u64) -> Result<u64> {
    let waiting = quotas::of_flight(tx, flight)?;
    let Some(owner) = waiting.first().map(|charge| charge.owner.as_str()) else { return Ok(bytes) };
    let Some(quota_bytes) = quotas.of(owner) else { return Ok(u64::MAX) };
    let least = waiting.iter().map(|charge| charge.bytes).min().unwrap_or(0);
    if bytes <= least {
        return Ok(least);
    }
    let own_bytes = waiting.iter().map(|charge| charge.bytes).sum();
    let others_bytes = quotas::used(tx, owner)?.saturating_sub(own_bytes);
    let asked = Asked { others_bytes, records: waiting.len() as u64, bytes, ahead_bytes: ahead(bytes) };
    let granted = asked.under(quota_bytes).ok_or_else(|| asked.refused(owner, quota_bytes))?;
    waiting.iter().try_for_each(|charge| quotas::set(tx, &charge.checkpoint, granted))?;
    Ok(granted)
}

/// Of how many bytes it is known by now that a flight brings them, and up to how many it may.
pub(super) struct Growth {
    shared: Arc<Shared>,
    flight: String,
    bytes: AtomicU64,
    granted: AtomicU64,
}

impl Growth {
    /// A flight of which nothing is known yet.
    pub(super) fn new(shared: &Arc<Shared>, flight: &str) -> Self {
        let granted = if shared.settings.quotas.are_none() { u64::MAX } else { 0 };
        Self {
            shared: Arc::clone(shared),
            flight: flight.to_owned(),
            bytes: AtomicU64::new(0),
            granted: AtomicU64::new(granted),
        }
    }

    /// What is known from the beginning, and charged.
    pub(super) fn begin(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    /// There are `bytes` more.
    ///
    /// # Errors
    /// As [`Growth::reach`].
    pub(super) async fn add(&self, bytes: u64) -> Result<()> {
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.reach(before.saturating_add(bytes)).await
    }

    /// `bytes` of those that were added have to come again.
    pub(super) fn take_back(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// There are `bytes` in all.
    ///
    /// # Errors
    /// `CHECKPOINT_TOO_LARGE`, `QUOTA_EXCEEDED` with the figures; those of the catalog.
    pub(super) async fn reach(&self, bytes: u64) -> Result<()> {
        plan::check_limit(bytes, self.shared.settings.checkpoint_bytes)?;
        if bytes <= self.granted.load(Ordering::Relaxed) {
            return Ok(());
        }
        let (quotas, flight) = (self.shared.settings.quotas.clone(), self.flight.clone());
        let granted = self.shared.store.catalog().write(move |tx| charge_flight(tx, &quotas, &flight, bytes)).await?;
        self.granted.fetch_max(granted, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_charge_is_granted_up_to_the_quota_and_ahead_as_far_as_there_is_room() {
        for (others_bytes, records, bytes, ahead_bytes, quota_bytes, granted) in [
            (0, 1, 100, 0, 100, Some(100)),
            (1, 1, 100, 0, 100, None),
            (0, 1, 50, 20, 100, Some(70)),
            (40, 1, 50, 20, 100, Some(60)),
            (50, 1, 50, 20, 100, Some(50)),
            // Both that wait for the same bytes are charged.
            (0, 2, 50, 20, 100, Some(50)),
            (1, 2, 50, 20, 100, None),
            (0, 2, 40, 20, 101, Some(50)),
            // More is kept than may be: the quota became smaller.
            (200, 1, 0, 0, 100, None),
            (0, 1, u64::MAX, 1, u64::MAX, Some(u64::MAX)),
        ] {
            let asked = Asked { others_bytes, records, bytes, ahead_bytes };
            assert_eq!(asked.under(quota_bytes), granted, "{asked:?} under {quota_bytes}");
        }
    }

    #[test]
    fn a_name_has_its_own_quota_and_what_nobody_owns_has_none() {
        let owners = BTreeMap::from([("a".to_owned(), 5), ("free".to_owned(), 0), (String::new(), 7)]);
        let quotas = Quotas { default_bytes: 9, owners };
        assert_eq!(["a", "free", "b", ""].map(|owner| quotas.of(owner)), [Some(5), None, Some(9), None]);
        assert!(!quotas.are_none());
        assert!(Quotas::default().are_none());
    }

    #[test]
    fn figures_are_of_the_owner() {
        let error = Asked { others_bytes: 7, records: 1, bytes: 5, ahead_bytes: 99 }.refused("a", 10);
        let facts = [("owner", "a"), ("used_bytes", "7"), ("asked_bytes", "5"), ("quota_bytes", "10")];
        assert_eq!(error.facts(), facts.map(|(key, value)| (key.to_owned(), value.to_owned())));
        assert!(!error.tells_of_the_host());
    }
}

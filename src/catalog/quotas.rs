//! What counts against quotas: each record's *charge*, its owner's sum of them, in the transaction that decides.
//!
//! A record is charged with the logical bytes of what is kept here for it, or was admitted and is to come:
//!
//! | state | charge |
//! |---|---|
//! | filling | what was admitted: all of it where the size is known, else what has arrived and a step ahead |
//! | failed | the same where what arrived is kept for a retry, else nothing |
//! | ready | its size; nothing where its bytes stay in a datastore |
//! | evicted, removing | nothing |
//!
//! Logical bytes, as the owner's own files are: what others have, and so what dedup saves, changes no charge. An owner that has equal bytes
//! twice is charged twice, or a quota would tell it what is shared.

use rusqlite::{Connection, params};

use super::{catalog_error, from_sql, to_sql};
use crate::error::Result;

/// What a record is charged with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Charge {
    /// Its id.
    pub checkpoint: String,
    /// Its owner; empty for what nobody owns.
    pub owner: String,
    /// Bytes.
    pub bytes: u64,
}

/// What all records of an owner are charged with, in bytes.
///
/// # Errors
/// Those of the catalog.
pub fn used(tx: &Connection, owner: &str) -> Result<u64> {
    sum(tx, owner).map_err(catalog_error)
}

pub(super) fn sum(tx: &Connection, owner: &str) -> rusqlite::Result<u64> {
    tx.prepare_cached(
        "SELECT COALESCE(SUM(charged_bytes), 0) FROM checkpoints WHERE owner = ? AND state <> 'removing'",
    )?
    .query_row([owner], |row| row.get(0).map(from_sql))
}

/// The charge of a record that is not being removed.
///
/// # Errors
/// Those of the catalog.
pub fn of_record(tx: &Connection, id: &str) -> Result<Option<Charge>> {
    charges(tx, "id", id).map(|mut found| found.pop())
}

/// The charges of all records that a flight fills; they have one owner.
///
/// # Errors
/// Those of the catalog.
pub fn of_flight(tx: &Connection, flight: &str) -> Result<Vec<Charge>> {
    charges(tx, "flight", flight)
}

/// Charges a record with so many bytes, whatever the quota.
///
/// # Errors
/// Those of the catalog.
pub fn set(tx: &Connection, id: &str, bytes: u64) -> Result<()> {
    tx.prepare_cached("UPDATE checkpoints SET charged_bytes = ? WHERE id = ?")
        .and_then(|mut update| update.execute(params![to_sql(bytes), id]))
        .map_err(catalog_error)?;
    Ok(())
}

fn charges(tx: &Connection, column: &str, value: &str) -> Result<Vec<Charge>> {
    let read = || -> rusqlite::Result<Vec<Charge>> {
        tx.prepare_cached(&format!(
            "SELECT id, owner, charged_bytes FROM checkpoints WHERE {column} = ? AND state <> 'removing'"
        ))?
        .query_map([value], |row| {
            Ok(Charge { checkpoint: row.get(0)?, owner: row.get(1)?, bytes: from_sql(row.get(2)?) })
        })?
        .collect()
    };
    read().map_err(catalog_error)
}

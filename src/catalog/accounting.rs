//! Where every byte is: figures per checkpoint, per owner and of the store, exact after every transaction and cheap at any size.
//!
//! | word | of a checkpoint | of an owner |
//! |---|---|---|
//! | *logical* | sum of its files' sizes, equal files as often as they occur | sum over its records, whatever their state |
//! | *unique* | bytes that its blobs are home to: each blob once, without what it borrows | the same over all its checkpoints, each blob once |
//! | *shared* | of the unique ones, those in blobs that another checkpoint names too | those in blobs that another owner's names too |
//! | *physical* | what its blobs occupy on disk, hydrated duplicates included | the same over all its checkpoints, each blob once |
//!
//! Only checkpoints that are ready and stored have anything but logical bytes. Unique less shared is what removing gives back, but for
//! ranges that others borrow (the blob stays as a remnant then); what it had hydrated (*duplicates*) comes on top. Where the filesystem shares
//! extents, a file occupies all that it reads from, so an extent that several share counts in each; what the filesystem has in use is less.
//!
//! **Kept by triggers** (`schema`, migration 4), in the transaction that makes the change: `blobs.borrowed_bytes` and `.duplicate_bytes`
//! follow `borrows`; `blobs.names` and a row of `footprints` for each tree follow `manifest_blobs`; both and `totals` follow `blobs`. A
//! change of a blob reaches the footprints of the trees that name it; one name more or less reaches two trees at most. So reading is one
//! row for a checkpoint. An owner's figures are sums of footprints for blobs that one tree names; those that several name are gone through.
//!
//! **What a tenant may see.** These figures depend on what others have, and dedup is no oracle: they are the operator's. [`own_footprint`] and
//! [`own_figures`] are computed from the checkpoint's own tree alone, equal files once, and say the same whoever else is on the host.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Connection, OptionalExtension as _};

use super::checkpoints::Record;
use super::{catalog_error, from_sql, quotas};
use crate::digest::Digest;
use crate::error::Result;

/// Figures in bytes: see the module's page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Sum of file sizes.
    pub logical_bytes: u64,
    /// After dedup.
    pub unique_bytes: u64,
    /// Of the unique ones, those that others name too.
    pub shared_bytes: u64,
    /// On disk.
    pub physical_bytes: u64,
}

/// Figures of the store's blobs in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// That sealed blobs are home to.
    pub unique_bytes: u64,
    /// Of what is on disk, copies of borrowed ranges, which can be given up at once.
    pub duplicate_bytes: u64,
    /// That sealed blobs occupy.
    pub sealed_bytes: u64,
    /// That blobs occupy which nothing names: remnants, and what is about to be unlinked.
    pub remnant_bytes: u64,
}

impl Totals {
    /// What all blobs occupy.
    pub fn physical_bytes(&self) -> u64 {
        self.sealed_bytes + self.remnant_bytes
    }
}

/// An owner's figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnerFigures {
    /// Records.
    pub checkpoints: u64,
    /// What counts against its quota: see [`quotas`].
    pub charged_bytes: u64,
    /// Bytes.
    pub figures: Figures,
}

/// The row of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Footprint {
    tree_bytes: u64,
    unique_bytes: u64,
    shared_bytes: u64,
    stored_bytes: u64,
    shared_stored_bytes: u64,
}

/// Figures of one checkpoint, for operators.
///
/// # Errors
/// Those of the catalog.
pub fn footprint(tx: &Connection, record: &Record) -> Result<Figures> {
    let logical = Figures { logical_bytes: record.logical_bytes, ..Default::default() };
    let (Some(manifest), None) = (record.ready_manifest(), &record.in_place) else { return Ok(logical) };
    let Some(row) = row_of(tx, &manifest)? else { return Ok(logical) };
    let is_elsewhere = tx
        .prepare_cached(
            "SELECT 1 FROM checkpoints WHERE manifest = ? AND state = 'ready' AND datastore = '' AND id <> ?",
        )
        .and_then(|mut query| query.exists(rusqlite::params![manifest.as_bytes(), record.id]))
        .map_err(catalog_error)?;
    Ok(Figures {
        unique_bytes: row.unique_bytes,
        shared_bytes: if is_elsewhere { row.unique_bytes } else { row.shared_bytes },
        physical_bytes: row.stored_bytes,
        ..logical
    })
}

/// Figures of one checkpoint that tell nothing of others: of its own tree, equal files once.
///
/// # Errors
/// Those of the catalog.
pub fn own_footprint(tx: &Connection, record: &Record) -> Result<Figures> {
    let logical = Figures { logical_bytes: record.logical_bytes, ..Default::default() };
    let (Some(manifest), None) = (record.ready_manifest(), &record.in_place) else { return Ok(logical) };
    let tree_bytes = row_of(tx, &manifest)?.unwrap_or_default().tree_bytes;
    Ok(Figures { unique_bytes: tree_bytes, physical_bytes: tree_bytes, ..logical })
}

/// [`own_footprint`] of all that an owner has, equal trees once.
///
/// # Errors
/// Those of the catalog.
pub fn own_figures(tx: &Connection, owner: &str) -> Result<OwnerFigures> {
    let mut own = OwnerFigures::default();
    let mut read = || -> rusqlite::Result<()> {
        (own.checkpoints, own.figures.logical_bytes) = tx
            .prepare_cached("SELECT COUNT(*), COALESCE(SUM(logical_bytes), 0) FROM checkpoints WHERE owner = ?")?
            .query_row([owner], |row| Ok((from_sql(row.get(0)?), from_sql(row.get(1)?))))?;
        own.charged_bytes = quotas::sum(tx, owner)?;
        let tree_bytes = tx
            .prepare_cached(
                "SELECT COALESCE(SUM(tree_bytes), 0) FROM footprints WHERE manifest IN
                 (SELECT manifest FROM checkpoints WHERE owner = ? AND state = 'ready' AND datastore = '')",
            )?
            .query_row([owner], |row| Ok(from_sql(row.get(0)?)))?;
        own.figures.unique_bytes = tree_bytes;
        own.figures.physical_bytes = tree_bytes;
        Ok(())
    };
    read().map_err(catalog_error)?;
    Ok(own)
}

/// Figures of the store.
///
/// # Errors
/// Those of the catalog.
pub fn totals(tx: &Connection) -> Result<Totals> {
    tx.prepare_cached("SELECT unique_bytes, duplicate_bytes, sealed_bytes, remnant_bytes FROM totals")
        .and_then(|mut query| {
            query.query_row([], |row| {
                Ok(Totals {
                    unique_bytes: from_sql(row.get(0)?),
                    duplicate_bytes: from_sql(row.get(1)?),
                    sealed_bytes: from_sql(row.get(2)?),
                    remnant_bytes: from_sql(row.get(3)?),
                })
            })
        })
        .map_err(catalog_error)
}

/// Figures of every owner, for operators. Goes through the records, and through the blobs that several trees name.
///
/// # Errors
/// Those of the catalog.
pub fn by_owner(tx: &Connection) -> Result<BTreeMap<String, OwnerFigures>> {
    let mut owners: BTreeMap<String, OwnerFigures> = BTreeMap::new();
    let mut trees: BTreeMap<Digest, BTreeSet<String>> = BTreeMap::new();
    let records = || -> rusqlite::Result<Vec<_>> {
        tx.prepare_cached(
            "SELECT owner, logical_bytes, iif(state = 'removing', 0, charged_bytes),
                    CASE WHEN state = 'ready' AND datastore = '' THEN manifest END FROM checkpoints",
        )?
        .query_map([], |row| {
            let tree: Option<[u8; crate::digest::DIGEST_BYTES]> = row.get(3)?;
            Ok((row.get::<_, String>(0)?, from_sql(row.get(1)?), from_sql(row.get(2)?), tree.map(Digest::from_bytes)))
        })?
        .collect()
    };
    for (owner, logical_bytes, charged_bytes, tree) in records().map_err(catalog_error)? {
        if let Some(tree) = tree {
            trees.entry(tree).or_default().insert(owner.clone());
        }
        let of = owners.entry(owner).or_default();
        of.checkpoints += 1;
        of.charged_bytes += charged_bytes;
        of.figures.logical_bytes += logical_bytes;
    }
    for (tree, its_owners) in &trees {
        let Some(row) = row_of(tx, tree)? else { continue };
        let (unique, stored) = (row.unique_bytes - row.shared_bytes, row.stored_bytes - row.shared_stored_bytes);
        add(&mut owners, its_owners, unique, stored);
    }
    let mut at = None;
    for (blob, unique, stored, tree) in shared_blobs(tx)? {
        let Some(its_owners) = trees.get(&tree) else { continue };
        let (last, known, ..) = at.get_or_insert_with(|| (blob, BTreeSet::new(), unique, stored));
        if *last == blob {
            known.extend(its_owners.iter().cloned());
        } else if let Some((_, known, unique, stored)) = at.replace((blob, its_owners.clone(), unique, stored)) {
            add(&mut owners, &known, unique, stored);
        }
    }
    if let Some((_, known, unique, stored)) = at {
        add(&mut owners, &known, unique, stored);
    }
    Ok(owners)
}

/// Counts what all of `its_owners` have, once for each.
fn add(owners: &mut BTreeMap<String, OwnerFigures>, its_owners: &BTreeSet<String>, unique: u64, stored: u64) {
    for owner in its_owners {
        let figures = &mut owners.entry(owner.clone()).or_default().figures;
        figures.unique_bytes += unique;
        figures.physical_bytes += stored;
        figures.shared_bytes += if its_owners.len() > 1 { unique } else { 0 };
    }
}

/// Blobs that several trees name, with unique and stored bytes, once for each tree; in order of their ids.
fn shared_blobs(tx: &Connection) -> Result<Vec<(i64, u64, u64, Digest)>> {
    let read = || -> rusqlite::Result<Vec<_>> {
        tx.prepare_cached(
            "SELECT b.id, b.size - b.borrowed_bytes, b.stored_bytes, m.manifest
             FROM blobs b INDEXED BY blobs_shared JOIN manifest_blobs m ON m.blob = b.id WHERE b.names > 1 ORDER BY b.id",
        )?
        .query_map([], |row| {
            Ok((row.get(0)?, from_sql(row.get(1)?), from_sql(row.get(2)?), super::digest_at(row, 3)?))
        })?
        .collect()
    };
    read().map_err(catalog_error)
}

fn row_of(tx: &Connection, manifest: &Digest) -> Result<Option<Footprint>> {
    tx.prepare_cached(
        "SELECT tree_bytes, unique_bytes, shared_bytes, stored_bytes, shared_stored_bytes FROM footprints WHERE manifest = ?",
    )
    .and_then(|mut query| {
        query
            .query_row([manifest.as_bytes()], |row| {
                Ok(Footprint {
                    tree_bytes: from_sql(row.get(0)?),
                    unique_bytes: from_sql(row.get(1)?),
                    shared_bytes: from_sql(row.get(2)?),
                    stored_bytes: from_sql(row.get(3)?),
                    shared_stored_bytes: from_sql(row.get(4)?),
                })
            })
            .optional()
    })
    .map_err(catalog_error)
}

#[cfg(test)]
mod recount;

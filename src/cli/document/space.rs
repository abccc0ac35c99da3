//! Where bytes are, and what was given back.

use serde::Serialize;

use crate::control::wire;

/// The answer of `usage`.
#[derive(Serialize)]
pub(in crate::cli) struct Usage<'a> {
    logical_bytes: u64,
    unique_bytes: u64,
    physical_bytes: u64,
    duplicate_bytes: u64,
    remnant_bytes: u64,
    filling_bytes: u64,
    quarantine_bytes: u64,
    scratch_bytes: u64,
    catalog_bytes: u64,
    other_bytes: u64,
    filesystem_bytes: u64,
    capacity_bytes: u64,
    free_bytes: u64,
    owners: Vec<OwnerUsage<'a>>,
}

#[derive(Serialize)]
struct OwnerUsage<'a> {
    owner: &'a str,
    checkpoints: u64,
    logical_bytes: u64,
    unique_bytes: u64,
    shared_bytes: u64,
    physical_bytes: u64,
}

impl<'a> From<&'a wire::Usage> for Usage<'a> {
    fn from(usage: &'a wire::Usage) -> Self {
        let owners = usage.owners.iter().map(|owner| OwnerUsage {
            owner: &owner.owner,
            checkpoints: owner.checkpoints,
            logical_bytes: owner.logical_bytes,
            unique_bytes: owner.unique_bytes,
            shared_bytes: owner.shared_bytes,
            physical_bytes: owner.physical_bytes,
        });
        Self {
            logical_bytes: usage.logical_bytes,
            unique_bytes: usage.unique_bytes,
            physical_bytes: usage.physical_bytes,
            duplicate_bytes: usage.duplicate_bytes,
            remnant_bytes: usage.remnant_bytes,
            filling_bytes: usage.filling_bytes,
            quarantine_bytes: usage.quarantine_bytes,
            scratch_bytes: usage.scratch_bytes,
            catalog_bytes: usage.catalog_bytes,
            other_bytes: usage.other_bytes,
            filesystem_bytes: usage.filesystem_bytes,
            capacity_bytes: usage.capacity_bytes,
            free_bytes: usage.free_bytes,
            owners: owners.collect(),
        }
    }
}

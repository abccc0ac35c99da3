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
    evictable_bytes: u64,
    leased_bytes: u64,
    pinned_bytes: u64,
    not_refetchable_bytes: u64,
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
    quota_bytes: u64,
    charged_bytes: u64,
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
            quota_bytes: owner.quota_bytes,
            charged_bytes: owner.charged_bytes,
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
            evictable_bytes: usage.evictable_bytes,
            leased_bytes: usage.leased_bytes,
            pinned_bytes: usage.pinned_bytes,
            not_refetchable_bytes: usage.not_refetchable_bytes,
            owners: owners.collect(),
        }
    }
}

/// The answer of `evict`.
#[derive(Serialize)]
pub(in crate::cli) struct Evicted<'a> {
    evicted: Vec<Eviction<'a>>,
    duplicate_bytes: u64,
    freed_bytes: u64,
    lacking_bytes: u64,
    available_bytes: u64,
    leased_bytes: u64,
    pinned_bytes: u64,
    not_refetchable_bytes: u64,
    dry_run: bool,
}

#[derive(Serialize)]
struct Eviction<'a> {
    id: &'a str,
    name: &'a str,
    owner: &'a str,
    freed_bytes: u64,
    logical_bytes: u64,
    idle_ms: u64,
}

impl<'a> From<&'a wire::EvictCheckpointsResponse> for Evicted<'a> {
    fn from(answer: &'a wire::EvictCheckpointsResponse) -> Self {
        let evicted = answer.evicted.iter().map(|eviction| Eviction {
            id: &eviction.id,
            name: &eviction.name,
            owner: &eviction.owner,
            freed_bytes: eviction.freed_bytes,
            logical_bytes: eviction.logical_bytes,
            idle_ms: eviction.idle_ms,
        });
        Self {
            evicted: evicted.collect(),
            duplicate_bytes: answer.duplicate_bytes,
            freed_bytes: answer.freed_bytes,
            lacking_bytes: answer.lacking_bytes,
            available_bytes: answer.available_bytes,
            leased_bytes: answer.leased_bytes,
            pinned_bytes: answer.pinned_bytes,
            not_refetchable_bytes: answer.not_refetchable_bytes,
            dry_run: answer.dry_run,
        }
    }
}

//! What is kept and where every byte is: pins, usage.

use super::caller::Caller;
use super::{Floors, wire};
use crate::catalog::{accounting, retention};
use crate::error::{Error, Result};

impl Floors {
    /// Sets or ends an operator's lasting right.
    pub(super) async fn pin(&self, reference: String, pinned: bool, caller: &Caller) -> Result<wire::Checkpoint> {
        let record = self.find_own(reference, caller).await?;
        let id = record.id.clone();
        self.store.catalog().write(move |tx| retention::set_pinned(tx, &id, pinned)).await?;
        self.ingests.note_change(&record.id);
        self.retention.wake();
        let record = self.find(record.id, caller).await?;
        self.show(record, caller).await
    }

    /// What an owner has, by its own checkpoints alone.
    async fn usage_of(&self, owner: String) -> Result<wire::Usage> {
        let key = owner.clone();
        let own = self.store.catalog().read(move |tx| accounting::own_figures(tx, &key)).await?;
        let (figures, checkpoints) = (own.figures, own.checkpoints);
        let usage = wire::OwnerUsage {
            quota_bytes: self.ingests.quotas().of(&owner).unwrap_or(0),
            charged_bytes: own.charged_bytes,
            owner,
            checkpoints,
            logical_bytes: figures.logical_bytes,
            unique_bytes: figures.unique_bytes,
            physical_bytes: figures.physical_bytes,
            ..Default::default()
        };
        Ok(wire::Usage {
            logical_bytes: figures.logical_bytes,
            unique_bytes: figures.unique_bytes,
            physical_bytes: figures.physical_bytes,
            owners: vec![usage],
            ..Default::default()
        })
    }

    /// Where every byte is; for a confined caller, what its owner has.
    pub(super) async fn usage(&self, caller: &Caller) -> Result<wire::Usage> {
        if let Some(owner) = &caller.owner {
            return self.usage_of(owner.clone()).await;
        }
        let (owners, totals) =
            self.store.catalog().read(|tx| Ok((accounting::by_owner(tx)?, accounting::totals(tx)?))).await?;
        let (standing, bounds) = (self.retention.standing().await?, self.store.bounds());
        let disk = self.store.disk().clone();
        let (occupied, filesystem) =
            tokio::task::spawn_blocking(move || Ok::<_, Error>((disk.occupied()?, disk.filesystem()?)))
                .await
                .map_err(|error| Error::internal("looking at the disk ended early").because(error))??;
        let ours = totals.physical_bytes() + occupied.total_bytes();
        let shown = owners.iter().map(|(owner, usage)| wire::OwnerUsage {
            owner: owner.clone(),
            checkpoints: usage.checkpoints,
            logical_bytes: usage.figures.logical_bytes,
            unique_bytes: usage.figures.unique_bytes,
            shared_bytes: usage.figures.shared_bytes,
            physical_bytes: usage.figures.physical_bytes,
            quota_bytes: self.ingests.quotas().of(owner).unwrap_or(0),
            charged_bytes: usage.charged_bytes,
        });
        Ok(wire::Usage {
            logical_bytes: owners.values().map(|usage| usage.figures.logical_bytes).sum(),
            unique_bytes: totals.unique_bytes,
            physical_bytes: totals.physical_bytes(),
            duplicate_bytes: totals.duplicate_bytes,
            remnant_bytes: totals.remnant_bytes,
            filling_bytes: occupied.filling_bytes,
            quarantine_bytes: occupied.quarantine_bytes,
            scratch_bytes: occupied.scratch_bytes,
            catalog_bytes: occupied.catalog_bytes,
            other_bytes: filesystem.used_bytes.saturating_sub(ours),
            filesystem_bytes: filesystem.bytes,
            capacity_bytes: if bounds.capacity_bytes == 0 { filesystem.bytes } else { bounds.capacity_bytes },
            evictable_bytes: standing.evictable_bytes,
            leased_bytes: standing.leased_bytes,
            pinned_bytes: standing.pinned_bytes,
            not_refetchable_bytes: standing.not_refetchable_bytes,
            free_bytes: filesystem.free_bytes,
            owners: shown.collect(),
        })
    }
}

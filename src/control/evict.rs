//! Evicting by hand, and the return of what was evicted.

use super::caller::{Caller, not_yours};
use super::{Floors, resolve, wire};
use crate::catalog::checkpoints::{self as rows, Failure, Record, State};
use crate::catalog::retention;
use crate::error::{Error, Kind, Result};
use crate::retain::ByHand;
use crate::retain::plan::{Eviction, Step};
use crate::source::Credentials;

impl Floors {
    /// Evicts what an operator names, and as much else as is asked for.
    pub(super) async fn evict(
        &self,
        request: wire::EvictCheckpointsRequest,
        caller: &Caller,
    ) -> Result<wire::EvictCheckpointsResponse> {
        if request.checkpoints.is_empty() && request.until_available_bytes == 0 {
            return Err(Error::invalid("NOTHING_TO_EVICT", "the request names no checkpoint and no number of bytes")
                .remedy("name checkpoints, or say how much is to be free"));
        }
        if caller.owner.is_some() && request.until_available_bytes > 0 {
            return Err(not_yours("evicting what others have"));
        }
        let (references, asking) = (request.checkpoints, caller.clone());
        let find = move |tx: &rusqlite::Connection| {
            references.iter().map(|reference| evictable(resolve::own(tx, reference, &asking)?)).collect()
        };
        let ids = self.store.catalog().read(find).await?;
        let order = ByHand {
            ids,
            available_bytes: request.until_available_bytes,
            dry_run: request.dry_run,
            force: request.force,
        };
        let (retention, dry_run) = (self.retention.clone(), request.dry_run);
        let outcome = tokio::spawn(async move { retention.by_hand(order).await })
            .await
            .map_err(|error| Error::internal("evicting ended early").because(error))??;
        let copies = outcome.steps.iter().filter(|step| matches!(step, Step::Punch(..))).map(Step::bytes).sum();
        let evicted = outcome.steps.into_iter().filter_map(|step| match step {
            Step::Evict(eviction) => Some(shown(eviction)),
            Step::Punch(..) => None,
        });
        let room = self.store.room().await?;
        // A call for one owner is told nothing of others.
        let of_the_host = |bytes: u64| if caller.owner.is_some() { 0 } else { bytes };
        Ok(wire::EvictCheckpointsResponse {
            evicted: evicted.collect(),
            duplicate_bytes: copies,
            freed_bytes: outcome.freed_bytes,
            lacking_bytes: outcome.lacking_bytes,
            available_bytes: of_the_host(room.available_bytes()),
            leased_bytes: of_the_host(outcome.standing.leased_bytes),
            pinned_bytes: of_the_host(outcome.standing.pinned_bytes),
            not_refetchable_bytes: of_the_host(outcome.standing.not_refetchable_bytes),
            dry_run,
        })
    }

    /// Begins to fill a checkpoint again that was evicted, or that could not be filled again for a while; any other is left alone.
    ///
    /// # Errors
    /// Those of the catalog.
    pub(super) async fn bring_back(&self, record: &Record) -> Result<()> {
        if !is_to_come_back(record) {
            return Ok(());
        }
        self.admit()?;
        // In a task of its own: a caller that goes away must not leave a record that nobody fills.
        let (floors, record) = (self.clone(), record.clone());
        let begun = async move {
            let id = record.id.clone();
            if floors.store.catalog().write(move |tx| retention::fill_again(tx, &id)).await? {
                floors.start_unless_sent(
                    &Record { state: State::Filling, failure: None, ..record },
                    Credentials::default(),
                );
            }
            Ok(())
        };
        tokio::spawn(begun).await.map_err(|error| Error::internal("filling again ended early").because(error))?
    }

    /// The record of an id as it is now.
    ///
    /// # Errors
    /// `NO_SUCH_CHECKPOINT`.
    pub(super) async fn find_again(&self, id: &str) -> Result<Record> {
        let key = id.to_owned();
        let found = self.store.catalog().read(move |tx| rows::get(tx, &key)).await?;
        found.ok_or_else(|| Error::not_found("NO_SUCH_CHECKPOINT", format!("the checkpoint `{id}` is no longer there")))
    }
}

/// Whether it was ready, and nothing but a passing trouble keeps it from being so again.
fn is_to_come_back(record: &Record) -> bool {
    let passes = |failure: &Failure| {
        matches!(Kind::from_grpc_code(failure.code), Kind::Unavailable | Kind::NoSpace | Kind::Cancelled)
    };
    match record.state {
        State::Evicted => true,
        State::Failed => record.manifest.is_some() && record.failure.as_ref().is_some_and(passes),
        State::New | State::Filling | State::Ready | State::Removing => false,
    }
}

/// The id of a record that has bytes to give up, or has given them up already.
fn evictable(record: Record) -> Result<String> {
    let why = match record.state {
        State::Ready if record.in_place.is_some() => "its bytes are in a datastore and not in the store",
        State::Ready | State::Evicted => return Ok(record.id),
        State::New | State::Filling => "it is being filled",
        State::Failed => "it failed and is not whole",
        State::Removing => "it is being removed",
    };
    let error = Error::wrong_state("NOT_EVICTABLE", format!("`{}` cannot be evicted: {why}", record.name));
    Err(error.fact("checkpoint", &record.id).remedy("`ckptctl remove` gives its bytes up for good"))
}

fn shown(eviction: Eviction) -> wire::Eviction {
    wire::Eviction {
        id: eviction.id,
        name: eviction.name,
        owner: eviction.owner,
        freed_bytes: eviction.bytes,
        logical_bytes: eviction.logical_bytes,
        idle_ms: eviction.idle_ms,
    }
}

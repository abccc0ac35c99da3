//! From what a request calls a checkpoint to its record.

use rusqlite::Connection;

use super::Floors;
use super::caller::Caller;
use crate::catalog::checkpoints::{self, Record, Seen, State};
use crate::error::{Error, Kind, NO_ROOM, Result, tells_of_the_host};
use crate::ingest::Arrival;
use crate::source::SourceKind;

/// The one visible checkpoint that `reference` (id, or a name borne by one) means.
///
/// # Errors
/// `NO_SUCH_CHECKPOINT`, `AMBIGUOUS_NAME` with the ids.
pub(super) fn record(tx: &Connection, reference: &str, seen: &Seen, public: bool) -> Result<Record> {
    if reference.is_empty() {
        return Err(Error::invalid("NO_CHECKPOINT", "the request names no checkpoint").remedy("give its id or name"));
    }
    let mut found = checkpoints::matching(tx, reference, seen, public)?;
    if found.len() > 1 {
        let ids: Vec<_> = found.iter().map(|record| record.id.as_str()).collect();
        return Err(Error::invalid(
            "AMBIGUOUS_NAME",
            format!("{} checkpoints are called `{reference}`: {}", ids.len(), ids.join(", ")),
        )
        .fact("name", reference)
        .fact("ids", ids.join(","))
        .remedy("use one of the ids"));
    }
    found.pop().ok_or_else(|| no_such(reference, public))
}

/// That `reference` means nothing.
pub(super) fn no_such(reference: &str, public: bool) -> Error {
    let what = if public { "public checkpoint" } else { "checkpoint" };
    Error::not_found("NO_SUCH_CHECKPOINT", format!("there is no {what} `{reference}`"))
        .fact("checkpoint", reference)
        .remedy("`ckptctl list` shows what there is")
}

/// [`record`] for whoever is to change it: it must be the caller's.
///
/// # Errors
/// As [`record`]; `NOT_YOURS`.
pub(super) fn own(tx: &Connection, reference: &str, caller: &Caller) -> Result<Record> {
    let found = record(tx, reference, &caller.sees(), false)?;
    caller.check_owns(&found)?;
    Ok(found)
}

/// [`own`] for a removal: also one by id that is being removed, so that a removal that broke off can be asked for again.
///
/// # Errors
/// As [`own`].
pub(super) fn removable(tx: &Connection, reference: &str, caller: &Caller) -> Result<Record> {
    match checkpoints::get(tx, reference)? {
        Some(removing) if removing.state == State::Removing && caller.sees().includes(&removing) => {
            caller.check_owns(&removing)?;
            Ok(removing)
        }
        _ => own(tx, reference, caller),
    }
}

impl Floors {
    /// [`record`] among what the caller sees, in a transaction of its own.
    pub(super) async fn find(&self, reference: String, caller: &Caller) -> Result<Record> {
        let seen = caller.sees();
        self.store.catalog().read(move |tx| record(tx, &reference, &seen, false)).await
    }

    /// [`own`] in a transaction of its own.
    pub(super) async fn find_own(&self, reference: String, caller: &Caller) -> Result<Record> {
        let caller = caller.clone();
        self.store.catalog().read(move |tx| own(tx, &reference, &caller)).await
    }

    /// Waits until a checkpoint can be attached; one that was evicted is filled again.
    ///
    /// # Errors
    /// `CHECKPOINT_FAILED` with the recorded cause, `DRAINING`; `NO_SUCH_CHECKPOINT` when it is removed meanwhile.
    pub(super) async fn until_ready(&self, id: &str) -> Result<Record> {
        let mut changes = self.ingests.changes();
        loop {
            let key = id.to_owned();
            let found = self.store.catalog().read(move |tx| checkpoints::get(tx, &key)).await?;
            let record = found.filter(|record| record.state != State::Removing).ok_or_else(|| {
                Error::not_found("NO_SUCH_CHECKPOINT", format!("the checkpoint `{id}` is no longer there"))
            })?;
            match record.state {
                State::Ready => return Ok(record),
                State::Failed => return Err(failed(&record)),
                State::Evicted => {
                    self.bring_back(&record).await?;
                    continue;
                }
                State::New | State::Filling | State::Removing => {}
            }
            self.wait_for(&mut changes, id).await?;
        }
    }

    /// Waits until `id` may have changed. Missing a message is one too.
    ///
    /// # Errors
    /// `DRAINING`: nothing goes on with it.
    async fn wait_for(&self, changes: &mut tokio::sync::broadcast::Receiver<String>, id: &str) -> Result<()> {
        loop {
            let changed = tokio::select! {
                changed = changes.recv() => changed,
                () = self.ingests.until_paused() => return self.admit(),
            };
            match changed {
                Ok(changed) if changed != id => {}
                _ => return Ok(()),
            }
        }
    }
}

impl Floors {
    /// Waits until a checkpoint can be attached, be it before all bytes are here. Where that cannot be, waits until it is ready and says why.
    ///
    /// # Errors
    /// As [`Floors::until_ready`].
    pub(super) async fn until_readable(&self, id: &str) -> Result<(Record, Option<String>)> {
        let mut changes = self.ingests.changes();
        loop {
            let key = id.to_owned();
            let record = self.store.catalog().read(move |tx| checkpoints::get(tx, &key)).await?;
            match (record, self.ingests.arrival(id)) {
                (Some(record), Some(Arrival::Readable(_))) if record.state == State::Filling => {
                    return Ok((record, None));
                }
                (Some(record), Some(Arrival::NotBefore(why))) if record.state == State::Filling => {
                    return Ok((self.until_ready(id).await?, Some(why)));
                }
                (Some(record), None) if is_open(&record) && is_sent(&record) => {
                    return Ok((self.until_ready(id).await?, Some("it is being sent".to_owned())));
                }
                (Some(record), _) if is_open(&record) => {}
                (Some(record), _) if record.state == State::Evicted => {
                    self.bring_back(&record).await?;
                    continue;
                }
                _ => return Ok((self.until_ready(id).await?, None)),
            }
            self.wait_for(&mut changes, id).await?;
        }
    }
}

fn is_open(record: &Record) -> bool {
    matches!(record.state, State::New | State::Filling)
}

/// Whether somebody sends the bytes.
fn is_sent(record: &Record) -> bool {
    [SourceKind::Upload, SourceKind::Local].iter().any(|kind| record.origin.kind == kind.as_str())
}

/// Why a failed checkpoint cannot be used.
pub(super) fn failed(record: &Record) -> Error {
    let why = match &record.failure {
        // Whoever asks may be a tenant; operators find the figures in the record.
        Some(failure) if tells_of_the_host(&failure.reason) => format!(": {NO_ROOM}"),
        Some(failure) => format!(": {}", failure.message),
        None => String::new(),
    };
    Error::new(Kind::WrongState, "CHECKPOINT_FAILED", format!("the checkpoint `{}` failed{why}", record.name))
        .fact("checkpoint", &record.id)
        .fact("cause", record.failure.as_ref().map_or("", |failure| failure.reason.as_str()))
        .remedy(format!("mend the cause, then `ckptctl retry {}`", record.id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Catalog;
    use crate::control::caller::Role;

    #[tokio::test]
    async fn a_public_one_that_is_being_removed_is_not_an_owners_to_remove() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&directory.path().join("catalog.db")).unwrap();
        let origin = checkpoints::Origin { kind: "web".into(), uri: "u".into(), options: Default::default() };
        let record = Record { public: true, state: State::Removing, ..Record::new("i", "n", origin, 0) };
        catalog.write(move |tx| checkpoints::insert(tx, &record)).await.unwrap();
        for (owner, reason) in [(None, None), (Some("a"), Some("NOT_YOURS"))] {
            let caller = Caller { name: "c".into(), role: Role::Tenant, owner: owner.map(str::to_owned) };
            let found = catalog.read(move |tx| removable(tx, "i", &caller)).await;
            assert_eq!(found.as_ref().err().map(Error::reason), reason, "{owner:?}");
        }
    }
}

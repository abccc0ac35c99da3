//! Records of the catalog as messages.

use rusqlite::Connection;

use super::caller::Caller;
use super::catalogue::Catalogue;
use super::{Floors, wire};
use crate::catalog::accounting::{self, Figures};
use crate::catalog::checkpoints::{self, Record, State};
use crate::catalog::events::Event;
use crate::catalog::jobs::{JobRow, JobState};
use crate::error::{NO_ROOM, NO_ROOM_REMEDY, Result, tells_of_the_host};
use crate::source::{self, SourceKind};

const fn state(state: State) -> wire::CheckpointState {
    match state {
        State::New => wire::CheckpointState::New,
        State::Filling => wire::CheckpointState::Filling,
        State::Ready => wire::CheckpointState::Ready,
        State::Evicted => wire::CheckpointState::Evicted,
        State::Failed => wire::CheckpointState::Failed,
        State::Removing => wire::CheckpointState::Removing,
    }
}

const fn job_state(state: JobState) -> wire::AttachmentState {
    match state {
        JobState::Reserved => wire::AttachmentState::Reserved,
        JobState::Attaching | JobState::Attached => wire::AttachmentState::Attached,
        JobState::Lost => wire::AttachmentState::Lost,
    }
}

impl Floors {
    /// A record as it is now, with its footprint and progress, as far as the caller may know them.
    pub(super) async fn show(&self, record: Record, caller: &Caller) -> Result<wire::Checkpoint> {
        let (asked, confined) = (record.clone(), caller.owner.is_some());
        let bytes = self.store.catalog().read(move |tx| footprint(tx, &asked, confined)).await?;
        Ok(self.message(record, bytes, confined))
    }

    /// [`Floors::show`], and where its bytes are to be sent with which token, while it waits for somebody to send them. Only for who
    /// asks for this one record and may fill it.
    pub(super) async fn show_transfer(&self, record: Record, caller: &Caller) -> Result<wire::Checkpoint> {
        let waits =
            matches!(record.state, State::New | State::Filling) && record.origin.kind == SourceKind::Local.as_str();
        let may_send = waits && caller.may_own() && caller.check_owns(&record).is_ok();
        let transfer = self.tokens.as_ref().filter(|_| may_send).map(|tokens| wire::Transfer {
            url: tokens.url().to_owned(),
            token: tokens.token(&record.id, record.created_ms),
        });
        Ok(wire::Checkpoint { transfer, ..self.show(record, caller).await? })
    }

    /// [`Floors::show`] of a list, in one view of the catalog.
    pub(super) async fn show_all(
        &self,
        caller: &Caller,
        select: impl FnOnce(&Connection) -> Result<Vec<Record>> + Send + 'static,
    ) -> Result<Vec<wire::Checkpoint>> {
        let confined = caller.owner.is_some();
        let found = self
            .store
            .catalog()
            .read(move |tx| {
                let with_bytes = |record: Record| {
                    let bytes = footprint(tx, &record, confined)?;
                    Ok((record, bytes))
                };
                select(tx)?.into_iter().map(with_bytes).collect::<Result<Vec<_>>>()
            })
            .await?;
        Ok(found.into_iter().map(|(record, bytes)| self.message(record, bytes, confined)).collect())
    }

    fn message(&self, record: Record, figures: Figures, confined: bool) -> wire::Checkpoint {
        let fill = self.ingests.progress(&record.id).filter(|_| record.state == State::Filling);
        let kind = record.origin.kind.parse().ok();
        let uri = kind.map_or_else(String::new, |kind| source::shown_uri(kind, &record.origin.uri));
        wire::Checkpoint {
            state: state(record.state).into(),
            digest: record.manifest.map(|digest| digest.to_hex()).unwrap_or_default(),
            source: Some(wire::Source {
                r#type: record.origin.kind,
                uri,
                options: record.origin.options.into_iter().map(shown_option).collect(),
            }),
            fill: fill.map(|fill| wire::Fill {
                bytes_done: fill.bytes_done,
                bytes_total: fill.bytes_total,
                rate_bytes_per_s: fill.rate_bytes_per_s,
                files_done: fill.files_done,
                files_total: fill.files_total,
            }),
            error: record.failure.map(|failure| shown_failure(failure, confined)),
            id: record.id,
            name: record.name,
            owner: record.owner,
            public: record.public,
            revision: record.revision,
            files: record.files,
            logical_bytes: record.logical_bytes,
            unique_bytes: figures.unique_bytes,
            shared_bytes: figures.shared_bytes,
            physical_bytes: figures.physical_bytes,
            pinned: record.pinned,
            // What is public is used by others too.
            used_unix_ms: if confined && record.public { 0 } else { record.used_ms },
            created_unix_ms: record.created_ms,
            transfer: None,
        }
    }

    /// A job's row with the names of its checkpoints.
    pub(super) async fn show_job(&self, row: JobRow) -> Result<wire::Attachment> {
        let facts = self.facts.clone();
        self.store.catalog().read(move |tx| attachment(tx, row, &facts.catalogue)).await
    }
}

/// Figures of the store, or for a confined caller those that nobody else's checkpoints have a part in.
fn footprint(tx: &Connection, record: &Record, confined: bool) -> Result<Figures> {
    if confined { accounting::own_footprint(tx, record) } else { accounting::footprint(tx, record) }
}

/// Why a record failed. How much room the host has is not for a confined caller: it would tell what others have.
fn shown_failure(failure: checkpoints::Failure, confined: bool) -> wire::Failure {
    let of_the_host = confined && tells_of_the_host(&failure.reason);
    let (message, remedy) =
        if of_the_host { (NO_ROOM.to_owned(), NO_ROOM_REMEDY.to_owned()) } else { (failure.message, failure.remedy) };
    wire::Failure { code: failure.code, reason: failure.reason, message, remedy }
}

/// Older records may hold an endpoint with user information, which is refused now.
fn shown_option((key, value): (String, String)) -> (String, String) {
    let value = if key == "endpoint" { source::split_user_information(&value).0 } else { value };
    (key, value)
}

/// A job's row as a message.
pub(super) fn attachment(tx: &Connection, row: JobRow, catalogue: &Catalogue) -> Result<wire::Attachment> {
    let mut terms = Vec::new();
    let mut checkpoints = Vec::with_capacity(row.leases.len());
    for lease in &row.leases {
        let record = checkpoints::get(tx, &lease.checkpoint)?;
        terms.extend(record.as_ref().and_then(|record| catalogue.terms(record)));
        let path = match (row.target.as_str(), lease.subdir.as_str()) {
            ("", _) => String::new(),
            (target, "") => target.to_owned(),
            (target, subdir) => format!("{target}/{subdir}"),
        };
        checkpoints.push(wire::AttachedCheckpoint {
            id: lease.checkpoint.clone(),
            name: record.as_ref().map(|record| record.name.clone()).unwrap_or_default(),
            digest: record.and_then(|record| record.manifest).map(|digest| digest.to_hex()).unwrap_or_default(),
            path,
        });
    }
    let env = if row.target.is_empty() {
        Default::default()
    } else {
        [("ML_CHECKPOINT_PATH".to_owned(), row.target.clone())].into()
    };
    Ok(wire::Attachment {
        job: row.job,
        target: row.target,
        checkpoints,
        env,
        state: job_state(row.state).into(),
        terms,
        pid: row.pid,
        waited_for: String::new(),
        expires_unix_ms: row.expires_ms.unwrap_or(0),
    })
}

/// An event as a message.
pub(super) fn event(event: Event) -> wire::Event {
    wire::Event {
        id: event.id,
        at_unix_ms: event.at_ms,
        kind: event.kind,
        checkpoint: event.checkpoint,
        job: event.job,
        message: event.message,
    }
}

//! Records of the catalog as messages.

use rusqlite::Connection;

use super::catalogue::Catalogue;
use super::{Floors, wire};
use crate::catalog::accounting::{self, Figures};
use crate::catalog::checkpoints::{self, Record, State};
use crate::catalog::events::Event;
use crate::catalog::jobs::{JobRow, JobState};
use crate::error::Result;
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
    /// A record as it is now, with its footprint and progress.
    pub(super) async fn show(&self, record: Record) -> Result<wire::Checkpoint> {
        let asked = record.clone();
        let footprint = self.store.catalog().read(move |tx| accounting::footprint(tx, &asked)).await?;
        Ok(self.message(record, footprint))
    }

    /// [`Floors::show`], and where its bytes are to be sent with which token, while it waits for somebody to send them. Only for who
    /// asks for this one record.
    pub(super) async fn show_transfer(&self, record: Record) -> Result<wire::Checkpoint> {
        let waits =
            matches!(record.state, State::New | State::Filling) && record.origin.kind == SourceKind::Local.as_str();
        let transfer = self.tokens.as_ref().filter(|_| waits).map(|tokens| wire::Transfer {
            url: tokens.url().to_owned(),
            token: tokens.token(&record.id, record.created_ms),
        });
        Ok(wire::Checkpoint { transfer, ..self.show(record).await? })
    }

    /// [`Floors::show`] of a list, in one view of the catalog.
    pub(super) async fn show_all(
        &self,
        select: impl FnOnce(&Connection) -> Result<Vec<Record>> + Send + 'static,
    ) -> Result<Vec<wire::Checkpoint>> {
        let found = self
            .store
            .catalog()
            .read(move |tx| {
                let footprint = |record: Record| {
                    let bytes = accounting::footprint(tx, &record)?;
                    Ok((record, bytes))
                };
                select(tx)?.into_iter().map(footprint).collect::<Result<Vec<_>>>()
            })
            .await?;
        Ok(found.into_iter().map(|(record, footprint)| self.message(record, footprint)).collect())
    }

    fn message(&self, record: Record, figures: Figures) -> wire::Checkpoint {
        let fill = self.ingests.progress(&record.id).filter(|_| record.state == State::Filling);
        let kind = record.origin.kind.parse().ok();
        let uri = kind.map_or_else(String::new, |kind| source::shown_uri(kind, &record.origin.uri));
        wire::Checkpoint {
            state: state(record.state).into(),
            digest: record.manifest.map(|digest| digest.to_hex()).unwrap_or_default(),
            source: Some(wire::Source {
                r#type: record.origin.kind,
                uri,
                options: record.origin.options.into_iter().collect(),
            }),
            fill: fill.map(|fill| wire::Fill {
                bytes_done: fill.bytes_done,
                bytes_total: fill.bytes_total,
                rate_bytes_per_s: fill.rate_bytes_per_s,
                files_done: fill.files_done,
                files_total: fill.files_total,
            }),
            error: record.failure.map(|failure| wire::Failure {
                code: failure.code,
                reason: failure.reason,
                message: failure.message,
                remedy: failure.remedy,
            }),
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
            used_unix_ms: record.used_ms,
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

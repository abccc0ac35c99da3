//! What a restart finds and does: every state that a dead daemon can have left has one way on.
//!
//! | record | then |
//! |---|---|
//! | `removing` | the removal is finished: the record at once, its bytes in the background |
//! | `new`, `filling` | the ingest begins again and resumes, with the secrets of its request where somebody has held them; an upload waits for its sender with what is durable of it, and is removed where that is told of none; one that is sent by HTTP is for [`http::transfer`](crate::http) to go on with |
//! | `ready`, `failed`, `evicted` | nothing |
//!
//! Publishes were mended when the store was opened, what removals left is given back in the background; views are made again by `serve::attachments`.

use std::sync::Arc;

use super::holder::Holder;
use super::secrets::Secrets;
use crate::catalog::checkpoints::{self, Record, State};
use crate::catalog::events::{self, NewEvent};
use crate::control::Floors;
use crate::error::Result;
use crate::panics::guarded_task;
use crate::source::SourceKind;
use crate::units::now_unix_ms;

/// Recovers; the records that somebody is to send by HTTP are returned as they are.
pub(super) async fn recover(floors: &Floors, holder: &Holder, secrets: &Arc<Secrets>) -> Result<Vec<Record>> {
    // A full disk takes no event, and who is to make room on it needs a daemon to ask.
    if let Err(error) = note_restart(floors, holder).await {
        tracing::warn!(error = %error.report(), "the restart could not be noted");
    }
    let records =
        floors.store.catalog().read(|tx| checkpoints::list(tx, &checkpoints::Seen::Everything, "", false)).await?;
    let (mut uploads, mut transfers, mut filling) = (Vec::new(), Vec::new(), Vec::new());
    for record in records {
        match record.state {
            State::Removing => finish_removal(floors, &record).await,
            State::New | State::Filling if record.origin.kind == SourceKind::Upload.as_str() => {
                uploads.push(record);
            }
            State::New | State::Filling if record.origin.kind == SourceKind::Local.as_str() => {
                transfers.push(record);
            }
            // What a job sees of it is what it goes on with.
            State::New | State::Filling if floors.ingests.is_shown(&record).await => {
                floors.ingests.start(&record, secrets.of_predecessor(&record));
            }
            State::New | State::Filling => filling.push(record),
            State::Ready | State::Failed | State::Evicted => {}
        }
    }
    // Views first: jobs wait for them, uploads may be long to read, and what is filled must not go over to another revision than jobs have
    // seen, and will see again.
    floors.attachments.recover().await?;
    for record in &filling {
        floors.ingests.start(record, secrets.of_predecessor(record));
    }
    let secrets = secrets.clone();
    // Before anybody may create another of the same id, whose secrets have the same name.
    let _ = tokio::task::spawn_blocking(move || secrets.let_go_of_the_rest()).await;
    for record in floors.await_senders(uploads).await {
        finish_removal(floors, &record).await;
    }
    Ok(transfers)
}

/// Says in the events that and why there was a predecessor.
async fn note_restart(floors: &Floors, holder: &Holder) -> Result<()> {
    let adopted = floors.attachments.reconciled().adopted;
    let message = match holder.ended() {
        Some(ended) => {
            format!("ckptd was started again, {} times by now; of the one before: {ended}", holder.restarts())
        }
        None if adopted > 0 => format!("ckptd was started again and goes on with {adopted} sessions"),
        None => return Ok(()),
    };
    let event = NewEvent { kind: "DAEMON_RESTARTED", message, ..Default::default() };
    floors.store.catalog().write(move |tx| events::record(tx, now_unix_ms(), &event)).await
}

/// A removal that fails again is left for the next start: the daemon must come up.
async fn finish_removal(floors: &Floors, record: &Record) {
    let id = record.id.clone();
    let mark = move |tx: &rusqlite::Connection| checkpoints::set_state(tx, &id, State::Removing, None);
    let removed = match floors.store.catalog().write(mark).await {
        Ok(_) => guarded_task("finishing a removal", floors.finish_removal(record.clone())).await,
        Err(error) => Err(error),
    };
    if let Err(error) = removed {
        tracing::warn!(checkpoint = record.id, error = %error.report(), "finishing a removal failed");
    }
}

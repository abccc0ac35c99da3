//! `WatchCheckpoints`: records as they change.
//!
//! What has changed is told by the ingests, id by id; a watcher that lags is told so and looks at everything. Only what fills is looked at on a timer,
//! and only while something does, so that watching ten thousand checkpoints that rest costs nothing.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::sync::{broadcast, mpsc};
use tonic::Status;

use super::caller::Caller;
use super::{Floors, wire};
use crate::catalog::checkpoints::{self as rows, Record, State};
use crate::error::Result;

/// A watched record is sent at most this often.
const WATCH_EVERY: Duration = Duration::from_millis(200);

/// Changes waited for at a time before they are looked at together.
const CHANGES_AT_A_TIME: usize = 256;

pub(super) type Watcher = mpsc::Sender<Result<wire::Checkpoint, Status>>;

/// Sends one record until it is decided.
pub(super) async fn one(
    floors: &Floors,
    caller: &Caller,
    id: &str,
    mut changes: broadcast::Receiver<String>,
    watcher: &Watcher,
) -> Result<()> {
    let mut last = None;
    loop {
        let key = id.to_owned();
        let Some(record) = floors.store.catalog().read(move |tx| rows::get(tx, &key)).await? else { return Ok(()) };
        let state = record.state;
        let message = floors.show(record, caller).await?;
        if last.as_ref() != Some(&message) {
            last = Some(message.clone());
            if watcher.send(Ok(message)).await.is_err() {
                return Ok(());
            }
        }
        match state {
            State::Ready | State::Failed | State::Evicted => return Ok(()),
            State::New | State::Filling | State::Removing => {}
        }
        tokio::select! {
            () = watcher.closed() => return Ok(()),
            () = tokio::time::sleep(WATCH_EVERY) => {}
            () = changed(&mut changes, id) => {}
        }
    }
}

async fn changed(changes: &mut broadcast::Receiver<String>, id: &str) {
    loop {
        match changes.recv().await {
            Ok(other) if other != id => {}
            _ => return,
        }
    }
}

/// Sends all records that the caller sees, then each that changes.
pub(super) async fn all(
    floors: &Floors,
    caller: &Caller,
    mut changes: broadcast::Receiver<String>,
    watcher: &Watcher,
) -> Result<()> {
    let mut sent: HashMap<String, wire::Checkpoint> = HashMap::new();
    let mut look_at = Changed::Everything;
    loop {
        let seen = caller.sees();
        let found = match &look_at {
            Changed::Everything => floors.show_all(caller, move |tx| rows::list(tx, &seen, "", false)).await?,
            Changed::These(ids) => {
                let ids = ids.clone();
                let select = move |tx: &rusqlite::Connection| -> Result<Vec<Record>> {
                    let found = ids.iter().map(|id| rows::get(tx, id)).filter_map(Result::transpose);
                    found.filter(|record| record.as_ref().map_or(true, |record| seen.includes(record))).collect()
                };
                floors.show_all(caller, select).await?
            }
        };
        match &look_at {
            Changed::Everything => sent.retain(|id, _| found.iter().any(|message| &message.id == id)),
            Changed::These(ids) => sent.retain(|id, _| !ids.contains(id) || found.iter().any(|m| &m.id == id)),
        }
        for message in found {
            if sent.get(&message.id) != Some(&message) {
                sent.insert(message.id.clone(), message.clone());
                if watcher.send(Ok(message)).await.is_err() {
                    return Ok(());
                }
            }
        }
        let filling: BTreeSet<String> =
            sent.values().filter(|message| message.fill.is_some()).map(|message| message.id.clone()).collect();
        look_at = tokio::select! {
            () = watcher.closed() => return Ok(()),
            () = tokio::time::sleep(WATCH_EVERY), if !filling.is_empty() => Changed::These(filling),
            next = changes.recv() => gather(next, &mut changes).await,
        };
    }
}

/// What is to be looked at.
enum Changed {
    Everything,
    These(BTreeSet<String>),
}

/// Everything that changes within a moment, to be looked at together.
async fn gather(
    first: std::result::Result<String, broadcast::error::RecvError>,
    changes: &mut broadcast::Receiver<String>,
) -> Changed {
    let Ok(first) = first else { return Changed::Everything };
    let mut ids = BTreeSet::from([first]);
    tokio::time::sleep(WATCH_EVERY).await;
    while ids.len() < CHANGES_AT_A_TIME {
        match changes.try_recv() {
            Ok(id) => ids.insert(id),
            Err(broadcast::error::TryRecvError::Empty) => break,
            Err(_) => return Changed::Everything,
        };
    }
    Changed::These(ids)
}

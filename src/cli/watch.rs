//! `watch`: one checkpoint until it settles, or all of them for ever.

use std::collections::HashMap;

use clap::Args;

use super::connect::Daemon;
use super::console::Console;
use super::exit::Ended;
use super::progress::Progress;
use super::{document, follow, text};
use crate::control::wire;

/// Watch a checkpoint until it is ready or failed; without one, all as they change
#[derive(Args)]
pub(super) struct Watch {
    /// Id or name
    checkpoint: Option<String>,
}

impl Watch {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        match self.checkpoint {
            Some(checkpoint) => watch_one(console, &daemon, &checkpoint).await,
            None => watch_all(console, &daemon).await,
        }
    }
}

async fn watch_one(console: &Console, daemon: &Daemon, checkpoint: &str) -> Ended {
    // With --json each record is a line of the answer, and says all that a bar would.
    let mut progress = (!console.wants_json()).then(Progress::on_stderr);
    let settled = follow::until_settled(daemon, checkpoint, |record| match &mut progress {
        Some(progress) => {
            progress.update(record);
            Ok(())
        }
        None => console.answer_line(&document::Checkpoint::from(record), String::new),
    });
    let settled = follow::or_interrupted(settled, || format!("nothing that happens to {checkpoint} is stopped")).await;
    drop(progress);
    let record = follow::ready(settled?)?;
    if console.wants_json() {
        return Ok(());
    }
    console.answer(&document::Checkpoint::from(&record), || text::checkpoint_line(&record))
}

async fn watch_all(console: &Console, daemon: &Daemon) -> Ended {
    let request = wire::WatchCheckpointsRequest::default();
    let mut records = daemon.ask(daemon.checkpoints().watch_checkpoints(request)).await?;
    let mut shown = Shown::default();
    while let Some(record) = records.message().await.map_err(|status| daemon.refusal(&status))? {
        // People are told of changes of state and of whole percents; programs of every record.
        if console.wants_json() || shown.is_news(&record) {
            console.answer_line(&document::Checkpoint::from(&record), || text::checkpoint_line(&record))?;
        }
    }
    Ok(())
}

/// What people were last told of each checkpoint; one short text for each that is there.
#[derive(Default)]
struct Shown(HashMap<String, String>);

impl Shown {
    fn is_news(&mut self, record: &wire::Checkpoint) -> bool {
        let state = text::shown_state(record);
        if record.state() == wire::CheckpointState::Removing {
            self.0.remove(&record.id);
            return true;
        }
        self.0.insert(record.id.clone(), state.clone()).is_none_or(|before| before != state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_state_is_no_news() {
        let mut shown = Shown::default();
        let mut record = wire::Checkpoint {
            id: "c1".into(),
            state: wire::CheckpointState::Filling.into(),
            fill: Some(wire::Fill { bytes_done: 10, bytes_total: 1000, ..Default::default() }),
            ..Default::default()
        };
        assert!(shown.is_news(&record));
        record.fill = Some(wire::Fill { bytes_done: 11, bytes_total: 1000, ..Default::default() });
        assert!(!shown.is_news(&record));
        record.fill = Some(wire::Fill { bytes_done: 20, bytes_total: 1000, ..Default::default() });
        assert!(shown.is_news(&record));
        record.state = wire::CheckpointState::Removing.into();
        assert!(shown.is_news(&record));
        assert!(shown.0.is_empty());
    }
}

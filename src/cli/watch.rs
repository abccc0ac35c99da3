//! `watch`: one checkpoint until it settles, or all of them for ever.

use std::collections::HashMap;

use clap::Args;

use super::connect::Daemon;
use super::console::Console;
use super::exit::Ended;
use super::follow::Patience;
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
    let (mut shown, mut patience) = (Shown::default(), Patience::default());
    loop {
        let ending = watch_all_once(console, daemon, &mut shown, &mut patience).await;
        patience.wait_out(ending.err().unwrap_or_else(|| follow::silent_end("all checkpoints"))).await?;
    }
}

async fn watch_all_once(console: &Console, daemon: &Daemon, shown: &mut Shown, patience: &mut Patience) -> Ended {
    let request = wire::WatchCheckpointsRequest::default();
    let mut records = daemon.ask(daemon.checkpoints().watch_checkpoints(request)).await?;
    patience.heard();
    while let Some(record) = records.message().await.map_err(|status| daemon.refusal(&status))? {
        patience.heard();
        if shown.is_news(&record, console.wants_json()) {
            console.answer_line(&document::Checkpoint::from(&record), || text::checkpoint_line(&record))?;
        }
    }
    Ok(())
}

/// What was last told of each checkpoint: a daemon that returns begins with all of them. Programs are told of every record, people of changes of
/// state and of whole percents.
#[derive(Default)]
struct Shown(HashMap<String, Told>);

#[derive(PartialEq)]
enum Told {
    State(String),
    Record(Box<wire::Checkpoint>),
}

impl Shown {
    fn is_news(&mut self, record: &wire::Checkpoint, whole: bool) -> bool {
        if record.state() == wire::CheckpointState::Removing {
            self.0.remove(&record.id);
            return true;
        }
        let told = if whole { Told::Record(Box::new(record.clone())) } else { Told::State(text::shown_state(record)) };
        match self.0.insert(record.id.clone(), told) {
            Some(before) => self.0.get(&record.id) != Some(&before),
            None => true,
        }
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
        assert!(shown.is_news(&record, false));
        record.fill = Some(wire::Fill { bytes_done: 11, bytes_total: 1000, ..Default::default() });
        assert!(!shown.is_news(&record, false));
        let mut of_programs = Shown::default();
        assert!(of_programs.is_news(&record, true));
        assert!(!of_programs.is_news(&record, true));
        record.fill = Some(wire::Fill { bytes_done: 20, bytes_total: 1000, ..Default::default() });
        assert!(of_programs.is_news(&record, true));
        assert!(shown.is_news(&record, false));
        record.state = wire::CheckpointState::Removing.into();
        assert!(shown.is_news(&record, false));
        assert!(shown.0.is_empty());
    }
}

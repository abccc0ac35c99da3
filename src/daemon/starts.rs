//! How often systemd has started the daemon, and how often in a row for nothing: what `ckptd keeper` counts of its child, counted by the
//! daemon itself, for systemd tells it nothing of its predecessors.
//!
//! A record in the runtime directory that systemd gives (`RUNTIME_DIRECTORY`, kept over stops and gone with the host's boot) is written at
//! each start, again once the daemon has answered for [`STEADY`](super::keeper::STEADY), and when it is asked to stop. A start that finds one is a restart. One
//! that finds a predecessor which did not come so far waits as long as the keeper would let it, counted from that one's start: what systemd waits by itself
//! (`RestartSec=`, and `RestartSteps=` where it knows it) is part of it. This happens before the configuration is read, a mistake in which is the usual reason.
//!
//! Records are replaced whole (written beside, renamed). One that cannot be read or written, or is of another version, is as none: it is
//! there to tell people and to be gentle, and must not keep the daemon from starting. It is small text and never synced: it need not outlive the host.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::keeper::pause;
use crate::units::now_unix_ms;

/// Name of the record.
const NAME: &str = "starts";

/// First word of a record, with its version.
const VERSION: &str = "starts-1";

/// How far a daemon came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Begun,
    Steady,
    Stopped,
}

const STAGES: [(Stage, &str); 3] = [(Stage::Begun, "begun"), (Stage::Steady, "steady"), (Stage::Stopped, "stopped")];

#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    /// Restarts, this start included.
    restarts: u32,
    /// Starts in a row before this one that failed.
    failed: u32,
    stage: Stage,
    /// When this start began, in Unix milliseconds.
    begun_ms: i64,
}

/// The record of this start.
#[derive(Debug)]
pub(super) struct Starts {
    path: PathBuf,
    record: Record,
    ended: Option<String>,
}

impl Starts {
    /// Counts a start in `directory` and waits if those before it failed; `say` is told why.
    pub(super) fn count(directory: &Path, say: impl FnOnce(&str)) -> Self {
        let path = directory.join(NAME);
        let before = fs::read_to_string(&path).ok().and_then(|text| Record::read(&text));
        let (mut record, wait) = follow(before.as_ref(), now_unix_ms());
        if !wait.is_zero() {
            let text = format!("waiting {wait:?}: {} starts in a row have failed", record.failed);
            tracing::warn!("{text}");
            say(&text);
            // Who is stopped here has begun nothing, and is not counted.
            std::thread::sleep(wait);
            record.begun_ms = now_unix_ms();
        }
        let ended = before.as_ref().map(|before| before.ended(record.failed));
        let starts = Self { path, record, ended };
        starts.write(Stage::Begun);
        starts
    }

    /// How often the daemon was started again since the host's boot.
    pub(super) fn restarts(&self) -> u32 {
        self.record.restarts
    }

    /// How the predecessor ended; `None` for a first start.
    pub(super) fn ended(&self) -> Option<&str> {
        self.ended.as_deref()
    }

    /// Notes that the start did not fail.
    pub(super) fn steady(&self) {
        self.write(Stage::Steady);
    }

    /// Notes that the daemon was asked to stop.
    pub(super) fn stopped(&self) {
        self.write(Stage::Stopped);
    }

    fn write(&self, stage: Stage) {
        let beside = self.path.with_extension("new");
        let text = Record { stage, ..self.record.clone() }.text();
        let written: io::Result<()> = fs::write(&beside, text).and_then(|()| fs::rename(&beside, &self.path));
        if let Err(error) = written {
            tracing::warn!(path = %self.path.display(), %error, "starts are not counted");
        }
    }
}

/// What is recorded of a start behind `before`, and how long it waits first.
fn follow(before: Option<&Record>, now_ms: i64) -> (Record, Duration) {
    let Some(before) = before else {
        return (Record { restarts: 0, failed: 0, stage: Stage::Begun, begun_ms: now_ms }, Duration::ZERO);
    };
    let failed = if before.stage == Stage::Begun { before.failed.saturating_add(1) } else { 0 };
    let whole = pause(failed);
    // A clock that was set back counts as none: the pause is then its own.
    let passed = u64::try_from(now_ms.saturating_sub(before.begun_ms)).map_or(Duration::ZERO, Duration::from_millis);
    let record = Record { restarts: before.restarts.saturating_add(1), failed, stage: Stage::Begun, begun_ms: now_ms };
    (record, whole.saturating_sub(passed))
}

impl Record {
    fn text(&self) -> String {
        let stage = STAGES.iter().find(|(stage, _)| *stage == self.stage).map_or("", |(_, word)| *word);
        format!("{VERSION} {} {} {stage} {}\n", self.restarts, self.failed, self.begun_ms)
    }

    fn read(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        words.next().filter(|version| *version == VERSION)?;
        let (restarts, failed) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let word = words.next()?;
        let stage = STAGES.iter().find(|(_, known)| *known == word)?.0;
        let begun_ms = words.next()?.parse().ok()?;
        words.next().is_none().then_some(Self { restarts, failed, stage, begun_ms })
    }

    /// How the daemon of this record ended, as `failed` starts in a row by now know.
    fn ended(&self, failed: u32) -> String {
        match self.stage {
            Stage::Stopped => "it was asked to stop".to_owned(),
            Stage::Steady => "it ended without being asked to".to_owned(),
            Stage::Begun => format!("it failed, {failed} times in a row at its start"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(restarts: u32, failed: u32, stage: Stage) -> Record {
        Record { restarts, failed, stage, begun_ms: 10_000 }
    }

    #[test]
    fn a_start_counts_those_before_it_and_waits_for_failures_alone() {
        // (before, now, restarts, failed in a row, waits ms)
        let table = [
            (None, 10_000, 0, 0, 0),
            (Some(record(0, 0, Stage::Steady)), 10_001, 1, 0, 0),
            (Some(record(6, 5, Stage::Stopped)), 10_001, 7, 0, 0),
            (Some(record(0, 0, Stage::Begun)), 10_001, 1, 1, 0),
            (Some(record(1, 1, Stage::Begun)), 10_050, 2, 2, 150),
            (Some(record(4, 4, Stage::Begun)), 10_000, 5, 5, 1600),
            (Some(record(4, 4, Stage::Begun)), 20_000, 5, 5, 0),
            (Some(record(4, 4, Stage::Begun)), 0, 5, 5, 1600),
            (Some(record(u32::MAX, u32::MAX, Stage::Begun)), 10_000, u32::MAX, u32::MAX, 10_000),
        ];
        for (before, now, restarts, failed, waits) in table {
            let (next, wait) = follow(before.as_ref(), now);
            assert_eq!((next.restarts, next.failed), (restarts, failed), "{before:?}");
            assert_eq!((wait.as_millis(), next.stage), (waits, Stage::Begun), "{before:?}");
        }
    }

    #[test]
    fn records_are_read_as_they_are_written_and_others_are_none() {
        for (stage, _) in STAGES {
            let one = record(3, 2, stage);
            assert_eq!(Record::read(&one.text()), Some(one));
        }
        for text in
            ["", "starts-2 1 1 begun 5", "starts-1 1 1 lost 5", "starts-1 1 x begun 5", "starts-1 1 1 begun 5 6"]
        {
            assert_eq!(Record::read(text), None, "{text}");
        }
    }

    #[test]
    fn a_first_start_says_nothing_and_the_next_what_became_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let count = || Starts::count(directory.path(), |_| {});
        let first = count();
        assert_eq!((first.restarts(), first.ended()), (0, None));
        first.steady();
        let second = count();
        assert_eq!((second.restarts(), second.ended()), (1, Some("it ended without being asked to")));
        let third = count();
        assert_eq!((third.restarts(), third.ended()), (2, Some("it failed, 1 times in a row at its start")));
        third.stopped();
        assert_eq!(count().ended(), Some("it was asked to stop"));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left beside it");
    }
}

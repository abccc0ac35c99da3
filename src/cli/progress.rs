//! What is seen while bytes move: a bar on a terminal, plain lines elsewhere.
//!
//! All of it goes to stderr. On a terminal one line is redrawn in place and taken away at the end. Elsewhere (a log, a pipe) a line is
//! written at once when what is being done changes, and otherwise at most every five seconds. Writing never fails: whoever
//! closed stderr does not want to know.

use std::collections::VecDeque;
use std::io::{self, IsTerminal as _, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::text::show_span;
use crate::control::wire;
use crate::names;
use crate::units::show_bytes;

/// Least time between two plain lines that say the same with other figures.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Least time between two drawings of the bar.
const DRAW_EVERY: Duration = Duration::from_millis(100);

/// Span over which the rate of a transfer is taken: long enough to be steady, short enough to show a stall.
const RATE_SPAN: Duration = Duration::from_secs(5);

/// Samples within that span.
const RATE_SAMPLES: usize = 64;

/// Characters of a name shown beside the bar.
const NAME_CHARS: usize = 32;

/// Share done in whole percent; `None` where the total is not known.
pub fn percent(done: u64, total: u64) -> Option<u64> {
    let share = (u128::from(done) * 100).checked_div(u128::from(total))?;
    u64::try_from(share.min(100)).ok()
}

/// The display. Taken away when dropped.
pub struct Progress {
    sink: Sink,
    pace: Pace,
    meter: Meter,
}

enum Sink {
    Bar(ProgressBar),
    Lines(Box<dyn Write + Send>),
}

/// One moment of a transfer.
#[derive(Clone, Copy, Debug)]
struct Step<'a> {
    /// Of what: a name.
    what: &'a str,
    /// `downloading`, `sending` ...
    doing: &'a str,
    bytes_done: u64,
    /// 0 while not known.
    bytes_total: u64,
    rate_bytes_per_s: u64,
}

impl Progress {
    /// A bar if stderr is a terminal, else lines on stderr.
    pub fn on_stderr() -> Self {
        if io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            Self::new(Sink::Bar(bar), DRAW_EVERY)
        } else {
            Self::to_lines(io::stderr())
        }
    }

    /// Plain lines to `out`.
    pub fn to_lines(out: impl Write + Send + 'static) -> Self {
        Self::new(Sink::Lines(Box::new(out)), LINE_EVERY)
    }

    fn new(sink: Sink, every: Duration) -> Self {
        Self { sink, pace: Pace { every, last: None }, meter: Meter::default() }
    }

    /// Shows where the filling of a checkpoint is. A checkpoint that has settled is not shown: its line is the caller's answer.
    pub fn update(&mut self, checkpoint: &wire::Checkpoint) {
        let what = if checkpoint.name.is_empty() { &checkpoint.id } else { &checkpoint.name };
        let fill = checkpoint.fill.unwrap_or_default();
        let doing = match checkpoint.state() {
            wire::CheckpointState::New => "waiting to begin",
            wire::CheckpointState::Filling if fill.bytes_total > 0 && fill.bytes_done >= fill.bytes_total => "sealing",
            wire::CheckpointState::Filling => "downloading",
            wire::CheckpointState::Unspecified
            | wire::CheckpointState::Ready
            | wire::CheckpointState::Evicted
            | wire::CheckpointState::Failed
            | wire::CheckpointState::Removing => return,
        };
        self.show(Step {
            what,
            doing,
            bytes_done: fill.bytes_done,
            bytes_total: fill.bytes_total,
            rate_bytes_per_s: fill.rate_bytes_per_s,
        });
    }

    /// Shows a transfer of our own, whose rate is measured here: `what` is being done (`doing`, "sending"), `bytes_total` 0 if not known.
    pub fn transfer(&mut self, what: &str, doing: &str, bytes_done: u64, bytes_total: u64) {
        let rate_bytes_per_s = self.meter.rate(Instant::now(), bytes_done);
        self.show(Step { what, doing, bytes_done, bytes_total, rate_bytes_per_s });
    }

    /// Says a line without disturbing the bar.
    pub fn say(&mut self, line: &str) {
        match &mut self.sink {
            Sink::Bar(bar) => bar.println(line),
            Sink::Lines(out) => write_line(out, line),
        }
    }

    /// Takes the bar away. What is shown afterwards brings it back.
    pub fn clear(&mut self) {
        if let Sink::Bar(bar) = &self.sink {
            bar.finish_and_clear();
        }
    }

    fn show(&mut self, step: Step<'_>) {
        if !self.pace.is_due(Instant::now(), step.doing) {
            return;
        }
        match &mut self.sink {
            Sink::Bar(bar) => draw(bar, step),
            Sink::Lines(out) => {
                write_line(out, &format!("{}: {}", names::show_bytes(step.what.as_bytes()), step.sentence()));
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Step<'_> {
    /// `downloading 43 %, 1.20 GiB of 4.00 GiB, 512.00 MiB/s, 12 s left`.
    fn sentence(&self) -> String {
        match percent(self.bytes_done, self.bytes_total) {
            Some(share) if self.bytes_done > 0 => format!("{} {share} %, {}", self.doing, self.figures()),
            _ if self.bytes_done > 0 || self.bytes_total > 0 => format!("{}, {}", self.doing, self.figures()),
            _ => self.doing.to_owned(),
        }
    }

    fn figures(&self) -> String {
        let mut figures = show_bytes(self.bytes_done);
        if self.bytes_total > 0 {
            figures = format!("{figures} of {}", show_bytes(self.bytes_total));
        }
        let left = self.bytes_total.saturating_sub(self.bytes_done);
        if self.rate_bytes_per_s > 0 && (left > 0 || self.bytes_total == 0) {
            figures.push_str(&format!(", {}/s", show_bytes(self.rate_bytes_per_s)));
        }
        match left.checked_div(self.rate_bytes_per_s) {
            Some(seconds) if left > 0 => format!("{figures}, {} left", show_span(seconds)),
            _ => figures,
        }
    }
}

/// Sets everything, then draws it: what indicatif draws in between is the same line half told, and is overdrawn at once.
fn draw(bar: &ProgressBar, step: Step<'_>) {
    // Both templates are constants; one that indicatif refuses leaves its own style.
    let template = if step.bytes_total > 0 { "{prefix} [{wide_bar}] {msg}" } else { "{spinner} {prefix} {msg}" };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    if bar.is_finished() {
        bar.reset();
    }
    match step.bytes_total {
        0 => bar.unset_length(),
        total => bar.set_length(total),
    }
    bar.set_position(step.bytes_done);
    bar.set_prefix(format!("{}: {}", shortened(step.what), step.doing));
    bar.set_message(step.figures());
    bar.force_draw();
}

fn shortened(name: &str) -> String {
    let name = names::show_bytes(name.as_bytes());
    if name.chars().count() <= NAME_CHARS {
        return name;
    }
    name.chars().take(NAME_CHARS - 1).chain(['…']).collect()
}

fn write_line(out: &mut dyn Write, line: &str) {
    drop(writeln!(out, "{line}"));
}

/// When the next line or drawing is due.
struct Pace {
    every: Duration,
    last: Option<(Instant, String)>,
}

impl Pace {
    fn is_due(&mut self, now: Instant, doing: &str) -> bool {
        let due = match &self.last {
            Some((at, said)) => said != doing || now.duration_since(*at) >= self.every,
            None => true,
        };
        if due {
            self.last = Some((now, doing.to_owned()));
        }
        due
    }
}

/// The rate of the last seconds.
#[derive(Default)]
struct Meter {
    samples: VecDeque<(Instant, u64)>,
}

impl Meter {
    fn rate(&mut self, now: Instant, bytes_done: u64) -> u64 {
        let spacing = RATE_SPAN / u32::try_from(RATE_SAMPLES).unwrap_or(u32::MAX);
        if self.samples.back().is_none_or(|(at, _)| now.duration_since(*at) >= spacing) {
            self.samples.push_back((now, bytes_done));
        }
        // The oldest sample kept is the youngest that is at least the span old, so that the whole span is covered.
        while self.samples.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= RATE_SPAN) {
            self.samples.pop_front();
        }
        let Some((since, before)) = self.samples.front() else { return 0 };
        let millis = now.duration_since(*since).as_millis();
        let moved = u128::from(bytes_done.saturating_sub(*before)) * 1000;
        moved.checked_div(millis).and_then(|rate| u64::try_from(rate).ok()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn filling(bytes_done: u64, bytes_total: u64) -> wire::Checkpoint {
        wire::Checkpoint {
            name: "m".into(),
            state: wire::CheckpointState::Filling.into(),
            fill: Some(wire::Fill { bytes_done, bytes_total, rate_bytes_per_s: 1 << 20, ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn lines_are_written_when_the_state_changes_and_not_for_every_byte() {
        let paper = Paper::default();
        let mut progress = Progress::to_lines(paper.clone());
        progress.update(&wire::Checkpoint { state: wire::CheckpointState::New.into(), ..filling(0, 0) });
        for done in [1, 2, 3] {
            progress.update(&filling(done << 20, 4 << 20));
        }
        progress.update(&filling(4 << 20, 4 << 20));
        progress.update(&wire::Checkpoint { state: wire::CheckpointState::Ready.into(), ..filling(4, 4) });
        let text = String::from_utf8(paper.0.lock().unwrap().clone()).unwrap();
        assert_eq!(
            text.lines().collect::<Vec<_>>(),
            [
                "m: waiting to begin",
                "m: downloading 25 %, 1.00 MiB of 4.00 MiB, 1.00 MiB/s, 3 s left",
                "m: sealing 100 %, 4.00 MiB of 4.00 MiB",
            ]
        );
    }

    #[test]
    fn the_same_is_said_again_after_five_seconds() {
        let (mut pace, start) = (Pace { every: LINE_EVERY, last: None }, Instant::now());
        assert!(pace.is_due(start, "a"));
        assert!(!pace.is_due(start + Duration::from_millis(4999), "a"));
        assert!(pace.is_due(start + Duration::from_secs(5), "a"));
        assert!(pace.is_due(start + Duration::from_secs(6), "b"));
    }

    #[test]
    fn the_rate_is_of_the_last_seconds_and_falls_to_zero_in_a_stall() {
        let (mut meter, start) = (Meter::default(), Instant::now());
        for tenth in 0_u64..100 {
            meter.rate(start + Duration::from_millis(tenth * 100), tenth * 100);
        }
        assert_eq!(meter.rate(start + Duration::from_secs(10), 10_000), 1000);
        for second in 11..20 {
            meter.rate(start + Duration::from_secs(second), 10_000);
        }
        assert_eq!(meter.rate(start + Duration::from_secs(20), 10_000), 0);
        assert!(meter.samples.len() <= RATE_SAMPLES + 2);
    }

    #[test]
    fn percent_is_whole_and_bounded() {
        assert_eq!(percent(1, 0), None);
        assert_eq!(percent(199, 200), Some(99));
        assert_eq!(percent(u64::MAX, u64::MAX), Some(100));
        assert_eq!(percent(300, 200), Some(100));
    }

    #[test]
    fn an_unknown_total_shows_bytes_and_rate_alone() {
        let step = Step { what: "m", doing: "sending", bytes_done: 1 << 20, bytes_total: 0, rate_bytes_per_s: 1 << 10 };
        assert_eq!(step.sentence(), "sending, 1.00 MiB, 1.00 KiB/s");
    }
}

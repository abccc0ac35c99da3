//! What a verb talks through: answers on stdout, talk on stderr, the way to the daemon.
//!
//! Writing never panics. A closed stdout ends the verb ([`Ending::Unread`]); a closed stderr is ignored.

use std::io::{self, Write as _};

use serde::Serialize;

use super::connect::{self, Daemon, Way};
use super::exit::{Ended, Ending};
use crate::error::{Error, Result};

/// The options every verb has, and stdout.
pub(super) struct Console {
    way: Way,
    json: bool,
}

impl Console {
    /// A console for one run.
    pub(super) fn new(way: Way, json: bool) -> Self {
        Self { way, json }
    }

    /// Connects to the daemon.
    pub(super) async fn daemon(&self) -> Result<Daemon> {
        connect::connect(&self.way).await
    }

    /// Whether answers are wanted as JSON.
    pub(super) fn wants_json(&self) -> bool {
        self.json
    }

    /// Prints an answer: `document` where JSON is wanted, else the text for people.
    pub(super) fn answer(&self, document: &impl Serialize, people: impl FnOnce() -> String) -> Ended {
        let mut text = if self.json { encode(serde_json::to_string_pretty(document))? } else { people() };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        write_stdout(&text)
    }

    /// Prints one of several answers, on a line of its own.
    pub(super) fn answer_line(&self, document: &impl Serialize, people: impl FnOnce() -> String) -> Ended {
        let text = if self.json { encode(serde_json::to_string(document))? } else { people() };
        write_stdout(&format!("{text}\n"))
    }
}

/// Says `line` on stderr.
pub(super) fn talk(line: &str) {
    // With stderr gone there is nobody left to tell.
    drop(writeln!(io::stderr().lock(), "{line}"));
}

fn encode(encoded: serde_json::Result<String>) -> Result<String> {
    encoded.map_err(|error| Error::internal("writing an answer as JSON").because(error))
}

fn write_stdout(text: &str) -> Ended {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Ending::Unread,
        _ => Error::io("writing the answer to", "stdout", error).into(),
    })
}

//! `remove`: the one verb that cannot be undone, so it asks.
//!
//! What was shown is what is removed: after the question the id is used, whatever the name has come to mean meanwhile.

use std::io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _};

use clap::Args;

use super::connect::Daemon;
use super::console::Console;
use super::exit::Ended;
use super::{document, text};
use crate::control::wire;
use crate::error::{Error, Kind, Result};
use crate::units::show_bytes;

/// Longest answer read from the terminal.
const ANSWER_BYTES: u64 = 64;

/// Remove a checkpoint and the bytes that nothing else needs
#[derive(Args)]
pub(super) struct Remove {
    /// Id or name
    checkpoint: String,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

impl Remove {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let can_ask = io::stdin().is_terminal() && io::stderr().is_terminal();
        if !self.yes && !can_ask {
            return Err(unasked(&self.checkpoint).into());
        }
        let daemon = console.daemon().await?;
        let checkpoint = if self.yes { self.checkpoint } else { asked(&daemon, self.checkpoint).await? };
        let request = wire::RemoveCheckpointRequest { checkpoint: checkpoint.clone() };
        let removed = daemon.ask(daemon.checkpoints().remove_checkpoint(request)).await?;
        let (id, freed_bytes, freeing) = (&removed.id, removed.freed_bytes, removed.freeing);
        let answer = document::Removed { id, freed_bytes, freeing };
        let more = if freeing { " so far, the rest follows (see `ckptctl events`)" } else { "" };
        console.answer(&answer, || format!("removed {id}, {} freed{more}", show_bytes(freed_bytes)))
    }
}

fn unasked(checkpoint: &str) -> Error {
    Error::invalid("NOT_CONFIRMED", format!("removing {checkpoint}: there is no terminal to ask on"))
        .remedy("give --yes if you mean it")
}

/// Shows what would be removed and asks; gives its id.
async fn asked(daemon: &Daemon, checkpoint: String) -> Result<String> {
    let request = wire::GetCheckpointRequest { checkpoint };
    let record = daemon.ask_promptly(daemon.checkpoints().get_checkpoint(request)).await?;
    let line = text::checkpoint_line(&record);
    let answer =
        ask(&format!("{line}\nRemove it? [y/N] ")).map_err(|error| Error::io("asking on", "the terminal", error))?;
    if is_yes(&answer) {
        Ok(record.id)
    } else {
        Err(Error::new(Kind::Cancelled, "NOT_CONFIRMED", format!("{} was not removed", text::titled(&record))))
    }
}

fn ask(question: &str) -> io::Result<String> {
    let mut stderr = io::stderr().lock();
    stderr.write_all(question.as_bytes())?;
    stderr.flush()?;
    let mut answer = String::new();
    io::stdin().lock().take(ANSWER_BYTES).read_line(&mut answer)?;
    Ok(answer)
}

fn is_yes(answer: &str) -> bool {
    matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_yes_removes() {
        for yes in ["y\n", "Yes\n", " YES "] {
            assert!(is_yes(yes), "{yes}");
        }
        for no in ["", "\n", "n\n", "yikes\n", "remove\n"] {
            assert!(!is_yes(no), "{no}");
        }
    }
}

//! How a run ends, and the one place that says so.

use std::process::ExitCode;

use super::console::talk;
use crate::error::Error;

/// What shells give for a run that the terminal interrupted (128 + SIGINT).
const INTERRUPTED: u8 = 130;

/// Result of a verb or of a step of one.
pub(super) type Ended<T = ()> = Result<T, Ending>;

/// Why a verb stopped before its end.
#[derive(Debug)]
pub(super) enum Ending {
    /// It could not be done.
    Failed(Error),
    /// Whoever read our stdout has gone; there is nobody to tell.
    Unread,
    /// Ctrl-C during a wait; the text says what goes on without us.
    Interrupted(String),
}

impl From<Error> for Ending {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Tells the operator how the run ended, if there is anything to tell, and turns it into the exit code.
pub(super) fn code(ended: Ended) -> ExitCode {
    match ended {
        Ok(()) | Err(Ending::Unread) => ExitCode::SUCCESS,
        Err(Ending::Failed(error)) => {
            talk(&format!("ckptctl: {}", error.report()));
            ExitCode::from(error.kind().exit_code())
        }
        Err(Ending::Interrupted(text)) => {
            talk(&format!("ckptctl: interrupted; {text}"));
            ExitCode::from(INTERRUPTED)
        }
    }
}

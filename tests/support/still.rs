//! Processes that stand still.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process that stands still until the guard goes.
pub(crate) struct Still(Pid);

impl Still {
    pub(crate) fn of(process: Pid) -> Self {
        kill(process, Signal::SIGSTOP).unwrap();
        Self(process)
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

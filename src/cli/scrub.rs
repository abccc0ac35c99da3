//! `scrub`: every byte at rest is read again.

use std::time::Duration;

use clap::Args;

use super::connect::Daemon;
use super::console::Console;
use super::exit::Ended;
use super::{document, text};
use crate::control::wire;
use crate::control::wire::reasons::SCRUB_GOES_ON;
use crate::error::{Error, Result};
use crate::units::counted;

/// How often a scrub that is waited for is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Read everything in the store again, or one checkpoint, and put right what rotted
#[derive(Args)]
pub(super) struct Scrub {
    /// Id or name; none: the whole store
    checkpoint: Option<String>,
    /// As fast as the machine allows
    #[arg(long)]
    full_rate: bool,
    /// Wait for the end, also of another one before it; fails with 6 where bytes are lost, with 7 where not everything was read
    #[arg(long)]
    wait: bool,
}

impl Scrub {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request =
            wire::StartScrubRequest { checkpoint: self.checkpoint.unwrap_or_default(), full_rate: self.full_rate };
        let mut scrub = loop {
            match daemon.ask_promptly(daemon.node().start_scrub(request.clone())).await {
                Err(error) if self.wait && error.reason() == SCRUB_GOES_ON => tokio::time::sleep(LOOK_EVERY).await,
                begun => break begun?,
            }
        };
        while self.wait && scrub.running {
            tokio::time::sleep(LOOK_EVERY).await;
            scrub = same(&daemon, &scrub).await?;
        }
        console.answer(&document::Scrub::from(&scrub), || text::scrub_line(&scrub))?;
        if self.wait { complete(&scrub).map_err(Into::into) } else { Ok(()) }
    }
}

/// Fails unless everything was read and is right.
fn complete(scrub: &wire::Scrub) -> Result<()> {
    if scrub.lost > 0 {
        let message = format!("bytes of {} are lost", counted(scrub.lost, "file"));
        return Err(Error::corrupt("BYTES_ROTTEN", message).remedy("see `ckptctl events`, then retry"));
    }
    if scrub.stopped {
        let message = "the scrub was cut short, and not everything was read";
        return Err(Error::unavailable("SCRUB_STOPPED", message).remedy("scrub again"));
    }
    if scrub.unread > 0 {
        let message = format!("{} could not be read", counted(scrub.unread, "file"));
        return Err(
            Error::unavailable("SCRUB_INCOMPLETE", message).remedy("look at the log of ckptd, then scrub again")
        );
    }
    Ok(())
}

/// What is told of the scrub that `begun` was told of.
async fn same(daemon: &Daemon, begun: &wire::Scrub) -> Result<wire::Scrub> {
    let status = daemon.ask_promptly(daemon.node().get_status(wire::GetStatusRequest {})).await?;
    status.scrub.filter(|scrub| scrub.started_unix_ms == begun.started_unix_ms).ok_or_else(|| {
        let message = "ckptd was started again meanwhile, or another scrub has begun: how this one ended is not known";
        Error::unavailable("SCRUB_ENDED", message).remedy("see `ckptctl events` for what was lost, or scrub again")
    })
}

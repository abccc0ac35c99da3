//! `events`: what happened on this host.

use clap::Args;
use tonic::Streaming;

use super::connect::Daemon;
use super::console::Console;
use super::exit::Ended;
use super::follow::Patience;
use super::{document, follow, text};
use crate::control::wire;

/// Show events kept so far, and with --follow new ones as they happen
#[derive(Args)]
pub(super) struct Events {
    /// Go on with new ones
    #[arg(long, short)]
    follow: bool,
    /// Only those after the event with this number
    #[arg(long, value_name = "ID", default_value_t = 0)]
    after: u64,
}

impl Events {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        if self.follow { self.follow(console, &daemon).await } else { self.kept(console, &daemon).await }
    }

    /// Those kept so far: at once for people, as one document for programs.
    async fn kept(self, console: &Console, daemon: &Daemon) -> Ended {
        let mut events = self.ask(daemon, self.after).await?;
        let mut kept = Vec::new();
        while let Some(event) = events.message().await.map_err(|status| daemon.refusal(&status))? {
            if console.wants_json() {
                kept.push(event);
            } else {
                console.answer_line(&document::Event::from(&event), || text::event_line(&event))?;
            }
        }
        if console.wants_json() {
            console.answer(&document::Events::from(&kept[..]), String::new)?;
        }
        Ok(())
    }

    /// Each as it happens, across restarts of the daemon: every event is told once.
    async fn follow(self, console: &Console, daemon: &Daemon) -> Ended {
        let (mut last, mut patience) = (self.after, Patience::default());
        loop {
            let ending = self.follow_once(console, daemon, &mut last, &mut patience).await;
            patience.wait_out(ending.err().unwrap_or_else(|| follow::silent_end("events"))).await?;
        }
    }

    async fn follow_once(&self, console: &Console, daemon: &Daemon, last: &mut u64, patience: &mut Patience) -> Ended {
        let mut events = self.ask(daemon, *last).await?;
        patience.heard();
        while let Some(event) = events.message().await.map_err(|status| daemon.refusal(&status))? {
            patience.heard();
            *last = event.id;
            console.answer_line(&document::Event::from(&event), || text::event_line(&event))?;
        }
        Ok(())
    }

    async fn ask(&self, daemon: &Daemon, after_id: u64) -> Ended<Streaming<wire::Event>> {
        let request = wire::WatchEventsRequest { after_id, follow: self.follow };
        Ok(daemon.ask(daemon.node().watch_events(request)).await?)
    }
}

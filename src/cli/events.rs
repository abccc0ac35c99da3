//! `events`: what happened on this host.

use clap::Args;

use super::console::Console;
use super::exit::Ended;
use super::{document, text};
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
        let request = wire::WatchEventsRequest { after_id: self.after, follow: self.follow };
        let mut events = daemon.ask(daemon.node().watch_events(request)).await?;
        // People see each at once; without --follow programs get one document, as long as the daemon keeps events.
        let one_document = console.wants_json() && !self.follow;
        let mut kept = Vec::new();
        while let Some(event) = events.message().await.map_err(|status| daemon.refusal(&status))? {
            if one_document {
                kept.push(event);
            } else {
                console.answer_line(&document::Event::from(&event), || text::event_line(&event))?;
            }
        }
        if one_document {
            console.answer(&document::Events::from(&kept[..]), String::new)?;
        }
        Ok(())
    }
}

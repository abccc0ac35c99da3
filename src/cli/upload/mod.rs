//! `upload`: a file or directory of this computer, sent over gRPC.
//!
//! The tree is walked twice: once to state how much will come, once to send. A thread of its own reads and encodes
//! ([`send`]); at most [`MESSAGES_AHEAD`] messages wait for the connection, so memory is bounded whatever the tree holds.
//!
//! A connection that breaks is made again, and the upload goes on where the daemon stands ([`again`]), after the tree up to there was looked at once
//! more ([`kept`]). So every upload has an id, made here if none was given; the same command with the id goes on after this process was killed.
//! What goes wrong on this side, and Ctrl-C, ends the upload: the daemon is told to keep nothing.

mod again;
mod kept;
mod send;
mod tree;

use std::path::{Path, PathBuf};

use clap::Args;

use super::console::Console;
use super::create::parse_option;
use super::exit::{Ended, Ending};
use super::{document, text};
use crate::control::wire;
use crate::names::{self, CheckpointId};
use again::Uploading;

/// Messages read but not yet sent: 4 MiB, enough to read while the connection is busy.
const MESSAGES_AHEAD: usize = 4;

/// Send a file or directory of this computer as a new checkpoint
///
/// Symbolic links are kept, not followed; so is the executable bit. A single archive is extracted. A connection that breaks is made again,
/// and sending goes on where it broke.
#[derive(Args)]
pub(super) struct Upload {
    /// What to call it; need not be unique
    name: String,
    /// The file or directory
    path: PathBuf,
    /// Whose it is
    #[arg(long, conflicts_with = "public")]
    owner: Option<String>,
    /// Visible to every owner
    #[arg(long)]
    public: bool,
    /// Id to give it; repeating the command with it is harmless, and goes on with what was interrupted
    #[arg(long)]
    id: Option<String>,
    /// Option, repeatable: extract=false keeps a single archive as it is instead of taking it apart
    #[arg(long = "option", value_name = "KEY=VALUE", value_parser = parse_option)]
    options: Vec<(String, String)>,
}

impl Upload {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let bytes_total = tree::measure(&self.path)?;
        let may_be_known = self.id.as_ref().is_some_and(|id| !id.is_empty());
        let id = match self.id {
            Some(id) if may_be_known => id,
            _ => CheckpointId::fresh()?.to_string(),
        };
        let start = wire::UploadStart {
            id,
            name: self.name,
            owner: self.owner.unwrap_or_default(),
            public: self.public,
            origin: origin(&self.path),
            bytes_total,
            options: self.options.into_iter().collect(),
            one_file: self.path.is_file(),
            resume: None,
        };
        let mut uploading = Uploading::new(console, start, self.path, may_be_known);
        let sent = tokio::select! {
            outcome = uploading.until_ready() => outcome.map_err(Ending::from),
            Ok(()) = tokio::signal::ctrl_c() => Err(Ending::Interrupted(uploading.interrupted().await)),
        };
        drop(uploading);
        let record = sent?;
        console.answer(&document::Checkpoint::from(&record), || text::checkpoint_line(&record))
    }
}

/// What is shown as the checkpoint's source: `host:/path`.
fn origin(path: &Path) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    format!("{}:{}", host.trim(), names::show_bytes(path.as_os_str().as_encoded_bytes()))
}

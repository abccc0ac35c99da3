//! `upload`: a file or directory of this computer, sent over gRPC.
//!
//! The tree is walked twice: once to state how much will come, once to send. A thread of its own reads and encodes
//! ([`send`]); at most [`MESSAGES_AHEAD`] messages wait for the connection, so memory is bounded whatever the tree holds. Whatever goes
//! wrong on this side drops the stream before its `finish`, and the daemon keeps nothing.

mod send;
mod tree;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::Args;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

use super::connect::Daemon;
use super::console::Console;
use super::create::parse_option;
use super::exit::Ended;
use super::progress::Progress;
use super::{document, follow, text};
use crate::control::wire;
use crate::error::{Error, Result};
use crate::names;

/// Messages read but not yet sent: 4 MiB, enough to read while the connection is busy.
const MESSAGES_AHEAD: usize = 4;

/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Send a file or directory of this computer as a new checkpoint
///
/// Symbolic links are kept, not followed; so is the executable bit. A single archive is extracted.
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
    /// Id to give it; makes repeating the command harmless
    #[arg(long)]
    id: Option<String>,
    /// Option, repeatable: extract=false keeps a single archive as it is instead of taking it apart
    #[arg(long = "option", value_name = "KEY=VALUE", value_parser = parse_option)]
    options: Vec<(String, String)>,
}

impl Upload {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let bytes_total = tree::measure(&self.path)?;
        let daemon = console.daemon().await?;
        let start = wire::UploadStart {
            id: self.id.unwrap_or_default(),
            name: self.name.clone(),
            owner: self.owner.unwrap_or_default(),
            public: self.public,
            origin: origin(&self.path),
            bytes_total,
            options: self.options.into_iter().collect(),
            one_file: self.path.is_file(),
        };
        let sending = Sending::begin(start, self.path);
        let record = sending.finish(&daemon, &self.name, bytes_total).await?;
        console.answer(&document::Checkpoint::from(&record), || text::checkpoint_line(&record))
    }
}

/// A tree on its way.
struct Sending {
    messages: mpsc::Receiver<wire::UploadCheckpointRequest>,
    /// How reading ended; that nobody took the messages any more is no fault of reading.
    read: oneshot::Receiver<Result<()>>,
    bytes_sent: Arc<AtomicU64>,
}

impl Sending {
    fn begin(start: wire::UploadStart, root: PathBuf) -> Self {
        let (out, messages) = mpsc::channel(MESSAGES_AHEAD);
        let (outcome, read) = oneshot::channel();
        let bytes_sent = Arc::new(AtomicU64::new(0));
        let sender = send::Sender::new(out, Arc::clone(&bytes_sent));
        // The thread ends with the messages' receiver, at the latest with this process.
        std::thread::spawn(move || {
            // The stream is kept open over a fault, so that the fault is heard of before the end of the stream.
            let result = sender.send(start, &root);
            drop(outcome.send(result));
            drop(sender);
        });
        Self { messages, read, bytes_sent }
    }

    async fn finish(self, daemon: &Daemon, name: &str, bytes_total: u64) -> Ended<wire::Checkpoint> {
        let bytes_sent = Arc::clone(&self.bytes_sent);
        let mut progress = Progress::on_stderr();
        let mut look = tokio::time::interval(LOOK_EVERY);
        let upload = self.upload(daemon);
        tokio::pin!(upload);
        let wait = async {
            loop {
                tokio::select! {
                    outcome = &mut upload => break outcome.map_err(Into::into),
                    _ = look.tick() => {
                        let done = bytes_sent.load(Ordering::Relaxed);
                        let doing = if done < bytes_total { "sending" } else { "sealing" };
                        progress.transfer(name, doing, done, bytes_total);
                    }
                }
            }
        };
        follow::or_interrupted(wait, || "nothing of the upload is kept".to_owned()).await
    }

    async fn upload(self, daemon: &Daemon) -> Result<wire::Checkpoint> {
        let mut client = daemon.checkpoints();
        let answer = daemon.ask(client.upload_checkpoint(ReceiverStream::new(self.messages)));
        tokio::pin!(answer);
        tokio::select! {
            biased;
            read = self.read => {
                read.unwrap_or_else(|_| Err(Error::internal("the thread that reads the upload died")))?;
                answer.await
            }
            answer = &mut answer => answer,
        }
    }
}

/// What is shown as the checkpoint's source: `host:/path`.
fn origin(path: &Path) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    format!("{}:{}", host.trim(), names::show_bytes(path.as_os_str().as_encoded_bytes()))
}

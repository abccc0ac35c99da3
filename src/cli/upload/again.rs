//! One upload over as many connections as it takes.
//!
//! What breaks a connection may pass, so it is made again, with growing pauses, until [`GIVE_UP_AFTER`] has gone by without the daemon having got
//! any further. Each time the daemon is asked where it stands, which also ends what it may still hear of the connection before. After a restart
//! that is where what was durable ends, perhaps before what had been sent: it is gone back to. One that does not
//! know the upload any more has dropped it: it is begun anew, [`ANEW_AT_MOST`] times. What the daemon refuses otherwise is final, and so is what
//! cannot be read here.
//!
//! A daemon that was not reached at first is not waited for: nothing has begun.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

use super::MESSAGES_AHEAD;
use super::kept::Kept;
use super::send::Sender;
use crate::cli::connect::Daemon;
use crate::cli::console::Console;
use crate::cli::progress::Progress;
use crate::cli::refusal;
use crate::control::wire;
use crate::control::wire::reasons::{UPLOAD_BROKEN, UPLOAD_DESYNC, UPLOAD_NOT_UNDER_WAY, UPLOAD_UNDER_WAY};
use crate::error::{Error, Kind, Result};
use crate::units::show_bytes;

/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long it is tried without getting any further: a restart of the daemon takes seconds, one of its host a minute or two.
const GIVE_UP_AFTER: Duration = Duration::from_secs(120);

/// First pause before the connection is made again; each further one is twice as long.
const PAUSE_MIN: Duration = Duration::from_millis(200);

/// Longest of them.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How often it is begun anew with daemons that know nothing of it: one that dies of it each time must not be sent all for ever.
const ANEW_AT_MOST: u32 = 3;

/// A daemon that took so much of it was well.
const WENT_WELL_FROM: Duration = Duration::from_secs(10);

/// How long a connection of another process may take to be seen broken after that process was killed.
const ANOTHER_WITHIN: Duration = Duration::from_secs(5);

/// How long telling the daemon of Ctrl-C may take.
const END_WITHIN: Duration = Duration::from_secs(10);

/// See the module's page.
pub(super) struct Uploading<'a> {
    console: &'a Console,
    start: wire::UploadStart,
    root: PathBuf,
    /// Whether the daemon may know it from a run before.
    may_be_known: bool,
    /// Whether the daemon was sent anything by this run.
    begun: bool,
    /// Whether it was under way when an attempt ended.
    again: bool,
    /// Since when this attempt sends.
    sending_since: Option<Instant>,
    bytes_sent: Arc<AtomicU64>,
    patience: Patience,
    /// Where the daemon was last said to stand.
    told: Option<wire::UploadPosition>,
    progress: Progress,
}

/// Whose fault it is that an attempt ended.
enum Fault {
    /// Of what is read here: the daemon knows nothing of it.
    Here(Error),
    /// Of the daemon or the way to it.
    There(Error),
}

impl<'a> Uploading<'a> {
    /// Sends `root` as `start` says.
    pub(super) fn new(console: &'a Console, start: wire::UploadStart, root: PathBuf, may_be_known: bool) -> Self {
        Self {
            console,
            start,
            root,
            may_be_known,
            begun: false,
            again: false,
            sending_since: None,
            bytes_sent: Arc::default(),
            patience: Patience::default(),
            told: None,
            progress: Progress::on_stderr(),
        }
    }

    /// Sends it all, over as many connections as it takes; the record, ready. Cancel-safe: whoever drops it calls [`Uploading::interrupted`].
    ///
    /// # Errors
    /// What cannot be read here; what the daemon refuses; unavailable where it stays away.
    pub(super) async fn until_ready(&mut self) -> Result<wire::Checkpoint> {
        loop {
            let error = match self.attempt().await {
                Ok(record) => return Ok(record),
                Err(Fault::Here(error)) => {
                    if let Err(left) = self.end().await {
                        let id = &self.start.id;
                        self.progress.say(&format!("{}: `ckptctl remove {id}` removes what was sent", left.chain()));
                    }
                    return Err(error);
                }
                Err(Fault::There(error)) => error,
            };
            if !self.may_go_on(&error) {
                return Err(error);
            }
            self.again = self.begun;
            let first = self.patience.is_new();
            let Some(pause) = self.patience.pause(self.sending_for()) else { return Err(error) };
            if first {
                self.progress.say(&format!("{}; it is tried again", error.chain()));
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Ends the upload for Ctrl-C; what is left, in words.
    pub(super) async fn interrupted(&mut self) -> String {
        if !self.begun {
            return "nothing was sent".to_owned();
        }
        let id = &self.start.id;
        match tokio::time::timeout(END_WITHIN, self.end()).await {
            Ok(Ok(true)) => "nothing of the upload is kept".to_owned(),
            Ok(Ok(false)) => format!("the upload was complete: `ckptctl get {id}` shows it"),
            Ok(Err(_)) | Err(_) => format!(
                "ckptd could not be told and keeps what was sent for a while: the same command with `--id {id}` goes on with it, \
                 `ckptctl remove {id}` removes it"
            ),
        }
    }

    /// Asks for the upload to be dropped; whether nothing is left of it, since it may have been complete.
    async fn end(&self) -> Result<bool> {
        let daemon = self.console.daemon().await?;
        // What a call that was dropped had begun may be recorded a moment later.
        for _ in 0..2 {
            match self.ask(&daemon, true).await {
                Ok(_) => {
                    let request = wire::RemoveCheckpointRequest { checkpoint: self.start.id.clone() };
                    return match daemon.ask(daemon.checkpoints().remove_checkpoint(request)).await {
                        Err(error) if error.kind() != Kind::NotFound => Err(error),
                        _ => Ok(true),
                    };
                }
                Err(error) if error.kind() == Kind::NotFound => tokio::time::sleep(PAUSE_MIN).await,
                Err(error) if error.reason() == UPLOAD_NOT_UNDER_WAY => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn sending_for(&self) -> Duration {
        self.sending_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    async fn attempt(&mut self) -> Result<wire::Checkpoint, Fault> {
        self.sending_since = None;
        let daemon = self.console.daemon().await.map_err(Fault::There)?;
        let kept = if self.begun || self.may_be_known { self.kept(&daemon).await.map_err(Fault::There)? } else { None };
        let mut start = self.start.clone();
        start.resume = kept.as_ref().map(Kept::position);
        (self.begun, self.sending_since) = (true, Some(Instant::now()));
        let sending = Sending::begin(start, self.root.clone(), kept.unwrap_or_default(), &self.bytes_sent);
        let upload = sending.upload(&daemon);
        tokio::pin!(upload);
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                outcome = &mut upload => return outcome,
                _ = look.tick() => {
                    let (done, total) = (self.bytes_sent.load(Ordering::Relaxed), self.start.bytes_total);
                    let doing = if done < total { "sending" } else { "sealing" };
                    self.progress.transfer(&self.start.name, doing, done, total);
                }
            }
        }
    }

    /// What the daemon has of the upload; `None` where it is to begin, or is complete, which a call from the start on finds out.
    async fn kept(&mut self, daemon: &Daemon) -> Result<Option<Kept>> {
        match self.ask(daemon, self.begun).await {
            Ok(upload) if upload.connected => Err(another(&self.start.name)),
            Ok(upload) => {
                let kept = Kept::of(upload);
                let at = kept.position();
                self.patience.has_come_to(at);
                if self.told.replace(at) != Some(at) {
                    self.progress.say(&format!(
                        "going on with the upload {} at entry {}, byte {}",
                        self.start.id, at.entries, at.bytes
                    ));
                }
                Ok(Some(kept))
            }
            Err(error) if error.reason() == UPLOAD_NOT_UNDER_WAY => Ok(None),
            Err(error) if error.kind() == Kind::NotFound => {
                if self.begun && self.patience.begins_anew()? {
                    self.bytes_sent.store(0, Ordering::Relaxed);
                    let total = show_bytes(self.start.bytes_total);
                    self.progress.say(&format!(
                        "ckptd does not know the upload any more and has nothing of it: all of it ({total}) is sent again"
                    ));
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn ask(&self, daemon: &Daemon, take_over: bool) -> Result<wire::Upload> {
        let request = wire::GetUploadRequest { id: self.start.id.clone(), take_over };
        daemon.ask_promptly(daemon.checkpoints().get_upload(request)).await
    }

    /// Whether what an attempt ended with may pass.
    fn may_go_on(&self, error: &Error) -> bool {
        match error.reason() {
            UPLOAD_UNDER_WAY => !self.begun && self.patience.waited() < ANOTHER_WITHIN,
            // Said at the door, or of an upload that it took before.
            "DRAINING" | "TOO_MANY_CALLS" => self.again || error.facts().iter().any(|(key, _)| key == "checkpoint"),
            // Of what speaks gRPC for the daemon.
            refusal::NO_REASON => self.begun && matches!(error.kind(), Kind::Unavailable | Kind::Cancelled),
            _ => self.begun && PASSING.contains(&error.reason()),
        }
    }
}

/// Reasons of what may pass: of the way to the daemon, and of the moment between asking it where it stands and going on from there.
const PASSING: &[&str] = &[
    refusal::LOST,
    "NO_DAEMON",
    "NO_ANSWER",
    UPLOAD_BROKEN,
    UPLOAD_DESYNC,
    UPLOAD_NOT_UNDER_WAY,
    "NO_SUCH_CHECKPOINT",
];

fn another(name: &str) -> Error {
    Error::wrong_state(UPLOAD_UNDER_WAY, format!("`{name}` is being uploaded already"))
        .remedy("wait for it, or remove it and upload it again")
}

/// How often and how long it is tried again.
#[derive(Default)]
struct Patience {
    /// Since when it does not get any further.
    since: Option<Instant>,
    pauses: u32,
    farthest: (u64, u64),
    anew: u32,
    /// Whether it was begun anew and nothing came of that yet.
    lost: bool,
}

impl Patience {
    /// Whether it got further since the last trouble.
    fn is_new(&self) -> bool {
        self.since.is_none()
    }

    fn waited(&self) -> Duration {
        self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// The daemon stands here. Further is only what is further than ever: one that dies again and again at the same place gets nowhere.
    fn has_come_to(&mut self, at: wire::UploadPosition) {
        if (at.entries, at.bytes) > self.farthest {
            self.farthest = (at.entries, at.bytes);
            (self.since, self.pauses, self.lost) = (None, 0, false);
        }
    }

    /// The daemon does not know the upload; whether that is news.
    ///
    /// # Errors
    /// `UPLOAD_LOST`: that was often enough.
    fn begins_anew(&mut self) -> Result<bool> {
        if std::mem::replace(&mut self.lost, true) {
            return Ok(false);
        }
        self.anew += 1;
        if self.anew > ANEW_AT_MOST {
            let message = format!("ckptd lost the upload {} times, as by restarts", self.anew);
            return Err(Error::unavailable("UPLOAD_LOST", message).remedy("look at its log, then upload it again"));
        }
        (self.since, self.pauses, self.farthest) = (None, 0, (0, 0));
        Ok(true)
    }

    /// How long to wait before the next attempt; `None`: no more. The one before sent for as long as `sent_for`, which does not count: how far the
    /// daemon got by it is not known yet.
    fn pause(&mut self, sent_for: Duration) -> Option<Duration> {
        let since = self.since.map_or_else(Instant::now, |since| since + sent_for);
        self.since = Some(since);
        self.lost &= sent_for < WENT_WELL_FROM;
        let pause = PAUSE_MIN.saturating_mul(1 << self.pauses.min(10)).min(PAUSE_MAX);
        self.pauses += 1;
        (since.elapsed() + pause < GIVE_UP_AFTER).then_some(pause)
    }
}

/// A tree on its way over one connection.
struct Sending {
    messages: mpsc::Receiver<wire::UploadCheckpointRequest>,
    /// How reading ended; that nobody took the messages any more is no fault of reading.
    read: oneshot::Receiver<Result<()>>,
}

impl Sending {
    fn begin(start: wire::UploadStart, root: PathBuf, kept: Kept, bytes_sent: &Arc<AtomicU64>) -> Self {
        let (out, messages) = mpsc::channel(MESSAGES_AHEAD);
        let (outcome, read) = oneshot::channel();
        let sender = Sender::new(out, Arc::clone(bytes_sent));
        // The thread ends with the messages' receiver, at the latest with this process.
        std::thread::spawn(move || {
            // The stream is kept open over a fault, so that the fault is heard of before the end of the stream.
            let result = sender.send(start, &root, kept);
            drop(outcome.send(result));
            drop(sender);
        });
        Self { messages, read }
    }

    async fn upload(self, daemon: &Daemon) -> Result<wire::Checkpoint, Fault> {
        let mut client = daemon.checkpoints();
        let answer = daemon.ask(client.upload_checkpoint(ReceiverStream::new(self.messages)));
        tokio::pin!(answer);
        tokio::select! {
            biased;
            read = self.read => {
                let died = |_| Err(Error::internal("the thread that reads the upload died"));
                read.unwrap_or_else(died).map_err(Fault::Here)?;
                answer.await.map_err(Fault::There)
            }
            answer = &mut answer => answer.map_err(Fault::There),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(entries: u64, bytes: u64) -> wire::UploadPosition {
        wire::UploadPosition { entries, bytes }
    }

    #[test]
    fn pauses_grow_and_end_when_nothing_gets_further() {
        let mut patience = Patience::default();
        let pauses: Vec<_> = (0..7).map_while(|_| patience.pause(Duration::ZERO)).collect();
        assert_eq!(pauses[..5], [200, 400, 800, 1600, 3200].map(Duration::from_millis));
        assert_eq!(pauses[5..], [PAUSE_MAX; 2]);
        patience.since = Some(Instant::now() - GIVE_UP_AFTER);
        assert_eq!(patience.pause(Duration::ZERO), None);
        assert_eq!(patience.pause(GIVE_UP_AFTER), Some(PAUSE_MAX), "it may have gone well for as long");
    }

    #[test]
    fn getting_further_is_a_new_beginning() {
        let mut patience = Patience::default();
        patience.has_come_to(at(1, 5));
        for (position, is_further) in [(at(1, 5), false), (at(1, 4), false), (at(1, 5), false), (at(2, 0), true)] {
            patience.pause(Duration::ZERO);
            patience.has_come_to(position);
            assert_eq!(patience.is_new(), is_further, "{position:?}");
        }
    }

    #[test]
    fn a_daemon_that_forgets_again_and_again_is_not_sent_all_for_ever() {
        let mut patience = Patience::default();
        for _ in 0..ANEW_AT_MOST {
            assert!(patience.begins_anew().unwrap());
            // One that is still being drained.
            patience.pause(Duration::ZERO);
            assert!(!patience.begins_anew().unwrap());
            patience.pause(WENT_WELL_FROM);
        }
        assert_eq!(patience.begins_anew().unwrap_err().kind(), Kind::Unavailable);
    }
}

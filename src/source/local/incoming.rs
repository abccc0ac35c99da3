//! The end where the tar is read, on a thread of its own: what the feed brings, behind what the tail of an earlier run has.
//!
//! The thread takes the SHA-512 of everything on its way, trailing zeros included, and marks its state in the tail, so that a later run goes on from
//! there. It can be asked for the digest without ending the stream.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::StreamDigest;
use super::digester::Digester;
use super::settling::Settling;
use crate::archive::Runs;
use crate::error::{Error, Kind, Result};

/// Bytes between two marks: so much of the tail is kept for the digest alone.
pub(super) const MARK_BYTES: u64 = 4 << 20;

/// Bytes read from the tail at a time.
const READ_BYTES: u64 = 256 << 10;

/// How long the thread rests where nothing waits for it, before it is woken by the next piece: a sender waits for the answer to each, so that otherwise every piece, which
/// is hashed in half the time, costs a wake, or a rest.
const REST: Duration = Duration::from_millis(2);

/// What passes the queue.
pub(super) enum Message {
    Piece(Vec<Bytes>, OwnedSemaphorePermit),
    Digest(oneshot::Sender<StreamDigest>),
    End,
}

/// What the reading thread found out.
#[derive(Debug, Default)]
pub(super) struct Heard {
    pub(super) digest: OnceLock<StreamDigest>,
}

/// What an earlier run has read and hashed, and what its tail has.
#[derive(Debug, Default)]
pub(super) struct Before {
    /// How far it was read, as far as that is recorded.
    pub(super) read: u64,
    /// How far it was hashed, with the state: not farther.
    pub(super) hashed: (u64, Vec<u8>),
    /// Where the tail ends.
    pub(super) end: u64,
}

/// See the module's page; blocks.
pub(super) struct Incoming {
    receiver: mpsc::Receiver<Message>,
    runs: std::vec::IntoIter<Bytes>,
    present: Bytes,
    /// The present piece's share of the queue.
    counted: Option<OwnedSemaphorePermit>,
    /// Where the next run begins, and how far the digest is.
    at: u64,
    /// Bytes before this one were read by an earlier run.
    from: u64,
    /// Where what the tail has ends.
    replay_until: u64,
    marked: u64,
    digester: Digester,
    ended: bool,
    heard: Arc<Heard>,
    settling: Arc<Settling>,
}

impl Incoming {
    /// What `receiver` brings behind what was `before`.
    ///
    /// # Errors
    /// A state that is none.
    pub(super) fn new(
        receiver: mpsc::Receiver<Message>,
        heard: Arc<Heard>,
        settling: Arc<Settling>,
        before: &Before,
    ) -> Result<Self> {
        let (hashed, state) = &before.hashed;
        if *hashed >= before.end {
            settling.is_read();
        }
        Ok(Self {
            receiver,
            runs: Vec::new().into_iter(),
            present: Bytes::new(),
            counted: None,
            at: *hashed,
            from: before.read,
            replay_until: before.end,
            marked: *hashed,
            digester: if *hashed == 0 { Digester::new() } else { Digester::thaw(state)? },
            ended: false,
            heard,
            settling,
        })
    }

    /// Makes the next run of bytes present; whether there is one.
    fn advance(&mut self) -> io::Result<bool> {
        loop {
            if self.at < self.replay_until {
                let run = self.replayed().map_err(io::Error::other)?;
                self.take(run);
                if self.at >= self.replay_until {
                    self.settling.is_read();
                }
                return Ok(true);
            }
            if let Some(run) = self.runs.next() {
                self.take(run);
                return Ok(true);
            }
            self.counted = None;
            match self.hear() {
                Some(Message::Piece(piece, counted)) => {
                    self.runs = piece.into_iter();
                    self.counted = Some(counted);
                }
                Some(Message::Digest(answer)) => drop(answer.send(self.digester.digest())),
                Some(Message::End) => {
                    self.ended = true;
                    let _ = self.heard.digest.set(self.digester.digest());
                    return Ok(false);
                }
                None => return Err(io::Error::other(broken_off())),
            }
        }
    }

    /// The next message; `None` when there will be none. One wake brings the pieces that come in a [`REST`].
    fn hear(&mut self) -> Option<Message> {
        if let Ok(message) = self.receiver.try_recv() {
            return Some(message);
        }
        std::thread::sleep(REST);
        self.receiver.blocking_recv()
    }

    fn replayed(&self) -> Result<Bytes> {
        let length = (self.replay_until - self.at).min(READ_BYTES);
        let mut run = vec![0; usize::try_from(length).unwrap_or_default()];
        self.settling.read(&mut run, self.at)?;
        Ok(run.into())
    }

    fn take(&mut self, run: Bytes) {
        let end = self.at + run.len() as u64;
        let unread = usize::try_from(self.from.saturating_sub(self.at)).unwrap_or(usize::MAX).min(run.len());
        self.digester.update(&run);
        self.present = run.slice(unread..);
        self.at = end;
        if end >= self.marked + MARK_BYTES {
            self.settling.offer(end, self.digester.state());
            self.marked = end;
        }
    }
}

impl Runs for Incoming {
    fn next_run(&mut self) -> io::Result<Bytes> {
        while self.present.is_empty() && !self.ended && self.advance()? {}
        Ok(std::mem::take(&mut self.present))
    }
}

fn broken_off() -> Error {
    Error::new(Kind::Cancelled, "UPLOAD_BROKEN", "the upload broke off before its end").remedy("upload it again")
}

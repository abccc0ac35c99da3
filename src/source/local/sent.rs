//! The stream between the requests that bring a tar in pieces and the ingest that takes its entries.
//!
//! ```text
//! request -> Room::put -> [ at most QUEUE_BYTES ] -> thread that reads the tar -> SentTar -> ingest
//! ```
//! A request waits for room and then puts its whole piece at once: a piece is taken or it is not, whatever becomes of the request. The
//! thread takes the SHA-512 of everything on its way, trailing zeros included, and can be asked for it without ending the stream. Only
//! [`Feed::end`] ends the tar; a feed that is dropped breaks it off, so that what was never confirmed never becomes a checkpoint.

use std::io::{self, Read};
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use bytes::{Buf as _, Bytes};
use sha2::{Digest as _, Sha512};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::beginning::Beginning;
use super::revision;
use crate::archive::{About, Archived, Dictionaries, Format, Members};
use crate::error::{Error, Kind, Result};
use crate::manifest::Manifest;
use crate::names::EntryName;
use crate::source::{EntryStream, Listed, listed_member};

/// Largest piece: the protocol's client means to send 5 MiB, and sends 64 to 192 KiB.
pub const PIECE_BYTES: usize = 8 << 20;

/// Bytes waiting for the reading thread: one largest piece, so that a small sender never waits and a fast one is held back.
const QUEUE_BYTES: usize = PIECE_BYTES;

/// Pieces waiting, however small: senders of single bytes are held back too.
const QUEUE_PIECES: usize = 256;

/// SHA-512 of a stream.
pub type StreamDigest = [u8; 64];

/// What passes the queue.
enum Message {
    Piece(Vec<Bytes>, OwnedSemaphorePermit),
    Digest(oneshot::Sender<StreamDigest>),
    End,
}

/// The end where pieces are put.
#[derive(Debug)]
pub struct Feed {
    sender: mpsc::Sender<Message>,
    bytes: Arc<Semaphore>,
}

/// Room for one piece, kept for whoever asked until it is used or dropped.
pub struct Room<'a> {
    slot: mpsc::Permit<'a, Message>,
    bytes: OwnedSemaphorePermit,
}

impl Feed {
    /// Waits for room for a piece of `length` bytes, at most [`PIECE_BYTES`]; `None` when nobody reads any more. Cancel-safe.
    pub async fn room(&self, length: usize) -> Option<Room<'_>> {
        let length = u32::try_from(length.min(QUEUE_BYTES)).ok()?;
        let bytes = Arc::clone(&self.bytes).acquire_many_owned(length).await.ok()?;
        let slot = self.sender.reserve().await.ok()?;
        Some(Room { slot, bytes })
    }

    /// The digest of all that was put so far, once it is read; `None` when nobody reads any more.
    pub async fn digest(&self) -> Option<StreamDigest> {
        let (answer, digest) = oneshot::channel();
        self.sender.send(Message::Digest(answer)).await.ok()?;
        digest.await.ok()
    }

    /// Says that this is all.
    pub async fn end(&self) {
        // Where nobody reads any more, the outcome says why.
        let _ = self.sender.send(Message::End).await;
    }
}

impl Room<'_> {
    /// Puts the piece, given in one or more runs of bytes.
    pub fn put(self, piece: Vec<Bytes>) {
        self.slot.send(Message::Piece(piece, self.bytes));
    }
}

/// What the reading thread found out.
#[derive(Debug, Default)]
struct Heard {
    tree: OnceLock<bool>,
    digest: OnceLock<StreamDigest>,
}

/// The entries of what is put into the feed; with `extract`, one archive sent as a file is to be taken apart. Needs a runtime.
///
/// # Errors
/// None that can be met.
pub fn stream(extract: bool) -> Result<(Feed, SentTar)> {
    let (sender, receiver) = mpsc::channel(QUEUE_PIECES);
    let heard = Arc::<Heard>::default();
    let incoming = Incoming {
        receiver,
        runs: Vec::new().into_iter(),
        present: Bytes::new(),
        counted: None,
        sha512: Sha512::new(),
        beginning: Beginning::default(),
        ended: false,
        heard: Arc::clone(&heard),
    };
    let about = About { name: EntryName::new(*b"the upload")?, format: Format::Tar, executable: false };
    // The protocol's client does not compress; who does has what need not be claimed.
    let members = Members::read(Archived::Stream(Box::new(incoming)), about, Dictionaries::within(0));
    let feed = Feed { sender, bytes: Arc::new(Semaphore::new(QUEUE_BYTES)) };
    Ok((feed, SentTar { members, heard, extract }))
}

/// Entries of a tar as they are sent.
#[derive(Debug)]
pub struct SentTar {
    members: Members,
    heard: Arc<Heard>,
    extract: bool,
}

#[async_trait]
impl EntryStream for SentTar {
    async fn next_entry(&mut self) -> Result<Option<Listed>> {
        Ok(self.members.next().await?.map(listed_member))
    }

    async fn next_bytes(&mut self) -> Result<Option<Bytes>> {
        self.members.next_bytes().await
    }

    fn revision(&self, _tree: &Manifest) -> String {
        self.heard.digest.get().map(revision).unwrap_or_default()
    }

    fn one_file(&self) -> bool {
        self.extract && self.heard.tree.get() == Some(&false)
    }
}

/// The end where the tar is read; blocks.
struct Incoming {
    receiver: mpsc::Receiver<Message>,
    runs: std::vec::IntoIter<Bytes>,
    present: Bytes,
    /// The present piece's share of the queue.
    counted: Option<OwnedSemaphorePermit>,
    sha512: Sha512,
    beginning: Beginning,
    ended: bool,
    heard: Arc<Heard>,
}

impl Incoming {
    /// Makes the next run of bytes present; whether there is one.
    fn advance(&mut self) -> io::Result<bool> {
        loop {
            if let Some(run) = self.runs.next() {
                self.sha512.update(&run);
                self.listen(&run);
                self.present = run;
                return Ok(true);
            }
            self.counted = None;
            match self.receiver.blocking_recv() {
                Some(Message::Piece(piece, counted)) => {
                    self.runs = piece.into_iter();
                    self.counted = Some(counted);
                }
                Some(Message::Digest(answer)) => drop(answer.send(self.sha512.clone().finalize().into())),
                Some(Message::End) => {
                    self.ended = true;
                    let _ = self.heard.digest.set(self.sha512.clone().finalize().into());
                    return Ok(false);
                }
                None => return Err(io::Error::other(broken_off())),
            }
        }
    }

    fn listen(&mut self, run: &[u8]) {
        if self.heard.tree.get().is_none() {
            self.beginning.look(run);
            if let Some(tree) = self.beginning.is_tree() {
                let _ = self.heard.tree.set(tree);
            }
        }
    }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.present.is_empty() {
            if self.ended || !self.advance()? {
                return Ok(0);
            }
        }
        let length = self.present.len().min(buffer.len());
        self.present.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

fn broken_off() -> Error {
    Error::new(Kind::Cancelled, "UPLOAD_BROKEN", "the upload broke off before its end").remedy("upload it again")
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn put(feed: &Feed, piece: Vec<u8>) {
        feed.room(piece.len()).await.unwrap().put(vec![piece.into()]);
    }

    /// A tar of one empty file, `a`.
    fn tar() -> Vec<u8> {
        let mut header = vec![0; 512];
        header[0] = b'a';
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..136].copy_from_slice(b"00000000000\0");
        header[148..156].fill(b' ');
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header.resize(10_240, 0);
        header
    }

    #[tokio::test]
    async fn the_digest_is_of_everything_and_can_be_asked_for_before_the_end() {
        let (feed, mut entries) = stream(true).unwrap();
        for piece in tar().chunks(700) {
            put(&feed, piece.to_vec()).await;
        }
        let digest = feed.digest().await.unwrap();
        assert_eq!(digest[..], Sha512::digest(tar())[..]);
        assert!(entries.next_entry().await.unwrap().is_some());
        assert!(entries.one_file());
        put(&feed, vec![0; 512]).await;
        feed.end().await;
        assert!(entries.next_entry().await.unwrap().is_none());
        let tree = Manifest::new(Vec::new()).unwrap();
        assert_eq!(entries.revision(&tree), revision(&Sha512::digest([tar(), vec![0; 512]].concat()).into()));
    }

    #[tokio::test]
    async fn a_feed_that_is_dropped_ends_in_an_error_even_behind_the_end_mark() {
        let (feed, mut entries) = stream(true).unwrap();
        put(&feed, tar()).await;
        assert!(entries.next_entry().await.unwrap().is_some());
        drop(feed);
        assert_eq!(entries.next_entry().await.unwrap_err().reason(), "UPLOAD_BROKEN");
    }

    #[tokio::test]
    async fn nobody_reading_is_seen_by_who_waits_for_room() {
        let (feed, entries) = stream(true).unwrap();
        drop(entries);
        put(&feed, vec![b'x'; 600]).await;
        while let Some(room) = feed.room(1).await {
            drop(room);
            tokio::task::yield_now().await;
        }
    }
}

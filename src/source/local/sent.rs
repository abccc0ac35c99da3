//! The stream between the requests that bring a tar in pieces and the ingest that takes its entries.
//!
//! ```text
//! request -> Room::put -> [ at most QUEUE_BYTES ] -> thread that reads the tar -> SentTar -> ingest
//!              \-> tail of the upload, before its sender is told                     <- Recorded -/
//! ```
//! A request waits for room, has its piece kept ([`Settling`]) and then puts it at once: a piece is taken or it is not, whatever becomes of the request.
//! Only [`Feed::end`] ends the tar; a feed that is dropped breaks it off, so that what was never confirmed never becomes a checkpoint.
//!
//! One that an earlier run of the daemon had under way ([`Left`]) begins with the members that are recorded; then comes what its tail has behind
//! them, and then what its sender goes on with.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::digester::Digester;
use super::incoming::{Before, Heard, Incoming, Message};
use super::settling::{From, Settling, Told};
use super::{StreamDigest, revision};
use crate::archive::{About, Archived, Dictionaries, Format, Given, Member, Members, What};
use crate::digest::Digest;
use crate::disk::{Disk, TAIL_BYTES, Tail, TailLeft};
use crate::error::{Error, Result};
use crate::limits::UNIT_BYTES;
use crate::manifest::Manifest;
use crate::names::EntryName;
use crate::source::recorded::{self, Next, RecordedMembers};
use crate::source::{Begun, EntryStream, Here, Listed, Recorded, listed_member};

/// Largest piece: the protocol's client means to send 5 MiB, and sends 64 to 192 KiB.
pub const PIECE_BYTES: usize = 8 << 20;

/// Bytes waiting for the reading thread: one largest piece, so that a small sender never waits and a fast one is held back.
const QUEUE_BYTES: usize = PIECE_BYTES;

/// Pieces waiting, however small: senders of single bytes are held back too.
const QUEUE_PIECES: usize = 256;

/// A member's padding is shorter.
const PADDING_BYTES: u64 = 512;

/// The end where pieces are put.
#[derive(Debug)]
pub struct Feed {
    sender: mpsc::Sender<Message>,
    bytes: Arc<Semaphore>,
    settling: Arc<Settling>,
    /// Why the entries end where they are, to be gone on with by a later run.
    left: watch::Sender<Option<Arc<Error>>>,
}

/// Room for one piece, kept for whoever asked until it is used or dropped.
pub struct Room {
    slot: mpsc::OwnedPermit<Message>,
    bytes: OwnedSemaphorePermit,
    settling: Arc<Settling>,
}

impl Feed {
    /// Waits for room for a piece of `length` bytes, at most [`PIECE_BYTES`], that begins at `at`; `None` when nobody reads any more. Cancel-safe.
    pub async fn room(&self, at: u64, length: usize) -> Option<Room> {
        let room = async {
            self.settling.room(at.saturating_add(length as u64)).await;
            let length = u32::try_from(length.min(QUEUE_BYTES)).ok()?;
            let bytes = Arc::clone(&self.bytes).acquire_many_owned(length).await.ok()?;
            let slot = self.sender.clone().reserve_owned().await.ok()?;
            Some(Room { slot, bytes, settling: Arc::clone(&self.settling) })
        };
        tokio::select! {
            room = room => room,
            // Whoever takes the entries is gone, whatever their reader waits for.
            () = self.left.closed() => None,
        }
    }

    /// Whether what is put outlives the daemon.
    pub fn survives(&self) -> bool {
        self.settling.survives()
    }

    /// Ends the entries where they are, with `why`; a later run of the daemon goes on.
    pub fn leave(&self, why: Error) {
        self.left.send_replace(Some(Arc::new(why)));
    }

    /// The digest of all that was put so far, once it is read; `None` when nobody reads any more.
    pub async fn digest(&self) -> Option<StreamDigest> {
        let (answer, digest) = oneshot::channel();
        self.sender.send(Message::Digest(answer)).await.ok()?;
        digest.await.ok()
    }

    /// Says that this is all, and has this digest. A later run knows it as well.
    pub async fn end(&self, digest: StreamDigest) {
        let settling = Arc::clone(&self.settling);
        let _ = tokio::task::spawn_blocking(move || settling.set_ended(&digest)).await;
        // Where nobody reads any more, the outcome says why.
        let _ = self.sender.send(Message::End).await;
    }
}

impl Room {
    /// Whether the piece is to be [kept](Room::keep), which blocks.
    pub fn is_to_be_kept(&self) -> bool {
        self.settling.survives()
    }

    /// Keeps the piece, which begins at `at` and is given in one or more runs of bytes, for a later run of the daemon. Blocks.
    pub fn keep(&self, piece: &[Bytes], at: u64) {
        self.settling.keep(piece, at);
    }

    /// Puts the piece.
    pub fn put(self, piece: Vec<Bytes>) {
        self.slot.send(Message::Piece(piece, self.bytes));
    }
}

/// An upload as an earlier run of the daemon has left it.
pub struct Left {
    tail: Tail,
    said: TailLeft,
    entries: Vec<(Member, Here)>,
    given: Given,
    from: From,
}

impl Left {
    /// That of which `entries` are recorded, each with how much of it is here: all but the last wholly.
    ///
    /// # Errors
    /// `UPLOAD_TAIL_DAMAGED` where the tail does not go on behind them.
    pub fn new((tail, said): (Tail, TailLeft), entries: Vec<(Member, Here)>) -> Result<Self> {
        let given = recorded::given(&entries);
        let begun = match entries.last() {
            Some((Member { span, .. }, Here::Begun(begun))) if given.left > 0 => Some((*span, begun.bytes)),
            _ => None,
        };
        let members = entries.len() as u64 - u64::from(begun.is_some());
        let from = From { members, begun, settled: given.until(), marked: said.mark.0 };
        // Where less is recorded than was, what lies between is nowhere, or does not go through the digest any more.
        let is_there = from.marked <= from.settled.min(said.end) && said.end - from.marked <= TAIL_BYTES;
        let fits = from.settled.saturating_sub(said.end) <= PADDING_BYTES;
        let has_place =
            entries.iter().all(|(member, _)| member.span.is_known()) && begun.is_none_or(|(span, _)| span.plain);
        if !is_there || !fits || !has_place {
            return Err(Error::corrupt("UPLOAD_TAIL_DAMAGED", "what had come of an upload is not all there"));
        }
        if from.marked > 0 {
            Digester::thaw(&said.mark.1)?;
        }
        Ok(Self { tail, said, entries, given, from })
    }

    /// How many bytes its sender was told have come.
    pub fn end(&self) -> u64 {
        self.said.end
    }

    /// The digest of all, where all has come.
    pub fn ended(&self) -> Option<StreamDigest> {
        self.said.ended
    }
}

/// The entries of what is put into the feed, by whoever `about` says; with `extract`, one archive sent as a file is to be taken apart. Needs a runtime.
///
/// # Errors
/// None that can be met.
pub fn stream(about: Vec<u8>, extract: bool) -> Result<(Feed, SentTar)> {
    connected(Arc::new(Settling::new(about)), &Before::default(), Vec::new(), Given::default(), extract)
}

/// The same behind what an earlier run of the daemon has left.
///
/// # Errors
/// As [`Left::new`].
pub fn go_on(left: Left, extract: bool) -> Result<(Feed, SentTar)> {
    let Left { tail, said, entries, given, from } = left;
    let before = Before { read: from.settled, hashed: said.mark, end: said.end };
    let settling = Arc::new(Settling::left(said.about, tail, &from));
    connected(settling, &before, entries, given, extract)
}

fn connected(
    settling: Arc<Settling>,
    before: &Before,
    recorded: Vec<(Member, Here)>,
    given: Given,
    extract: bool,
) -> Result<(Feed, SentTar)> {
    let (sender, receiver) = mpsc::channel(QUEUE_PIECES);
    let heard = Arc::<Heard>::default();
    let incoming = Box::new(Incoming::new(receiver, Arc::clone(&heard), Arc::clone(&settling), before)?);
    let (name, left_bytes) = (EntryName::new(*b"the upload")?, given.left);
    let members = if recorded.is_empty() {
        let about = About { name, format: Format::Tar, executable: false };
        // The protocol's client does not compress; who does has what need not be claimed.
        Members::read(Archived::Stream(incoming), about, Dictionaries::within(0))
    } else {
        Members::go_on(incoming, name, given, Box::new(|_| ()))
    };
    let left = watch::Sender::new(None);
    let members = RecordedMembers::new(members, recorded, left_bytes);
    let (hearing, settled) = (left.subscribe(), Arc::clone(&settling));
    let entries = SentTar { members, row: None, is_first: false, heard, extract, left: hearing, settling: settled };
    let feed = Feed { sender, bytes: Arc::new(Semaphore::new(QUEUE_BYTES)), settling, left };
    Ok((feed, entries))
}

/// Entries of a tar as they are sent.
pub struct SentTar {
    members: RecordedMembers,
    row: Option<(u64, Vec<u8>)>,
    /// Whether the present entry is what the tar begins with.
    is_first: bool,
    heard: Arc<Heard>,
    extract: bool,
    left: watch::Receiver<Option<Arc<Error>>>,
    settling: Arc<Settling>,
}

impl SentTar {
    fn entry(&mut self, next: Next) -> Listed {
        let Next { member, position, is_recorded } = next;
        self.is_first = member.span.at == 0;
        if !is_recorded {
            let is_large = matches!(member.what, What::File { size, .. } if size.is_none_or(|size| size > UNIT_BYTES));
            if !member.span.is_known() || (is_large && !member.span.plain) {
                // Of a compressed tar, or with holes: where its bytes are in what is sent cannot be told.
                self.is_not_recorded();
            }
            self.settling.add(member.span);
        }
        let is_wanted = self.members.begun().is_some() || (!is_recorded && self.settling.survives());
        self.row = is_wanted.then(|| (position, recorded::encode(&member, None)));
        listed_member(member)
    }
}

/// Resolves with an error when the entries are to end where they are.
async fn left(left: &mut watch::Receiver<Option<Arc<Error>>>) -> Error {
    let why = match left.wait_for(Option::is_some).await {
        Ok(why) => why.as_ref().map(|why| why.share()),
        Err(_) => None,
    };
    match why {
        Some(why) => why,
        // The feed is gone, which the members tell.
        None => std::future::pending().await,
    }
}

#[async_trait]
impl EntryStream for SentTar {
    async fn next_entry(&mut self) -> Result<Option<Listed>> {
        self.settling.is_asked();
        let next = tokio::select! {
            biased;
            why = left(&mut self.left) => return Err(why),
            next = self.members.next() => next?,
        };
        Ok(next.map(|next| self.entry(next)))
    }

    async fn next_bytes(&mut self) -> Result<Option<Vec<Bytes>>> {
        tokio::select! {
            biased;
            why = left(&mut self.left) => Err(why),
            bytes = self.members.next_bytes() => bytes,
        }
    }

    fn sealed(&self) -> Option<(u64, Digest)> {
        self.members.sealed()
    }

    fn begun(&self) -> Option<Begun> {
        self.members.begun()
    }

    fn to_record(&self) -> Option<(u64, Vec<u8>)> {
        self.row.clone()
    }

    fn recorded(&self) -> Option<Arc<dyn Recorded>> {
        Some(Arc::new(Told(Arc::clone(&self.settling))))
    }

    async fn begin(&mut self, disk: &Arc<Disk>, flight: &str) {
        self.settling.begin(disk, flight).await;
    }

    fn is_not_recorded(&mut self) {
        self.settling.give_up();
    }

    fn revision(&self, _tree: &Manifest) -> String {
        self.heard.digest.get().map(revision).unwrap_or_default()
    }

    /// `tar -C DIR .` begins with the directory itself, which is no entry; `tar -C PARENT FILE` with the file.
    fn one_file(&self) -> bool {
        self.extract && self.is_first
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest as _, Sha512};

    use super::*;

    /// A disk on which the directory of the flight `f` is begun.
    fn disk(root: &std::path::Path) -> Arc<Disk> {
        let disk = Arc::new(Disk::open(root).unwrap());
        disk.begin_flight("f").unwrap();
        disk
    }

    /// Puts what begins at `at` as a request does.
    async fn put(feed: &Feed, at: usize, piece: &[u8]) {
        let room = feed.room(at as u64, piece.len()).await.unwrap();
        let piece = vec![Bytes::copy_from_slice(piece)];
        tokio::task::spawn_blocking(move || {
            room.keep(&piece, at as u64);
            room.put(piece);
        })
        .await
        .unwrap();
    }

    async fn put_all(feed: &Feed, tar: &[u8], from: usize, step: usize) {
        for (number, piece) in tar[from..].chunks(step).enumerate() {
            put(feed, from + number * step, piece).await;
        }
    }

    fn member(name: &str, kind: u8, bytes: &[u8]) -> Vec<u8> {
        let mut header = vec![0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", bytes.len()).as_bytes());
        header[148..156].fill(b' ');
        header[156] = kind;
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header.extend_from_slice(bytes);
        header.resize(512 + bytes.len().next_multiple_of(512), 0);
        header
    }

    /// A tar of these members and its end mark.
    fn tar(members: &[Vec<u8>]) -> Vec<u8> {
        let mut tar = members.concat();
        tar.resize((tar.len() + 1024).next_multiple_of(10_240), 0);
        tar
    }

    fn sha512(bytes: &[u8]) -> StreamDigest {
        Sha512::digest(bytes).into()
    }

    async fn bytes_of(entries: &mut SentTar) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(bytes) = entries.next_bytes().await.unwrap() {
            bytes.iter().for_each(|run| all.extend_from_slice(run));
        }
        all
    }

    #[tokio::test]
    async fn the_digest_is_of_everything_and_can_be_asked_for_before_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let (feed, mut entries) = stream(Vec::new(), true).unwrap();
        entries.begin(&disk(directory.path()), "f").await;
        let mut tar = tar(&[member("a", b'0', b"")]);
        put_all(&feed, &tar, 0, 700).await;
        assert_eq!(feed.digest().await.unwrap(), sha512(&tar));
        assert!(entries.next_entry().await.unwrap().is_some());
        assert!(entries.one_file());
        put(&feed, tar.len(), &[0; 512]).await;
        tar.extend_from_slice(&[0; 512]);
        feed.end(sha512(&tar)).await;
        assert!(entries.next_entry().await.unwrap().is_none());
        assert_eq!(entries.revision(&Manifest::new(Vec::new()).unwrap()), revision(&sha512(&tar)));
    }

    #[tokio::test]
    async fn a_feed_that_is_dropped_ends_in_an_error_even_behind_the_end_mark() {
        let directory = tempfile::tempdir().unwrap();
        let (feed, mut entries) = stream(Vec::new(), true).unwrap();
        entries.begin(&disk(directory.path()), "f").await;
        put(&feed, 0, &tar(&[member("a", b'0', b"")])).await;
        assert!(entries.next_entry().await.unwrap().is_some());
        drop(feed);
        assert_eq!(entries.next_entry().await.unwrap_err().reason(), "UPLOAD_BROKEN");
    }

    #[tokio::test]
    async fn nobody_reading_is_seen_by_who_waits_for_room_even_where_there_is_no_tail_yet() {
        let (feed, entries) = stream(Vec::new(), true).unwrap();
        drop(entries);
        while let Some(room) = feed.room(0, 1).await {
            drop(room);
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn who_is_told_to_leave_gets_the_reason_and_no_more_entries() {
        let directory = tempfile::tempdir().unwrap();
        let (feed, mut entries) = stream(Vec::new(), true).unwrap();
        entries.begin(&disk(directory.path()), "f").await;
        put(&feed, 0, &tar(&[member("a", b'0', b"x")])).await;
        assert!(entries.next_entry().await.unwrap().is_some());
        feed.leave(Error::unavailable("DRAINING", "later"));
        assert_eq!(entries.next_bytes().await.unwrap_err().reason(), "DRAINING");
        assert_eq!(entries.next_entry().await.unwrap_err().reason(), "DRAINING");
    }

    const LARGE: usize = 6 << 20;

    fn members() -> Vec<Vec<u8>> {
        let large: Vec<_> = (0..LARGE).map(|at| u8::try_from(at % 251).unwrap()).collect();
        vec![
            member("./", b'5', b""),
            member("./d/", b'5', b""),
            member("./d/a", b'0', b"small"),
            member("./large", b'0', &large),
            member("./z", b'0', b"last"),
        ]
    }

    /// Leaves the upload of `tar` after its first `sent` bytes, of which `recorded` entries are, and opens it again. Of the large file there is as much as `large` says.
    async fn left_after(disk: &Arc<Disk>, tar: &[u8], sent: usize, recorded: usize, large: Option<u64>) -> Left {
        let (feed, mut entries) = stream(b"mine".to_vec(), true).unwrap();
        entries.begin(disk, "f").await;
        let sending = put_all(&feed, &tar[..sent], 0, 100_000);
        let taking = async {
            let mut rows = Vec::new();
            for _ in 0..recorded {
                let size = match entries.next_entry().await.unwrap().unwrap().what {
                    crate::source::What::File(file) => file.size,
                    _ => None,
                };
                let member = recorded::decode(&entries.to_record().unwrap().1).unwrap().0;
                let here = match size {
                    Some(size) if size < UNIT_BYTES => Here::Sealed(size, Digest::of(b"")),
                    Some(size) => Here::Begun(Begun { number: 9, bytes: large.unwrap_or(size) }),
                    None => Here::No,
                };
                rows.push((member, here));
            }
            rows
        };
        let (rows, ()) = tokio::join!(taking, sending);
        // Everything that was told is hashed, or is in the queue as a kill finds it.
        drop((feed, entries));
        let (tail, said) = disk.open_tail("f").unwrap().unwrap();
        assert_eq!((said.about.as_slice(), said.end), (b"mine".as_slice(), sent as u64));
        Left::new((tail, said), rows).unwrap()
    }

    async fn assert_goes_on(sent: usize, recorded: usize, large: Option<u64>) {
        let directory = tempfile::tempdir().unwrap();
        let disk = disk(directory.path());
        let tar = tar(&members());
        let left = left_after(&disk, &tar, sent, recorded, large).await;
        let (feed, mut entries) = go_on(left, true).unwrap();
        entries.begin(&disk, "f").await;
        let sending = async {
            put_all(&feed, &tar, sent, 70_000).await;
            let digest = feed.digest().await.unwrap();
            feed.end(digest).await;
            digest
        };
        let taking = async {
            let mut seen = Vec::new();
            while let Some(listed) = entries.next_entry().await.unwrap() {
                let before = entries.begun().map_or(0, |begun| begun.bytes);
                let sealed = entries.sealed().map(|(size, _)| size);
                seen.push((listed.path.to_string(), before, sealed, bytes_of(&mut entries).await.len() as u64));
            }
            seen
        };
        let (seen, digest) = tokio::join!(taking, sending);
        assert_eq!(digest, sha512(&tar), "the digest goes on");
        let file = |name: &str, size: u64, here: Option<u64>| match here {
            Some(here) if size < UNIT_BYTES => (name.to_owned(), 0, Some(here), 0),
            Some(here) => (name.to_owned(), here, None, size - here),
            None => (name.to_owned(), 0, None, size),
        };
        let is_here = |at: usize, size: u64| (recorded > at).then_some(size);
        let expected = [
            file("d", 0, None),
            file("d/a", 5, is_here(1, 5)),
            file("large", LARGE as u64, is_here(2, large.unwrap_or(LARGE as u64))),
            file("z", 4, is_here(3, 4)),
        ];
        assert_eq!(seen, expected, "sent {sent}, recorded {recorded}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_later_run_goes_on_where_the_sender_was_told_that_it_stood() {
        let whole = tar(&members()).len();
        for (sent, recorded, large) in [
            (100, 0, None),
            (512 * 3 + 7, 1, None),
            (512 * 3 + 7, 2, None),
            (512 * 4, 2, None),
            (5 << 20, 2, None),
            (5 << 20, 3, Some(UNIT_BYTES)),
            (LARGE + 512 * 5, 3, Some(UNIT_BYTES)),
            (LARGE + 512 * 5, 3, None),
            (LARGE + 512 * 5 + 100, 3, None),
            (whole - 1, 4, None),
            (whole, 0, None),
            (whole, 4, None),
        ] {
            assert_goes_on(sent, recorded, large).await;
        }
    }

    #[tokio::test]
    async fn what_does_not_meet_its_tail_is_not_gone_on_with() {
        let directory = tempfile::tempdir().unwrap();
        let disk = disk(directory.path());
        let tail = disk.make_tail("f", b"").unwrap();
        tail.append(&[vec![0; 700].into()], 0).unwrap();
        drop(tail);
        let spans = [(512, 1211, true), (512, 1213, false)];
        for (bytes_at, end, is_sound) in spans {
            let span = crate::archive::Span { at: 0, bytes_at, end, plain: true };
            let path = crate::names::EntryPath::new(*b"a").unwrap();
            let member = Member { path, what: What::File { size: Some(5), executable: false, here: false }, span };
            let rows = vec![(member, Here::Sealed(5, Digest::of(b"")))];
            let left = Left::new(disk.open_tail("f").unwrap().unwrap(), rows);
            assert_eq!(left.is_ok(), is_sound, "{end}");
        }
    }
}

//! One archive that was sent as a file: its members take its place.
//!
//! A tar or a single compressed file whose sender says that it is all there is ([`EntryStream::is_alone`]) is taken apart while it comes: its
//! bytes go to the thread that reads it through a bounded channel, and nothing of it is on disk but its members.
//!
//! Otherwise whether it is all that was sent is known only when the next entry is asked for; and a zip's directory is at its end. So
//! its bytes are spooled into a file of the flight. Was it not all, the file is given as it came, and what follows behind it.
//!
//! What is taken apart while it comes is sent anew after a restart. A spool is recorded like a large file, where entries are: the next run goes on with it, and
//! takes it apart from its beginning.

use std::collections::VecDeque;
use std::fs::File as OpenFile;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

use super::Shared;
use super::extract::{Piece, PieceReader, QUEUE_PIECES};
use super::fetch::blocking;
use super::quota::Growth;
use super::taker::{Bound, Taker};
use super::tasks::draining;
use crate::archive::{About, Archived, Format, Member, Members};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::Manifest;
use crate::names::{EntryName, EntryPath};
use crate::source::{Begun, EntryStream, Expected, File, Listed, Recorded, Verifier, What, listed_member};

/// Bytes read back from the spool at a time.
const READ_BYTES: u64 = 1 << 20;

/// See the module's page.
pub(super) struct Unpacked {
    shared: Arc<Shared>,
    flight: String,
    sent: Box<dyn EntryStream>,
    state: State,
    /// Whether an archive is taken apart, or was spooled to be: no later run of the daemon has its beginning, so none goes on behind it.
    unpacks: bool,
    survives: bool,
}

enum State {
    /// Nothing was asked for yet.
    First,
    /// Entries are given as they come.
    Plain,
    /// The archive was not all: its bytes are given, then what came behind it.
    Again { spool: Spool, at: u64, behind: Option<Listed> },
    /// Members in place of the archive.
    Members(Members),
    /// The same while the archive comes.
    Arriving(Arriving),
}

struct Arriving {
    members: Members,
    feed: Feed,
}

/// Where the bytes of an archive go as they come.
struct Feed {
    /// `None` once all are on their way.
    sender: Option<mpsc::Sender<Piece>>,
    /// What is to be handed on next.
    runs: VecDeque<Bytes>,
}

struct Spool {
    file: Arc<OpenFile>,
    size: u64,
}

impl Unpacked {
    /// `sent` for the flight `flight`, whose directory is there.
    /// `survives` says whether whoever sends goes on after a restart.
    pub(super) fn new(shared: Arc<Shared>, flight: &str, sent: Box<dyn EntryStream>, survives: bool) -> Self {
        Self { shared, flight: flight.to_owned(), sent, state: State::First, unpacks: false, survives }
    }

    /// Ends what would be sent anew anyway: a drain is not to wait for it.
    fn check_drain(&self) -> Result<()> {
        let is_drained = self.unpacks && self.survives && *self.shared.paused.borrow();
        if is_drained { Err(draining()) } else { Ok(()) }
    }

    async fn first(&mut self) -> Result<Option<Listed>> {
        self.state = State::Plain;
        let Some(first) = self.sent.next_entry().await? else { return Ok(None) };
        let Some((about, size)) = self.archive(&first) else { return Ok(Some(first)) };
        let dictionaries = self.shared.settings.dictionaries.clone();
        if about.format != Format::Zip && self.sent.is_alone() {
            self.unpacks = true;
            let (sender, pieces) = mpsc::channel(QUEUE_PIECES);
            let reader = PieceReader::new(pieces, Verifier::new(&Expected::default(), size), first.path);
            let members = Members::read(Archived::Stream(Box::new(reader)), about, dictionaries);
            self.state =
                State::Arriving(Arriving { members, feed: Feed { sender: Some(sender), runs: VecDeque::new() } });
            return self.next_entry().await;
        }
        let spool = self.spool(&first.path, size).await?;
        let behind = self.sent.next_entry().await?;
        self.unpacks = true;
        match behind {
            Some(behind) => {
                // What comes behind it has a place that no later run comes to.
                self.sent.is_not_recorded();
                self.survives = false;
                self.shared.let_stay(&self.flight);
                self.state = State::Again { spool, at: 0, behind: Some(behind) };
                Ok(Some(first))
            }
            None => {
                let Spool { file, size } = spool;
                let file = Arc::into_inner(file).ok_or_else(|| Error::internal("the spool is still written to"))?;
                let mut members = Members::read(Archived::Random(Box::new(file), size), about, dictionaries);
                let member = members.next().await?;
                self.state = State::Members(members);
                Ok(member.map(listed_member))
            }
        }
    }

    /// What `first` is, if it is an archive to be taken apart.
    fn archive(&self, first: &Listed) -> Option<(About, u64)> {
        let What::File(File { size: Some(size), executable, .. }) = first.what else { return None };
        if self.sent.sealed().is_some() {
            // It was taken as a file before the restart.
            return None;
        }
        let name = EntryName::new(first.path.as_bytes()).ok()?;
        let format = Format::of_name(&name).filter(|_| self.sent.one_file())?;
        Some((About { name, format, executable }, size))
    }

    async fn spool(&mut self, path: &EntryPath, size: u64) -> Result<Spool> {
        let growth = Growth::new(&self.shared, &self.flight);
        growth.reach(size).await?;
        let begun = self.sent.begun();
        self.shared.admit_more(size.saturating_sub(begun.map_or(0, |begun| begun.bytes))).await?;
        let number =
            begun.map_or_else(|| self.shared.next_number.fetch_add(1, Ordering::Relaxed), |begun| begun.number);
        let bound = Bound { path: path.clone(), number, row: self.sent.to_record(), begun };
        let recorded = self.sent.recorded();
        // What is counted are the members.
        let uncounted = Arc::default();
        let (shared, flight) = (self.shared.clone(), self.flight.clone());
        let taker = Taker {
            shared: &shared,
            flight: &flight,
            progress: &uncounted,
            growth: &growth,
            recorded: recorded.as_ref(),
        };
        let file = Arc::new(taker.spool(&mut *self.sent, &bound, size).await?);
        Ok(Spool { file, size })
    }
}

impl Arriving {
    /// The next bytes of the present member, while those of the archive are handed on. Cancel-safe, as what is sent is.
    async fn next_bytes(&mut self, sent: &mut dyn EntryStream) -> Result<Option<Vec<Bytes>>> {
        loop {
            tokio::select! {
                biased;
                bytes = self.members.next_bytes() => return bytes,
                fed = self.feed.step(sent) => fed?,
            }
        }
    }

    async fn next(&mut self, sent: &mut dyn EntryStream) -> Result<Option<Member>> {
        loop {
            tokio::select! {
                biased;
                member = self.members.next() => return member,
                fed = self.feed.step(sent) => fed?,
            }
        }
    }
}

impl Feed {
    /// Hands on one run, or the end; for ever at nothing when all is handed on.
    async fn step(&mut self, sent: &mut dyn EntryStream) -> Result<()> {
        let Some(sender) = &self.sender else { return std::future::pending().await };
        if self.runs.is_empty() {
            let Some(runs) = sent.next_bytes().await? else {
                if let Some(behind) = sent.next_entry().await? {
                    return Err(not_alone(&behind));
                }
                let _ = sender.send(Ok(None)).await;
                self.sender = None;
                return Ok(());
            };
            self.runs = runs.into();
        }
        // Where nobody reads any more, the members say why.
        let place = sender.reserve().await;
        if let (Ok(place), Some(run)) = (place, self.runs.pop_front()) {
            place.send(Ok(Some(run)));
        }
        Ok(())
    }
}

fn not_alone(behind: &Listed) -> Error {
    let message = format!("`{}` was sent behind an archive that was said to be all there is", behind.path);
    Error::invalid("BAD_UPLOAD", message).remedy("send a directory with both, or without `one_file`")
}

impl Spool {
    async fn read(&self, at: u64) -> Result<Option<Bytes>> {
        let length = usize::try_from((self.size - at).min(READ_BYTES)).unwrap_or_default();
        if length == 0 {
            return Ok(None);
        }
        let file = self.file.clone();
        blocking(move || {
            let mut piece = vec![0; length];
            let fault = |error| Error::io("reading", "the spool of an upload", error);
            file.read_exact_at(&mut piece, at).map_err(fault)?;
            Ok(Some(piece.into()))
        })
        .await
    }
}

#[async_trait]
impl EntryStream for Unpacked {
    async fn next_entry(&mut self) -> Result<Option<Listed>> {
        self.check_drain()?;
        match &mut self.state {
            State::First => self.first().await,
            State::Plain => self.sent.next_entry().await,
            State::Members(members) => Ok(members.next().await?.map(listed_member)),
            State::Arriving(arriving) => Ok(arriving.next(&mut *self.sent).await?.map(listed_member)),
            State::Again { behind, .. } => {
                let behind = behind.take();
                self.state = State::Plain;
                Ok(behind)
            }
        }
    }

    async fn next_bytes(&mut self) -> Result<Option<Vec<Bytes>>> {
        self.check_drain()?;
        match &mut self.state {
            State::First => Ok(None),
            State::Plain => self.sent.next_bytes().await,
            State::Members(members) => members.next_bytes().await,
            State::Arriving(arriving) => arriving.next_bytes(&mut *self.sent).await,
            State::Again { spool, at, .. } => {
                let piece = spool.read(*at).await?;
                *at += piece.as_ref().map_or(0, |piece| piece.len() as u64);
                Ok(piece.map(|piece| vec![piece]))
            }
        }
    }

    fn sealed(&self) -> Option<(u64, Digest)> {
        self.sent.sealed().filter(|_| !self.unpacks)
    }

    fn begun(&self) -> Option<Begun> {
        self.sent.begun().filter(|_| !self.unpacks)
    }

    fn to_record(&self) -> Option<(u64, Vec<u8>)> {
        self.sent.to_record().filter(|_| !self.unpacks)
    }

    fn recorded(&self) -> Option<Arc<dyn Recorded>> {
        self.sent.recorded()
    }

    fn revision(&self, tree: &Manifest) -> String {
        self.sent.revision(tree)
    }
}

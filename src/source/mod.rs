//! Where checkpoints come from: the [`Source`] trait, one file per kind, and the egress policy.
//!
//! A source is opened once per ingest. Opening resolves what the caller asked for to a *revision that cannot move* (a
//! commit, a version id, an `ETag`) and gives its entries in one of two shapes:
//!
//! * [`Opened::Listed`]: everything is known beforehand and files are fetched in ranges, in any order, several at a
//!   time (Hugging Face, object stores, directories, single files of the web);
//! * [`Opened::Streamed`]: entries come one after the other and their bytes with them (uploads, tar streams, local
//!   transfer).
//!
//! [`mod@connect`] turns what was asked for into a source, and [`check_uri`] says whether it could, without connecting.
//!
//! Sources only talk to the outside. They never write to the store, never retry a whole file (the ingest does, with
//! the ladder of its own) and hold no lock over an await. Errors say whether trying again can help by their kind:
//! [`Kind::Unavailable`](crate::error::Kind::Unavailable) is retried, everything else is final.

mod archived;
mod asking;
mod beneath;
mod captured;
mod connect;
mod covering;
mod credentials;
mod datastore;
mod directory;
pub mod egress;
mod git;
mod http;
mod huggingface;
mod inside;
mod kaggle;
pub mod local;
mod objects;
mod patience;
pub mod recorded;
mod regional;
mod rights;
mod spec;
mod stated;
mod walk;
mod web;

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::Stream;

use crate::digest::Digest;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::manifest::Manifest;
use crate::names::EntryPath;
use crate::places::{Place, Stamp};

pub use archived::listed_member;
pub use captured::PROCESS_OPTION;
pub use connect::{
    SourceContext, check_options, check_uri, connect, shown_uri, split_signature, split_user_information,
};
pub use credentials::{Credentials, CredentialsDirectory};
pub use datastore::{Datastore, Datastores, Trouble, check_file};
pub use http::{HttpClient, HttpSettings};
pub use inside::ProcessId;
pub use spec::{SourceKind, SourceSpec};
pub use stated::{Expected, Stated, Verifier};

/// Bytes of one range, in order. Ends early only with an error; implementations enforce the length they announced.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes>> + Send>>;

/// Told how many entries a listing has so far; refuses more than there may be.
pub type Counter = Arc<dyn Fn(usize) -> Result<()> + Send + Sync>;

/// A place checkpoints come from: see the module's page.
#[async_trait]
pub trait Source: Send + Sync {
    /// Resolves the revision and lists or begins to stream the entries. Tells `counter` how many there are so far while it lists, before more of them are
    /// in memory than a page or a directory has; its error ends the listing.
    ///
    /// # Errors
    /// Not found, denied (credentials missing or refused), invalid (no such shape), unavailable (try again).
    async fn open(&self, counter: &Counter) -> Result<Opened>;

    /// Whether opening has a chance, before there is a record of what is wanted; what it finds is held for opening.
    ///
    /// # Errors
    /// As [`Source::open`].
    async fn check(&self) -> Result<()> {
        Ok(())
    }

    /// The bytes `range` of a listed file, of the revision that [`Source::open`] resolved.
    ///
    /// The stream yields exactly `range.end - range.start` bytes, or an error: unavailable when the connection broke
    /// (also for a body that is too short), `SOURCE_CHANGED` when the file is no longer of that revision. Where
    /// [`File::ranges`] is false, only ranges beginning at 0 are asked for; where the size is unknown the end
    /// is `u64::MAX` and the stream ends with the file.
    async fn read(&self, file: &File, range: Range<u64>) -> Result<ByteStream>;

    /// Whether a large file is still what was listed, asked once all of it has come: where a server begins to send a range, and then sends what
    /// somebody writes over it meanwhile, nothing else would tell.
    ///
    /// # Errors
    /// `SOURCE_CHANGED`; as [`Source::read`].
    async fn confirm(&self, _file: &File) -> Result<()> {
        Ok(())
    }

    /// Reads that it lets be open at a time; more wait for their turn.
    fn reads_at_a_time(&self) -> usize {
        usize::MAX
    }

    /// Whether somebody may still be writing to it: then it is listed again once everything was read, and taken anew if it changed.
    fn may_change(&self) -> bool {
        false
    }

    /// Whether files are opened by [`Source::open_local`], which may then wait for a disk or a server behind it.
    fn is_local(&self) -> bool {
        false
    }

    /// The file itself, where the source is on this host: lets the ingest copy in the kernel or share extents.
    ///
    /// # Errors
    /// As [`Source::read`].
    fn open_local(&self, _file: &File) -> Result<Option<std::fs::File>> {
        Ok(None)
    }

    /// Whether `file`, opened by [`Source::open_local`] and read since, is still what was listed.
    ///
    /// # Errors
    /// `SOURCE_CHANGED`, naming the file.
    fn check_unchanged(&self, _file: &File, _opened: &std::fs::File) -> Result<()> {
        Ok(())
    }
}

/// What opening a source gives.
pub enum Opened {
    /// Everything is known; fetch in any order.
    Listed(Listing),
    /// Entries follow one another.
    Streamed(Box<dyn EntryStream>),
}

/// All entries of one revision.
#[derive(Debug)]
pub struct Listing {
    /// Names exactly these bytes for ever, in the source's own terms; an interrupted ingest resumes if it is equal.
    pub revision: String,
    /// Entries in any order; parents may be missing.
    pub entries: Vec<Listed>,
    /// What was left out on purpose (sockets, devices), for the event log: path and reason.
    pub skipped: Vec<(String, String)>,
    /// Whether what was asked for is one file by its own address, and not a tree that happens to hold one: an archive
    /// given so is extracted.
    pub one_file: bool,
    /// Set where the bytes are to stay where they are and be served from there; each file then has a stamp ([`File::stamp`]).
    pub in_place: Option<Place>,
}

impl Listing {
    /// A tree of `entries` at `revision`, nothing left out.
    pub fn new(revision: String, entries: Vec<Listed>) -> Self {
        Self { revision, entries, skipped: Vec::new(), one_file: false, in_place: None }
    }
}

/// One listed entry.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Where it goes below the checkpoint's root.
    pub path: EntryPath,
    /// What it is.
    pub what: What,
}

/// What a listed or streamed entry is.
#[derive(Clone, Debug)]
pub enum What {
    /// A directory, listed so that it exists even if empty.
    Directory,
    /// A symbolic link with its target, verbatim.
    Symlink(Box<[u8]>),
    /// A regular file.
    File(File),
    /// The bytes and the executable bit of the regular file that came earlier under this path (a hard link). In streams only.
    SameAs(EntryPath),
}

/// A regular file at a source.
#[derive(Clone, Debug)]
pub struct File {
    /// How the source finds it again: a URL, a key, a path. Never shown; may hold a signature.
    pub locator: Arc<str>,
    /// Exact size in bytes; `None` where the source does not say.
    pub size: Option<u64>,
    /// Whether the executable bit is to be set.
    pub executable: bool,
    /// Whether ranges that do not begin at 0 can be read.
    pub ranges: bool,
    /// Digests that the source states, verified before the file is sealed.
    pub expected: Expected,
}

impl File {
    /// A file whose bytes come right behind its entry in a stream, with nothing stated but its size.
    pub fn streamed(size: Option<u64>, executable: bool) -> Self {
        Self { locator: Arc::default(), size, executable, ranges: false, expected: Expected::default() }
    }

    /// What tells that a file of this host is untouched.
    ///
    /// # Errors
    /// Internal for files of any other source.
    pub fn stamp(&self) -> Result<Stamp> {
        self.locator.parse::<beneath::Locator>().map(|locator| locator.stamp)
    }
}

/// Entries that arrive one after the other, each file's bytes right behind its entry.
#[async_trait]
pub trait EntryStream: Send {
    /// The next entry, skipping what is left of the present file; `None` at the end. Only after `None` is the
    /// stream known to be whole.
    async fn next_entry(&mut self) -> Result<Option<Listed>>;

    /// The next bytes of the present file, in runs as they came; `None` at its end.
    async fn next_bytes(&mut self) -> Result<Option<Vec<Bytes>>>;

    /// Size and digest of the present file where its bytes do not follow: an earlier attempt has sealed them.
    fn sealed(&self) -> Option<(u64, Digest)> {
        None
    }

    /// Where an earlier run of the daemon left the present file: its bytes follow from there on.
    fn begun(&self) -> Option<Begun> {
        None
    }

    /// The present entry as it is to be recorded, so that a later run of the daemon can go on behind it: its position from 0 on, and itself in
    /// the sender's terms. `None` where none can; where it is recorded, it may be given again.
    fn to_record(&self) -> Option<(u64, Vec<u8>)> {
        None
    }

    /// Who wants to hear how far entries are recorded.
    fn recorded(&self) -> Option<Arc<dyn Recorded>> {
        None
    }

    /// Said before the first entry is asked for, when the directory `flight` of the disk is there.
    async fn begin(&mut self, _disk: &Arc<Disk>, _flight: &str) {}

    /// Said once it is clear that nothing that comes will be recorded.
    fn is_not_recorded(&mut self) {}

    /// The revision, known once [`EntryStream::next_entry`] gave `None`; for streams usually a digest of what was sent. `tree` is what came of it.
    fn revision(&self, tree: &Manifest) -> String;

    /// Whether one file was sent by its own name, and not a tree that may hold one: if it is an archive, its members are
    /// wanted. Asked once the first entry is here.
    fn one_file(&self) -> bool {
        false
    }

    /// Whether the sender has said of [`one_file`](Self::one_file) that it is all there is.
    fn is_alone(&self) -> bool {
        false
    }
}

/// A large file that an earlier run of the daemon has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// Its number in the flight's directory.
    pub number: u64,
    /// How many bytes of its beginning are durable: whole fill units, or all.
    pub bytes: u64,
}

/// How much of an entry is here that an earlier run of the daemon has recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Here {
    /// Nothing but, perhaps, that it came.
    No,
    /// Some of a file, from its beginning.
    Begun(Begun),
    /// All of a file: size and digest.
    Sealed(u64, Digest),
}

/// What a large file of a stream is filled into.
#[derive(Debug)]
pub struct BeingFilled {
    /// The file, writable.
    pub file: std::fs::File,
    /// Its number in the flight's directory.
    pub number: u64,
    /// Its length in bytes.
    pub size: u64,
}

/// Hears how far the entries of a stream are recorded, each by its position ([`EntryStream::to_record`]).
pub trait Recorded: Send + Sync {
    /// All of it is.
    fn whole(&self, _position: u64) {}

    /// So many bytes of a file are, from its beginning.
    fn begun(&self, _position: u64, _bytes: u64) {}

    /// A large file is filled into this one: whoever keeps what comes may keep it there.
    fn fills(&self, _position: u64, _into: BeingFilled) {}

    /// Which of its bytes are kept there: they need not be written. What is not is written before this is asked again.
    fn kept(&self, _position: u64) -> Range<u64> {
        0..0
    }

    /// Waits until what follows from all that was said is kept. Blocks.
    fn settle(&self) {}

    /// The row of a file of which so many bytes are about to be recorded, where it is another by now; written with them.
    fn row(&self, _position: u64, _bytes: u64) -> Option<Vec<u8>> {
        None
    }
}

/// Begins a revision that equals no other: nobody vouches for the bytes.
const UNPINNED: &str = "unpinned:";

/// Whether a revision says nothing of whether the bytes are still the same.
pub fn is_never_met_again(revision: &str) -> bool {
    revision.strip_prefix("archive:").unwrap_or(revision).starts_with(UNPINNED)
}

/// Reason of a source that is no longer as it was when it was opened.
pub const SOURCE_CHANGED: &str = "SOURCE_CHANGED";

/// A checkpoint of nothing is somebody's mistake.
pub fn empty() -> Error {
    Error::invalid("EMPTY_SOURCE", "the source has no files and no directories").remedy("check the address or path")
}

/// The error of a source whose `what` is no longer as it was when it was opened; `how` says in which way.
fn source_changed(what: &str, how: &str) -> Error {
    Error::wrong_state(SOURCE_CHANGED, format!("reading {what}: {how} since it was opened"))
        .remedy("retry, which takes it as it is then")
        .fact("file", what)
}

//! Archives, read as a stream of members: zip, tar in its dialects and compressions, and single compressed files.
//!
//! Nothing is ever unpacked onto a file system. [`Members::read`] reads an archive on a blocking thread and
//! hands members and their bytes through a bounded channel; whoever takes them writes them wherever they belong. Tars and single
//! compressed files are read from a stream; a zip, whose directory is at its end, needs its bytes in any order ([`Archived`]).
//!
//! # What is an archive
//! The name decides ([`Format::of_name`]), the content must agree ([`Format::check`]). Weights are zips by content
//! (`.pt`, `.npz`, `.keras`, `.whl`) and are never taken apart. A name that promises an archive over content that is none is an
//! error rather than a file: people who name a file `x.tar.gz` expect a tree, and would find out in the job that they got none.
//! A tar may be compressed otherwise than its name says, as GNU tar has it.
//!
//! # What members may be
//! Regular files, directories, symbolic links, and hard links to a file that came before ([`What::SameAs`]). Absolute and
//! climbing names, links that lead out of the root, devices, FIFOs, names that occur twice, members below what is no directory
//! refuse the whole archive, naming the member ([`gate`] holds the rules). Owners, times, extended attributes, setuid and write
//! bits are dropped. Backslashes in names of zips stay as they are.
//!
//! # Hostile input
//! Nothing is allocated by a claimed size: what is held grows with bytes that came and stops at a limit of [`limits`](crate::limits).
//! Bombs stop at [`ARCHIVE_RATIO`](crate::limits::ARCHIVE_RATIO); members of a zip that share bytes are refused. Sizes are announced
//! before bytes, so that whoever takes them refuses what is too large before it comes; only the size of a single compressed file is
//! unknown until its end. What ends early is damaged, a tar without its end mark included: it cannot be told from one that lost files.
//!
//! # Errors
//! `ARCHIVE_DAMAGED` (corrupt), `ARCHIVE_REFUSED` and `ARCHIVE_BOMB` (invalid), `ARCHIVE_UNSUPPORTED`, `NOT_AN_ARCHIVE`,
//! `TOO_MANY_ENTRIES`. After an error nothing follows; members that came before it are not to be kept.

mod dictionaries;
mod format;
mod gate;
mod input;
mod pax;
mod runs;
mod sink;
mod tar;
mod tar_header;
mod zip;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::layout::ReadAt;
use crate::names::{EntryName, EntryPath};
use input::{Coding, Input, Meter};
use runs::{FileRange, Reader};
use sink::{Message, Sink};

pub use dictionaries::Dictionaries;
pub use format::Format;
pub use runs::Runs;

/// Messages under way between the thread and who takes them: with pieces of [`input::PIECE_BYTES`] 4 MiB at most, and what else is in the buffers that
/// their bytes came in.
const QUEUE_MESSAGES: usize = 8;

/// One member of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Where it goes below the root.
    pub path: EntryPath,
    /// What it is.
    pub what: What,
    /// Where it is in the archive.
    pub span: Span,
}

/// Where a member is in a tar that is not compressed, in bytes from its beginning; of members of others nothing is known ([`Span::is_known`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Where what tells of it begins: where the member before ended, 0 for the first.
    pub at: u64,
    /// Where its bytes begin.
    pub bytes_at: u64,
    /// Where the next header is.
    pub end: u64,
    /// Whether its bytes are there as they are, none left out and nothing between them.
    pub plain: bool,
}

impl Span {
    /// Whether the archive was one in which members have a place.
    pub const fn is_known(&self) -> bool {
        self.end > 0
    }
}

/// What an earlier reading has given of a tar.
#[derive(Debug, Default)]
pub struct Given {
    /// All members that came whole, in their order, and one of which some has come.
    pub members: Vec<Member>,
    /// Bytes that are still to come of the last of them, if any.
    pub left: u64,
}

impl Given {
    /// Where in the tar the reading goes on; 0 where nothing was given.
    pub fn until(&self) -> u64 {
        self.members.last().map_or(0, |Member { span, what, .. }| match what {
            What::File { size: Some(size), .. } if self.left > 0 => span.bytes_at + size.saturating_sub(self.left),
            _ => span.end,
        })
    }
}

/// What a member is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A directory.
    Directory,
    /// A symbolic link with its target, which stays inside the root.
    Symlink(Box<[u8]>),
    /// A regular file; its bytes follow.
    File {
        /// Exact size in bytes; `None` only for a single compressed file.
        size: Option<u64>,
        /// Whether any executable bit is set.
        executable: bool,
        /// Whether its bytes do not follow, because they are here already: see [`Here`].
        here: bool,
    },
    /// A hard link: the bytes and the executable bit of the regular file that came earlier under this path.
    SameAs(EntryPath),
}

/// The members of an archive as they are read. Dropping it ends the reading.
#[derive(Debug)]
pub struct Members {
    receiver: mpsc::Receiver<Result<Message>>,
    /// A member met while bytes of the one before were asked for.
    next: Option<Member>,
    ended: bool,
}

/// The bytes of an archive. What a reader fails with reaches who takes the members as it is, if it is an [`Error`] inside.
pub enum Archived {
    /// In order, each once. Not for zips.
    Stream(Box<dyn Runs + Send>),
    /// In any order, with how many there are.
    Random(Box<dyn ReadAt + Send>, u64),
}

/// Whether the file of this path and size is here from an earlier reading of the very same archive. Where an archive has a directory and is
/// read in any order, as zips are, such a member is not read again.
pub type Here = Box<dyn Fn(&EntryPath, u64) -> bool + Send>;

/// How far a tar that is not compressed was read: exactly, whatever was taken of its bytes ahead. Said on the thread that reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed {
    /// Up to the end of a member.
    Member(u64),
    /// So far into a plain file whose bytes begin there.
    Within {
        /// The present byte.
        at: u64,
        /// Where they begin.
        bytes_at: u64,
    },
}

/// Hears how far a tar was read.
pub type Watch = Box<dyn FnMut(Passed) + Send>;

/// What is known of an archive besides its bytes.
#[derive(Clone, Debug)]
pub struct About {
    /// What it is called.
    pub name: EntryName,
    /// What its name says it is.
    pub format: Format,
    /// Whether a single compressed file is executable.
    pub executable: bool,
}

impl Members {
    /// Begins to read an archive as what its name and content say it is. Needs a runtime.
    pub fn read(bytes: Archived, about: About, dictionaries: Dictionaries) -> Self {
        Self::read_rest(bytes, about, dictionaries, Box::new(|_, _| false))
    }

    /// The same without the bytes of what is `here`.
    pub fn read_rest(bytes: Archived, about: About, dictionaries: Dictionaries, here: Here) -> Self {
        Self::begin(about.name.clone(), here, move |sink| read(bytes, &about, &dictionaries, sink))
    }

    /// [`Members::read`] of a tar, which says how far it is.
    pub fn read_watched(bytes: Archived, about: About, dictionaries: Dictionaries, watch: Watch) -> Self {
        let here: Here = Box::new(|_, _| false);
        Self::begin(about.name.clone(), here, move |sink| {
            sink.watch(watch);
            read(bytes, &about, &dictionaries, sink)
        })
    }

    /// Goes on with a tar that is not compressed behind what was `given`, where `stream` begins ([`Given::until`]). What comes first are the bytes that
    /// are left of its last member. Needs a runtime.
    pub fn go_on(stream: Box<dyn Runs + Send>, name: EntryName, given: Given, watch: Watch) -> Self {
        Self::begin(name, Box::new(|_, _| false), move |sink| {
            sink.watch(watch);
            let reader = Reader::new(stream, Meter::default());
            let mut input = Input::whole(reader, Coding::Plain, &Dictionaries::within(0))?;
            input.begins_at(given.until());
            tar::go_on(&mut input, sink, given)
        })
    }

    fn begin(name: EntryName, here: Here, read: impl FnOnce(&mut Sink) -> Result<()> + Send + 'static) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE_MESSAGES);
        tokio::task::spawn_blocking(move || {
            let mut sink = Sink::new(sender, here);
            let outcome = read(&mut sink).and_then(|()| sink.end());
            if let Err(error) = outcome {
                let shown = crate::names::show_bytes(name.as_bytes());
                sink.fail(error.during(format!("extracting `{shown}`")));
            }
        });
        Self { receiver, next: None, ended: false }
    }

    /// The next member, skipping what is left of the present one; `None` once the whole archive was read and found sound.
    ///
    /// # Errors
    /// See the module's page.
    pub async fn next(&mut self) -> Result<Option<Member>> {
        while self.next.is_none() && !self.ended {
            self.next_bytes().await?;
        }
        Ok(self.next.take())
    }

    /// The next bytes of the present file, some at least, in runs; `None` at its end. Exactly as many as were announced.
    ///
    /// # Errors
    /// See the module's page.
    pub async fn next_bytes(&mut self) -> Result<Option<Vec<Bytes>>> {
        if self.next.is_some() || self.ended {
            return Ok(None);
        }
        match self.receiver.recv().await {
            Some(Ok(Message::Bytes(piece))) => return Ok(Some(piece)),
            Some(Ok(Message::Member(member))) => self.next = Some(member),
            Some(Ok(Message::End)) => self.ended = true,
            Some(Err(error)) => return Err(error),
            None => return Err(Error::internal("reading an archive ended early")),
        }
        Ok(None)
    }
}

fn read(bytes: Archived, about: &About, dictionaries: &Dictionaries, sink: &mut Sink) -> Result<()> {
    match bytes {
        Archived::Random(bytes, size) if about.format == Format::Zip => {
            let range = Box::new(FileRange::new(bytes.as_ref(), 0, size));
            about.format.check(input::start_of(&mut Reader::new(range, Meter::default()))?)?;
            zip::read(bytes.as_ref(), size, dictionaries, sink)
        }
        Archived::Random(bytes, size) => {
            read_stream(Box::new(FileRange::new(bytes.as_ref(), 0, size)), about, dictionaries, sink)
        }
        Archived::Stream(stream) => read_stream(stream, about, dictionaries, sink),
    }
}

fn read_stream<'a>(
    stream: Box<dyn Runs + 'a>,
    about: &About,
    dictionaries: &Dictionaries,
    sink: &mut Sink,
) -> Result<()> {
    let mut reader = Reader::new(stream, Meter::default());
    let coding = about.format.check(input::start_of(&mut reader)?)?;
    let mut input = Input::whole(reader, coding, dictionaries)?;
    match about.format {
        Format::Zip => Err(Error::internal("a zip was given as a stream")),
        Format::Tar => tar::read(&mut input, sink, coding == Coding::Plain),
        Format::Single(_) => {
            sink.file(about.format.content_name(&about.name), None, about.executable)?;
            loop {
                let piece = input.piece(u64::MAX)?;
                if piece.is_empty() {
                    return Ok(());
                }
                sink.bytes(piece)?;
            }
        }
    }
}

/// The archive breaks a rule; `what` names the member.
fn refused(what: impl Into<String>) -> Error {
    Error::invalid("ARCHIVE_REFUSED", what).remedy("pack it again without this member")
}

/// The archive's bytes are not those of an archive, or not all of them.
fn damaged(what: impl Into<String>) -> Error {
    Error::corrupt("ARCHIVE_DAMAGED", what).remedy("fetch or pack it again")
}

/// The archive is in order and uses what is not read here.
fn unsupported(what: impl Into<String>) -> Error {
    Error::new(crate::error::Kind::Unsupported, "ARCHIVE_UNSUPPORTED", what).remedy("pack it again as plain tar or zip")
}

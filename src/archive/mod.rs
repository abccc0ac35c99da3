//! Archives, read as a stream of members: zip, tar in its dialects and compressions, and single compressed files.
//!
//! Nothing is ever unpacked onto a file system. [`Members::read`] reads an archive file of this host on a blocking thread and
//! hands members and their bytes through a bounded channel; whoever takes them writes them wherever they belong.
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

mod format;
mod gate;
mod input;
mod pax;
mod sink;
mod tar;
mod tar_header;
mod zip;

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::names::{EntryName, EntryPath};
use input::Input;
use sink::{Message, Sink};

pub use format::Format;

/// Messages under way between the thread and who takes them: with pieces of [`input::PIECE_BYTES`], 4 MiB at most.
const QUEUE_MESSAGES: usize = 8;

/// One member of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Where it goes below the root.
    pub path: EntryPath,
    /// What it is.
    pub what: What,
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

impl Members {
    /// Begins to read `file`, called `name`, as what its name and content say it is. Needs a runtime.
    pub fn read(file: File, name: EntryName, format: Format) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE_MESSAGES);
        tokio::task::spawn_blocking(move || {
            let mut sink = Sink::new(sender);
            let outcome = read(&file, &name, format, &mut sink).and_then(|()| sink.end());
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

    /// The next bytes of the present file; `None` at its end. Exactly as many as were announced.
    ///
    /// # Errors
    /// See the module's page.
    pub async fn next_bytes(&mut self) -> Result<Option<Bytes>> {
        if self.next.is_some() || self.ended {
            return Ok(None);
        }
        match self.receiver.recv().await {
            Some(Ok(Message::Bytes(bytes))) => return Ok(Some(bytes)),
            Some(Ok(Message::Member(member))) => self.next = Some(member),
            Some(Ok(Message::End)) => self.ended = true,
            Some(Err(error)) => return Err(error),
            None => return Err(Error::internal("reading an archive ended early")),
        }
        Ok(None)
    }
}

fn read(file: &File, name: &EntryName, format: Format, sink: &mut Sink) -> Result<()> {
    let coding = format.check(file)?;
    match format {
        Format::Zip => zip::read(file, sink),
        Format::Tar => tar::read(&mut Input::whole(file, coding)?, sink),
        Format::Single(_) => {
            let metadata = file.metadata().map_err(input::fault)?;
            let mut input = Input::whole(file, coding)?;
            sink.file(format.content_name(name), None, metadata.mode() & 0o111 != 0)?;
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

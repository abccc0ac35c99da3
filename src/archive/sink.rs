//! Where members go: past the gate into the channel. Blocks while the channel is full.

use bytes::Bytes;
use tokio::sync::mpsc::Sender;

use super::gate::{Gate, Linked};
use super::{Here, Member, Passed, Span, Watch, What};
use crate::error::{Error, Kind, Result};
use crate::names::EntryPath;

/// What passes the channel.
#[derive(Debug)]
pub(super) enum Message {
    /// The next member.
    Member(Member),
    /// Bytes of the present file, some at least, in runs.
    Bytes(Vec<Bytes>),
    /// The archive is whole.
    End,
}

/// The channel's inner end.
pub(super) struct Sink {
    sender: Sender<Result<Message>>,
    gate: Gate,
    here: Here,
    /// Of the next member.
    span: Span,
    watch: Option<Watch>,
}

impl Sink {
    pub(super) fn new(sender: Sender<Result<Message>>, here: Here) -> Self {
        Self { sender, gate: Gate::default(), here, span: Span::default(), watch: None }
    }

    /// Who is to hear of what is [passed](Sink::passed).
    pub(super) fn watch(&mut self, watch: Watch) {
        self.watch = Some(watch);
    }

    /// Says how far it was read.
    pub(super) fn passed(&mut self, passed: Passed) {
        if let Some(watch) = &mut self.watch {
            watch(passed);
        }
    }

    /// Says where the next member is.
    pub(super) fn place(&mut self, span: Span) {
        self.span = span;
    }

    /// Lets pass what an earlier reading has handed on.
    pub(super) fn given(&mut self, member: &Member) -> Result<()> {
        let name = member.path.as_bytes();
        match &member.what {
            What::Directory => self.gate.directory(name).map(drop),
            What::Symlink(target) => self.gate.symlink(name, target).map(drop),
            What::File { .. } => self.gate.file(name).map(drop),
            What::SameAs(target) => self.gate.hard_link(name, target.as_bytes()).map(drop),
        }
    }

    /// A directory; the root itself is not handed on.
    pub(super) fn directory(&mut self, name: &[u8]) -> Result<()> {
        match self.gate.directory(name)? {
            Some(path) => self.member(path, What::Directory),
            None => Ok(()),
        }
    }

    /// A regular file; its bytes are to follow.
    pub(super) fn file(&mut self, name: &[u8], size: Option<u64>, executable: bool) -> Result<()> {
        let path = self.gate.file(name)?;
        self.member(path, What::File { size, executable, here: false })
    }

    /// Whether a regular file of this name and size is here, so that its bytes need not follow.
    pub(super) fn is_here(&self, name: &[u8], size: u64) -> bool {
        EntryPath::new(name).is_ok_and(|path| (self.here)(&path, size))
    }

    /// A regular file that [`Sink::is_here`]; no bytes are to follow.
    pub(super) fn file_here(&mut self, name: &[u8], size: u64, executable: bool) -> Result<()> {
        let path = self.gate.file(name)?;
        if !(self.here)(&path, size) {
            return Err(Error::internal(format!("`{path}` was taken for one that is here")));
        }
        self.member(path, What::File { size: Some(size), executable, here: true })
    }

    /// A symbolic link.
    pub(super) fn symlink(&mut self, name: &[u8], target: &[u8]) -> Result<()> {
        let path = self.gate.symlink(name, target)?;
        self.member(path, What::Symlink(target.into()))
    }

    /// A hard link to a file that came before.
    pub(super) fn same_as(&mut self, name: &[u8], target: &[u8]) -> Result<()> {
        let (path, linked) = self.gate.hard_link(name, target)?;
        let what = match linked {
            Linked::File(target) => What::SameAs(target),
            Linked::Symlink(target) => What::Symlink(target),
        };
        self.member(path, what)
    }

    /// Bytes of the present file, some at least.
    pub(super) fn bytes(&mut self, piece: Vec<Bytes>) -> Result<()> {
        self.send(Message::Bytes(piece))
    }

    /// The archive is read to its end: the last judgement.
    pub(super) fn end(&mut self) -> Result<()> {
        self.gate.end()?;
        self.send(Message::End)
    }

    /// The archive is at fault; whether anybody still listens does not matter.
    pub(super) fn fail(self, error: Error) {
        let _ = self.sender.blocking_send(Err(error));
    }

    fn member(&mut self, path: crate::names::EntryPath, what: What) -> Result<()> {
        self.send(Message::Member(Member { path, what, span: self.span }))
    }

    fn send(&mut self, message: Message) -> Result<()> {
        let gone = |_| Error::new(Kind::Cancelled, "ARCHIVE_GIVEN_UP", "nobody reads it any more");
        self.sender.blocking_send(Ok(message)).map_err(gone)
    }
}

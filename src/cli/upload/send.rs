//! Reading a tree into messages.
//!
//! A file is stated with the size it has when opened, and exactly that is sent; a file that is another afterwards fails the upload by
//! name, since what was sent may be neither the one nor the other. What the daemon has already ([`Kept`]) is looked at again and not sent.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Take};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

use super::kept::Kept;
use super::tree::{self, Entry, EntryKind};
use crate::control::wire;
use crate::control::wire::upload_checkpoint_request::Message;
use crate::control::wire::upload_entry::Kind as SentKind;
use crate::error::{Error, Kind, Result};

/// Bytes of a file in one message: large enough for its framing to be nothing, small enough to wait in fours.
const DATA_BYTES: u64 = 1 << 20;

/// Why sending stopped when nobody takes the messages any more: the daemon has answered, and its answer says why.
const NOT_TAKEN: &str = "NOT_TAKEN";

/// The sending half of an upload; blocks, so it lives on a thread of its own.
pub(super) struct Sender {
    out: mpsc::Sender<wire::UploadCheckpointRequest>,
    bytes_sent: Arc<AtomicU64>,
}

impl Sender {
    /// Sends to `out`; `bytes_sent` is told how many bytes of files are there or on their way.
    pub(super) fn new(out: mpsc::Sender<wire::UploadCheckpointRequest>, bytes_sent: Arc<AtomicU64>) -> Self {
        Self { out, bytes_sent }
    }

    /// Sends `start`, everything below `root` that is not `kept`, `finish`. Blocks while the connection is busy. Returns well when nobody
    /// takes the messages any more.
    ///
    /// # Errors
    /// What cannot be read; wrong state for a file that changed meanwhile, or a tree that is not the one of which some is kept.
    pub(super) fn send(&self, start: wire::UploadStart, root: &Path, kept: Kept) -> Result<()> {
        match self.send_rest(start, root, kept) {
            Err(error) if error.reason() == NOT_TAKEN => Ok(()),
            sent => sent,
        }
    }

    fn send_rest(&self, start: wire::UploadStart, root: &Path, mut kept: Kept) -> Result<()> {
        self.message(Message::Start(start))?;
        if kept.is_all() {
            return Ok(());
        }
        self.note(&kept);
        tree::walk(root, &mut |entry| self.entry(&entry, &mut kept))?;
        kept.end(root)?;
        self.message(Message::Finish(wire::UploadFinish {}))
    }

    fn entry(&self, entry: &Entry, kept: &mut Kept) -> Result<()> {
        let place = &entry.place;
        let fault = |error| Error::io("reading", place, error);
        let mut content = None;
        let kind = match entry.kind {
            EntryKind::Directory => SentKind::Directory(wire::UploadDirectory {}),
            EntryKind::Symlink => {
                let target = std::fs::read_link(place).map_err(fault)?;
                SentKind::Symlink(target.into_os_string().into_vec())
            }
            // It is not opened again: the tree may have very many.
            EntryKind::File(_) if kept.has_next_whole() => {
                SentKind::File(stated(&std::fs::symlink_metadata(place).map_err(fault)?))
            }
            EntryKind::File(_) => {
                let (file, seen) = open(place)?;
                let kind = SentKind::File(stated(&seen));
                content = Some((file, seen));
                kind
            }
        };
        let sent = wire::UploadEntry { path: entry.path.as_bytes().to_vec(), kind: Some(kind) };
        let there = kept.meet(&sent, place)?;
        match there {
            Some(_) => self.note(kept),
            None => self.message(Message::Entry(sent))?,
        }
        match content {
            Some((file, seen)) => self.content(place, file, &seen, there.unwrap_or(0)),
            None => Ok(()),
        }
    }

    /// Counts what is there, once it was met.
    fn note(&self, kept: &Kept) {
        if let Some(bytes) = kept.bytes() {
            self.bytes_sent.store(bytes, Ordering::Relaxed);
        }
    }

    /// Sends the content of a file from byte `from` on.
    fn content(&self, place: &Path, mut file: File, seen: &Metadata, from: u64) -> Result<()> {
        let fault = |error| Error::io("reading", place, error);
        if from > 0 {
            file.seek(SeekFrom::Start(from)).map_err(fault)?;
        }
        let mut left = seen.len().saturating_sub(from);
        let mut content = file.take(left);
        while left > 0 {
            let data = next_data(&mut content, left.min(DATA_BYTES)).map_err(fault)?;
            let length = data.len() as u64;
            if length == 0 {
                return Err(changed(place));
            }
            left -= length;
            self.message(Message::Data(data.into()))?;
            self.bytes_sent.fetch_add(length, Ordering::Relaxed);
        }
        let mut file = content.into_inner();
        let more = file.read(&mut [0]).map_err(fault)?;
        let now = file.metadata().map_err(fault)?;
        let state = |seen: &Metadata| (seen.len(), seen.mtime(), seen.mtime_nsec());
        if more == 0 && state(&now) == state(seen) { Ok(()) } else { Err(changed(place)) }
    }

    fn message(&self, message: Message) -> Result<()> {
        let request = wire::UploadCheckpointRequest { message: Some(message) };
        self.out.blocking_send(request).map_err(|_| Error::new(Kind::Cancelled, NOT_TAKEN, "sending the upload"))
    }
}

/// What is said of a file beforehand.
fn stated(seen: &Metadata) -> wire::UploadFile {
    let modified_unix_ns = seen.mtime().saturating_mul(1_000_000_000).saturating_add(seen.mtime_nsec());
    wire::UploadFile { size_bytes: seen.len(), executable: seen.mode() & 0o111 != 0, modified_unix_ns }
}

/// Up to `length` bytes; none only at the end of the file. `length` is bounded by [`DATA_BYTES`].
fn next_data(content: &mut Take<File>, length: u64) -> std::io::Result<Vec<u8>> {
    let mut data = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
    content.by_ref().take(length).read_to_end(&mut data)?;
    Ok(data)
}

/// Opens what was listed as a file: never through a link put there since, never waiting for a pipe put there since.
fn open(place: &Path) -> Result<(File, Metadata)> {
    let fault = |error| Error::io("reading", place, error);
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(place).map_err(fault)?;
    let seen = file.metadata().map_err(fault)?;
    if seen.is_file() { Ok((file, seen)) } else { Err(changed(place)) }
}

/// That the file at `place` is not what was, or is to be, sent.
pub(super) fn changed(place: &Path) -> Error {
    Error::wrong_state("FILE_CHANGED", format!("{} changed while it was sent", place.display()))
        .remedy("upload it again when nothing writes to it")
        .fact("path", place.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sender() -> (Sender, mpsc::Receiver<wire::UploadCheckpointRequest>) {
        let (out, messages) = mpsc::channel(64);
        (Sender::new(out, Arc::default()), messages)
    }

    fn sent(mut messages: mpsc::Receiver<wire::UploadCheckpointRequest>) -> Vec<Message> {
        std::iter::from_fn(|| messages.try_recv().ok()).filter_map(|request| request.message).collect()
    }

    #[test]
    fn a_file_is_sent_in_pieces_of_one_mebibyte() {
        let root = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..5 << 19).map(|at: u32| at.to_le_bytes()[1]).collect();
        std::fs::write(root.path().join("f"), &content).unwrap();
        let (sender, messages) = sender();
        sender.send(wire::UploadStart::default(), root.path(), Kept::default()).unwrap();
        let bytes_sent = sender.bytes_sent.load(Ordering::Relaxed);
        drop(sender);
        let sent = sent(messages);
        let data: Vec<_> =
            sent.iter().filter_map(|m| if let Message::Data(data) = m { Some(data) } else { None }).collect();
        assert_eq!(data.iter().map(|data| data.len()).collect::<Vec<_>>(), [1 << 20, 1 << 20, 1 << 19]);
        assert_eq!(data.iter().flat_map(|data| data.iter().copied()).collect::<Vec<_>>(), content);
        assert_eq!(bytes_sent, content.len() as u64);
        assert!(matches!(sent.first(), Some(Message::Start(_))));
        assert!(matches!(sent.last(), Some(Message::Finish(_))));
    }

    #[test]
    fn a_file_that_shrinks_grows_or_is_rewritten_is_an_error_by_name() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("f");
        for after in ["1234", "12345678", "abcdef"] {
            std::fs::write(&place, "123456").unwrap();
            let past = std::time::SystemTime::UNIX_EPOCH;
            File::options().write(true).open(&place).unwrap().set_modified(past).unwrap();
            let (file, seen) = open(&place).unwrap();
            std::fs::write(&place, after).unwrap();
            let (sender, _messages) = sender();
            let error = sender.content(&place, file, &seen, 0).unwrap_err();
            assert_eq!((error.kind(), error.reason()), (Kind::WrongState, "FILE_CHANGED"), "{after}");
        }
    }

    #[test]
    fn a_link_or_pipe_put_in_the_place_of_a_file_is_not_read() {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.path().join("link")).unwrap();
        assert!(open(&root.path().join("link")).is_err());
        nix::unistd::mkfifo(&root.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(open(&root.path().join("pipe")).unwrap_err().reason(), "FILE_CHANGED");
    }

    #[test]
    fn nobody_taking_the_messages_is_no_fault_of_reading() {
        let (sender, messages) = sender();
        drop(messages);
        assert!(sender.send(wire::UploadStart::default(), Path::new("/"), Kept::default()).is_ok());
    }
}

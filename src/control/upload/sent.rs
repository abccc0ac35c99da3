//! What clients send as a stream of entries, whichever of their calls brings it.
//!
//! That of an upload which a dead daemon had under way begins with what is kept of it: nobody sends that again.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use prost::Message as _;

use super::Messages;
use super::under_way::{Turn, Upload, broken_off};
use crate::control::wire;
use crate::control::wire::upload_checkpoint_request::Message;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits;
use crate::manifest::Manifest;
use crate::names::EntryPath;
use crate::source::{Begun, EntryStream, File, Here, Listed, What};

/// The first message of a call.
pub(super) async fn first(messages: &mut Messages) -> Result<Option<Message>> {
    match messages.message().await {
        Ok(Some(request)) => request.message.map(Some).ok_or_else(|| protocol("a message is empty")),
        Ok(None) => Ok(None),
        Err(status) => Err(broken_off(status.message())),
    }
}

pub(super) fn protocol(what: &str) -> Error {
    Error::invalid("BAD_UPLOAD", format!("the upload does not follow the protocol: {what}"))
}

/// See the module's page.
pub(super) struct Sent {
    upload: Arc<Upload>,
    /// The call that is listened to.
    turn: Option<Turn>,
    /// What is kept and was not given yet.
    kept: std::vec::IntoIter<(Listed, Here)>,
    /// How much of the present entry is kept.
    here: Here,
    /// Bytes of the present file that are still to come.
    present: Option<u64>,
    /// The present entry as it came, where it is to be recorded.
    row: Option<(u64, Vec<u8>)>,
    /// Entries that were given.
    entries: u64,
    /// What they take as they came, all of them.
    listed_bytes: usize,
    /// Whether it is one file that is to be extracted if it is an archive.
    one_file: bool,
}

#[async_trait]
impl EntryStream for Sent {
    async fn next_entry(&mut self) -> Result<Option<Listed>> {
        while self.next_bytes().await?.is_some() {}
        if let Some((listed, here)) = self.kept.next() {
            (self.here, self.row) = (here, None);
            self.entries += 1;
            self.present = match (&listed.what, here) {
                (What::File(file), Here::Begun(begun)) => file.size.map(|size| size.saturating_sub(begun.bytes)),
                _ => None,
            };
            return Ok(Some(listed));
        }
        self.here = Here::No;
        match self.next().await? {
            Message::Entry(entry) => self.entry(&entry).map(Some),
            Message::Finish(_) => Ok(None),
            Message::Data(_) => Err(protocol("more data was sent than the file has")),
            Message::Start(_) => Err(protocol("`start` was sent twice")),
        }
    }

    async fn next_bytes(&mut self) -> Result<Option<Vec<Bytes>>> {
        let Some(left) = self.present.filter(|left| *left > 0) else {
            self.present = None;
            return Ok(None);
        };
        match self.next().await? {
            Message::Data(data) if data.len() as u64 <= left => {
                self.present = Some(left - data.len() as u64);
                Ok(Some(vec![data]))
            }
            Message::Data(_) => Err(protocol("more data was sent than the file has")),
            Message::Start(_) | Message::Entry(_) | Message::Finish(_) => Err(protocol("a file was cut short")),
        }
    }

    fn sealed(&self) -> Option<(u64, Digest)> {
        if let Here::Sealed(size, digest) = self.here { Some((size, digest)) } else { None }
    }

    fn begun(&self) -> Option<Begun> {
        if let Here::Begun(begun) = self.here { Some(begun) } else { None }
    }

    fn to_record(&self) -> Option<(u64, Vec<u8>)> {
        self.row.clone()
    }

    /// Of what came of it: nobody has all bytes again as they were sent.
    fn revision(&self, tree: &Manifest) -> String {
        format!("sent:{}", tree.digest())
    }

    fn one_file(&self) -> bool {
        self.one_file
    }

    fn is_alone(&self) -> bool {
        self.one_file
    }
}

impl Sent {
    /// What comes of `upload`, behind what is `kept` of it.
    pub(super) fn new(upload: Arc<Upload>, one_file: bool, kept: Vec<(Listed, Here)>) -> Self {
        let listed_bytes = kept.iter().map(|(listed, _)| listed.path.as_bytes().len()).sum();
        let kept = kept.into_iter();
        Self { upload, turn: None, kept, here: Here::No, present: None, row: None, entries: 0, listed_bytes, one_file }
    }

    /// The next message, from whichever call; waits for as long as there is none.
    async fn next(&mut self) -> Result<Message> {
        loop {
            self.turn = self.upload.present_turn(self.turn.take())?;
            let Some(turn) = &mut self.turn else {
                self.upload.turned().await;
                continue;
            };
            let heard = tokio::select! {
                biased;
                () = self.upload.turned() => continue,
                heard = turn.messages.message() => heard,
            };
            let ended = match heard {
                Ok(Some(request)) => {
                    let message = request.message.ok_or_else(|| protocol("a message is empty"))?;
                    if self.upload.take(turn, &message) {
                        return Ok(message);
                    }
                    continue;
                }
                Ok(None) => "it ended without `finish`",
                Err(_) => "the connection broke",
            };
            if let Some(turn) = self.turn.take() {
                self.upload.lost(turn, ended);
            }
        }
    }

    fn entry(&mut self, entry: &wire::UploadEntry) -> Result<Listed> {
        let listed = listed(entry)?;
        if let What::File(file) = &listed.what {
            self.present = file.size;
        }
        // They are kept until the end, and what is recorded of them is nobody's to pay for.
        self.listed_bytes += entry.encoded_len();
        if self.listed_bytes > limits::MANIFEST_BYTES {
            let most = limits::MANIFEST_BYTES >> 20;
            return Err(Error::no_space("TOO_MANY_ENTRIES", format!("the entries sent take more than {most} MiB"))
                .remedy("upload it in parts, or as an archive"));
        }
        self.row = self.upload.resumes().then(|| (self.entries, entry.encode_to_vec()));
        self.entries += 1;
        Ok(listed)
    }
}

/// What an entry says.
///
/// # Errors
/// A path that none can have; `BAD_UPLOAD`.
pub(super) fn listed(entry: &wire::UploadEntry) -> Result<Listed> {
    use wire::upload_entry::Kind as Sort;
    let path = EntryPath::new(entry.path.as_slice())?;
    let what = match &entry.kind {
        Some(Sort::Directory(_)) => What::Directory,
        Some(Sort::Symlink(target)) if target.len() > limits::ENTRY_PATH_BYTES => {
            let most = limits::ENTRY_PATH_BYTES;
            return Err(Error::invalid(
                "BAD_SYMLINK",
                format!("the target of the link `{path}` is longer than {most} bytes"),
            ));
        }
        Some(Sort::Symlink(target)) => What::Symlink(target.clone().into()),
        Some(Sort::File(file)) => What::File(File::streamed(Some(file.size_bytes), file.executable)),
        None => return Err(protocol("an entry has no kind")),
    };
    Ok(Listed { path, what })
}

//! What clients send as a stream of entries, whichever of their calls brings it.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::Messages;
use super::under_way::{Turn, Upload, broken_off};
use crate::control::wire;
use crate::control::wire::upload_checkpoint_request::Message;
use crate::digest::Digester;
use crate::error::{Error, Result};
use crate::names::EntryPath;
use crate::source::{EntryStream, File, Listed, What};

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
    /// Bytes of the present file that are still to come.
    present: Option<u64>,
    /// Everything sent, for the revision.
    sent: Digester,
    /// Whether it is one file that is to be extracted if it is an archive.
    one_file: bool,
}

#[async_trait]
impl EntryStream for Sent {
    async fn next_entry(&mut self) -> Result<Option<Listed>> {
        while self.next_bytes().await?.is_some() {}
        match self.next().await? {
            Message::Entry(entry) => self.entry(entry).map(Some),
            Message::Finish(_) => Ok(None),
            Message::Data(_) => Err(protocol("more data was sent than the file has")),
            Message::Start(_) => Err(protocol("`start` was sent twice")),
        }
    }

    async fn next_bytes(&mut self) -> Result<Option<Bytes>> {
        let Some(left) = self.present.filter(|left| *left > 0) else {
            self.present = None;
            return Ok(None);
        };
        match self.next().await? {
            Message::Data(data) if data.len() as u64 <= left => {
                self.present = Some(left - data.len() as u64);
                self.sent.update(&data);
                Ok(Some(data))
            }
            Message::Data(_) => Err(protocol("more data was sent than the file has")),
            Message::Start(_) | Message::Entry(_) | Message::Finish(_) => Err(protocol("a file was cut short")),
        }
    }

    fn revision(&self) -> String {
        format!("sent:{}", self.sent.finish())
    }

    fn one_file(&self) -> bool {
        self.one_file
    }
}

impl Sent {
    /// What comes of `upload`.
    pub(super) fn new(upload: Arc<Upload>, one_file: bool) -> Self {
        Self { upload, turn: None, present: None, sent: Digester::new(), one_file }
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

    fn entry(&mut self, entry: wire::UploadEntry) -> Result<Listed> {
        use wire::upload_entry::Kind as Sort;
        self.sent.update(&entry.path);
        let path = EntryPath::new(entry.path)?;
        let what = match entry.kind {
            Some(Sort::Directory(_)) => What::Directory,
            Some(Sort::Symlink(target)) => What::Symlink(target.into()),
            Some(Sort::File(file)) => {
                self.present = Some(file.size_bytes);
                What::File(File::streamed(Some(file.size_bytes), file.executable))
            }
            None => return Err(protocol("an entry has no kind")),
        };
        Ok(Listed { path, what })
    }
}

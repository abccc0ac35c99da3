//! `UploadCheckpoint`: the client's messages as a stream of entries.

use async_trait::async_trait;
use bytes::Bytes;
use tonic::Streaming;

use super::caller::Caller;
use super::checkpoints::{insert, new_record};
use super::wire::upload_checkpoint_request::Message;
use super::{Floors, wire};
use crate::catalog::checkpoints::{self as rows, Origin, Record, State};
use crate::digest::Digester;
use crate::error::{Error, Kind, Result};
use crate::ingest::{draining, plan};
use crate::names::EntryPath;
use crate::source::{EntryStream, File, Listed, SourceKind, What};

/// Receives a whole checkpoint; the record, ready.
pub(super) async fn receive(
    floors: &Floors,
    mut messages: Streaming<wire::UploadCheckpointRequest>,
    caller: Caller,
) -> Result<wire::Checkpoint> {
    floors.admit()?;
    let Some(Message::Start(start)) = next(&mut messages).await? else {
        return Err(protocol("the first message must be `start`"));
    };
    plan::admit(start.bytes_total, floors.store.available_bytes()?).map_err(|error| caller.may_know(error))?;
    let options = start.options.into_iter().collect();
    let origin = Origin { kind: SourceKind::Upload.to_string(), uri: start.origin, options };
    let one_file = start.one_file && origin.options.get("extract").is_none_or(|value| value != "false");
    let owner = caller.owner_of_new(start.owner, start.public)?;
    let record = new_record(start.id, start.name, owner, start.public, origin)?;
    // In a task of its own: a sender that goes away drops this call, and what it left must go all the same.
    let floors = floors.clone();
    let sent = Sent::new(messages, one_file);
    tokio::spawn(async move { fill(&floors, record, sent, start.bytes_total, &caller).await })
        .await
        .map_err(|error| Error::internal("an upload ended early").because(error))?
}

async fn fill(
    floors: &Floors,
    record: Record,
    sent: Sent,
    bytes_total: u64,
    caller: &Caller,
) -> Result<wire::Checkpoint> {
    let (record, is_new) = insert(floors, record, caller.sees()).await?;
    if !is_new {
        return match record.state {
            State::Ready => floors.show(record, caller).await,
            _ => Err(Error::wrong_state("UPLOAD_UNDER_WAY", format!("`{}` is being uploaded already", record.name))
                .remedy("wait for it, or remove it and upload it again")),
        };
    }
    let outcome = tokio::select! {
        outcome = floors.ingests.fill_from_stream(&record, Box::new(sent), bytes_total) => outcome,
        () = floors.ingests.until_paused() => {
            Err(draining().during("receiving an upload").remedy("upload it again when ckptd has been restarted"))
        }
    };
    match outcome {
        Ok(()) => floors.show(floors.find(record.id, caller).await?, caller).await,
        Err(error) => {
            let id = record.id.clone();
            floors.store.catalog().write(move |tx| rows::set_state(tx, &id, State::Removing, None)).await?;
            floors.remove_marked(&record, record.id.clone()).await?;
            Err(caller.may_know(error))
        }
    }
}

async fn next(messages: &mut Streaming<wire::UploadCheckpointRequest>) -> Result<Option<Message>> {
    match messages.message().await {
        Ok(Some(request)) => request.message.map(Some).ok_or_else(|| protocol("a message is empty")),
        Ok(None) => Ok(None),
        Err(status) => {
            Err(Error::new(Kind::Cancelled, "UPLOAD_BROKEN", format!("the upload broke off: {}", status.message()))
                .remedy("upload it again"))
        }
    }
}

fn protocol(what: &str) -> Error {
    Error::invalid("BAD_UPLOAD", format!("the upload does not follow the protocol: {what}"))
}

/// What the client sends.
struct Sent {
    messages: Streaming<wire::UploadCheckpointRequest>,
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
        match next(&mut self.messages).await? {
            Some(Message::Entry(entry)) => self.entry(entry).map(Some),
            Some(Message::Finish(_)) => Ok(None),
            Some(Message::Data(_)) => Err(protocol("more data was sent than the file has")),
            Some(Message::Start(_)) => Err(protocol("`start` was sent twice")),
            None => Err(protocol("it ended without `finish`")),
        }
    }

    async fn next_bytes(&mut self) -> Result<Option<Bytes>> {
        let Some(left) = self.present.filter(|left| *left > 0) else {
            self.present = None;
            return Ok(None);
        };
        match next(&mut self.messages).await? {
            Some(Message::Data(data)) if data.len() as u64 <= left => {
                self.present = Some(left - data.len() as u64);
                self.sent.update(&data);
                Ok(Some(data))
            }
            Some(Message::Data(_)) => Err(protocol("more data was sent than the file has")),
            Some(_) => Err(protocol("a file was cut short")),
            None => Err(protocol("it ended in the middle of a file")),
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
    fn new(messages: Streaming<wire::UploadCheckpointRequest>, one_file: bool) -> Self {
        Self { messages, present: None, sent: Digester::new(), one_file }
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

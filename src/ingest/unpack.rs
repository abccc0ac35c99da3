//! One archive that was sent as a file: its members take its place.
//!
//! Whether it is all that was sent is known only when the next entry is asked for, and a zip's directory is at its end. So
//! its bytes are spooled into a file of the flight, which has no name any more while it is used: it is gone with the process, and with
//! whoever fills; after a restart it is sent anew. Was it not all, the file is given as it came, and what follows behind it.

use std::fs::File as OpenFile;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use bytes::Bytes;

use super::Shared;
use super::fetch::blocking;
use super::quota::Growth;
use crate::archive::{About, Archived, Format, Members};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::Manifest;
use crate::names::EntryName;
use crate::source::{Begun, EntryStream, File, Listed, What, listed_member};

/// Bytes read back from the spool at a time.
const READ_BYTES: u64 = 1 << 20;

/// See the module's page.
pub(super) struct Unpacked {
    shared: Arc<Shared>,
    flight: String,
    sent: Box<dyn EntryStream>,
    state: State,
    /// Whether the beginning was spooled: no later run of the daemon has it, so none goes on behind it.
    spooled: bool,
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
}

struct Spool {
    file: Arc<OpenFile>,
    size: u64,
}

impl Unpacked {
    /// `sent` for the flight `flight`, whose directory is there.
    pub(super) fn new(shared: Arc<Shared>, flight: &str, sent: Box<dyn EntryStream>) -> Self {
        Self { shared, flight: flight.to_owned(), sent, state: State::First, spooled: false }
    }

    async fn first(&mut self) -> Result<Option<Listed>> {
        self.state = State::Plain;
        let Some(first) = self.sent.next_entry().await? else { return Ok(None) };
        let Some((about, size)) = self.archive(&first) else { return Ok(Some(first)) };
        self.spooled = true;
        let spool = self.spool(size).await?;
        match self.sent.next_entry().await? {
            Some(behind) => {
                self.state = State::Again { spool, at: 0, behind: Some(behind) };
                Ok(Some(first))
            }
            None => {
                let Spool { file, size } = spool;
                let file = Arc::into_inner(file).ok_or_else(|| Error::internal("the spool is still written to"))?;
                let dictionaries = self.shared.settings.dictionaries.clone();
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
        let name = EntryName::new(first.path.as_bytes()).ok()?;
        let format = Format::of_name(&name).filter(|_| self.sent.one_file())?;
        Some((About { name, format, executable }, size))
    }

    async fn spool(&mut self, size: u64) -> Result<Spool> {
        Growth::new(&self.shared, &self.flight).reach(size).await?;
        self.shared.admit_more(size).await?;
        let number = self.shared.next_number.fetch_add(1, Ordering::Relaxed);
        let (disk, flight) = (self.shared.store.disk().clone(), self.flight.clone());
        let file = blocking(move || {
            let (file, _) = disk.open_filling(&flight, number, size)?;
            disk.remove_filling(&flight, number)?;
            Ok(file)
        });
        let file = Arc::new(file.await?);
        let mut at = 0;
        while let Some(piece) = self.sent.next_bytes().await? {
            let (disk, spool, start) = (self.shared.store.disk().clone(), file.clone(), at);
            at += piece.len() as u64;
            blocking(move || {
                disk.check_room(piece.len() as u64)?;
                spool.write_all_at(&piece, start).map_err(|error| Error::io("writing", "the spool of an upload", error))
            })
            .await?;
        }
        Ok(Spool { file, size: at })
    }
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
        match &mut self.state {
            State::First => self.first().await,
            State::Plain => self.sent.next_entry().await,
            State::Members(members) => Ok(members.next().await?.map(listed_member)),
            State::Again { behind, .. } => {
                let behind = behind.take();
                self.state = State::Plain;
                Ok(behind)
            }
        }
    }

    async fn next_bytes(&mut self) -> Result<Option<Bytes>> {
        match &mut self.state {
            State::First => Ok(None),
            State::Plain => self.sent.next_bytes().await,
            State::Members(members) => members.next_bytes().await,
            State::Again { spool, at, .. } => {
                let piece = spool.read(*at).await?;
                *at += piece.as_ref().map_or(0, |piece| piece.len() as u64);
                Ok(piece)
            }
        }
    }

    fn sealed(&self) -> Option<(u64, Digest)> {
        self.sent.sealed().filter(|_| !self.spooled)
    }

    fn begun(&self) -> Option<Begun> {
        self.sent.begun().filter(|_| !self.spooled)
    }

    fn to_record(&self) -> Option<(u64, Vec<u8>)> {
        self.sent.to_record().filter(|_| !self.spooled)
    }

    fn revision(&self, tree: &Manifest) -> String {
        self.sent.revision(tree)
    }
}

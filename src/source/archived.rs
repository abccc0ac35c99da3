//! An archive on this host as a stream of entries.
//!
//! The archive floor reads it; here its members become entries, and the file is held to the stamp it was opened with: what was written
//! to while it was read is `SOURCE_CHANGED`, and not a damaged archive.

use std::fs::File as OpenFile;

use async_trait::async_trait;
use bytes::Bytes;

use super::{EntryStream, File, Listed, What};
use crate::archive::{self, About, Archived, Dictionaries, Member, Members};
use crate::error::{Error, Kind, Result};
use crate::manifest::Manifest;
use crate::names::show_bytes;

/// Says whether the archive is still the file that was opened.
type Check = Box<dyn Fn(&OpenFile) -> Result<()> + Send + Sync>;

/// See the module's page.
pub(super) struct ArchivedEntries {
    reading: Reading,
    opened: OpenFile,
    check: Check,
    revision: String,
}

/// The reading begins with the first entry that is asked for: what it takes of memory is not to be held while the stream waits for its turn.
enum Reading {
    NotYet(Option<(Archived, About, Dictionaries)>),
    Begun(Members),
}

impl Reading {
    fn members(&mut self) -> Result<&mut Members> {
        if let Self::NotYet(archive) = self {
            let (bytes, about, dictionaries) =
                archive.take().ok_or_else(|| Error::internal("an archive is read twice"))?;
            *self = Self::Begun(Members::read(bytes, about, dictionaries));
        }
        match self {
            Self::Begun(members) => Ok(members),
            Self::NotYet(_) => Err(Error::internal("an archive is not read")),
        }
    }
}

impl ArchivedEntries {
    /// Will read `opened`; `check` is asked at the end, and on any fault.
    ///
    /// # Errors
    /// The I/O error.
    pub(super) fn read(
        opened: OpenFile,
        about: About,
        dictionaries: Dictionaries,
        revision: String,
        check: Check,
    ) -> Result<Self> {
        let fault = |error| Error::io("opening", show_bytes(about.name.as_bytes()), error);
        let size = opened.metadata().map_err(fault)?.len();
        let reading = opened.try_clone().map_err(fault)?;
        let reading = Reading::NotYet(Some((Archived::Random(Box::new(reading), size), about, dictionaries)));
        Ok(Self { reading, opened, check, revision })
    }

    /// `error`, unless the file changed, which explains it.
    fn explain(&self, error: Error) -> Error {
        match error.kind() {
            Kind::Cancelled => error,
            _ => (self.check)(&self.opened).err().unwrap_or(error),
        }
    }
}

#[async_trait]
impl EntryStream for ArchivedEntries {
    async fn next_entry(&mut self) -> Result<Option<Listed>> {
        match self.reading.members()?.next().await {
            Ok(Some(member)) => Ok(Some(listed_member(member))),
            Ok(None) => (self.check)(&self.opened).map(|()| None),
            Err(error) => Err(self.explain(error)),
        }
    }

    async fn next_bytes(&mut self) -> Result<Option<Vec<Bytes>>> {
        let bytes = self.reading.members()?.next_bytes().await;
        bytes.map_err(|error| self.explain(error))
    }

    fn revision(&self, _tree: &Manifest) -> String {
        self.revision.clone()
    }
}

/// A member of an archive as an entry of a stream.
pub fn listed_member(member: Member) -> Listed {
    let what = match member.what {
        archive::What::Directory => What::Directory,
        archive::What::Symlink(target) => What::Symlink(target),
        archive::What::SameAs(path) => What::SameAs(path),
        archive::What::File { size, executable, here: _ } => What::File(File::streamed(size, executable)),
    };
    Listed { path: member.path, what }
}

//! Datastores: directories that the operator has mounted on this host and lets owners use by name.
//!
//! What is configured is trusted, what lies below it is not: everything there is resolved beneath the root without following a link. Nothing
//! below a datastore is ever written, and no descriptor of its root is kept, so that it can be unmounted and mounted again.
//! Whether it is mounted is not known here; its path may not be there yet when the daemon starts.
//!
//! Every call here may wait for as long as a server behind the mount does not answer: only threads that may be held up make them.

use std::collections::BTreeMap;
use std::fs::File as OpenFile;
use std::io;
use std::path::PathBuf;

use super::beneath::{GONE, Root, change_of, is_gone};
use crate::error::{Error, Result};
use crate::names::EntryPath;
use crate::places::{Place, Stamp};

/// A datastore as configured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Datastore {
    /// Where it is mounted; absolute.
    pub path: PathBuf,
    /// Who may use it; empty: everybody.
    pub owners: Vec<String>,
}

/// All datastores by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Datastores(pub BTreeMap<String, Datastore>);

/// Why the bytes of a file that is served in place cannot be had.
#[derive(Debug)]
pub enum Trouble {
    /// It is not what it was, and how.
    Changed(String),
    /// The file system would not say.
    Unreadable(io::Error),
}

impl Trouble {
    /// Whether a fresh descriptor may help: the server forgot this one, or the link to it broke.
    pub fn is_stale(&self) -> bool {
        match self {
            Self::Changed(_) => false,
            Self::Unreadable(error) => matches!(error.raw_os_error(), Some(libc::ESTALE | libc::EIO)),
        }
    }
}

impl Datastores {
    /// The datastore called `name`, for `owner`.
    ///
    /// # Errors
    /// `NO_SUCH_DATASTORE`, also for one that `owner` may not use: who may not use it does not learn of it.
    pub fn find(&self, name: &str, owner: &str) -> Result<&Datastore> {
        if let Some(found) = self.0.get(name).filter(|found| found.permits(owner)) {
            return Ok(found);
        }
        let known: Vec<_> =
            self.0.iter().filter(|(_, other)| other.permits(owner)).map(|(name, _)| name.as_str()).collect();
        let error = Error::not_found("NO_SUCH_DATASTORE", format!("there is no datastore `{name}`"));
        Err(match known.as_slice() {
            [] => error.remedy("let the operator configure it: [datastores.NAME] path = \"/mnt/...\""),
            known => error.remedy(format!("use one of {}", known.join(", "))),
        })
    }

    /// The datastore called `name`, for whoever was allowed to use it before.
    pub fn get(&self, name: &str) -> Option<&Datastore> {
        self.0.get(name)
    }
}

impl Datastore {
    fn permits(&self, owner: &str) -> bool {
        self.owners.is_empty() || self.owners.iter().any(|permitted| permitted == owner)
    }

    /// Opens the file at `path` from the root, if it still bears `stamp`.
    ///
    /// # Errors
    /// What became of it.
    pub fn open(&self, path: &EntryPath, stamp: &Stamp) -> Result<OpenFile, Trouble> {
        let root = Root::open_trusted(&self.path).map_err(Trouble::Unreadable)?;
        let opened = root.resolve_file(path).map_err(|error| match error {
            gone if is_gone(gone) => Trouble::Changed(GONE.to_owned()),
            _ => Trouble::Unreadable(error.into()),
        })?;
        check_file(stamp, &opened)?;
        Ok(opened)
    }

    /// Fails unless the directory of `place` is here; `filled` says that something must be in it.
    ///
    /// # Errors
    /// `DATASTORE_MISSING`.
    pub fn check(&self, place: &Place, filled: bool) -> Result<()> {
        let missing = |why: String| {
            Error::wrong_state("DATASTORE_MISSING", format!("the datastore `{}` {why}", place.datastore))
                .fact("datastore", &place.datastore)
                .remedy(format!("let the operator mount it at {} again", self.path.display()))
        };
        let at = self.path.display();
        let root = Root::open_trusted(&self.path).map_err(|error| missing(format!("is not at {at}")).because(error))?;
        root.descend(&place.below)
            .map_err(|error| missing(format!("has no directory /{}", place.below)).because(error))?;
        let empty = std::fs::read_dir(&self.path).is_ok_and(|mut entries| entries.next().is_none());
        if filled && empty {
            return Err(missing(format!("has nothing at {at}, as if it were not mounted")));
        }
        Ok(())
    }
}

/// Whether an open file still bears `stamp`; what was read from it before can then be believed. May wait for a server.
///
/// # Errors
/// What became of it.
pub fn check_file(stamp: &Stamp, opened: &OpenFile) -> Result<(), Trouble> {
    match change_of(stamp, opened) {
        Ok(None) => Ok(()),
        Ok(Some(how)) => Err(Trouble::Changed(how)),
        Err(error) => Err(Trouble::Unreadable(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datastores() -> Datastores {
        let datastore =
            |owners: &[&str]| Datastore { path: "/mnt/x".into(), owners: owners.iter().map(|o| (*o).into()).collect() };
        Datastores([("all".into(), datastore(&[])), ("some".into(), datastore(&["a"]))].into())
    }

    #[test]
    fn who_may_not_use_a_datastore_does_not_learn_of_it() {
        let datastores = datastores();
        assert!(datastores.find("some", "a").is_ok() && datastores.find("all", "").is_ok());
        for (name, owner, offered) in [("some", "b", "use one of all"), ("none", "a", "use one of all, some")] {
            let error = datastores.find(name, owner).unwrap_err();
            assert_eq!(
                (error.reason(), error.remedy_text()),
                ("NO_SUCH_DATASTORE", Some(offered)),
                "{name} for {owner}"
            );
        }
        let error = Datastores::default().find("x", "").unwrap_err();
        assert!(error.remedy_text().unwrap().contains("[datastores.NAME]"));
    }
}

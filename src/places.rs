//! Where a file is that stays outside of the store, and what tells that nobody touched it.
//!
//! A checkpoint that is served in place has a [`Place`]: everything it shows lies below one directory of one datastore. Each of its
//! files has the [`Stamp`] that it bore while its digest was taken. Both go into rows as text or bytes, in the forms given here.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::names::EntryPath;

/// A directory of a datastore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Name of the datastore in the configuration.
    pub datastore: String,
    /// The directory, from the datastore's root.
    pub below: EntryPath,
}

impl Place {
    /// Where the entry `path` of the checkpoint is, from the datastore's root.
    ///
    /// # Errors
    /// `BAD_ENTRY_PATH` where the whole is too long or too deep.
    pub fn of(&self, path: &EntryPath) -> Result<EntryPath> {
        if self.below.is_root() {
            return Ok(path.clone());
        }
        EntryPath::new([self.below.as_bytes(), path.as_bytes()].join(&b'/'))
    }

    /// The directory above: where the bytes are if what was asked for is one file.
    #[must_use]
    pub fn above(&self) -> Self {
        Self { datastore: self.datastore.clone(), below: self.below.parent().unwrap_or_default() }
    }
}

/// What tells that a file is the one that was listed, untouched. The time of change cannot be set back by its owner.
///
/// The device is not in it: a datastore that is mounted again may get another number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Length in bytes.
    pub size: u64,
    /// Nanoseconds since the epoch.
    pub modified_ns: i128,
    /// Nanoseconds since the epoch.
    pub changed_ns: i128,
    /// Inode number.
    pub inode: u64,
}

impl Stamp {
    /// How a file that bore this stamp and bears `now` has changed; `None` if it has not.
    pub fn change(&self, now: &Self) -> Option<String> {
        if self == now {
            return None;
        }
        Some(if self.inode != now.inode {
            "it was replaced".to_owned()
        } else if self.size != now.size {
            format!("its size changed from {} to {} bytes", self.size, now.size)
        } else {
            "it was written to or its attributes changed".to_owned()
        })
    }
}

/// `size.modified.changed.inode`, in decimal.
impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { size, modified_ns, changed_ns, inode } = self;
        write!(f, "{size}.{modified_ns}.{changed_ns}.{inode}")
    }
}

impl FromStr for Stamp {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let mut fields = text.split('.');
            let stamp = Self {
                size: fields.next()?.parse().ok()?,
                modified_ns: fields.next()?.parse().ok()?,
                changed_ns: fields.next()?.parse().ok()?,
                inode: fields.next()?.parse().ok()?,
            };
            fields.next().is_none().then_some(stamp)
        };
        parse().ok_or_else(|| Error::corrupt("BAD_STAMP", format!("`{text}` is not the stamp of a file")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { size: 5, modified_ns: -7, changed_ns: 1 << 70, inode: u64::MAX };

    #[test]
    fn a_stamp_survives_its_text() {
        assert_eq!(STAMP.to_string().parse::<Stamp>().unwrap(), STAMP);
        for bad in ["", "1.2.3", "1.2.3.4.5", "a.2.3.4", "-1.2.3.4"] {
            assert_eq!(bad.parse::<Stamp>().unwrap_err().reason(), "BAD_STAMP", "{bad}");
        }
    }

    #[test]
    fn a_change_is_said_in_the_terms_that_explain_it() {
        assert_eq!(STAMP.change(&STAMP), None);
        for (now, how) in [
            (Stamp { inode: 1, size: 1, ..STAMP }, "it was replaced"),
            (Stamp { size: 6, ..STAMP }, "its size changed from 5 to 6 bytes"),
            (Stamp { changed_ns: 1, ..STAMP }, "it was written to or its attributes changed"),
        ] {
            assert_eq!(STAMP.change(&now).unwrap(), how);
        }
    }

    #[test]
    fn a_place_is_joined_with_what_is_below_it() {
        let path = |text: &str| EntryPath::new(text.as_bytes()).unwrap();
        let at = |below: &str| Place { datastore: "d".into(), below: path(below) };
        assert_eq!(at("").of(&path("a/b")).unwrap(), path("a/b"));
        assert_eq!(at("x/y").of(&path("a/b")).unwrap(), path("x/y/a/b"));
    }
}

//! What the daemon has of an upload already, gone over once more: the tree must be the same up to there.
//!
//! Every entry that came is looked at again as it was sent, time of change included, and compared by the digest that the daemon took of them; the
//! last one by itself too, so that the fault has a name. So a checkpoint never becomes a mixture of a tree before and after somebody changed it.

use std::path::Path;

use prost::Message as _;

use super::send::changed;
use crate::control::wire;
use crate::control::wire::upload_entry::Kind as SentKind;
use crate::digest::Digester;
use crate::error::{Error, Result};

/// See the module's page.
#[derive(Default)]
pub(super) struct Kept {
    upload: wire::Upload,
    /// Entries that were met again.
    met: u64,
    listed: Digester,
    /// Bytes of their contents that are there.
    bytes: u64,
}

impl Kept {
    /// What `upload` says is there; the default is nothing.
    pub(super) fn of(upload: wire::Upload) -> Self {
        Self { upload, ..Self::default() }
    }

    /// Where it ends.
    pub(super) fn position(&self) -> wire::UploadPosition {
        self.upload.position.unwrap_or_default()
    }

    /// Whether everything is there.
    pub(super) fn is_all(&self) -> bool {
        self.upload.finished
    }

    /// Whether the next entry is there with all its content, since another came after it.
    pub(super) fn has_next_whole(&self) -> bool {
        self.met + 1 < self.position().entries
    }

    /// Bytes of contents that are there, by what was met so far; `None` while more is to be met.
    pub(super) fn bytes(&self) -> Option<u64> {
        (self.met >= self.position().entries).then_some(self.bytes)
    }

    /// Meets the entry at `place`, which would be sent as `entry`: how many bytes of its content are there; `None` if not even the entry is.
    ///
    /// # Errors
    /// `FILE_CHANGED`, `TREE_CHANGED`: what was sent is something else.
    pub(super) fn meet(&mut self, entry: &wire::UploadEntry, place: &Path) -> Result<Option<u64>> {
        let position = self.position();
        if self.met >= position.entries {
            return Ok(None);
        }
        self.met += 1;
        self.listed.update(&entry.encode_length_delimited_to_vec());
        let is_last = self.met == position.entries;
        let there = if is_last { position.bytes } else { size_of(entry) };
        self.bytes += there;
        if is_last {
            let was = self.upload.present.as_ref();
            if was.is_some_and(|was| was.path == entry.path && was != entry) {
                return Err(changed(place));
            }
            if was != Some(entry) || self.listed.finish().as_bytes()[..] != self.upload.entries_digest[..] {
                return Err(tree_changed(place));
            }
        }
        Ok(Some(there))
    }

    /// That the whole tree below `root` was met.
    ///
    /// # Errors
    /// `TREE_CHANGED`: it has less than was sent.
    pub(super) fn end(&self, root: &Path) -> Result<()> {
        if self.met < self.position().entries { Err(tree_changed(root)) } else { Ok(()) }
    }
}

fn size_of(entry: &wire::UploadEntry) -> u64 {
    match &entry.kind {
        Some(SentKind::File(file)) => file.size_bytes,
        Some(SentKind::Directory(_) | SentKind::Symlink(_)) | None => 0,
    }
}

fn tree_changed(place: &Path) -> Error {
    Error::wrong_state("TREE_CHANGED", format!("what was sent up to {} changed since", place.display()))
        .remedy("upload it again when nothing writes to it")
        .fact("path", place.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, size_bytes: u64, modified_unix_ns: i64) -> wire::UploadEntry {
        let file = wire::UploadFile { size_bytes, executable: false, modified_unix_ns };
        wire::UploadEntry { path: path.into(), kind: Some(SentKind::File(file)) }
    }

    fn kept(entries: &[wire::UploadEntry], bytes: u64) -> Kept {
        let mut listed = Digester::new();
        entries.iter().for_each(|entry| listed.update(&entry.encode_length_delimited_to_vec()));
        Kept::of(wire::Upload {
            position: Some(wire::UploadPosition { entries: entries.len() as u64, bytes }),
            present: entries.last().cloned(),
            entries_digest: listed.finish().as_bytes().to_vec(),
            ..Default::default()
        })
    }

    fn meet(kept: &mut Kept, entry: &wire::UploadEntry) -> Result<Option<u64>> {
        kept.meet(entry, Path::new("/there"))
    }

    #[test]
    fn what_is_there_is_passed_over_and_the_last_file_is_gone_on_with() {
        let sent = [file("a", 10, 1), file("b", 20, 2)];
        let mut kept = kept(&sent, 5);
        assert!(kept.has_next_whole());
        assert_eq!((meet(&mut kept, &sent[0]).unwrap(), kept.bytes()), (Some(10), None));
        assert!(!kept.has_next_whole());
        assert!(kept.end(Path::new("/")).is_err());
        assert_eq!((meet(&mut kept, &sent[1]).unwrap(), kept.bytes()), (Some(5), Some(15)));
        assert_eq!(meet(&mut kept, &file("c", 1, 1)).unwrap(), None);
        kept.end(Path::new("/")).unwrap();
    }

    #[test]
    fn what_changed_before_the_position_is_seen() {
        let sent = [file("a", 10, 1), file("b", 20, 2)];
        for (now, reason) in [
            ([file("a", 10, 1), file("b", 20, 3)], "FILE_CHANGED"),
            ([file("a", 10, 1), file("b", 21, 2)], "FILE_CHANGED"),
            ([file("a", 10, 2), file("b", 20, 2)], "TREE_CHANGED"),
            ([file("b", 20, 2), file("c", 20, 2)], "TREE_CHANGED"),
        ] {
            let mut kept = kept(&sent, 5);
            meet(&mut kept, &now[0]).unwrap();
            assert_eq!(meet(&mut kept, &now[1]).unwrap_err().reason(), reason, "{now:?}");
        }
    }

    #[test]
    fn where_nothing_is_there_everything_is_new() {
        let mut kept = Kept::default();
        assert!(!kept.is_all() && !kept.has_next_whole());
        assert_eq!((kept.bytes(), meet(&mut kept, &file("a", 1, 1)).unwrap()), (Some(0), None));
    }
}

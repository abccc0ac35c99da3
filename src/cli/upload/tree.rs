//! The tree that is sent: what is in it, in canonical order, without following symbolic links below its root.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::limits;
use crate::names::{EntryName, EntryPath};

/// One entry below the root.
#[derive(Debug)]
pub(super) struct Entry {
    /// Where it will be in the checkpoint.
    pub(super) path: EntryPath,
    /// Where it is on this computer.
    pub(super) place: PathBuf,
    /// What it was when it was listed.
    pub(super) kind: EntryKind,
}

/// What an entry is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    /// A directory, visited before what is in it.
    Directory,
    /// A regular file of so many bytes.
    File(u64),
    /// A symbolic link.
    Symlink,
}

/// The bytes of all files below `root`.
///
/// # Errors
/// As [`walk`]; no space where there are more entries than a checkpoint may have.
pub(super) fn measure(root: &Path) -> Result<u64> {
    let (mut bytes, mut entries) = (0_u64, 0_usize);
    walk(root, &mut |entry| {
        entries += 1;
        if entries > limits::CHECKPOINT_ENTRIES {
            let fault = format!("{} has more than {} entries", root.display(), limits::CHECKPOINT_ENTRIES);
            return Err(Error::no_space("TOO_MANY_ENTRIES", fault).remedy("upload less, or an archive"));
        }
        if let EntryKind::File(size) = entry.kind {
            bytes = bytes.saturating_add(size);
        }
        Ok(())
    })?;
    Ok(bytes)
}

/// Visits everything below `root`, directories before what is in them, siblings by name. A root that is a file is its own only
/// entry; a root that is a symbolic link is followed, as it was named.
///
/// # Errors
/// Those of `visit`; what cannot be read; invalid for what is no file, directory or symbolic link.
pub(super) fn walk(root: &Path, visit: &mut dyn FnMut(Entry) -> Result<()>) -> Result<()> {
    let seen = fs::metadata(root).map_err(|error| {
        Error::io("reading", root, error)
            .remedy("give the path of a file or directory of this computer that you may read")
    })?;
    if seen.is_dir() {
        return walk_directory(root, &EntryPath::root(), visit);
    }
    let named = std::path::absolute(root).map_err(|error| Error::io("reading", root, error))?;
    let name = EntryName::new(named.file_name().unwrap_or_default().as_bytes())?;
    let path = EntryPath::root().join(&name)?;
    let kind = kind_of(root, &seen)?;
    let place = fs::canonicalize(root).map_err(|error| Error::io("reading", root, error))?;
    visit(Entry { path, place, kind })
}

/// Recursion is bounded by the depth that [`EntryPath`] allows.
fn walk_directory(place: &Path, above: &EntryPath, visit: &mut dyn FnMut(Entry) -> Result<()>) -> Result<()> {
    for name in names_in(place)? {
        let place = place.join(&name);
        let path = above.join(&EntryName::new(name.into_vec())?)?;
        let seen = fs::symlink_metadata(&place).map_err(|error| Error::io("reading", &place, error))?;
        let kind = kind_of(&place, &seen)?;
        let below = (kind == EntryKind::Directory).then(|| (place.clone(), path.clone()));
        visit(Entry { path, place, kind })?;
        if let Some((place, path)) = below {
            walk_directory(&place, &path, visit)?;
        }
    }
    Ok(())
}

fn names_in(directory: &Path) -> Result<Vec<OsString>> {
    let fault = |error| Error::io("listing", directory, error);
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(fault)? {
        names.push(entry.map_err(fault)?.file_name());
        if names.len() > limits::CHECKPOINT_ENTRIES {
            let fault = format!("{} has more than {} entries", directory.display(), limits::CHECKPOINT_ENTRIES);
            return Err(Error::no_space("TOO_MANY_ENTRIES", fault).remedy("upload less, or an archive"));
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn kind_of(place: &Path, seen: &fs::Metadata) -> Result<EntryKind> {
    let kind = seen.file_type();
    if kind.is_dir() {
        Ok(EntryKind::Directory)
    } else if kind.is_file() {
        Ok(EntryKind::File(seen.len()))
    } else if kind.is_symlink() {
        Ok(EntryKind::Symlink)
    } else {
        let fault = format!("{} is not a file, directory or symbolic link", place.display());
        Err(Error::invalid("UNSUPPORTED_ENTRY", fault).remedy("move it out of what is uploaded"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn seen(root: &Path) -> Vec<(String, EntryKind)> {
        let mut seen = Vec::new();
        walk(root, &mut |entry| {
            seen.push((entry.path.to_string(), entry.kind));
            Ok(())
        })
        .unwrap();
        seen
    }

    #[test]
    fn entries_come_in_canonical_order_and_links_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir_all(at("a/empty")).unwrap();
        fs::write(at("a/z"), "12345").unwrap();
        fs::write(at("a.b"), "1").unwrap();
        symlink("..", at("a/up")).unwrap();
        symlink("/nonexistent", at("dangling")).unwrap();
        let expected = [
            ("a", EntryKind::Directory),
            ("a/empty", EntryKind::Directory),
            ("a/up", EntryKind::Symlink),
            ("a/z", EntryKind::File(5)),
            ("a.b", EntryKind::File(1)),
            ("dangling", EntryKind::Symlink),
        ];
        let expected: Vec<_> = expected.into_iter().map(|(path, kind)| (path.to_owned(), kind)).collect();
        assert_eq!(seen(root.path()), expected);
        assert_eq!(measure(root.path()).unwrap(), 6);
    }

    #[test]
    fn a_file_is_its_own_only_entry_under_the_name_it_was_given_by() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("f"), "123").unwrap();
        symlink("f", root.path().join("named")).unwrap();
        assert_eq!(seen(&root.path().join("f")), [("f".to_owned(), EntryKind::File(3))]);
        assert_eq!(seen(&root.path().join("named")), [("named".to_owned(), EntryKind::File(3))]);
    }

    #[test]
    fn what_is_no_file_is_refused_by_name() {
        let root = tempfile::tempdir().unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(root.path().join("socket")).unwrap();
        let error = measure(root.path()).unwrap_err();
        assert_eq!(error.reason(), "UNSUPPORTED_ENTRY");
        assert!(error.report().contains("/socket "), "{}", error.report());
        assert_eq!(measure(&root.path().join("nothing")).unwrap_err().kind(), crate::error::Kind::NotFound);
    }
}

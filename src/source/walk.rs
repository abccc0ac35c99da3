//! What is below a directory: directories, regular files with their stamps, symbolic links verbatim.
//!
//! Sockets, devices and FIFOs are skipped and named. The walk is iterative, in the order of names, and bounded by `limits`; one
//! descriptor is open at a time.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, readlinkat};
use nix::sys::stat::{SFlag, fstatat};

use super::beneath::{Locator, Root, stamp_of};
use super::patience::Pace;
use super::{Counter, Expected, File, Listed, What};
use crate::digest::{Digest, Digester};
use crate::error::{Error, Result};
use crate::names::{EntryName, EntryPath, show_bytes};

/// What is below a root.
pub(super) struct Walked {
    pub(super) entries: Vec<Listed>,
    /// What was left out: path and reason.
    pub(super) skipped: Vec<(String, String)>,
    /// Over all paths, stamps and link targets: equal only if nothing was touched.
    pub(super) digest: Digest,
}

/// Everything below `root`, with a step of `pace` for each entry. Blocks.
///
/// # Errors
/// `SOURCE_CHANGED`, those of `counter`, names and paths beyond the limits, the I/O error.
pub(super) fn walk(root: &Root, pace: &Pace, counter: &Counter) -> Result<Walked> {
    root.act(|| walk_below(root, pace, counter))
}

fn walk_below(root: &Root, pace: &Pace, counter: &Counter) -> Result<Walked> {
    let mut walk = Walk {
        root,
        pace,
        counter,
        entries: Vec::new(),
        skipped: Vec::new(),
        digester: Digester::new(),
        open: Vec::new(),
    };
    match &root.only {
        Some(name) => walk.enter(&EntryPath::root(), &root.directory, name, None)?,
        None => {
            walk.open.push(EntryPath::root());
            while let Some(directory) = walk.open.pop() {
                walk.list_directory(&directory)?;
            }
        }
    }
    Ok(Walked { digest: walk.digester.finish(), entries: walk.entries, skipped: walk.skipped })
}

struct Walk<'a> {
    root: &'a Root,
    pace: &'a Pace,
    counter: &'a Counter,
    entries: Vec<Listed>,
    skipped: Vec<(String, String)>,
    digester: Digester,
    /// Directories found and not yet listed.
    open: Vec<EntryPath>,
}

impl Walk<'_> {
    fn list_directory(&mut self, path: &EntryPath) -> Result<()> {
        let fault = |error| self.root.fault("listing", path, error);
        let opened = self.root.resolve(path, OFlag::O_DIRECTORY).map_err(fault)?;
        let mut directory = Dir::from_fd(opened).map_err(fault)?;
        let mut names = Vec::new();
        for entry in directory.iter() {
            let entry = entry.map_err(fault)?;
            self.pace.step()?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            names.push((EntryName::new(name)?, entry.file_type()));
            (self.counter)(self.entries.len() + self.skipped.len() + names.len())
                .map_err(|error| self.while_listing(error))?;
        }
        names.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        for (name, kind) in names {
            self.enter(path, &directory, &name, kind)?;
        }
        Ok(())
    }

    /// Lists the one entry `name` of the directory `at`; `kind` where reading the directory told it.
    fn enter(&mut self, at: &EntryPath, directory: impl AsFd, name: &EntryName, kind: Option<Type>) -> Result<()> {
        let path = at.join(name)?;
        self.pace.step()?;
        let kind = match kind {
            Some(Type::Directory) => SFlag::S_IFDIR,
            Some(Type::Symlink) => SFlag::S_IFLNK,
            _ => return self.enter_examined(path, &directory, name),
        };
        self.enter_as(path, &directory, name, kind)
    }

    fn enter_examined(&mut self, path: EntryPath, directory: impl AsFd, name: &EntryName) -> Result<()> {
        let stat = fstatat(&directory, OsStr::from_bytes(name.as_bytes()), AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|error| self.root.fault("examining", &path, error))?;
        let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
        if kind != SFlag::S_IFREG {
            return self.enter_as(path, directory, name, kind);
        }
        let stamp = stamp_of(&stat);
        self.record(b'f', &path, format!("{stamp:?}").as_bytes());
        let locator = Locator { stamp, path: path.clone() }.to_string();
        let file = File {
            locator: locator.into(),
            size: Some(stamp.size),
            executable: stat.st_mode & 0o111 != 0,
            ranges: true,
            expected: Expected::default(),
        };
        self.entries.push(Listed { path, what: What::File(file) });
        Ok(())
    }

    /// Lists what is not a regular file.
    fn enter_as(&mut self, path: EntryPath, directory: impl AsFd, name: &EntryName, kind: SFlag) -> Result<()> {
        if kind == SFlag::S_IFDIR {
            self.record(b'd', &path, b"");
            self.open.push(path.clone());
            self.entries.push(Listed { path, what: What::Directory });
            return Ok(());
        }
        if kind == SFlag::S_IFLNK {
            let target = readlinkat(directory, OsStr::from_bytes(name.as_bytes()))
                // EINVAL: it is no link any more.
                .map_err(|error| if error == Errno::EINVAL { Errno::ENOENT } else { error })
                .map_err(|error| self.root.fault("reading the link", &path, error))?;
            let target = target.into_vec();
            self.record(b'l', &path, &target);
            self.entries.push(Listed { path, what: What::Symlink(target.into()) });
            return Ok(());
        }
        let what = match kind {
            SFlag::S_IFIFO => "is a FIFO",
            SFlag::S_IFSOCK => "is a socket",
            SFlag::S_IFBLK | SFlag::S_IFCHR => "is a device",
            _ => "is not a regular file",
        };
        self.skipped.push((path.to_string(), what.to_owned()));
        Ok(())
    }

    /// Adds one entry to the revision; lengths keep neighbours apart.
    fn record(&mut self, kind: u8, path: &EntryPath, rest: &[u8]) {
        let mut bytes = Vec::with_capacity(path.as_bytes().len() + rest.len() + 17);
        bytes.push(kind);
        for field in [path.as_bytes(), rest] {
            bytes.extend_from_slice(&u64::try_from(field.len()).unwrap_or(u64::MAX).to_le_bytes());
            bytes.extend_from_slice(field);
        }
        self.digester.update(&bytes);
    }

    fn while_listing(&self, error: Error) -> Error {
        error.during(format!("listing {}", show_bytes(self.root.path.as_os_str().as_bytes())))
    }
}

//! A disk that keeps only what it was told to keep.
//!
//! It is stricter than any file system we run on. A file's bytes and its size are durable after a sync of that file or of
//! everything; a name after a sync of its directory or of everything, whatever became of the file. A rename is one step, and takes with it
//! what had happened to its two names before; one of a directory moves whatever is named in it, durable or not. What is not durable may be lost, kept, or lost in part: names in the order
//! they were changed, bytes in any order, each write whole, cut short, or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::support::corpus::Random;
use crate::support::files::walk;
use crate::support::rot::ROT;
use crate::trace::Act;

/// Writes that are cut short end at a multiple of this.
const SECTOR_BYTES: u64 = 512;
const PAGE_BYTES: usize = 4096;

/// Bytes of a file, with a number that no other bytes have.
#[derive(Clone, Debug)]
pub(crate) struct Content {
    pub(crate) bytes: Arc<Vec<u8>>,
    pub(crate) number: u64,
}

impl Content {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Arc::new(bytes), number: next_number() }
    }

    /// The same with another byte at `at`.
    pub(crate) fn with_byte(&self, at: usize, byte: u8) -> Self {
        let mut bytes = self.bytes.as_ref().clone();
        bytes[at] = byte;
        Self::new(bytes)
    }

    fn change(&mut self, change: &Change) {
        let bytes = Arc::make_mut(&mut self.bytes);
        match change {
            Change::Write(at, written) => {
                if bytes.len() < at + written.len() {
                    bytes.resize(at + written.len(), 0);
                }
                bytes[*at..at + written.len()].copy_from_slice(written);
            }
            Change::Size(size) => bytes.resize(*size, 0),
            Change::Punch(range) => {
                let end = range.end.min(bytes.len());
                bytes[range.start.min(end)..end].fill(0);
            }
        }
        self.number = next_number();
    }
}

fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[derive(Clone, Debug)]
enum Change {
    Write(usize, Arc<[u8]>),
    Size(usize),
    Punch(Range<usize>),
}

#[derive(Clone, Debug)]
struct Inode {
    now: Content,
    durable: Content,
    /// What leads from `durable` to `now`.
    pending: Vec<Change>,
}

impl Inode {
    fn sync(&mut self) {
        self.durable = self.now.clone();
        self.pending.clear();
    }

    /// Its size and holes with the bytes it had before.
    fn hollow(&self) -> Content {
        let mut content = self.durable.clone();
        self.pending.iter().filter(|change| matches!(change, Change::Punch(_))).for_each(|hole| content.change(hole));
        if !self.pending.is_empty() {
            content.change(&Change::Size(self.now.bytes.len()));
        }
        content
    }

    /// Changes a byte of what is at rest.
    fn rot(&mut self, at: usize) {
        for content in [&mut self.now, &mut self.durable] {
            let wrong = content.bytes[at] ^ ROT;
            *content = content.with_byte(at, wrong);
        }
    }

    /// What may be left of it.
    fn torn(&self, random: &mut Random) -> Content {
        match random.below(4) {
            _ if self.pending.is_empty() => return self.durable.clone(),
            0 => return self.durable.clone(),
            1 => return self.now.clone(),
            _ => {}
        }
        let mut content = self.durable.clone();
        let sizes_only = random.below(2) == 0;
        for change in &self.pending {
            match change {
                Change::Write(..) if sizes_only || random.below(2) == 0 => {}
                Change::Write(at, bytes) if random.below(4) == 0 => {
                    let sectors = random.below(bytes.len() as u64 / SECTOR_BYTES + 1);
                    let kept = usize::try_from(sectors * SECTOR_BYTES).unwrap();
                    content.change(&Change::Write(*at, bytes[..kept].into()));
                }
                _ => content.change(change),
            }
        }
        content
    }
}

#[derive(Clone, Copy, Debug)]
enum Node {
    File(usize),
    Directory,
}

type Names = BTreeMap<String, Node>;

#[derive(Clone, Debug)]
enum Naming {
    Add(String, Node),
    Remove(String),
    Move(String, String, Node),
}

impl Naming {
    fn paths(&self) -> Vec<&str> {
        match self {
            Self::Add(path, _) | Self::Remove(path) => vec![path],
            Self::Move(from, to, _) => vec![from, to],
        }
    }

    fn carry_out(&self, names: &mut Names) {
        match self {
            Self::Add(path, node) => {
                names.insert(path.clone(), *node);
            }
            Self::Remove(path) => {
                names.remove(path);
            }
            Self::Move(from, to, node) => {
                names.remove(from);
                names.insert(to.clone(), *node);
                if matches!(node, Node::Directory) {
                    let below: Vec<_> =
                        names.keys().filter_map(|path| Some((path.clone(), moved(path, from, to)?))).collect();
                    for (before, after) in below {
                        let node = names.remove(&before).unwrap();
                        names.insert(after, node);
                    }
                }
            }
        }
    }

    /// The same in a directory that has moved.
    fn follow(&mut self, from: &str, to: &str) {
        let follow = |path: &mut String| {
            if let Some(after) = moved(path, from, to) {
                *path = after;
            }
        };
        match self {
            Self::Add(path, _) | Self::Remove(path) => follow(path),
            Self::Move(before, after, _) => [before, after].into_iter().for_each(follow),
        }
    }
}

/// Where what was in the directory `from` is once that is `to`; `None` for what was not in it.
fn moved(path: &str, from: &str, to: &str) -> Option<String> {
    let below = path.strip_prefix(from)?.strip_prefix('/')?;
    Some(format!("{to}/{below}"))
}

/// What of the pending is there after the power comes back.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Loss {
    /// All of it, as after `kill -9`.
    Nothing,
    /// None of it.
    Everything,
    /// Names, sizes and holes are there, bytes are not: a journal is written first.
    Bytes,
    /// Some of it, by a seed.
    Some(u64),
}

/// The disk.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    inodes: Vec<Inode>,
    now: Names,
    durable: Names,
    pending: Vec<Naming>,
}

impl Disk {
    /// A disk that holds `image`, all of it durable.
    pub(crate) fn holding(image: &Image) -> Self {
        let mut disk = Self::default();
        for directory in &image.directories {
            disk.now.insert(directory.clone(), Node::Directory);
        }
        for (path, content) in &image.files {
            disk.now.insert(path.clone(), Node::File(disk.inodes.len()));
            disk.inodes.push(Inode { now: content.clone(), durable: content.clone(), pending: Vec::new() });
        }
        disk.durable = disk.now.clone();
        disk
    }

    /// Does what was done.
    pub(crate) fn apply(&mut self, act: &Act) {
        match act {
            Act::Create(path) => {
                let empty = Content::new(Vec::new());
                self.inodes.push(Inode { now: empty.clone(), durable: empty, pending: Vec::new() });
                self.name(Naming::Add(path.clone(), Node::File(self.inodes.len() - 1)));
            }
            Act::MakeDirectory(path) => self.name(Naming::Add(path.clone(), Node::Directory)),
            Act::Write { path, at, bytes } => self.change(path, Change::Write(*at, bytes.clone())),
            Act::Size { path, size } => self.change(path, Change::Size(*size)),
            Act::Punch { path, range } => self.change(path, Change::Punch(range.clone())),
            Act::Rot { path, at } => match self.now.get(path) {
                Some(Node::File(inode)) => self.inodes[*inode].rot(*at),
                _ => panic!("`{path}` rots and is not there"),
            },
            Act::Sync(path) => match self.now.get(path) {
                Some(Node::File(inode)) => self.inodes[*inode].sync(),
                Some(Node::Directory) => self.sync_names(path),
                None if path.is_empty() => self.sync_names(path),
                None => panic!("`{path}` is synced and is not there"),
            },
            Act::SyncAll => {
                self.inodes.iter_mut().for_each(Inode::sync);
                self.durable = self.now.clone();
                self.pending.clear();
            }
            Act::Rename { from, to } => {
                let node = self.now[from];
                self.name(Naming::Move(from.clone(), to.clone(), node));
            }
            Act::Unlink(path) | Act::RemoveDirectory(path) => self.name(Naming::Remove(path.clone())),
            Act::Mark(_) => {}
        }
    }

    fn name(&mut self, naming: Naming) {
        naming.carry_out(&mut self.now);
        self.pending.push(naming);
    }

    fn change(&mut self, path: &str, change: Change) {
        let Some(Node::File(inode)) = self.now.get(path) else { panic!("`{path}` is changed and is not there") };
        let inode = &mut self.inodes[*inode];
        inode.now.change(&change);
        inode.pending.push(change);
    }

    fn sync_names(&mut self, directory: &str) {
        let mut due = vec![false; self.pending.len()];
        let mut touched: BTreeSet<&str> = BTreeSet::new();
        for (at, naming) in self.pending.iter().enumerate().rev() {
            let paths = naming.paths();
            if paths.iter().any(|path| parent(path) == directory || touched.contains(path)) {
                due[at] = true;
                touched.extend(paths);
            }
        }
        let mut left: Vec<Naming> = Vec::new();
        for (naming, due) in std::mem::take(&mut self.pending).into_iter().zip(due) {
            if due {
                if let Naming::Move(from, to, Node::Directory) = &naming {
                    left.iter_mut().for_each(|earlier| earlier.follow(from, to));
                }
                naming.carry_out(&mut self.durable);
            } else {
                left.push(naming);
            }
        }
        self.pending = left;
    }

    /// What is found after a crash now.
    pub(crate) fn image(&self, loss: Loss) -> Image {
        let mut random = Random::new(if let Loss::Some(seed) = loss { seed } else { 0 });
        let mut names = match loss {
            Loss::Nothing | Loss::Bytes => self.now.clone(),
            Loss::Everything | Loss::Some(_) => self.durable.clone(),
        };
        if matches!(loss, Loss::Some(_)) {
            let kept = usize::try_from(random.below(self.pending.len() as u64 + 1)).unwrap();
            self.pending[..kept].iter().for_each(|naming| naming.carry_out(&mut names));
        }
        let mut image = Image::default();
        // Parents come before what is in them.
        for (path, node) in names {
            if !parent(&path).is_empty() && !image.directories.contains(parent(&path)) {
                continue;
            }
            match node {
                Node::Directory => {
                    image.directories.insert(path);
                }
                Node::File(inode) => {
                    let inode = &self.inodes[inode];
                    let content = match loss {
                        Loss::Nothing => inode.now.clone(),
                        Loss::Everything => inode.durable.clone(),
                        Loss::Bytes => inode.hollow(),
                        Loss::Some(_) => inode.torn(&mut random),
                    };
                    image.files.insert(path, content);
                }
            }
        }
        image
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// A directory with all that is in it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    pub(crate) directories: BTreeSet<String>,
    pub(crate) files: BTreeMap<String, Content>,
}

impl Image {
    /// What is on the real disk.
    pub(crate) fn of(root: &Path) -> Self {
        let mut image = Self::default();
        for path in walk(root) {
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                image.directories.insert(name);
            } else if !name.ends_with("-shm") {
                image.files.insert(name, Content::new(fs::read(&path).unwrap()));
            }
        }
        image
    }

    /// Puts it on the real disk, holes as holes.
    pub(crate) fn write_to(&self, root: &Path) {
        fs::create_dir_all(root).unwrap();
        for directory in &self.directories {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        for (name, content) in &self.files {
            let file = File::create(root.join(name)).unwrap();
            file.set_len(content.bytes.len() as u64).unwrap();
            let pages = content.bytes.chunks(PAGE_BYTES);
            for (page, at) in
                pages.zip((0..).step_by(PAGE_BYTES)).filter(|(page, _)| page.iter().any(|byte| *byte != 0))
            {
                file.write_all_at(page, at).unwrap();
            }
        }
    }

    /// Where it differs from another.
    pub(crate) fn differences(&self, other: &Self) -> Vec<String> {
        let mut found: Vec<_> = self.directories.symmetric_difference(&other.directories).cloned().collect();
        let names: BTreeSet<_> = self.files.keys().chain(other.files.keys()).collect();
        let differs = |name: &String| {
            self.files.get(name).map(|file| &file.bytes) != other.files.get(name).map(|file| &file.bytes)
        };
        found.extend(names.into_iter().filter(|name| differs(name)).cloned());
        found
    }
}

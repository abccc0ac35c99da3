//! What a checkpoint looks like as a file system, without a word of FUSE.
//!
//! Inode = node of the manifest's tree + 1, so the root is inode 1 and every inode is fixed by the manifest alone: a
//! successor of this process shows the same numbers without having been told. Everything is read-only, owned by
//! root, and of one age: the checkpoint's. Nothing here changes, so nothing here is locked.

use std::sync::Arc;

use super::content::{Content, FileNode, FileState};
use super::refusal::Refusal;
use crate::manifest::{Entry, EntryKind, ROOT, Tree};

/// Inode of the root.
pub const ROOT_INODE: u64 = 1;

/// Unit of `statfs` and of preferred reads.
pub const STATFS_UNIT_BYTES: u32 = 4096;

/// Digest of a file: what `b3sum` prints.
const XATTR_DIGEST: &str = "user.ckptd.digest";
/// Which checkpoint this is.
const XATTR_CHECKPOINT: &str = "user.ckptd.checkpoint";
/// How a file's bytes reach the reader: `passthrough`, `daemon`, `filling 43%`.
const XATTR_STATE: &str = "user.ckptd.state";

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
}

/// Attributes of one inode; owner, group and times are the same for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub inode: u64,
    /// What it is.
    pub kind: NodeKind,
    /// Length in bytes; of the target for symbolic links.
    pub size: u64,
    /// 512-byte units that it takes up: as if it had no holes.
    pub blocks: u64,
    /// Permission bits.
    pub permissions: u16,
    /// Link count.
    pub links: u32,
}

/// One entry of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Child<'a> {
    /// Offset at which the listing goes on after this entry.
    pub next: u64,
    /// Name in the directory.
    pub name: &'a [u8],
    /// Its inode.
    pub inode: u64,
}

/// Figures of the whole file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    /// Logical bytes in units of [`STATFS_UNIT_BYTES`], rounded up.
    pub units: u64,
    /// Number of regular files.
    pub files: u64,
}

/// The tree of one checkpoint as inodes.
pub struct View {
    tree: Arc<Tree>,
    content: Arc<dyn Content>,
    checkpoint: String,
}

impl View {
    /// The view of `tree`, whose bytes are in `content`; `checkpoint` is what `user.ckptd.checkpoint` says.
    pub fn new(tree: Arc<Tree>, content: Arc<dyn Content>, checkpoint: impl Into<String>) -> Self {
        Self { tree, content, checkpoint: checkpoint.into() }
    }

    /// Where the bytes are.
    pub fn content(&self) -> &Arc<dyn Content> {
        &self.content
    }

    /// Attributes of `inode`.
    ///
    /// # Errors
    /// No such entry.
    pub fn attributes(&self, inode: u64) -> Result<Attributes, Refusal> {
        let node = self.node(inode)?;
        Ok(match self.tree.entry(node).map(|entry| &entry.kind) {
            None | Some(EntryKind::Directory) => self.directory(inode, node),
            Some(EntryKind::File { size, executable, .. }) => Attributes {
                inode,
                kind: NodeKind::File,
                size: *size,
                blocks: size.div_ceil(512),
                permissions: if *executable { 0o555 } else { 0o444 },
                links: 1,
            },
            Some(EntryKind::Symlink { target }) => Attributes {
                inode,
                kind: NodeKind::Symlink,
                size: u64::try_from(target.len()).unwrap_or(u64::MAX),
                blocks: 0,
                permissions: 0o777,
                links: 1,
            },
        })
    }

    fn directory(&self, inode: u64, node: u32) -> Attributes {
        let links = self.tree.subdirectories(node).saturating_add(2);
        Attributes { inode, kind: NodeKind::Directory, size: 0, blocks: 0, permissions: 0o555, links }
    }

    /// The inode of `name` in the directory `parent`; `None` where there is no such name. `.` and `..` are for whoever
    /// kept nothing but an inode number (exports).
    ///
    /// # Errors
    /// No such entry or not a directory, of `parent`.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Result<Option<u64>, Refusal> {
        let node = self.node(parent)?;
        match name {
            b"." => return Ok(Some(parent)),
            b".." => return Ok(Some(inode_of(self.tree.parent(node)))),
            _ => {}
        }
        let directory = self.directory_node(parent)?;
        Ok(self.tree.lookup(directory, name).map(inode_of))
    }

    /// The target of a symbolic link, verbatim.
    ///
    /// # Errors
    /// No such entry, or not a link.
    pub fn link_target(&self, inode: u64) -> Result<&[u8], Refusal> {
        match self.entry(inode)?.map(|entry| &entry.kind) {
            Some(EntryKind::Symlink { target }) => Ok(target),
            _ => Err(Refusal::NotALink),
        }
    }

    /// The regular file at `inode`.
    ///
    /// # Errors
    /// No such entry, or not a regular file.
    pub fn file(&self, inode: u64) -> Result<FileNode, Refusal> {
        match self.entry(inode)?.map(|entry| &entry.kind) {
            Some(EntryKind::File { size, digest, .. }) => Ok(FileNode { inode, digest: *digest, size: *size }),
            None | Some(EntryKind::Directory) => Err(Refusal::IsADirectory),
            Some(EntryKind::Symlink { .. }) => Err(Refusal::NotAFile),
        }
    }

    /// Shows `each` the entries of a directory from `offset` (0 for the start) until it returns true (no more room).
    ///
    /// # Errors
    /// No such entry, or not a directory.
    pub fn list<'a>(&'a self, inode: u64, offset: u64, mut each: impl FnMut(Child<'a>) -> bool) -> Result<(), Refusal> {
        let node = self.directory_node(inode)?;
        if offset == 0 && each(Child { next: 1, name: b".", inode }) {
            return Ok(());
        }
        if offset <= 1 && each(Child { next: 2, name: b"..", inode: inode_of(self.tree.parent(node)) }) {
            return Ok(());
        }
        let skip = usize::try_from(offset.saturating_sub(2)).unwrap_or(usize::MAX);
        let children = self.tree.children(node).get(skip..).unwrap_or_default();
        for (child, at) in children.iter().zip(offset.max(2)..) {
            if each(Child { next: at + 1, name: self.tree.name(*child), inode: inode_of(*child) }) {
                break;
            }
        }
        Ok(())
    }

    /// Names of the extended attributes of `inode`.
    ///
    /// # Errors
    /// No such entry.
    pub fn attribute_names(&self, inode: u64) -> Result<&'static [&'static str], Refusal> {
        Ok(match self.entry(inode)?.map(|entry| &entry.kind) {
            Some(EntryKind::File { .. }) => &[XATTR_DIGEST, XATTR_CHECKPOINT, XATTR_STATE],
            None | Some(EntryKind::Directory) => &[XATTR_CHECKPOINT],
            Some(EntryKind::Symlink { .. }) => &[],
        })
    }

    /// Value of the extended attribute `name`; `asked` says who asks how a file's bytes are here, where that matters.
    ///
    /// # Errors
    /// No such entry, or no such attribute.
    pub fn attribute(&self, inode: u64, name: &[u8], asked: impl FnOnce() -> Asked) -> Result<String, Refusal> {
        let known = self.attribute_names(inode)?.iter().find(|known| known.as_bytes() == name);
        match known.copied() {
            Some(XATTR_CHECKPOINT) => Ok(self.checkpoint.clone()),
            Some(XATTR_DIGEST) => {
                let file = self.file(inode)?;
                self.content.digest(&file).map(|digest| digest.to_hex()).ok_or(Refusal::NoSuchAttribute)
            }
            Some(XATTR_STATE) => {
                let file = self.file(inode)?;
                Ok(show_state(self.content.state(&file), asked))
            }
            _ => Err(Refusal::NoSuchAttribute),
        }
    }

    /// Size and count of the whole.
    pub fn figures(&self) -> Figures {
        let manifest = self.tree.manifest();
        Figures { units: manifest.logical_bytes().div_ceil(STATFS_UNIT_BYTES.into()), files: manifest.files() }
    }

    fn node(&self, inode: u64) -> Result<u32, Refusal> {
        let node = inode.checked_sub(1).and_then(|node| u32::try_from(node).ok());
        node.filter(|node| *node < self.tree.len()).ok_or(Refusal::NoSuchEntry)
    }

    /// `None` is the root.
    fn entry(&self, inode: u64) -> Result<Option<&Entry>, Refusal> {
        self.node(inode).map(|node| self.tree.entry(node))
    }

    fn directory_node(&self, inode: u64) -> Result<u32, Refusal> {
        let node = self.node(inode)?;
        if self.tree.is_directory(node) { Ok(node) } else { Err(Refusal::NotADirectory) }
    }
}

fn inode_of(node: u32) -> u64 {
    u64::from(node) + ROOT_INODE - u64::from(ROOT)
}

/// Who asks how a file's bytes are here, and what it is told of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// This host's root; whether this file would be, or is, read by the kernel itself.
    ByHost(bool),
    /// A job; whether the connection has passthrough at all.
    ByJob(bool),
}

/// A file with holes has them because another has the same bytes, whose owner may be another: a job is told what it would be without.
fn show_state(state: FileState, asked: impl FnOnce() -> Asked) -> String {
    let is_the_kernels = match state {
        FileState::Filling { percent } => return format!("filling {}%", percent.min(99)),
        FileState::Daemon => false,
        FileState::Passthrough => matches!(asked(), Asked::ByHost(true) | Asked::ByJob(true)),
        FileState::Compact => asked() == Asked::ByJob(true),
    };
    if is_the_kernels { "passthrough".to_owned() } else { "daemon".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::super::content::OpenFile;
    use super::*;
    use crate::digest::Digest;
    use crate::error::{Error, Result};
    use crate::manifest::Manifest;
    use crate::names::EntryPath;

    struct Nothing(FileState);

    impl Content for Nothing {
        fn open(&self, _: &FileNode) -> Result<Arc<dyn OpenFile>> {
            Err(Error::internal("nothing is here"))
        }

        fn state(&self, _: &FileNode) -> FileState {
            self.0
        }
    }

    fn entry(path: &str, kind: EntryKind) -> Entry {
        Entry { path: EntryPath::new(path.as_bytes()).unwrap(), kind }
    }

    fn view(state: FileState) -> View {
        let file = |size, executable| EntryKind::File { size, executable, digest: Digest::of(b"x") };
        let entries = vec![
            entry("d/run", file(513, true)),
            entry("d/sub/deep", file(0, false)),
            entry("link", EntryKind::Symlink { target: (*b"d/run").into() }),
            entry("weights", file(4097, false)),
        ];
        let tree = Arc::new(Tree::new(Arc::new(Manifest::new(entries).unwrap())));
        View::new(tree, Arc::new(Nothing(state)), "cp-1")
    }

    fn find(view: &View, path: &str) -> u64 {
        path.split('/')
            .fold(ROOT_INODE, |above, name| view.lookup(above, name.as_bytes()).unwrap().expect("the name is there"))
    }

    #[test]
    fn attributes_are_those_of_a_read_only_tree() {
        let view = view(FileState::Daemon);
        let shown = |path: &str| {
            let a = view.attributes(find(&view, path)).unwrap();
            (a.kind, a.size, a.blocks, a.permissions, a.links)
        };
        assert_eq!(shown("d/run"), (NodeKind::File, 513, 2, 0o555, 1));
        assert_eq!(shown("weights"), (NodeKind::File, 4097, 9, 0o444, 1));
        assert_eq!(shown("d"), (NodeKind::Directory, 0, 0, 0o555, 3));
        assert_eq!(shown("link"), (NodeKind::Symlink, 5, 0, 0o777, 1));
        assert_eq!(view.attributes(ROOT_INODE).unwrap().links, 3);
        assert_eq!(view.figures(), Figures { units: 2, files: 3 });
    }

    #[test]
    fn inodes_that_do_not_exist_are_refused_everywhere() {
        let view = view(FileState::Daemon);
        for inode in [0, 99, u64::MAX] {
            assert!(matches!(view.attributes(inode), Err(Refusal::NoSuchEntry)));
            assert!(matches!(view.lookup(inode, b"x"), Err(Refusal::NoSuchEntry)));
            assert!(matches!(view.file(inode), Err(Refusal::NoSuchEntry)));
            assert!(matches!(view.list(inode, 0, |_| false), Err(Refusal::NoSuchEntry)));
            assert!(matches!(view.attribute_names(inode), Err(Refusal::NoSuchEntry)));
        }
        let file = find(&view, "weights");
        assert!(matches!(view.lookup(file, b"x"), Err(Refusal::NotADirectory)));
        assert!(matches!(view.list(file, 0, |_| false), Err(Refusal::NotADirectory)));
        assert!(matches!(view.link_target(file), Err(Refusal::NotALink)));
        assert!(matches!(view.file(ROOT_INODE), Err(Refusal::IsADirectory)));
        assert_eq!(view.lookup(ROOT_INODE, b"nothing").unwrap(), None);
    }

    #[test]
    fn a_listing_goes_on_where_it_stopped() {
        let view = view(FileState::Daemon);
        let directory = find(&view, "d");
        let mut seen = Vec::new();
        let mut offset = 0;
        loop {
            let mut shown = None;
            view.list(directory, offset, |child| {
                shown = Some(child);
                true
            })
            .unwrap();
            let Some(child) = shown else { break };
            seen.push((child.name.to_vec(), child.inode));
            offset = child.next;
        }
        let names: Vec<_> = seen.iter().map(|(name, _)| name.as_slice()).collect();
        assert_eq!(names, [b".".as_slice(), b"..", b"run", b"sub"]);
        assert_eq!((seen[0].1, seen[1].1), (directory, ROOT_INODE));
        view.list(directory, u64::MAX, |_| panic!("there is nothing at that offset")).unwrap();
    }

    #[test]
    fn extended_attributes_say_what_and_how() {
        let value = |state, name: &str| {
            let view = view(state);
            view.attribute(find(&view, "weights"), name.as_bytes(), || Asked::ByHost(true))
        };
        assert_eq!(value(FileState::Daemon, XATTR_DIGEST).unwrap(), Digest::of(b"x").to_hex());
        assert_eq!(value(FileState::Daemon, XATTR_CHECKPOINT).unwrap(), "cp-1");
        assert!(matches!(value(FileState::Daemon, "security.capability"), Err(Refusal::NoSuchAttribute)));
        let view = view(FileState::Daemon);
        let of_root = |name: &str| view.attribute(ROOT_INODE, name.as_bytes(), || Asked::ByHost(true));
        assert!(matches!(of_root(XATTR_DIGEST), Err(Refusal::NoSuchAttribute)));
        assert_eq!(of_root(XATTR_CHECKPOINT).unwrap(), "cp-1");
    }

    #[test]
    fn a_job_is_not_told_that_a_file_is_compact() {
        let word = |state, asked| show_state(state, || asked);
        for (state, host, job) in [
            (FileState::Passthrough, "passthrough", "passthrough"),
            (FileState::Compact, "daemon", "passthrough"),
            (FileState::Daemon, "daemon", "daemon"),
            (FileState::Filling { percent: 43 }, "filling 43%", "filling 43%"),
        ] {
            assert_eq!((word(state, Asked::ByHost(true)), word(state, Asked::ByJob(true))), (host.into(), job.into()));
            let without = (word(state, Asked::ByHost(false)), word(state, Asked::ByJob(false)));
            assert!(without.0 != "passthrough" && without.0 == without.1, "{state:?}: {without:?}");
        }
    }
}

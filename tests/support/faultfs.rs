//! A file system that is slow, hangs, or fails on request: what a server behind a mount does on a bad day.
//!
//! One flat directory of files in memory, served through FUSE by this process. Nothing is cached on the way, so that every
//! read of a reader is a request here.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, ReplyOpen, Request,
};
use nix::mount::{MntFlags, umount2};

use super::place::Place;

const ROOT: u64 = 1;

/// The kernel asks every time.
const NEVER: Duration = Duration::ZERO;

/// The file system; its mount goes with it.
pub(crate) struct FaultFs {
    shared: Arc<Shared>,
    root: PathBuf,
    session: Option<BackgroundSession>,
    _place: Place,
}

#[derive(Default)]
struct Shared {
    files: Vec<(String, Vec<u8>)>,
    hung: Mutex<HashSet<u64>>,
    shut: Mutex<HashSet<u64>>,
    let_go: Condvar,
    /// Errno and how often, by inode.
    errors: Mutex<HashMap<u64, (i32, u32)>>,
    delay_ms: AtomicU64,
    bytes: AtomicU64,
}

struct Faulty(Arc<Shared>);

impl FaultFs {
    /// Mounts these files.
    pub(crate) fn mount(files: Vec<(String, Vec<u8>)>) -> Self {
        let place = Place::new();
        let root = place.dir("faulty");
        let shared = Arc::new(Shared { files, ..Shared::default() });
        let session = fuser::spawn_mount(Faulty(shared.clone()), &root, &Config::default()).unwrap();
        Self { shared, root, session: Some(session), _place: place }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Reads of `name` wait from now on, until [`FaultFs::let_go`].
    pub(crate) fn hang(&self, name: &str) {
        self.shared.hung.lock().unwrap().insert(self.shared.inode(name).unwrap());
    }

    /// Whoever opens its directory waits from now on, until [`FaultFs::let_go`].
    pub(crate) fn freeze(&self) {
        self.shared.hung.lock().unwrap().insert(ROOT);
    }

    /// Answers what waits.
    pub(crate) fn let_go(&self) {
        self.shared.hung.lock().unwrap().clear();
        self.shared.let_go.notify_all();
    }

    /// The next `times` reads of `name` fail; 0 ends it.
    pub(crate) fn fail(&self, name: &str, errno: i32, times: u32) {
        self.shared.errors.lock().unwrap().insert(self.shared.inode(name).unwrap(), (errno, times));
    }

    /// Whoever opens `name` fails with EIO from now on.
    pub(crate) fn shut(&self, name: &str) {
        self.shared.shut.lock().unwrap().insert(self.shared.inode(name).unwrap());
    }

    /// Every read takes so long, one after the other.
    pub(crate) fn slow_down(&self, delay: Duration) {
        self.shared.delay_ms.store(delay.as_millis().try_into().unwrap(), Ordering::Relaxed);
    }

    /// Bytes read since the last call.
    pub(crate) fn take_bytes(&self) -> u64 {
        self.shared.bytes.swap(0, Ordering::Relaxed)
    }
}

impl Drop for FaultFs {
    fn drop(&mut self) {
        self.let_go();
        let _ = umount2(&self.root, MntFlags::MNT_DETACH);
        drop(self.session.take());
    }
}

impl Shared {
    fn inode(&self, name: &str) -> Option<u64> {
        self.files.iter().position(|(known, _)| known == name).map(|at| at as u64 + ROOT + 1)
    }

    fn bytes_of(&self, inode: u64) -> Option<&[u8]> {
        let at = usize::try_from(inode.checked_sub(ROOT + 1)?).ok()?;
        self.files.get(at).map(|(_, bytes)| bytes.as_slice())
    }

    fn attributes(&self, inode: u64) -> Option<FileAttr> {
        let (kind, size) = match inode {
            ROOT => (FileType::Directory, 0),
            _ => (FileType::RegularFile, self.bytes_of(inode)?.len() as u64),
        };
        Some(FileAttr {
            ino: INodeNo(inode),
            size,
            blocks: size.div_ceil(512),
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind,
            perm: if kind == FileType::Directory { 0o755 } else { 0o644 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn answer(&self, inode: u64, offset: u64, size: u32, reply: ReplyData) {
        let Some(bytes) = self.bytes_of(inode) else { return reply.error(Errno::from_i32(libc::ENOENT)) };
        let start = usize::try_from(offset).unwrap().min(bytes.len());
        let end = (start + size as usize).min(bytes.len());
        self.bytes.fetch_add((end - start) as u64, Ordering::Relaxed);
        reply.data(&bytes[start..end]);
    }

    /// Answers at once, or from a thread of its own once `inode` hangs no more.
    fn when_let_go(self: &Arc<Self>, inode: u64, answer: impl FnOnce(&Self) + Send + 'static) {
        if !self.hung.lock().unwrap().contains(&inode) {
            return answer(self.as_ref());
        }
        let shared = self.clone();
        thread::spawn(move || {
            let hung = shared.hung.lock().unwrap();
            drop(shared.let_go.wait_while(hung, |hung| hung.contains(&inode)).unwrap());
            answer(&shared);
        });
    }

    /// The errno that this read is to fail with.
    fn fault(&self, inode: u64) -> Option<i32> {
        let mut errors = self.errors.lock().unwrap();
        let (errno, times) = errors.get_mut(&inode).filter(|(_, times)| *times > 0)?;
        *times -= 1;
        Some(*errno)
    }
}

impl Filesystem for Faulty {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = name.to_str().and_then(|name| self.0.attributes(self.0.inode(name)?));
        match found {
            Some(attributes) => reply.entry(&NEVER, &attributes, Generation(0)),
            None => reply.error(Errno::from_i32(libc::ENOENT)),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.attributes(ino.0) {
            Some(attributes) => reply.attr(&NEVER, &attributes),
            None => reply.error(Errno::from_i32(libc::ENOENT)),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if self.0.shut.lock().unwrap().contains(&ino.0) {
            return reply.error(Errno::from_i32(libc::EIO));
        }
        reply.opened(FileHandle(ino.0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if let Some(errno) = self.0.fault(ino.0) {
            return reply.error(Errno::from_i32(errno));
        }
        thread::sleep(Duration::from_millis(self.0.delay_ms.load(Ordering::Relaxed)));
        self.0.when_let_go(ino.0, move |shared| shared.answer(ino.0, offset, size, reply));
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.0.when_let_go(ino.0, move |_| reply.opened(FileHandle(ino.0), FopenFlags::empty()));
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let names = [".", ".."].into_iter().chain(self.0.files.iter().map(|(name, _)| name.as_str()));
        for (at, name) in names.enumerate().skip(usize::try_from(offset).unwrap()) {
            let kind = if at < 2 { FileType::Directory } else { FileType::RegularFile };
            let inode = self.0.inode(name).unwrap_or(ROOT);
            if reply.add(INodeNo(inode), at as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}

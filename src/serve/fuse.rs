//! The FUSE adapter: takes a request, asks the view, answers. No decision is made here that the view or [`OpenFiles`]
//! could make.
//!
//! Nothing is ever invalidated, because nothing ever changes: names, absent names and attributes are good for
//! [`FOREVER`], listings and links are cached, pages are kept from one open to the next. Listings always
//! carry attributes (plain readdirplus: the automatic kind was 25 times slower for the `stat`s after a first listing).
//! Directories are not opened at all where the kernel allows it: an `ENOSYS` to the first OPENDIR makes it cache all listings.
//!
//! A loop never waits: bytes that are not here are answered from wherever [`OpenFile::when_here`] resumes. A panic ends
//! one request with EIO (an unanswered reply says so when it is dropped), not the session.
//!
//! Writing is refused with EROFS. The kernel sees to it before asking, since the file system is mounted read-only;
//! the answers here are for whoever changes that.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::buffers::{READ_BYTES, ReadBuffers};
use super::content::OpenFile;
use super::features::Features;
use super::namespace;
use super::open_files::{Mode, OpenFiles};
use super::refusal::Refusal;
use super::view::{Asked, Attributes, NodeKind, STATFS_UNIT_BYTES, View};
use super::waits::{Asker, Turn, Waits};
use crate::error::Result;
use crate::limits::UNIT_BYTES;

/// How long the kernel may believe a name or attribute: ten years.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Inodes are never used again within a session.
const GENERATION: Generation = Generation(0);

/// Requests that the kernel may have under way in the background: read-ahead and `O_DIRECT`, of which one that waits for bytes counts until they are here. Beyond, whoever
/// reads what *is* here waits with them, of all jobs of the session; the kernel's own bound is 12. One that waits costs us some hundred bytes,
/// so this is half of what one flight lets wait, and thrice what is promised.
const BACKGROUND_REQUESTS: u16 = 1 << 15;

/// Reads of all sessions that wait.
pub(super) type ReadWaits = Waits<ReplyData>;

/// None yet.
pub(super) fn no_waits() -> ReadWaits {
    Waits::new(|reply: ReplyData| reply.error(Errno::EINTR))
}

/// One session's file system.
pub(super) struct Adapter {
    pub(super) view: View,
    pub(super) open: Arc<OpenFiles>,
    pub(super) buffers: Arc<ReadBuffers>,
    pub(super) waits: ReadWaits,
    pub(super) features: Features,
    /// Whether passthrough is asked for, and how deep file systems may then stack.
    pub(super) passthrough_depth: Option<u32>,
    /// Time of everything.
    pub(super) created: SystemTime,
}

impl Adapter {
    fn attributes(&self, inode: u64) -> Result<FileAttr, Refusal> {
        self.view.attributes(inode).map(|attributes| self.in_fuse(&attributes))
    }

    fn in_fuse(&self, attributes: &Attributes) -> FileAttr {
        FileAttr {
            ino: INodeNo(attributes.inode),
            size: attributes.size,
            blocks: attributes.blocks,
            atime: self.created,
            mtime: self.created,
            ctime: self.created,
            crtime: self.created,
            kind: file_type(attributes.kind),
            perm: attributes.permissions,
            nlink: attributes.links,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: STATFS_UNIT_BYTES,
            flags: 0,
        }
    }

    /// What the kernel remembers of a name that is not there.
    fn absent(&self) -> FileAttr {
        let attributes = Attributes { inode: 0, kind: NodeKind::File, size: 0, blocks: 0, permissions: 0, links: 0 };
        self.in_fuse(&attributes)
    }

    fn looked_up(&self, parent: u64, name: &[u8]) -> Result<FileAttr, Refusal> {
        match self.view.lookup(parent, name)? {
            Some(inode) => self.attributes(inode),
            None => Ok(self.absent()),
        }
    }

    fn open_file(&self, inode: u64) -> Result<Arc<dyn OpenFile>, Refusal> {
        let node = self.view.file(inode)?;
        Ok(self.open.file(inode, || self.view.content().open(&node))?)
    }

    fn opened(&self, inode: u64, flags: OpenFlags) -> Result<Mode, Refusal> {
        let node = self.view.file(inode)?;
        if flags.acc_mode() != OpenAccMode::O_RDONLY || flags.0 & libc::O_TRUNC != 0 {
            return Err(Refusal::ReadOnly);
        }
        Ok(self.open.open(inode, || self.view.content().open(&node))?)
    }

    /// What a read of `size` bytes at `offset` is of: the file and how many bytes there must be.
    fn to_read(&self, inode: u64, offset: u64, size: u32) -> Result<(Arc<dyn OpenFile>, u32), Refusal> {
        if size > READ_BYTES {
            return Err(Refusal::BadRequest);
        }
        let left = self.view.file(inode)?.size.saturating_sub(offset);
        let length = u32::try_from(left).unwrap_or(u32::MAX).min(size);
        Ok((self.open_file(inode)?, length))
    }
}

fn file_type(kind: NodeKind) -> FileType {
    match kind {
        NodeKind::Directory => FileType::Directory,
        NodeKind::File => FileType::RegularFile,
        NodeKind::Symlink => FileType::Symlink,
    }
}

fn refuse(inode: u64, refusal: &Refusal) -> Errno {
    match refusal {
        // The failure of the checkpoint was logged once; its readers may be thousands.
        Refusal::Failed(error) if error.reason() == "CHECKPOINT_FAILED" => {
            tracing::debug!(inode, error = %error.report(), "a request of a reader failed");
        }
        Refusal::Failed(error) => tracing::warn!(inode, error = %error.report(), "a request of a reader failed"),
        Refusal::Truncated => tracing::error!(inode, "the bytes of a file end before the file does"),
        _ => {}
    }
    Errno::from_i32(refusal.errno())
}

/// Runs one request; a panic in it is noted and goes no further.
fn guarded(operation: &'static str, inode: INodeNo, work: impl FnOnce()) {
    let work = || {
        let _span = tracing::trace_span!("fuse", operation, inode = inode.0).entered();
        work();
    };
    if catch_unwind(AssertUnwindSafe(work)).is_err() {
        tracing::error!(operation, inode = inode.0, "a panic ended a request of a reader");
    }
}

/// Whether a fill unit of what is asked for is here. What the kernel asks for a reader alone is never of two: pages, however large, are aligned.
fn is_partly_here(file: &dyn OpenFile, offset: u64, length: usize) -> bool {
    let end = offset.saturating_add(length as u64);
    let mut parts = std::iter::successors(Some(offset), |at| {
        let next = (at / UNIT_BYTES + 1) * UNIT_BYTES;
        (next < end).then_some(next)
    });
    parts.any(|at| {
        let until = ((at / UNIT_BYTES + 1) * UNIT_BYTES).min(end);
        file.here(at, usize::try_from(until - at).unwrap_or(usize::MAX))
    })
}

/// Reads `length` bytes, which are here, and answers.
fn answer_read(buffers: &ReadBuffers, file: &dyn OpenFile, inode: u64, offset: u64, length: u32, reply: ReplyData) {
    buffers.lend(length, |buffer| match fill(file, buffer, offset) {
        Ok(()) => reply.data(buffer),
        Err(refusal) => reply.error(refuse(inode, &refusal)),
    });
}

/// As [`answer_read`] for a read that waited: it is answered if its reader is still there.
fn answer_turn(
    buffers: &ReadBuffers,
    file: &dyn OpenFile,
    inode: u64,
    offset: u64,
    length: u32,
    turn: Turn<ReplyData>,
    arrived: Result<()>,
) {
    let refused = |turn: Turn<ReplyData>, refusal: &Refusal| {
        if let Some(reply) = turn.take() {
            reply.error(refuse(inode, refusal));
        }
    };
    match arrived {
        // Taken after the bytes are there: reading them may hang, and the reader may go away meanwhile.
        Ok(()) => buffers.lend(length, |buffer| match fill(file, buffer, offset) {
            Ok(()) => turn.take().into_iter().for_each(|reply| reply.data(buffer)),
            Err(refusal) => refused(turn, &refusal),
        }),
        Err(error) => refused(turn, &Refusal::Failed(error)),
    }
}

/// Fills `buffer`: the kernel takes a short answer for zeros.
fn fill(file: &dyn OpenFile, buffer: &mut [u8], offset: u64) -> Result<(), Refusal> {
    let mut done = 0;
    let mut at = offset;
    while done < buffer.len() {
        let got = file.read_at(&mut buffer[done..], at)?;
        if got == 0 {
            return Err(Refusal::Truncated);
        }
        done += got;
        at = at.saturating_add(u64::try_from(got).unwrap_or(u64::MAX));
    }
    Ok(())
}

fn answer_attribute(reply: ReplyXattr, size: u32, value: &[u8]) {
    match u32::try_from(value.len()) {
        Ok(length) if size == 0 => reply.size(length),
        Ok(length) if length <= size => reply.data(value),
        _ => reply.error(Errno::from_i32(Refusal::TooLong.errno())),
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_MAX_PAGES,
            InitFlags::FUSE_NO_OPENDIR_SUPPORT,
            InitFlags::FUSE_EXPORT_SUPPORT,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_ALLOW_IDMAP,
        ];
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                tracing::debug!(?flag, "the kernel does not offer a FUSE feature that would be used");
            }
        }
        if let Some(depth) = self.passthrough_depth
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
        {
            // Refused only above the kernel's own bound of 2, which the session has checked.
            let _ = config.set_max_stack_depth(depth);
        }
        let _ = config.set_max_write(READ_BYTES);
        let _ = config.set_max_background(BACKGROUND_REQUESTS);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        guarded("lookup", parent, || match self.looked_up(parent.0, name.as_bytes()) {
            Ok(attributes) => reply.entry(&FOREVER, &attributes, GENERATION),
            Err(refusal) => reply.error(refuse(parent.0, &refusal)),
        });
    }

    fn forget(&self, _req: &Request, _ino: INodeNo, _nlookup: u64) {}

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        guarded("getattr", ino, || match self.attributes(ino.0) {
            Ok(attributes) => reply.attr(&FOREVER, &attributes),
            Err(refusal) => reply.error(refuse(ino.0, &refusal)),
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        guarded("readlink", ino, || match self.view.link_target(ino.0) {
            Ok(target) => reply.data(target),
            Err(refusal) => reply.error(refuse(ino.0, &refusal)),
        });
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let handle = FileHandle(ino.0);
        guarded("open", ino, || match self.opened(ino.0, flags) {
            Ok(Mode::Daemon) => {
                let kept = self.open_file(ino.0).is_ok_and(|file| self.open.believes_pages(ino.0, file.as_ref()));
                let keep = if kept { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() };
                reply.opened(handle, keep | FopenFlags::FOPEN_NOFLUSH);
            }
            Ok(Mode::Passthrough { backing }) => {
                // SAFETY: `OpenFiles` has registered this number on this connection and withdraws it only after the last
                // release; ownership goes back to it right below.
                let backing = unsafe { reply.wrap_backing(backing) };
                // The kernel refuses FOPEN_KEEP_CACHE together with passthrough.
                reply.opened_passthrough(handle, FopenFlags::FOPEN_NOFLUSH, &backing);
                let _ = backing.into_raw();
            }
            Err(refusal) => reply.error(refuse(ino.0, &refusal)),
        });
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        guarded("read", ino, || {
            let (file, length) = match self.to_read(ino.0, offset, size) {
                Ok(found) => found,
                Err(refusal) => return reply.error(refuse(ino.0, &refusal)),
            };
            let bytes = usize::try_from(length).unwrap_or(usize::MAX);
            self.open.order.note(ino.0, offset);
            if file.here(offset, bytes) {
                return answer_read(&self.buffers, file.as_ref(), ino.0, offset, length, reply);
            }
            // The kernel names an owner of locks in reads past the page cache alone, also where nobody has asked for O_DIRECT (loop devices).
            let direct = flags.0 & libc::O_DIRECT != 0 || lock_owner.is_some();
            let read_ahead = !direct && is_partly_here(file.as_ref(), offset, bytes);
            let asker = Asker { thread: req.pid(), direct, read_ahead };
            let turn = self.waits.begin(asker, reply);
            let id = turn.id();
            let (buffers, waited) = (self.buffers.clone(), file.clone());
            let resume = move |arrived| answer_turn(&buffers, waited.as_ref(), ino.0, offset, length, turn, arrived);
            let resume = Box::new(move |arrived| guarded("read", ino, || resume(arrived)));
            if let Some(waiting) = file.when_here(offset, bytes, resume) {
                self.waits.on_giving_up(id, move || file.give_up(waiting));
            }
        });
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // Counted after the answer: a kernel that has none sends it again, to a successor, and it must not count twice.
        reply.ok();
        guarded("release", ino, || self.open.release(ino.0));
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.features.no_opendir {
            reply.error(Errno::from_i32(Refusal::NotOffered.errno()));
        } else {
            reply.opened(FileHandle(ino.0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR);
        }
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        guarded("readdir", ino, || {
            let listed = self.view.list(ino.0, offset, |child| {
                let kind = self.view.attributes(child.inode).map_or(NodeKind::File, |attributes| attributes.kind);
                reply.add(INodeNo(child.inode), child.next, file_type(kind), OsStr::from_bytes(child.name))
            });
            match listed {
                Ok(()) => reply.ok(),
                Err(refusal) => reply.error(refuse(ino.0, &refusal)),
            }
        });
    }

    fn readdirplus(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        guarded("readdirplus", ino, || {
            let listed = self.view.list(ino.0, offset, |child| {
                let attributes = self.attributes(child.inode).unwrap_or_else(|_| self.absent());
                let name = OsStr::from_bytes(child.name);
                reply.add(INodeNo(child.inode), child.next, name, &FOREVER, &attributes, GENERATION)
            });
            match listed {
                Ok(()) => reply.ok(),
                Err(refusal) => reply.error(refuse(ino.0, &refusal)),
            }
        });
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let figures = self.view.figures();
        reply.statfs(figures.units, 0, 0, figures.files, 0, STATFS_UNIT_BYTES, 255, STATFS_UNIT_BYTES);
    }

    fn getxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        guarded("getxattr", ino, || {
            let asked = || match namespace::is_of_our_root(req.pid()) {
                true => Asked::ByHost(self.open.offers_passthrough(ino.0)),
                false => Asked::ByJob(self.open.has_passthrough()),
            };
            match self.view.attribute(ino.0, name.as_bytes(), asked) {
                Ok(value) => answer_attribute(reply, size, value.as_bytes()),
                Err(refusal) => reply.error(refuse(ino.0, &refusal)),
            }
        });
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        guarded("listxattr", ino, || match self.view.attribute_names(ino.0) {
            Ok(names) => {
                let list: Vec<u8> = names.iter().flat_map(|name| name.bytes().chain([0])).collect();
                answer_attribute(reply, size, &list);
            }
            Err(refusal) => reply.error(refuse(ino.0, &refusal)),
        });
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::from_i32(Refusal::NoControl.errno()));
    }

    /// The kernel then answers itself, for good: the whole file is data.
    fn lseek(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _offset: i64, _whence: i32, reply: ReplyLseek) {
        reply.error(Errno::from_i32(Refusal::NotOffered.errno()));
    }

    /// Not asked under `default_permissions`.
    fn access(&self, _req: &Request, _ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        if mask.contains(AccessFlags::W_OK) { reply.error(read_only()) } else { reply.ok() }
    }

    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(read_only());
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(read_only());
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(read_only());
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(read_only());
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(read_only());
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(read_only());
    }

    fn rename(&self, _: &Request, _: INodeNo, _: &OsStr, _: INodeNo, _: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        reply.error(read_only());
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(read_only());
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(read_only());
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(read_only());
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(read_only());
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(read_only());
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(read_only());
    }
}

fn read_only() -> Errno {
    Errno::from_i32(Refusal::ReadOnly.errno())
}

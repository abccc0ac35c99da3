//! The mount system calls, which neither `nix` nor `libc` wraps as they are needed here.
//!
//! **By descriptor** (`fsopen`, `fsconfig`, `fsmount`, `move_mount`, `open_tree`: Linux 5.2, `mount_setattr`: 5.12): a mount that was made
//! but not yet moved belongs to its descriptor and goes away with it, so nothing of it needs undoing.
//!
//! **By path** (`mount`): the next-best way, where a filter of system calls refuses one of those ([`by_descriptor`]; all are older than any kernel that
//! is supported, 5.15). What is mounted so stands at once. A path is that of a descriptor in `/proc`, so nobody can swap what it leads to. In
//! another namespace nothing of ours can be bound; but a FUSE connection can be mounted any number of times (Linux 5.15), anywhere.
//!
//! Every function is one call, returns what the kernel said, and does not retry.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libc::{c_int, c_long, c_uint, c_ulong};
use serde::{Deserialize, Serialize};

/// What every mount of ours carries.
pub(super) const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

/// The same by path.
pub(super) const READ_ONLY_BY_PATH: c_ulong = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV;

const EMPTY: &CStr = c"";

/// Device number of a file system, as mountinfo and `/sys/class/bdi` write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Device {
    /// Major number; 0 for what is not a disk.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Which mount a path or descriptor is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    /// Number that mountinfo shows; the kernel uses it again after an unmount.
    pub(super) mount_id: u64,
    /// Number that is never used again (Linux 6.8).
    pub(super) unique_id: Option<u64>,
    /// The file system on it.
    pub(super) device: Device,
    /// Whether this is where the mount starts.
    pub(super) is_mount_root: bool,
}

/// Whether all calls by descriptor are to be had; each is asked for something impossible.
pub(super) fn by_descriptor() -> bool {
    let (nothing, from): (*const libc::c_char, _) = (std::ptr::null(), EMPTY.as_ptr());
    let refused = |answer: c_long| {
        answer < 0
            && matches!(io::Error::last_os_error().raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EACCES))
    };
    // SAFETY: no descriptor, no mount and no memory but an empty path is given to any of these calls, so they change nothing.
    unsafe {
        !refused(libc::syscall(libc::SYS_fsopen, nothing, 0))
            && !refused(libc::syscall(libc::SYS_fsconfig, -1, 0, nothing, nothing, 0))
            && !refused(libc::syscall(libc::SYS_fsmount, -1, 0, 0))
            && !refused(libc::syscall(libc::SYS_move_mount, -1, from, -1, from, libc::MOVE_MOUNT_F_EMPTY_PATH))
            && !refused(libc::syscall(libc::SYS_open_tree, -1, from, libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC))
            && !refused(libc::syscall(libc::SYS_mount_setattr, -1, from, 0, nothing, 0))
    }
}

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: c_long) -> io::Result<OwnedFd> {
    let number = c_int::try_from(check(result)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just returned this descriptor to us and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Starts the description of a new file system of type `kind`.
pub(super) fn open_filesystem(kind: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: `kind` is a C string that outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC) })
}

/// Gives the description one `key=value`.
pub(super) fn set_option(filesystem: &OwnedFd, key: &CStr, value: &str) -> io::Result<()> {
    let value = CString::new(value)?;
    configure(filesystem, libc::FSCONFIG_SET_STRING, Some(key), Some(&value))
}

/// Gives the description one key without a value.
pub(super) fn set_flag(filesystem: &OwnedFd, key: &CStr) -> io::Result<()> {
    configure(filesystem, libc::FSCONFIG_SET_FLAG, Some(key), None)
}

/// Makes the described file system.
pub(super) fn create_filesystem(filesystem: &OwnedFd) -> io::Result<()> {
    configure(filesystem, libc::FSCONFIG_CMD_CREATE, None, None)
}

fn configure(filesystem: &OwnedFd, command: c_uint, key: Option<&CStr>, value: Option<&CStr>) -> io::Result<()> {
    let key = key.map_or(std::ptr::null(), CStr::as_ptr);
    let value = value.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: both pointers are null or C strings that outlive the call; the kernel copies them.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, filesystem.as_raw_fd(), command, key, value, 0) }).map(drop)
}

/// A detached mount of a created file system.
pub(super) fn mount_filesystem(filesystem: &OwnedFd, attributes: u64) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, filesystem.as_raw_fd(), libc::FSMOUNT_CLOEXEC, attributes) })
}

/// A detached copy of the mount (not of what is mounted below it) that starts at `from`.
pub(super) fn clone_tree(from: impl AsFd) -> io::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | c_uint::try_from(libc::AT_EMPTY_PATH).unwrap_or(0);
    // SAFETY: the path is a static C string.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, from.as_fd().as_raw_fd(), EMPTY.as_ptr(), flags) })
}

/// Sets attributes of one mount and makes it private: mounts made in it stay in it.
pub(super) fn make_private(mount: impl AsFd, attributes: u64) -> io::Result<()> {
    let wanted = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    // SAFETY: the path is a static C string; `wanted` outlives the call and its size is passed.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            EMPTY.as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const wanted,
            size_of::<libc::mount_attr>(),
        )
    })
    .map(drop)
}

/// Moves a detached mount onto the directory that `target` stands for.
pub(super) fn move_onto(mount: impl AsFd, target: impl AsFd) -> io::Result<()> {
    move_mount(mount.as_fd(), target.as_fd(), EMPTY, libc::MOVE_MOUNT_T_EMPTY_PATH)
}

/// Moves a detached mount onto the entry `name` of `directory`.
pub(super) fn move_into(mount: impl AsFd, directory: impl AsFd, name: &CStr) -> io::Result<()> {
    move_mount(mount.as_fd(), directory.as_fd(), name, 0)
}

fn move_mount(mount: BorrowedFd<'_>, target: BorrowedFd<'_>, name: &CStr, flags: c_uint) -> io::Result<()> {
    // SAFETY: both paths are C strings that outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            EMPTY.as_ptr(),
            target.as_raw_fd(),
            name.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | flags,
        )
    })
    .map(drop)
}

/// Which mount `at` is on, without asking the file system (which may be dead, or ours).
pub(super) fn standing(at: impl AsFd) -> io::Result<Standing> {
    statx(at.as_fd(), libc::AT_STATX_DONT_SYNC)
}

/// Asks the file system itself for the attributes of `at`: ENOTCONN where a FUSE connection is dead, waits where it is
/// alive and not served.
pub(super) fn ask(at: impl AsFd) -> io::Result<()> {
    statx(at.as_fd(), libc::AT_STATX_FORCE_SYNC).map(drop)
}

fn statx(at: BorrowedFd<'_>, sync: c_int) -> io::Result<Standing> {
    // SAFETY: `statx` is plain integers, for which zero is a value.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let wanted = libc::STATX_BASIC_STATS | libc::STATX_MNT_ID;
    // SAFETY: the path is a static C string and `found` is ours to write.
    let mut get =
        |mask| unsafe { libc::statx(at.as_raw_fd(), EMPTY.as_ptr(), libc::AT_EMPTY_PATH | sync, mask, &raw mut found) };
    check(get(wanted).into())?;
    let mount_id = found.stx_mnt_id;
    // SAFETY: as above.
    let again = unsafe {
        let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
        libc::statx(at.as_raw_fd(), EMPTY.as_ptr(), flags, libc::STATX_MNT_ID_UNIQUE, &raw mut found)
    };
    check(again.into())?;
    let root_bit = u64::try_from(libc::STATX_ATTR_MOUNT_ROOT).unwrap_or(0);
    Ok(Standing {
        mount_id,
        unique_id: (found.stx_mask & libc::STATX_MNT_ID_UNIQUE != 0).then_some(found.stx_mnt_id),
        device: Device { major: found.stx_dev_major, minor: found.stx_dev_minor },
        is_mount_root: found.stx_attributes & root_bit != 0,
    })
}

/// Takes the mount away whose root is the working directory of the calling thread; open files keep working.
pub(super) fn unmount_here() -> io::Result<()> {
    unmount(c".")
}

/// Takes the topmost mount at `path` away, without following a symbolic link.
pub(super) fn unmount_at(path: &Path) -> io::Result<()> {
    unmount(&CString::new(path.as_os_str().as_bytes())?)
}

/// Takes the mount away whose root `root` is, without entering it.
pub(super) fn unmount_descriptor(root: impl AsFd, proc: Proc) -> io::Result<()> {
    unmount_with(&proc.path_of(root)?, libc::MNT_DETACH)
}

fn unmount(path: &CStr) -> io::Result<()> {
    unmount_with(path, libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW)
}

fn unmount_with(path: &CStr, flags: c_int) -> io::Result<()> {
    // SAFETY: `path` is a C string that outlives the call.
    check(unsafe { libc::umount2(path.as_ptr(), flags) }.into()).map(drop)
}

/// Where `/proc` is reached.
#[derive(Clone, Copy, Debug)]
pub(super) enum Proc {
    /// At its usual place.
    Here,
    /// It is the working directory of the calling thread.
    WorkingDirectory,
}

impl Proc {
    fn path_of(self, descriptor: impl AsFd) -> io::Result<CString> {
        let proc = match self {
            Self::Here => "/proc",
            Self::WorkingDirectory => ".",
        };
        Ok(CString::new(format!("{proc}/thread-self/fd/{}", descriptor.as_fd().as_raw_fd()))?)
    }
}

/// Mounts a file system of type `kind` on the directory `at`, by path.
pub(super) fn mount_on(at: impl AsFd, proc: Proc, kind: &CStr, flags: c_ulong, options: &str) -> io::Result<()> {
    let (at, options) = (proc.path_of(at)?, CString::new(options)?);
    mount(Some(c"ckptd"), &at, Some(kind), flags, Some(&options))
}

/// Mounts the directory `at` on itself, by path.
pub(super) fn bind_on_itself(at: impl AsFd, proc: Proc) -> io::Result<()> {
    let at = proc.path_of(at)?;
    mount(Some(&at), &at, None, libc::MS_BIND, None)
}

/// Changes the mount whose root `root` is, by path: its propagation, or (`MS_REMOUNT | MS_BIND`) its attributes.
pub(super) fn change_mount(root: impl AsFd, proc: Proc, flags: c_ulong) -> io::Result<()> {
    mount(None, &proc.path_of(root)?, None, flags, None)
}

fn mount(
    source: Option<&CStr>,
    at: &CStr,
    kind: Option<&CStr>,
    flags: c_ulong,
    options: Option<&CStr>,
) -> io::Result<()> {
    let or_null = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: all pointers are null or C strings that outlive the call; the kernel copies them.
    check(unsafe { libc::mount(or_null(source), at.as_ptr(), or_null(kind), flags, or_null(options).cast()) }.into())
        .map(drop)
}

/// Makes the number of `old` stand for the open file of `new`, in one step.
pub(super) fn replace_descriptor(new: impl AsFd, old: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both descriptors are open; the owner of `old` keeps owning its number, which stays open throughout.
    check(unsafe { libc::dup3(new.as_fd().as_raw_fd(), old.as_raw_fd(), libc::O_CLOEXEC) }.into()).map(drop)
}

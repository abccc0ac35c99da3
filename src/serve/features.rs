//! What the running kernel's FUSE can do, as it says in its INIT request.
//!
//! Every session hears it; [`probe`] asks without one, by making a file system that nobody sees.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::mount_calls::{self, Proc, Standing};
use crate::error::{Error, Kind, Result};

/// The device through which a kernel asks.
const DEVICE: &str = "/dev/fuse";

/// Longest request before anything is negotiated: `FUSE_MIN_READ_BUFFER`.
const INIT_ROOM: usize = 8192;

/// Header of a request, `struct fuse_in_header`.
const HEADER_BYTES: usize = 40;

/// `FUSE_INIT`.
const OPCODE_INIT: u32 = 26;

/// `FUSE_DEV_IOC_CLONE`: `_IOR(229, 0, uint32_t)`.
const CLONE: libc::Ioctl = 0x8004_E500;

/// Bits of INIT (`linux/fuse.h`); those from 32 on are in its second word, valid if `INIT_EXT` is set.
const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
const INIT_EXT: u64 = 1 << 30;
const PASSTHROUGH: u64 = 1 << 37;
const HAS_RESEND: u64 = 1 << 39;
const ALLOW_IDMAP: u64 = 1 << 40;

/// What the kernel offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Version of the protocol.
    pub protocol: (u32, u32),
    /// The kernel can read sealed files itself (Linux 6.9).
    pub passthrough: bool,
    /// The kernel can hand out again what a dead daemon had taken (Linux 6.9).
    pub resend: bool,
    /// Directories need no open (Linux 5.1).
    pub no_opendir: bool,
    /// Views may be mounted with mapped owners (Linux 6.12).
    pub idmap: bool,
    /// Mounts are made by descriptor; else by path, which a filter of system calls may leave alone.
    pub open_tree: bool,
}

impl Features {
    /// Reads a raw INIT request; `None` for anything else.
    pub fn from_init(request: &[u8]) -> Option<Self> {
        let word = |at: usize| request.get(at..at + 4).and_then(|four| four.try_into().ok()).map(u32::from_ne_bytes);
        if word(4)? != OPCODE_INIT {
            return None;
        }
        let mut flags = u64::from(word(HEADER_BYTES + 12)?);
        if flags & INIT_EXT != 0 {
            flags |= u64::from(word(HEADER_BYTES + 16)?) << 32;
        }
        Some(Self {
            protocol: (word(HEADER_BYTES)?, word(HEADER_BYTES + 4)?),
            passthrough: flags & PASSTHROUGH != 0,
            resend: flags & HAS_RESEND != 0,
            no_opendir: flags & NO_OPENDIR_SUPPORT != 0,
            idmap: flags & ALLOW_IDMAP != 0,
            open_tree: false,
        })
    }
}

/// A file system that is made but shown to nobody: its connection and its mount.
pub(super) struct Fresh {
    /// The connection, still without an answer to INIT.
    pub(super) device: OwnedFd,
    /// Its mount.
    pub(super) mount: FreshMount,
    /// The raw INIT request, already taken from the device.
    pub(super) init: Vec<u8>,
}

/// A mount that is gone when it is dropped before it was shown.
pub(super) struct FreshMount {
    /// Its root; `None` once it is shown.
    root: Option<OwnedFd>,
    /// Whether it is in its place already, where it cannot be made otherwise; else it is detached.
    stands: bool,
}

/// Asks the kernel what it offers. `scratch` is made for that, where file systems cannot be made without being mounted, and removed again.
///
/// # Errors
/// As for a session: `NO_FUSE`, `FUSE_NOT_PERMITTED`, `MOUNT_FAILED`.
pub fn probe(scratch: &Path) -> Result<Features> {
    std::fs::create_dir_all(scratch).map_err(|error| Error::io("making the directory", scratch, error))?;
    let features = ask(scratch);
    // A later start makes and removes it again.
    let _ = std::fs::remove_dir(scratch);
    features
}

fn ask(scratch: &Path) -> Result<Features> {
    let fresh = make_filesystem(scratch)?;
    let features = Features::from_init(&fresh.init).ok_or_else(unreadable_init)?;
    Ok(Features { open_tree: !fresh.mount.stands, ..features })
}

/// Makes a file system of ours and takes its INIT request; `mountpoint` is where it will be shown.
pub(super) fn make_filesystem(mountpoint: &Path) -> Result<Fresh> {
    let device = open_device()?;
    let stands = !mount_calls::by_descriptor();
    let made = if stands { mount_by_path(&device, mountpoint) } else { describe_and_mount(&device) };
    let mount = FreshMount { root: Some(made.map_err(explain_mount)?), stands };
    let mut init = vec![0; INIT_ROOM];
    let length = nix::unistd::read(&device, &mut init)
        .map_err(|errno| Error::io("taking the first request from", DEVICE, errno.into()))?;
    init.truncate(length);
    Ok(Fresh { device, mount, init })
}

impl FreshMount {
    /// Which mount it is.
    pub(super) fn standing(&self) -> std::io::Result<Standing> {
        mount_calls::standing(self.root.as_ref().ok_or(Errno::EBADF)?)
    }

    /// Has it stand at `place`; its root.
    pub(super) fn show(mut self, place: &OwnedFd) -> std::io::Result<OwnedFd> {
        let root = self.root.as_ref().ok_or(Errno::EBADF)?;
        if !self.stands {
            mount_calls::move_onto(root, place)?;
        }
        Ok(self.root.take().ok_or(Errno::EBADF)?)
    }
}

impl Drop for FreshMount {
    fn drop(&mut self) {
        let Some(root) = self.root.take().filter(|_| self.stands) else { return };
        if let Err(error) = mount_calls::unmount_descriptor(&root, Proc::Here) {
            tracing::error!(%error, "a session that did not begin stays mounted");
        }
    }
}

/// Another descriptor of the connection `device`. What is taken through it ends with it.
pub(super) fn clone_connection(device: &OwnedFd) -> std::io::Result<OwnedFd> {
    let clone = std::fs::OpenOptions::new().read(true).write(true).open(DEVICE)?;
    let number = u32::try_from(device.as_raw_fd()).map_err(std::io::Error::other)?;
    // SAFETY: both descriptors are open, and the kernel reads the number alone.
    let cloned = unsafe { libc::ioctl(clone.as_raw_fd(), CLONE, &raw const number) };
    if cloned < 0 { Err(std::io::Error::last_os_error()) } else { Ok(clone.into()) }
}

pub(super) fn unreadable_init() -> Error {
    Error::new(Kind::Unsupported, "FUSE_PROTOCOL", "the kernel's first FUSE request is not one we can read")
        .remedy("use Linux 5.15 or later")
}

fn open_device() -> Result<OwnedFd> {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(DEVICE);
    opened.map(OwnedFd::from).map_err(|error| {
        let (reason, remedy) = match error.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => {
                ("FUSE_NOT_PERMITTED", "run ckptd as root, and allow the device in its container")
            }
            _ => ("NO_FUSE", "load the kernel module `fuse`, or pass --device /dev/fuse to the container of ckptd"),
        };
        Error::new(Kind::Unsupported, reason, format!("opening {DEVICE}")).because(error).remedy(remedy)
    })
}

/// What every mount of a connection is made with, but for the connection.
fn options(device: impl AsFd) -> [(&'static CStr, String); 5] {
    [
        (c"fd", device.as_fd().as_raw_fd().to_string()),
        (c"rootmode", "40555".to_owned()),
        (c"user_id", "0".to_owned()),
        (c"group_id", "0".to_owned()),
        (c"max_read", super::buffers::READ_BYTES.to_string()),
    ]
}

const FLAGS: [&CStr; 2] = [c"allow_other", c"default_permissions"];

fn describe_and_mount(device: &OwnedFd) -> std::io::Result<OwnedFd> {
    let filesystem = mount_calls::open_filesystem(c"fuse")?;
    for (key, value) in [(c"source", "ckptd".to_owned()), (c"subtype", "ckptd".to_owned())] {
        mount_calls::set_option(&filesystem, key, &value)?;
    }
    for (key, value) in options(device) {
        mount_calls::set_option(&filesystem, key, &value)?;
    }
    // `ro` on the file system, not only on the mount: otherwise the kernel asks for the access time after every read.
    for flag in FLAGS.into_iter().chain([c"ro"]) {
        mount_calls::set_flag(&filesystem, flag)?;
    }
    mount_calls::create_filesystem(&filesystem)?;
    mount_calls::mount_filesystem(&filesystem, mount_calls::READ_ONLY)
}

/// The root of a file system that is mounted at `mountpoint` now, by path.
fn mount_by_path(device: &OwnedFd, mountpoint: &Path) -> std::io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let open = || nix::fcntl::open(mountpoint, flags, Mode::empty());
    let place = open()?;
    mount_connection(device, &place, Proc::Here)?;
    open().map_err(|errno| {
        // Best effort: a later start finds it dead.
        let _ = mount_calls::unmount_descriptor(&place, Proc::Here);
        errno.into()
    })
}

/// Mounts the file system of the connection `device` on the directory `at`, by path; it may be mounted elsewhere, too.
pub(super) fn mount_connection(device: impl AsFd, at: &OwnedFd, proc: Proc) -> std::io::Result<()> {
    let options = options(device).map(|(key, value)| format!("{}={value}", key.to_string_lossy()));
    let flags = FLAGS.map(|flag| flag.to_string_lossy().into_owned());
    let options = [options.join(","), flags.join(",")].join(",");
    mount_calls::mount_on(at, proc, c"fuse.ckptd", mount_calls::READ_ONLY_BY_PATH, &options)
}

fn explain_mount(error: std::io::Error) -> Error {
    let (kind, reason, remedy) = match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            (Kind::Denied, "FUSE_NOT_PERMITTED", "run ckptd as root with CAP_SYS_ADMIN")
        }
        Some(libc::ENODEV | libc::ENOSYS) => {
            (Kind::Unsupported, "NO_FUSE", "load the kernel module `fuse`, and use Linux 5.15 or later")
        }
        _ => (Kind::Unavailable, "MOUNT_FAILED", "see the kernel's log"),
    };
    Error::new(kind, reason, "making a FUSE file system").remedy(remedy).because(error)
}

/// How deep sessions may stack so that files of `store` can be given to the kernel: 1 where the store is on a file system of
/// its own, and views can then be a lower layer of overlayfs; 2 where the store itself is on overlayfs.
pub fn stack_depth(store: &Path) -> u32 {
    match nix::sys::statfs::statfs(store) {
        Ok(found) if found.filesystem_type() == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, flags: u32, flags2: u32) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
        for word in [7, 45, 131_072, flags, flags2] {
            bytes.extend_from_slice(&u32::to_ne_bytes(word));
        }
        bytes
    }

    #[test]
    fn the_second_word_counts_only_where_it_is_announced() {
        let second = 1 << (37 - 32) | 1 << (39 - 32);
        let with = Features::from_init(&request(OPCODE_INIT, 1 << 30 | 1 << 24, second)).unwrap();
        assert!(with.passthrough && with.resend && with.no_opendir && !with.idmap);
        assert_eq!(with.protocol, (7, 45));
        let without = Features::from_init(&request(OPCODE_INIT, 0, second)).unwrap();
        assert!(!without.passthrough && !without.resend);
    }

    #[test]
    fn what_is_not_an_init_request_is_refused() {
        assert_eq!(Features::from_init(&request(1, 0, 0)), None);
        assert_eq!(Features::from_init(&[]), None);
        assert_eq!(Features::from_init(&request(OPCODE_INIT, 0, 0)[..50]), None);
    }
}

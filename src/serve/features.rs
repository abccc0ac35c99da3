//! What the running kernel's FUSE can do, as it says in its INIT request.
//!
//! Every session hears it; [`probe`] asks without one, by making a file system that is never mounted anywhere.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use super::mount_calls;
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
        })
    }
}

/// A file system that is made but not mounted: its connection and its detached mount.
pub(super) struct Fresh {
    /// The connection, still without an answer to INIT.
    pub(super) device: OwnedFd,
    /// The detached mount.
    pub(super) mount: OwnedFd,
    /// The raw INIT request, already taken from the device.
    pub(super) init: Vec<u8>,
}

/// Asks the kernel what it offers.
///
/// # Errors
/// As for a session: `NO_FUSE`, `FUSE_NOT_PERMITTED`, `MOUNT_FAILED`.
pub fn probe() -> Result<Features> {
    let fresh = make_filesystem()?;
    Features::from_init(&fresh.init).ok_or_else(unreadable_init)
}

/// Makes a file system of ours and takes its INIT request.
pub(super) fn make_filesystem() -> Result<Fresh> {
    let device = open_device()?;
    let mount = describe_and_mount(&device).map_err(explain_mount)?;
    let mut init = vec![0; INIT_ROOM];
    let length = nix::unistd::read(&device, &mut init)
        .map_err(|errno| Error::io("taking the first request from", DEVICE, errno.into()))?;
    init.truncate(length);
    Ok(Fresh { device, mount, init })
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

fn describe_and_mount(device: &OwnedFd) -> std::io::Result<OwnedFd> {
    let filesystem = mount_calls::open_filesystem(c"fuse")?;
    let options = [
        (c"source", "ckptd".to_owned()),
        (c"subtype", "ckptd".to_owned()),
        (c"fd", device.as_fd().as_raw_fd().to_string()),
        (c"rootmode", "40555".to_owned()),
        (c"user_id", "0".to_owned()),
        (c"group_id", "0".to_owned()),
        (c"max_read", super::buffers::READ_BYTES.to_string()),
    ];
    for (key, value) in options {
        mount_calls::set_option(&filesystem, key, &value)?;
    }
    // `ro` on the file system, not only on the mount: otherwise the kernel asks for the access time after every read.
    for flag in [c"allow_other", c"default_permissions", c"ro"] {
        mount_calls::set_flag(&filesystem, flag)?;
    }
    mount_calls::create_filesystem(&filesystem)?;
    mount_calls::mount_filesystem(&filesystem, mount_calls::READ_ONLY)
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

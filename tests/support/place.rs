//! A private directory on a real disk, and the mounts below it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::mount::{MntFlags, umount2};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

/// Begins the name of every directory of ours, so that leftovers are told from strangers.
pub(crate) const PREFIX: &str = "ckptd-test.";

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A directory of this test alone; unmounted below and removed on drop.
#[derive(Debug)]
pub(crate) struct Place(PathBuf);

impl Place {
    /// Makes the directory, world-readable, never on tmpfs: holes and shared extents matter.
    pub(crate) fn new() -> Self {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // Targets may not have symbolic links in their paths.
        let path = disk_root().canonicalize().unwrap().join(format!("{PREFIX}{}.{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("making {}: {error}", path.display()));
        set_mode(&path, 0o755);
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// A path below it.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A new empty directory below it.
    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("making {}: {error}", path.display()));
        path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        unmount_below(&self.0);
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("removing {}: {error}", self.0.display());
        }
    }
}

/// One line of the kernel's table of mounts.
#[derive(Clone, Debug)]
pub(crate) struct Mount {
    pub(crate) target: PathBuf,
    pub(crate) options: String,
    pub(crate) kind: String,
    pub(crate) source: String,
}

/// Every mount of this namespace, in the order of mounting.
pub(crate) fn mounts() -> Vec<Mount> {
    fs::read_to_string("/proc/self/mountinfo").unwrap().lines().filter_map(parse_mount).collect()
}

/// Mounts exactly at `target`.
pub(crate) fn mounts_at(target: &Path) -> Vec<Mount> {
    mounts().into_iter().filter(|mount| mount.target == target).collect()
}

/// Lazily unmounts whatever is mounted below `path` or at it, deepest and latest first.
pub(crate) fn unmount_below(path: &Path) {
    let below: Vec<_> = mounts().into_iter().filter(|mount| mount.target.starts_with(path)).collect();
    for mount in below.iter().rev() {
        let _ = umount2(&mount.target, MntFlags::MNT_DETACH);
    }
}

fn parse_mount(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let left: Vec<_> = left.split(' ').collect();
    let right: Vec<_> = right.split(' ').collect();
    Some(Mount {
        target: PathBuf::from(unescape(left.get(4)?)),
        options: (*left.get(5)?).to_owned(),
        kind: (*right.first()?).to_owned(),
        source: (*right.get(1)?).to_owned(),
    })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

fn disk_root() -> PathBuf {
    let wished = std::env::temp_dir();
    let on_memory = statfs(&wished).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC);
    if on_memory || wished == Path::new("/tmp") { PathBuf::from("/var/tmp") } else { wished }
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

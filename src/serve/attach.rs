//! Putting views of sessions where a job sees them, and taking them away.
//!
//! One checkpoint is bound at the target itself. Several get a small read-only tmpfs at the target with a directory each. Either
//! way it is all or nothing, read-only, `nosuid` and `nodev`, and stands when [`Prepared::show`] returns. It takes a dozen system
//! calls however many mounts there are.
//!
//! [`Mounted`] is what a later [`detach`] needs, by this process or a successor. A view is found again by its mount number
//! and device in its namespace, wherever it has been moved to, and is unmounted only if the mount that is reached there is that
//! very one: something that others have mounted, over it or instead of it, is never touched. A namespace that no process
//! is in any more has taken its mounts with it.
//!
//! Where mounts cannot be made by descriptor a view is made in its place, and has no number before: [`by_path`].
//!
//! All functions block on mount operations, and enter other namespaces on threads of their own.

mod by_path;

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, mkdirat};
use serde::{Deserialize, Serialize};

use super::mount_calls::{self, Device, Proc, READ_ONLY};
use super::mountinfo::MountLine;
use super::namespace::{self, Entrance, MountNamespace};
use super::session::Original;
use super::target::{self, Reserved, Whose};
use crate::error::{Error, Result};
use crate::names::EntryName;

/// Looks for a view that is not where it is said to be, before something else is held to be over it. Each finds it with even chances while
/// somebody swaps what is above it as fast as he can.
const LOOKS: u32 = 32;

/// Where a job wants its checkpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// An absolute path: an existing, empty directory.
    pub target: PathBuf,
    /// The process whose path it is, as the host numbers it; `None` is the host.
    pub pid: Option<u32>,
}

/// One of several checkpoints.
#[derive(Debug)]
pub struct NamedView {
    /// Its directory below the target.
    pub name: EntryName,
    /// From [`Session::original`](super::Session::original).
    pub original: Original,
}

/// What is to be seen at the target.
#[derive(Debug)]
pub enum Views {
    /// The content of one checkpoint at the target itself; from [`Session::original`](super::Session::original).
    One(Original),
    /// A directory each.
    Several(Vec<NamedView>),
}

/// A view that stands, or stood: for the catalog.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mounted {
    /// Where it was put.
    pub target: PathBuf,
    /// The process whose path that is; `None` is the host.
    pub pid: Option<u32>,
    /// Number of the mount namespace it is in.
    pub namespace: u64,
    /// Number of the mount; the kernel uses it again after an unmount. 0 where it was not known before the view was made: it is known by its
    /// target then, and by being ours.
    pub mount_id: u64,
    /// Number of the mount that is never used again, where the kernel has it.
    pub unique_id: Option<u64>,
    /// The file system on it; 0:0 where that was not known before either.
    pub device: Device,
}

impl Mounted {
    /// Whether this is from before the view was made, and says less than could be known afterwards.
    pub(super) const fn is_foretold(&self) -> bool {
        self.mount_id == 0
    }

    /// Whether what stands at its target, on this line, may be what was foretold.
    fn may_be(&self, line: &MountLine) -> bool {
        line.source == by_path::SOURCE && (self.device == by_path::UNKNOWN || line.device == self.device)
    }

    /// That its process is in the namespace still that the view was put into: another may have its number by now.
    ///
    /// # Errors
    /// `NO_SUCH_PROCESS`.
    pub(super) fn check_process(&self) -> Result<()> {
        let Some(pid) = self.pid else { return Ok(()) };
        if namespace::of_process(pid)?.inode == self.namespace {
            return Ok(());
        }
        let message = format!("process {pid} is in another mount namespace than the view was put into");
        Err(Error::not_found("NO_SUCH_PROCESS", message)
            .fact("pid", pid)
            .remedy("attach again with the process that is the job's now"))
    }
}

/// What [`detach`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detached {
    /// It stood and was taken away.
    Removed,
    /// It was gone already.
    AlreadyGone,
}

/// A view that is built and stands nowhere yet; dropped, it is gone.
pub struct Prepared {
    build: Build,
    process: Option<MountNamespace>,
    mounted: Mounted,
}

/// Builds the view of `views` for `place`. A process that has our mounts and our root is the host, as far as targets go.
///
/// # Errors
/// `TARGET_*` of the path itself (see [`target`]), `NO_SUCH_PROCESS`, `DUPLICATE_VIEW`, or what the kernel says.
pub fn prepare(place: &Place, views: Views, reserved: &Reserved) -> Result<Prepared> {
    let process = place.pid.map(namespace::of_process).transpose()?;
    let process = process.map(|process| process.unless_host()).transpose()?.flatten();
    let whose = if process.is_some() { Whose::Process } else { Whose::Host };
    target::check_path(&place.target, whose, reserved)?;
    let namespace = process.as_ref().map_or_else(namespace::own_inode, |process| Ok(process.inode))?;
    let build = Build::of(views).map_err(|error| error.during(format!("attaching at {}", place.target.display())))?;
    if let Build::InPlace(_) = build {
        // Before it is foretold: another's view that is there already must not be taken for it.
        namespace::act(&entrance(process.as_ref()), || target::open(&place.target, whose).map(drop))?;
    }
    let (mount_id, unique_id, device) = build.known().map_err(|error| Error::io("looking at", &place.target, error))?;
    let mounted = Mounted { target: place.target.clone(), pid: place.pid, namespace, mount_id, unique_id, device };
    Ok(Prepared { build, process, mounted })
}

fn entrance(process: Option<&MountNamespace>) -> Entrance<'_> {
    process.map_or(Entrance::Here, Entrance::AsProcess)
}

impl Prepared {
    /// How the view will be found again. A mount keeps its number when it is moved, so this can be made durable before anything is to be seen.
    pub fn mounted(&self) -> &Mounted {
        &self.mounted
    }

    /// Puts the view in its place; how it is found from now on, which is [`Prepared::mounted`] or says more.
    ///
    /// # Errors
    /// `TARGET_*`, or what the kernel says. Nothing is mounted then.
    pub fn show(self) -> Result<Mounted> {
        let Self { build, process, mounted } = self;
        let whose = if process.is_some() { Whose::Process } else { Whose::Host };
        let proc = namespace::open_proc()?;
        let standing = namespace::act(&entrance(process.as_ref()), || match build {
            Build::Detached(built) => {
                let target = target::open(&mounted.target, whose)?;
                built.put(&target).map_err(|error| Error::io("mounting at", &mounted.target, error))?;
                Ok(None)
            }
            Build::InPlace(views) => by_path::put(&views, &mounted.target, whose, &proc).map(Some),
        })?;
        Ok(match standing {
            Some(found) => {
                Mounted { mount_id: found.mount_id, unique_id: found.unique_id, device: found.device, ..mounted }
            }
            None => mounted,
        })
    }
}

/// Takes away exactly what [`Prepared::show`] has put, at once for new lookups; open files keep working. Something already gone is fine.
///
/// # Errors
/// `TARGET_COVERED` where others have mounted something over it; or what the kernel says.
pub fn detach(mounted: &Mounted) -> Result<Detached> {
    at_mount(mounted, |proc, found| match found {
        Found::Gone => Ok(Detached::AlreadyGone),
        Found::Hidden(path) => {
            let message = format!("something else is mounted over the view at {}", path.display());
            Err(Error::wrong_state("TARGET_COVERED", message)
                .fact("target", path.display())
                .remedy("unmount what covers it, then detach again"))
        }
        Found::Here(path, root) => {
            // By descriptor: the path may lead elsewhere by now.
            let unmounted = match nix::unistd::fchdir(&root) {
                Ok(()) => mount_calls::unmount_here(),
                // Nobody can enter the root of a dead connection.
                Err(Errno::ENOTCONN) => nix::unistd::fchdir(proc)
                    .map_err(io::Error::from)
                    .and_then(|()| mount_calls::unmount_descriptor(&root, Proc::WorkingDirectory)),
                Err(errno) => Err(io::Error::from(errno)),
            };
            unmounted.map_err(|error| Error::io("unmounting the view at", &path, error))?;
            Ok(Detached::Removed)
        }
    })
}

/// Whether the view still stands, uncovered.
///
/// # Errors
/// What the kernel says.
pub fn standing(mounted: &Mounted) -> Result<bool> {
    at_mount(mounted, |_, found| Ok(matches!(found, Found::Here(..))))
}

/// What became of a view.
enum Found {
    Gone,
    /// Something else is reached at its path.
    Hidden(PathBuf),
    /// Its path, and its root.
    Here(PathBuf, OwnedFd),
}

/// Runs `work` in the view's namespace with what became of it there, and with our `/proc`.
fn at_mount<T: Send>(mounted: &Mounted, work: impl FnOnce(&OwnedFd, Found) -> Result<T> + Send) -> Result<T> {
    let proc = namespace::open_proc()?;
    let process = if mounted.namespace == namespace::own_inode()? {
        None
    } else {
        match namespace::find(mounted.namespace, mounted.pid) {
            None => return work(&proc, Found::Gone),
            found => found,
        }
    };
    let entrance = match &process {
        None => Entrance::Here,
        // Its target is what the process calls it.
        Some(process) if mounted.is_foretold() => Entrance::AsProcess(process),
        Some(process) => Entrance::AtRoot(process),
    };
    namespace::act(&entrance, || {
        // Whoever has the directories above may rename them while we look: then the path that the kernel tells leads elsewhere.
        let mut looks = 1;
        let found = loop {
            match find(&proc, mounted, process.is_some())? {
                Found::Hidden(_) if looks < LOOKS => looks += 1,
                found => break found,
            }
        };
        work(&proc, found)
    })
}

fn find(proc: &OwnedFd, mounted: &Mounted, in_process: bool) -> Result<Found> {
    let lines = namespace::mounts(proc)?;
    if mounted.is_foretold() {
        return find_foretold(lines, mounted, if in_process { Whose::Process } else { Whose::Host });
    }
    let is_it = |line: &MountLine| line.mount_id == mounted.mount_id && line.device == mounted.device;
    match lines.into_iter().find(is_it) {
        Some(line) => look_at(line.target, mounted),
        None => Ok(Found::Gone),
    }
}

/// What stands at the target of a view of which no more is known, if it is ours.
fn find_foretold(lines: Vec<MountLine>, mounted: &Mounted, whose: Whose) -> Result<Found> {
    let Ok(root) = target::walk(&mounted.target, whose) else { return Ok(Found::Gone) };
    let standing =
        mount_calls::standing(&root).map_err(|error| Error::io("looking at the view at", &mounted.target, error))?;
    let is_ours = |line: &MountLine| line.mount_id == standing.mount_id && mounted.may_be(line);
    Ok(match standing.is_mount_root && lines.iter().any(is_ours) {
        true => Found::Here(mounted.target.clone(), root),
        false => Found::Gone,
    })
}

/// Whether the recorded mount is at `path`, where a mount of its number is. The kernel gives numbers again, so that may be another job's view of
/// the same checkpoint: the recorded one is gone then.
fn look_at(path: PathBuf, mounted: &Mounted) -> Result<Found> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let root = match open(&path, flags, Mode::empty()) {
        Ok(root) => root,
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(Found::Hidden(path)),
        Err(errno) => return Err(Error::io("opening the view at", &path, errno.into())),
    };
    let found = mount_calls::standing(&root).map_err(|error| Error::io("looking at the view at", &path, error))?;
    if found.mount_id != mounted.mount_id || found.device != mounted.device || !found.is_mount_root {
        return Ok(Found::Hidden(path));
    }
    Ok(match (found.unique_id, mounted.unique_id) {
        (Some(found), Some(recorded)) if found != recorded => Found::Gone,
        _ => Found::Here(path, root),
    })
}

/// How a view comes about.
enum Build {
    /// It is built already.
    Detached(Built),
    /// It will be built where it is to be seen.
    InPlace(by_path::Views),
}

impl Build {
    fn of(views: Views) -> Result<Self> {
        let needs_path = |original: &Original| matches!(original, Original::Connection { .. });
        let by_path = match &views {
            Views::One(original) => needs_path(original),
            Views::Several(views) => views.iter().any(|view| needs_path(&view.original)),
        };
        if by_path { by_path::Views::of(views).map(Self::InPlace) } else { Built::new(views).map(Self::Detached) }
    }

    /// What is known of its mount before it is seen.
    fn known(&self) -> io::Result<(u64, Option<u64>, Device)> {
        match self {
            Self::Detached(built) => {
                mount_calls::standing(&built.root).map(|found| (found.mount_id, found.unique_id, found.device))
            }
            Self::InPlace(views) => Ok((0, None, views.device())),
        }
    }
}

/// A detached view, ready to be put somewhere.
struct Built {
    root: OwnedFd,
    /// What could not be put into `root` while it is detached (before Linux 6.15).
    left: Vec<(CString, OwnedFd)>,
}

impl Built {
    fn new(views: Views) -> Result<Self> {
        let mounting = |error| Error::unavailable("MOUNT_FAILED", "preparing a view").because(error);
        match views {
            Views::One(original) => {
                let tree = detached(original)?;
                mount_calls::make_private(&tree, READ_ONLY).map_err(mounting)?;
                Ok(Self { root: tree, left: Vec::new() })
            }
            Views::Several(views) => {
                let root = directory_mount(views.len()).map_err(mounting)?;
                let mut named = Vec::with_capacity(views.len());
                for view in views {
                    let tree = detached(view.original)?;
                    mount_calls::make_private(&tree, READ_ONLY).map_err(mounting)?;
                    named.push((make_directory(&root, &view.name)?, tree));
                }
                let left = match fill(&root, &named) {
                    Ok(()) => Vec::new(),
                    // Refused at the first, so none is in.
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => named,
                    Err(error) => return Err(mounting(error)),
                };
                mount_calls::make_private(&root, READ_ONLY).map_err(mounting)?;
                Ok(Self { root, left })
            }
        }
    }

    fn put(&self, target: &OwnedFd) -> io::Result<()> {
        mount_calls::move_onto(&self.root, target)?;
        fill(&self.root, &self.left).inspect_err(|_| {
            let undone =
                nix::unistd::fchdir(&self.root).map_err(io::Error::from).and_then(|()| mount_calls::unmount_here());
            if let Err(error) = undone {
                tracing::error!(%error, "half a view could not be taken away again");
            }
        })
    }
}

fn detached(original: Original) -> Result<OwnedFd> {
    match original {
        Original::Mount(tree) => Ok(tree),
        Original::Connection { .. } => Err(Error::internal("a connection is to be moved")),
    }
}

/// What a tmpfs with room for so many directories and nothing else is made with.
fn directory_options(directories: usize) -> [(&'static CStr, String); 3] {
    let inodes = directories.saturating_add(2).to_string();
    [(c"mode", "0555".to_owned()), (c"size", "4096".to_owned()), (c"nr_inodes", inodes)]
}

/// A detached tmpfs with room for directories and nothing else.
fn directory_mount(directories: usize) -> io::Result<OwnedFd> {
    let filesystem = mount_calls::open_filesystem(c"tmpfs")?;
    mount_calls::set_option(&filesystem, c"source", by_path::SOURCE)?;
    for (key, value) in directory_options(directories) {
        mount_calls::set_option(&filesystem, key, &value)?;
    }
    mount_calls::create_filesystem(&filesystem)?;
    mount_calls::mount_filesystem(&filesystem, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV)
}

fn make_directory(root: &OwnedFd, name: &EntryName) -> Result<CString> {
    let shown = crate::names::show_bytes(name.as_bytes());
    let c_name = CString::new(name.as_bytes()).map_err(|_| Error::internal("a name has a NUL byte"))?;
    match mkdirat(root.as_fd(), c_name.as_c_str(), Mode::from_bits_truncate(0o555)) {
        Ok(()) => Ok(c_name),
        Err(Errno::EEXIST) => {
            Err(Error::invalid("DUPLICATE_VIEW", format!("two checkpoints of the attachment are called `{shown}`"))
                .remedy("rename one of them"))
        }
        Err(errno) => Err(Error::io("making the directory", shown, errno.into())),
    }
}

fn fill(root: &OwnedFd, views: &[(CString, OwnedFd)]) -> io::Result<()> {
    views.iter().try_for_each(|(name, tree)| mount_calls::move_into(tree, root, name))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// As the catalog has it. Never edited: another shape is another version of the catalog.
    const GOLDEN: &str = r#"{"target":"/opt/ml/checkpoint","pid":7,"namespace":4026531841,"mount_id":52,"unique_id":4294967348,"device":{"major":0,"minor":57}}"#;

    #[test]
    fn what_a_catalog_says_of_a_view_is_read_and_written_as_ever() {
        let mounted: Mounted = serde_json::from_str(GOLDEN).unwrap();
        assert_eq!((mounted.pid, mounted.device), (Some(7), Device { major: 0, minor: 57 }));
        assert_eq!(serde_json::to_string(&mounted).unwrap(), GOLDEN);
    }

    /// A detached view whose directory `a` is still to be filled at `name`, as kernels before 6.15 leave it.
    fn half_built(name: &CStr) -> Built {
        let root = directory_mount(1).unwrap();
        make_directory(&root, &EntryName::new(*b"a").unwrap()).unwrap();
        mount_calls::make_private(&root, READ_ONLY).unwrap();
        Built { root, left: vec![(name.to_owned(), directory_mount(7).unwrap())] }
    }

    fn put(built: &Built, target: &Path) -> Result<()> {
        namespace::act(&Entrance::Here, || {
            let directory = target::open(target, Whose::Host)?;
            built.put(&directory).map_err(|error| Error::io("mounting at", target, error))
        })
    }

    #[test]
    fn what_cannot_be_filled_while_detached_is_filled_in_place_or_undone() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let target = tempfile::tempdir().unwrap();
        let entries = || std::fs::read_dir(target.path()).unwrap().count();
        put(&half_built(c"missing"), target.path()).unwrap_err();
        assert_eq!(entries(), 0, "half a view stands");
        put(&half_built(c"a"), target.path()).unwrap();
        let inner = open(&target.path().join("a"), OFlag::O_PATH, Mode::empty()).unwrap();
        let filled = mount_calls::standing(&inner).unwrap().is_mount_root;
        mount_calls::unmount_at(target.path()).unwrap();
        assert!(filled);
        assert_eq!(entries(), 0);
    }

    #[test]
    fn a_mount_that_cannot_be_entered_goes_by_its_descriptor() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let target = tempfile::tempdir().unwrap();
        put(&half_built(c"a"), target.path()).unwrap();
        namespace::act(&Entrance::Here, || {
            let root = open(target.path(), OFlag::O_PATH, Mode::empty()).unwrap();
            assert!(mount_calls::standing(&root).unwrap().is_mount_root);
            nix::unistd::fchdir(namespace::open_proc()?).unwrap();
            mount_calls::unmount_descriptor(&root, Proc::WorkingDirectory)
                .map_err(|error| Error::io("unmounting", target.path(), error))
        })
        .unwrap();
        let after = open(target.path(), OFlag::O_PATH, Mode::empty()).unwrap();
        assert!(!mount_calls::standing(&after).unwrap().is_mount_root);
    }
}

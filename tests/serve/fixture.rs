//! A checkpoint in a temporary directory, served, and everything unmounted again whatever happens.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use ckptd::digest::Digest;
use ckptd::error::{Error, Result};
use ckptd::manifest::{Entry, EntryKind, Manifest, Tree};
use ckptd::names::EntryPath;
use ckptd::serve::{
    Content, FileNode, FileState, OpenFile, ReadBuffers, Resume, Session, SessionConfig, Stopped, prepare_sessions_dir,
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Whether the machine can run these tests.
pub(crate) fn can_mount() -> bool {
    let can = nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !can {
        eprintln!("passed over: needs root and /dev/fuse");
    }
    can
}

/// Waits for a condition; panics with `what` when it does not come.
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes that differ everywhere.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length.div_ceil(8))
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .take(length)
        .collect()
}

/// A store: files by digest in a directory, and switches for how they are here.
#[derive(Default)]
pub(crate) struct Directory {
    files: Mutex<HashMap<Digest, PathBuf>>,
    pub(crate) reads: Arc<AtomicU64>,
    pub(crate) compact: AtomicBool,
    pub(crate) filling: Arc<AtomicBool>,
    pub(crate) panics: Arc<AtomicBool>,
    pub(crate) short: Arc<AtomicBool>,
    pub(crate) waiting: Arc<Mutex<Vec<Resume>>>,
}

struct DirectoryFile {
    file: File,
    whole: bool,
    reads: Arc<AtomicU64>,
    filling: Arc<AtomicBool>,
    panics: Arc<AtomicBool>,
    short: Arc<AtomicBool>,
    waiting: Arc<Mutex<Vec<Resume>>>,
}

impl Content for Directory {
    fn open(&self, file: &FileNode) -> Result<Arc<dyn OpenFile>> {
        let path = self.files.lock().unwrap().get(&file.digest).cloned();
        let path = path.ok_or_else(|| Error::not_found("NO_SUCH_BLOB", "no such blob"))?;
        let file = File::open(&path).map_err(|error| Error::io("opening", &path, error))?;
        Ok(Arc::new(DirectoryFile {
            file,
            whole: !self.compact.load(Ordering::SeqCst) && !self.filling.load(Ordering::SeqCst),
            reads: self.reads.clone(),
            filling: self.filling.clone(),
            panics: self.panics.clone(),
            short: self.short.clone(),
            waiting: self.waiting.clone(),
        }))
    }

    fn state(&self, _: &FileNode) -> FileState {
        if self.filling.load(Ordering::SeqCst) {
            FileState::Filling { percent: 43 }
        } else if self.compact.load(Ordering::SeqCst) {
            FileState::Daemon
        } else {
            FileState::Passthrough
        }
    }
}

impl OpenFile for DirectoryFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        assert!(!self.panics.load(Ordering::SeqCst), "a panic in the store");
        if self.short.load(Ordering::SeqCst) {
            return Ok(0);
        }
        // Short reads on purpose: the adapter must go on.
        let most = buf.len().min(300_000);
        self.file.read_at(&mut buf[..most], offset).map_err(|error| Error::io("reading", "blob", error))
    }

    fn whole(&self) -> Option<BorrowedFd<'_>> {
        self.whole.then(|| self.file.as_fd())
    }

    fn here(&self, _: u64, _: usize) -> bool {
        !self.filling.load(Ordering::SeqCst)
    }

    fn when_here(&self, _: u64, _: usize, resume: Resume) -> Option<u64> {
        self.waiting.lock().unwrap().push(resume);
        None
    }
}

/// One served checkpoint and where it came from.
pub(crate) struct Served {
    pub(crate) content: Arc<Directory>,
    pub(crate) source: PathBuf,
    pub(crate) session: Option<Session>,
    pub(crate) manifest: Arc<Manifest>,
}

impl Served {
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.session.as_ref().unwrap().mountpoint().join(path)
    }

    pub(crate) fn session(&self) -> &Session {
        self.session.as_ref().unwrap()
    }

    pub(crate) fn stop(&mut self) -> Stopped {
        self.session.take().unwrap().stop(PATIENCE).unwrap()
    }

    pub(crate) fn reads(&self) -> u64 {
        self.content.reads.load(Ordering::SeqCst)
    }
}

/// A private place for one test: everything mounted below it goes away with it.
pub(crate) struct Ground {
    dir: tempfile::TempDir,
    pub(crate) buffers: Arc<ReadBuffers>,
}

impl Ground {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("ckptd-serve-").tempdir().unwrap();
        prepare_sessions_dir(&dir.path().join("sessions")).unwrap();
        Self { dir, buffers: Arc::default() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn root(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn sessions(&self) -> PathBuf {
        self.path("sessions")
    }

    /// An empty directory.
    pub(crate) fn directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// A small checkpoint of every kind of entry.
    pub(crate) fn serve(&self, name: &str, adjust: impl FnOnce(&mut SessionConfig)) -> Served {
        let source = self.directory(&format!("source-{name}"));
        fs::create_dir_all(source.join("deep/er")).unwrap();
        fs::create_dir_all(source.join("empty")).unwrap();
        fs::write(source.join("model.safetensors"), noise(5_000_123, 7)).unwrap();
        fs::write(source.join("deep/er/config.json"), name).unwrap();
        fs::write(source.join("nothing"), "").unwrap();
        fs::write(source.join("run.sh"), "#!/bin/sh\necho ran\n").unwrap();
        fs::set_permissions(source.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink("deep/er/config.json", source.join("link")).unwrap();
        self.serve_directory(name, source, adjust)
    }

    /// Serves what is in `source`.
    pub(crate) fn serve_directory(
        &self,
        name: &str,
        source: PathBuf,
        adjust: impl FnOnce(&mut SessionConfig),
    ) -> Served {
        let content = Arc::new(Directory::default());
        let mut entries = Vec::new();
        collect(&source, &source, &content, &mut entries);
        let manifest = Arc::new(Manifest::new(entries).unwrap());
        let mut config = SessionConfig::new(self.sessions().join(name), format!("id-{name}"), self.buffers.clone());
        config.created = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        adjust(&mut config);
        let tree = Arc::new(Tree::new(manifest.clone()));
        let session = Session::start(config, tree, content.clone()).unwrap();
        Served { content, source, session: Some(session), manifest }
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // Whatever a failed test left: deepest first, lazily.
        for target in mounts_below(self.dir.path()).into_iter().rev() {
            let _ = nix::mount::umount2(&target, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

fn collect(root: &Path, directory: &Path, content: &Directory, entries: &mut Vec<Entry>) {
    for found in fs::read_dir(directory).unwrap() {
        let path = found.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        let kind = if metadata.is_dir() {
            collect(root, &path, content, entries);
            EntryKind::Directory
        } else if metadata.is_symlink() {
            let target = fs::read_link(&path).unwrap();
            EntryKind::Symlink { target: target.as_os_str().as_encoded_bytes().into() }
        } else {
            let bytes = fs::read(&path).unwrap();
            let digest = Digest::of(&bytes);
            content.files.lock().unwrap().insert(digest, path.clone());
            let executable = metadata.permissions().mode() & 0o111 != 0;
            EntryKind::File { size: metadata.len(), executable, digest }
        };
        let relative = path.strip_prefix(root).unwrap().as_os_str().as_encoded_bytes();
        entries.push(Entry { path: EntryPath::new(relative).unwrap(), kind });
    }
}

/// Mount points below `under`, in order of mounting.
pub(crate) fn mounts_below(under: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let targets = text.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    targets.filter(|target| target.starts_with(under)).collect()
}

/// A process that holds a mount namespace of its own, in which `/mnt` is a fresh tmpfs.
pub(crate) struct Holder(Child);

impl Holder {
    pub(crate) fn new(setup: &str) -> Self {
        let script = format!("mount -t tmpfs tmpfs /mnt && {setup} && echo ready && exec cat");
        let mut child = Command::new("unshare")
            .args(["-m", "--propagation", "private", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        assert_eq!(&line, b"ready\n");
        Self(child)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid()))
    }

    pub(crate) fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.end();
    }
}

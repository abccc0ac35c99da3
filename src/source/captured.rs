//! What somebody has written here and wants kept: a directory of this host by its path, or by the path that a process of the job has for it.
//!
//! Whoever wrote it may still do so. What is promised: each file comes as it was while it bore one stamp; and once everything was read the
//! whole is listed again ([`Source::may_change`]) and is of the same revision, or the capture is not made. So between the first look and the last no
//! file, link or directory of it was other than captured, as far as stamps tell ([`beneath`](super::beneath) says how far that is).
//! What came and went again between the two looks was in neither.
//!
//! Links are kept as they are, also those that lead outside: nobody follows them here, and on the mount they lead whoever does to what is his to
//! see. (Archives, which others have made to be unpacked, are refused for them.) Hard links become files of their own, whose bytes are
//! kept once. Sockets, FIFOs and devices are left out and named.
//!
//! By its path on the host the directory may hold mounts, since only this host's operator can have made them; through a process it is one mount
//! ([`inside`](super::inside)), and it is what that process may read itself. A listing that gets no answer for long is given up.

use std::fs::File as OpenFile;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::directory::DirectorySource;
use super::inside::{ProcessId, ProcessRoot};
use super::patience::Turns;
use super::{ByteStream, Counter, File, Opened, Source, SourceContext, SourceSpec};
use crate::error::{Error, Result};

/// The option that names the process whose path the URI is.
pub const PROCESS_OPTION: &str = "process";

struct CapturedSource {
    tree: DirectorySource,
    /// For a listing that waits for file systems of the job's; shared with other captures of the same process, or path.
    turns: Arc<Turns>,
    patience: Duration,
    shown: String,
}

/// The directory that `spec` names. The root of a process is held from now on, and the directory in it once it was looked at.
///
/// # Errors
/// `NO_SUCH_PROCESS`, `BAD_OPTION`, `NOT_PERMITTED`.
pub(super) fn connect(spec: &SourceSpec, context: &SourceContext) -> Result<Arc<dyn Source>> {
    let extract = spec.option("extract") != Some("false");
    let path = Path::new(&spec.uri);
    let (tree, turns) = match process_of(spec)? {
        None => (
            DirectorySource::new(path, extract.then(|| context.dictionaries.clone())),
            context.path_turns.of(spec.uri.clone()),
        ),
        Some(process) => {
            let inside = ProcessRoot::open(&process, path)?;
            let tree = DirectorySource::found_by("directory", Arc::new(move || inside.find()), None);
            (tree, context.process_turns.of(process.to_string()))
        }
    };
    let patience = context.settings.inactivity_timeout;
    Ok(Arc::new(CapturedSource { tree, turns, patience, shown: spec.uri.clone() }))
}

fn process_of(spec: &SourceSpec) -> Result<Option<ProcessId>> {
    spec.option(PROCESS_OPTION).map(str::parse).transpose()
}

impl CapturedSource {
    fn silent(&self) -> Error {
        let seconds = self.patience.as_secs_f64();
        Error::unavailable("DIRECTORY_SILENT", format!("listing {}: it gave no answer within {seconds} s", self.shown))
            .remedy("see to the file system that it is on, then retry")
    }
}

#[async_trait]
impl Source for CapturedSource {
    async fn open(&self, counter: &Counter) -> Result<Opened> {
        let looked = self.turns.run(self.patience, || self.silent(), self.tree.look(counter)).await?;
        self.tree.opened(looked)
    }

    async fn check(&self) -> Result<()> {
        self.turns.run(self.patience, || self.silent(), self.tree.glance()).await
    }

    async fn read(&self, file: &File, range: Range<u64>) -> Result<ByteStream> {
        self.tree.read(file, range).await
    }

    fn is_local(&self) -> bool {
        true
    }

    fn may_change(&self) -> bool {
        true
    }

    fn open_local(&self, file: &File) -> Result<Option<OpenFile>> {
        self.tree.open_local(file)
    }

    fn check_unchanged(&self, file: &File, opened: &OpenFile) -> Result<()> {
        self.tree.check_unchanged(file, opened)
    }
}

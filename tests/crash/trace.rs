//! What a daemon asked of its state directory, in order: records of `recorder.c`, which is compiled here.

use std::fmt;
use std::fs::{self, File};
use std::io::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::support::ran::run;
use crate::support::rot::flip;

/// One thing that was done, by paths below the state directory.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Create(String),
    MakeDirectory(String),
    Write {
        path: String,
        at: usize,
        bytes: Arc<[u8]>,
    },
    Size {
        path: String,
        size: usize,
    },
    Punch {
        path: String,
        range: Range<usize>,
    },
    /// By the disk: nobody is told.
    Rot {
        path: String,
        at: usize,
    },
    /// Of a file or a directory; it had returned.
    Sync(String),
    /// Of the whole file system.
    SyncAll,
    Rename {
        from: String,
        to: String,
    },
    Unlink(String),
    RemoveDirectory(String),
    /// Said by the test: see [`Marks`].
    Mark(String),
}

impl Act {
    /// What it makes durable, by kind: what the test can take out.
    pub(crate) fn sync_kind(&self) -> Option<&'static str> {
        match self {
            Self::SyncAll => Some("the file system"),
            Self::Sync(path) if path.starts_with("catalog.db") => Some("the catalog"),
            Self::Sync(path) if path.starts_with("filling/") => Some("bytes that are filled"),
            Self::Sync(path) if path.starts_with("blobs/") && path.matches('/').count() == 1 => Some("names of blobs"),
            Self::Sync(path) if path.starts_with("blobs/") => Some("bytes of sealed blobs"),
            Self::Sync(_) => Some("the rest"),
            _ => None,
        }
    }

    /// Whether the order of durable things can change here.
    pub(crate) fn is_step(&self) -> bool {
        let names = matches!(self, Self::Rename { .. } | Self::Unlink(_) | Self::RemoveDirectory(_));
        names || self.sync_kind().is_some() || matches!(self, Self::Punch { .. })
    }
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write { path, at, bytes } => write!(f, "{} bytes at {at} of {path}", bytes.len()),
            other => write!(f, "{other:?}"),
        }
    }
}

/// Where records go, and what a daemon needs in its environment to write them.
pub(crate) struct Recorder {
    library: PathBuf,
    records: PathBuf,
}

impl Recorder {
    /// Compiles the recorder below `place`.
    pub(crate) fn new(place: &Path) -> Self {
        let (library, records) = (place.join("recorder.so"), place.join("records"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/crash/recorder.c");
        let mut compile = Command::new("cc");
        compile.args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-pthread", "-o"]);
        run(compile.arg(&library).arg(source)).ok();
        File::create(&records).unwrap();
        Self { library, records }
    }

    /// The environment of a daemon whose state directory is `root`.
    pub(crate) fn environment<'a>(&'a self, root: &'a Path) -> [(&'static str, &'a str); 3] {
        let text = |path: &'a Path| path.to_str().unwrap();
        [("LD_PRELOAD", text(&self.library)), ("RECORD_ROOT", text(root)), ("RECORD_TO", text(&self.records))]
    }

    /// Who says what the daemon has promised.
    pub(crate) fn marks(&self) -> Marks {
        Marks(File::options().append(true).open(&self.records).unwrap())
    }

    /// All records. The last one of a killed daemon may be cut off: what it tells of had not been answered.
    pub(crate) fn acts(&self) -> Vec<Act> {
        let bytes = fs::read(&self.records).unwrap();
        let mut acts = Vec::new();
        let mut rest = bytes.as_slice();
        while let Some((act, length)) = parse(rest) {
            acts.extend(act);
            rest = &rest[length..];
        }
        acts
    }
}

/// Remarks between the records: `begin x`, `ready x`, `lose x`, `remove x`, `gone x`, each once that is true for whoever asked.
pub(crate) struct Marks(File);

impl Marks {
    pub(crate) fn say(&mut self, remark: &str) {
        self.0.write_all(format!("mark\t{remark}\t\t0\t0\t0\n").as_bytes()).unwrap();
    }

    /// Lets a byte of the file at `path` below `root` rot, in the records too. Nobody changes that file meanwhile.
    pub(crate) fn rot(&mut self, root: &Path, path: &str, at: usize) {
        self.0.write_all(format!("rot\t{path}\t\t{at}\t0\t0\n").as_bytes()).unwrap();
        flip(&root.join(path), at as u64);
    }
}

/// The first record and its length; no act for what SQLite shares between its connections alone and makes anew at every start.
fn parse(bytes: &[u8]) -> Option<(Option<Act>, usize)> {
    let head = bytes.iter().position(|byte| *byte == b'\n')?;
    let line = std::str::from_utf8(&bytes[..head]).unwrap();
    let words: Vec<_> = line.split('\t').collect();
    let [what, path, other, a, b, length] = words[..] else { panic!("not a record: {line}") };
    let number = |word: &str| word.parse::<usize>().unwrap();
    let end = head + 1 + number(length);
    let bytes = bytes.get(head + 1..end)?;
    let name = path.to_owned();
    let act = match what {
        _ if path.ends_with("-shm") => return Some((None, end)),
        "create" => Act::Create(name),
        "mkdir" => Act::MakeDirectory(name),
        "write" => Act::Write { path: name, at: number(a), bytes: bytes.into() },
        "size" => Act::Size { path: name, size: number(a) },
        "punch" => Act::Punch { path: name, range: number(a)..number(a) + number(b) },
        "rot" => Act::Rot { path: name, at: number(a) },
        "sync" => Act::Sync(name),
        "syncfs" => Act::SyncAll,
        "rename" => Act::Rename { from: name, to: other.to_owned() },
        "unlink" => Act::Unlink(name),
        "rmdir" => Act::RemoveDirectory(name),
        "mark" => Act::Mark(name),
        _ => panic!("the disk of this test does not know `{what}`"),
    };
    Some((Some(act), end))
}

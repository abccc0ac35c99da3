//! What the caller asked for: kind, URI, options.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The ten kinds of `create`, and the two the daemon makes itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceKind {
    /// Amazon S3 and whatever speaks it.
    Aws,
    /// Azure Blob Storage.
    Azure,
    /// Google Cloud Storage.
    Gcp,
    /// A git repository.
    Git,
    /// A Hugging Face repository.
    HuggingFace,
    /// A Kaggle competition, dataset or kernel.
    Kaggle,
    /// Somebody's computer, by the platform's transfer protocol.
    Local,
    /// A datastore mounted on this host.
    Regional,
    /// Wasabi, spoken to as S3.
    Wasabi,
    /// HTTP, HTTPS, FTP, FTPS.
    Web,
    /// A directory of this host, given by the scheduler or the operator (`capture`, `quickstart`).
    Directory,
    /// Bytes sent over gRPC.
    Upload,
}

impl SourceKind {
    const ALL: [Self; 12] = [
        Self::Aws,
        Self::Azure,
        Self::Gcp,
        Self::Git,
        Self::HuggingFace,
        Self::Kaggle,
        Self::Local,
        Self::Regional,
        Self::Wasabi,
        Self::Web,
        Self::Directory,
        Self::Upload,
    ];

    /// The name used in requests, rows and tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Aws => "aws",
            Self::Azure => "azure",
            Self::Gcp => "gcp",
            Self::Git => "git",
            Self::HuggingFace => "huggingface",
            Self::Kaggle => "kaggle",
            Self::Local => "local",
            Self::Regional => "regional",
            Self::Wasabi => "wasabi",
            Self::Web => "web",
            Self::Directory => "directory",
            Self::Upload => "upload",
        }
    }

    /// Whether the daemon can fetch the bytes again by itself, as long as their source has them. What was sent, and what a job left in a directory, it
    /// cannot count on.
    pub const fn is_fetched(self) -> bool {
        !matches!(self, Self::Local | Self::Directory | Self::Upload)
    }

    /// The kind a URI can only mean, for requests without a type.
    ///
    /// # Errors
    /// `AMBIGUOUS_SOURCE` where several kinds take such a URI.
    pub fn infer(uri: &str) -> Result<Self> {
        let scheme = uri.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
        match scheme.as_deref() {
            Some("gs") => Ok(Self::Gcp),
            Some("ssh") => Ok(Self::Git),
            Some("ftp" | "ftps" | "http") => Ok(Self::Web),
            Some("https") if uri.contains(".blob.core.windows.net/") => Ok(Self::Azure),
            Some("https") if uri.ends_with(".git") => Ok(Self::Git),
            Some("https") => Ok(Self::Web),
            None if uri.starts_with("hf:") => Ok(Self::HuggingFace),
            None if uri.starts_with("git@") => Ok(Self::Git),
            _ => Err(Error::invalid("AMBIGUOUS_SOURCE", format!("`{uri}` does not say what type of source it is"))
                .remedy("give the type")),
        }
    }
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for SourceKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|kind| kind.as_str()).collect();
            Error::invalid("UNKNOWN_SOURCE_TYPE", format!("there is no source type `{text}`"))
                .remedy(format!("use one of {}", known.join(", ")))
        })
    }
}

/// Where a checkpoint comes from; durable with its record, so it never holds a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceSpec {
    /// Kind of source.
    pub kind: SourceKind,
    /// As the caller wrote it, less user information.
    pub uri: String,
    /// Options by key: `branch`, `endpoint`, `region`, `account`, `anonymous`, `type`, `path`, `extract`, `copy`, `credentials`, `process`.
    pub options: BTreeMap<String, String>,
}

impl SourceSpec {
    /// The same at a revision that it resolved to before, where its kind can be asked for one: a branch may have moved since.
    #[must_use]
    pub fn at(mut self, revision: &str) -> Self {
        let is_commit = matches!(revision.len(), 40 | 64) && revision.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_commit && matches!(self.kind, SourceKind::Git | SourceKind::HuggingFace) {
            self.options.insert("branch".to_owned(), revision.to_owned());
        }
        self
    }

    /// The option `key`, if given and not empty.
    pub fn option(&self, key: &str) -> Option<&str> {
        self.options.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }
}

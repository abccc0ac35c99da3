//! What is recorded of a checkpoint.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Kind, Result};
use crate::places::Place;

/// State of a record: see [`checkpoints`](super::checkpoints).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Recorded.
    New,
    /// Bytes are arriving.
    Filling,
    /// Whole and verified.
    Ready,
    /// Known; bytes given up.
    Evicted,
    /// Given up.
    Failed,
    /// Being removed.
    Removing,
}

impl State {
    const ALL: [Self; 6] = [Self::New, Self::Filling, Self::Ready, Self::Evicted, Self::Failed, Self::Removing];

    /// The word in rows, requests and tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Filling => "filling",
            Self::Ready => "ready",
            Self::Evicted => "evicted",
            Self::Failed => "failed",
            Self::Removing => "removing",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for State {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| Error::corrupt("CATALOG_DAMAGED", format!("the catalog has a checkpoint of state `{text}`")))
    }
}

/// Where a checkpoint comes from, as recorded: never a secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Source type in words.
    #[serde(rename = "type")]
    pub kind: String,
    /// URI in the form of the type.
    pub uri: String,
    /// Options.
    pub options: std::collections::BTreeMap<String, String>,
}

/// Why a checkpoint failed, as recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// `google.rpc.Code`.
    pub code: i32,
    /// SCREAMING_SNAKE.
    pub reason: String,
    /// One sentence.
    pub message: String,
    /// What to do; may be empty.
    pub remedy: String,
}

impl Failure {
    /// The record of an error.
    pub fn of(error: &Error) -> Self {
        Self {
            code: error.kind().grpc_code(),
            reason: error.reason().to_owned(),
            message: error.chain(),
            remedy: error.remedy_text().unwrap_or_default().to_owned(),
        }
    }

    /// The error that was recorded.
    pub fn to_error(&self) -> Error {
        let error = Error::new(Kind::from_grpc_code(self.code), self.reason.clone(), self.message.clone());
        if self.remedy.is_empty() { error } else { error.remedy(self.remedy.clone()) }
    }
}

/// A checkpoint's record.
#[derive(Clone, Debug)]
pub struct Record {
    /// Id.
    pub id: String,
    /// Name; not unique.
    pub name: String,
    /// Owner; empty for public ones.
    pub owner: String,
    /// Visible to all.
    pub public: bool,
    /// State.
    pub state: State,
    /// Where from.
    pub origin: Origin,
    /// What the source resolved to; empty until known.
    pub revision: String,
    /// Checkpoint digest; set when it is ready first, and kept when it is evicted.
    pub manifest: Option<Digest>,
    /// Regular files; 0 until the listing is known.
    pub files: u64,
    /// Sum of sizes in bytes; 0 until the listing is known.
    pub logical_bytes: u64,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// Milliseconds since the epoch.
    pub created_ms: i64,
    /// Where its bytes are, if they are not in the store; set when ready.
    pub in_place: Option<Place>,
    /// Whether an operator wants it kept.
    pub pinned: bool,
    /// When a job last took or gave up a right to it, or it became ready: milliseconds since the epoch.
    pub used_ms: i64,
    /// Whether it was filled with secrets that came with the request, so that the daemon cannot fill it again by itself.
    pub secrets_given: bool,
}

impl Record {
    /// One of which nothing is known yet but what was asked for, at `now_ms` milliseconds since the epoch. The host's own without an owner.
    pub fn new(id: impl Into<String>, name: impl Into<String>, origin: Origin, now_ms: i64) -> Self {
        Self {
            id: id.into(),
            name: name.into(),
            owner: String::new(),
            public: false,
            state: State::New,
            origin,
            revision: String::new(),
            manifest: None,
            files: 0,
            logical_bytes: 0,
            failure: None,
            created_ms: now_ms,
            in_place: None,
            pinned: false,
            used_ms: now_ms,
            secrets_given: false,
        }
    }

    /// The tree that can be served whole now.
    pub fn ready_manifest(&self) -> Option<Digest> {
        self.manifest.filter(|_| self.state == State::Ready)
    }
}

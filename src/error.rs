//! The one error vocabulary.
//!
//! An [`Error`] is one sentence: what was being done to what and why it failed (`message`), and what to
//! do about it (`remedy`). Its [`Kind`] says what the receiver would do, and three exhaustive tables turn the
//! kind into an errno, a gRPC status and an exit code; there is no wildcard arm in any of them, so
//! a new kind does not compile until it has all three. `reason` is a stable SCREAMING_SNAKE word for programs;
//! `facts` are the names and figures in the sentence, for programs too.
//!
//! `Display` never repeats the source; [`Error::report`] gives the whole chain for people. Nothing secret is
//! ever put in an error: URIs are shown without user information and query.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::Duration;

/// Result with the crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the receiver of an error would do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Correct the request: it can never succeed as it is.
    Invalid,
    /// Name something else: nothing of that name is there.
    NotFound,
    /// Ask for less or choose another name: something is there already.
    AlreadyExists,
    /// Change the state first (detach, release, wait), then ask again.
    WrongState,
    /// Bring credentials or rights.
    Denied,
    /// Free space, or raise a limit.
    NoSpace,
    /// The bytes are not what they were stated to be.
    Corrupt,
    /// Try again: the cause may pass.
    Unavailable,
    /// The caller went away or asked to stop.
    Cancelled,
    /// This build or this kernel does not have it.
    Unsupported,
    /// Report it: our bug.
    Internal,
}

impl Kind {
    /// Whether the same may succeed later although nobody corrects the request.
    pub const fn may_pass(self) -> bool {
        matches!(self, Self::NoSpace | Self::Unavailable | Self::Cancelled)
    }

    /// The exit code of `ckptctl` and `ckptd`.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Invalid | Self::Denied | Self::Unsupported => 2,
            Self::NotFound => 3,
            Self::AlreadyExists | Self::WrongState => 4,
            Self::NoSpace => 5,
            Self::Corrupt => 6,
            Self::Unavailable | Self::Cancelled => 7,
            Self::Internal => 1,
        }
    }

    /// What a reader of the mount sees.
    pub const fn errno(self) -> i32 {
        match self {
            Self::Invalid => libc::EINVAL,
            Self::NotFound => libc::ENOENT,
            Self::AlreadyExists => libc::EEXIST,
            Self::WrongState => libc::EBUSY,
            Self::Denied => libc::EACCES,
            Self::NoSpace => libc::ENOSPC,
            Self::Corrupt | Self::Unavailable | Self::Internal => libc::EIO,
            Self::Cancelled => libc::EINTR,
            Self::Unsupported => libc::EOPNOTSUPP,
        }
    }

    /// The gRPC status code, by its number in `google.rpc.Code`.
    pub const fn grpc_code(self) -> i32 {
        match self {
            Self::Invalid => 3,
            Self::NotFound => 5,
            Self::AlreadyExists => 6,
            Self::WrongState => 9,
            Self::Denied => 7,
            Self::NoSpace => 8,
            Self::Corrupt => 15,
            Self::Unavailable => 14,
            Self::Cancelled => 1,
            Self::Unsupported => 12,
            Self::Internal => 13,
        }
    }

    /// The kind behind a gRPC status code, for clients. Unknown codes are ours to explain, so [`Kind::Internal`].
    pub const fn from_grpc_code(code: i32) -> Self {
        match code {
            3 | 11 => Self::Invalid,
            5 => Self::NotFound,
            6 => Self::AlreadyExists,
            9 => Self::WrongState,
            7 | 16 => Self::Denied,
            8 => Self::NoSpace,
            15 => Self::Corrupt,
            4 | 10 | 14 => Self::Unavailable,
            1 => Self::Cancelled,
            12 => Self::Unsupported,
            _ => Self::Internal,
        }
    }
}

/// Reasons whose figures tell how full the host is, and so of what others have.
const OF_THE_HOST: &[&str] = &["NO_SPACE", "DISK_FULL", "STORE_FULL"];

/// What an owner is told instead.
pub const NO_ROOM: &str = "this host has too little room for the checkpoint";

/// What it may do about it.
pub const NO_ROOM_REMEDY: &str = "make it smaller, or ask an operator of this host";

/// What to do about a source that fails or falls silent, and may do better.
pub const LATER: &str = "retry later; if it stays so, ask whoever runs the source";

/// What to do about a source to which there is no connection.
pub const OUT_OF_REACH: &str = "check the address, and that this host can reach it, then retry";

/// What to do about a source that ends before what it announced.
pub const CUT_SHORT: &str = "retry; if it stays so, ask whoever serves it to check the file";

/// What to do about a source with more entries than a checkpoint may have.
pub const TOO_MANY: &str = "bring it in by parts: what is below one of its directories, or an archive of it";

/// The fact that says how many seconds the other side asked to wait.
pub const RETRY_AFTER_FACT: &str = "retry_after_s";

/// Whether an error of this reason has figures that are not for owners.
pub fn tells_of_the_host(reason: &str) -> bool {
    OF_THE_HOST.contains(&reason)
}

type Cause = Box<dyn std::error::Error + Send + Sync>;

struct Body {
    kind: Kind,
    reason: String,
    message: String,
    remedy: Option<String>,
    facts: Vec<(String, String)>,
    source: Option<Cause>,
}

/// What went wrong, why, and what to do: see the module's page. One pointer wide.
pub struct Error(Box<Body>);

impl Error {
    /// An error of `kind`; `reason` is SCREAMING_SNAKE and stable, `message` one clause without a full stop.
    pub fn new(kind: Kind, reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self(Box::new(Body {
            kind,
            reason: reason.into(),
            message: message.into(),
            remedy: None,
            facts: Vec::new(),
            source: None,
        }))
    }

    /// The request can never succeed as it is.
    pub fn invalid(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, reason, message)
    }

    /// Nothing of that name is there.
    pub fn not_found(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, reason, message)
    }

    /// The state must change first.
    pub fn wrong_state(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Kind::WrongState, reason, message)
    }

    /// Rights or credentials are missing.
    pub fn denied(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Kind::Denied, reason, message)
    }

    /// Space or a limit is exhausted.
    pub fn no_space(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Kind::NoSpace, reason, message)
    }

    /// Bytes differ from what was stated.
    pub fn corrupt(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Kind::Corrupt, reason, message)
    }

    /// The cause may pass.
    pub fn unavailable(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Kind::Unavailable, reason, message)
    }

    /// Our bug.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, "INTERNAL", message)
    }

    /// An I/O error while `doing` something to `path`; the kind follows from the errno.
    pub fn io(doing: &str, path: impl AsRef<Path>, source: io::Error) -> Self {
        let path = path.as_ref().display().to_string();
        let (kind, reason) = classify_io(&source);
        let error = Self::new(kind, reason, format!("{doing} {path}")).fact("path", path);
        let error = match reason {
            CALL_REFUSED => error.remedy(
                "use Linux 5.15 or later, and let no system call filter refuse it (a container's seccomp profile; of systemd \
                 RestrictSUIDSGID= refuses openat2, SystemCallFilter= what it is told to)",
            ),
            DISK_FULL => error.remedy("free space on its file system, then try again"),
            NOT_PERMITTED => error.remedy("check the rights to it and to the directories above it"),
            _ => error,
        };
        error.because(source)
    }

    /// Adds what to do about it: an imperative clause.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.0.remedy = Some(remedy.into());
        self
    }

    /// Adds a name or figure for programs.
    #[must_use]
    pub fn fact(mut self, key: impl Into<String>, value: impl fmt::Display) -> Self {
        self.0.facts.push((key.into(), value.to_string()));
        self
    }

    /// Adds the cause; shown by [`Error::report`], not by `Display`.
    #[must_use]
    pub fn because(mut self, source: impl Into<Cause>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Puts what was being done in front of the message: `doing: message`.
    #[must_use]
    pub fn during(mut self, doing: impl fmt::Display) -> Self {
        self.0.message = format!("{doing}: {}", self.0.message);
        self
    }

    /// What the receiver would do.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The stable word for programs.
    pub fn reason(&self) -> &str {
        &self.0.reason
    }

    /// Whether its figures are not for owners.
    pub fn tells_of_the_host(&self) -> bool {
        tells_of_the_host(self.reason())
    }

    /// What to do, if known.
    pub fn remedy_text(&self) -> Option<&str> {
        self.0.remedy.as_deref()
    }

    /// Names and figures for programs.
    pub fn facts(&self) -> &[(String, String)] {
        &self.0.facts
    }

    /// How long the other side asked to wait before the next attempt (`Retry-After`), if it did.
    pub fn retry_after(&self) -> Option<Duration> {
        let (_, seconds) = self.facts().iter().find(|(key, _)| key == RETRY_AFTER_FACT)?;
        seconds.parse().ok().map(Duration::from_secs)
    }

    /// The message and its causes, without the remedy.
    pub fn chain(&self) -> String {
        let mut text = self.0.message.clone();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            if !text.contains(&cause_text) {
                text.push_str(": ");
                text.push_str(&cause_text);
            }
            source = cause.source();
        }
        text
    }

    /// The whole sentence for people: message, causes, remedy.
    pub fn report(&self) -> String {
        match &self.0.remedy {
            Some(remedy) => format!("{}; {remedy}", self.chain()),
            None => self.chain(),
        }
    }

    /// A copy for a second receiver; the source is folded into the message.
    pub fn share(&self) -> Self {
        Self(Box::new(Body {
            kind: self.0.kind,
            reason: self.0.reason.clone(),
            message: self.chain(),
            remedy: self.0.remedy.clone(),
            facts: self.0.facts.clone(),
            source: None,
        }))
    }
}

/// Reason of a system call that this kernel does not have, or a filter hides.
const CALL_REFUSED: &str = "CALL_REFUSED";

/// Reason of a file system without room.
const DISK_FULL: &str = "DISK_FULL";

/// Reason of rights that are missing.
pub const NOT_PERMITTED: &str = "NOT_PERMITTED";

fn classify_io(error: &io::Error) -> (Kind, &'static str) {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => (Kind::NotFound, "NO_SUCH_FILE"),
        Some(libc::EACCES | libc::EPERM) => (Kind::Denied, NOT_PERMITTED),
        Some(libc::ENOSPC | libc::EDQUOT) => (Kind::NoSpace, DISK_FULL),
        Some(libc::EMFILE | libc::ENFILE) => (Kind::Unavailable, "TOO_MANY_OPEN_FILES"),
        Some(libc::EEXIST) => (Kind::AlreadyExists, "FILE_EXISTS"),
        Some(libc::EBUSY) => (Kind::WrongState, "BUSY"),
        Some(libc::EROFS) => (Kind::WrongState, "READ_ONLY_FILESYSTEM"),
        Some(libc::EIO) => (Kind::Unavailable, "DISK_IO_ERROR"),
        // What is missing now is missing at the next attempt.
        Some(libc::ENOSYS) => (Kind::Unsupported, CALL_REFUSED),
        _ => (Kind::Unavailable, "IO_ERROR"),
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}/{}: {}", self.0.kind, self.0.reason, self.report())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|cause| cause as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_is_the_message_and_report_is_the_whole_sentence() {
        let error = Error::io("reading", "/x/y", io::Error::from_raw_os_error(libc::ENOSPC)).remedy("free some space");
        assert_eq!(error.to_string(), "reading /x/y");
        assert_eq!(error.report(), "reading /x/y: No space left on device (os error 28); free some space");
        assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "DISK_FULL"));
    }

    #[test]
    fn what_a_file_system_refuses_has_a_remedy_of_its_own() {
        for (errno, words) in [(libc::ENOSPC, "free space"), (libc::EACCES, "rights"), (libc::ENOSYS, "system call")] {
            let error = Error::io("writing", "/x", io::Error::from_raw_os_error(errno));
            assert!(error.remedy_text().is_some_and(|remedy| remedy.contains(words)), "{error:?}");
        }
    }

    #[test]
    fn every_kind_survives_the_wire() {
        for kind in [
            Kind::Invalid,
            Kind::NotFound,
            Kind::AlreadyExists,
            Kind::WrongState,
            Kind::Denied,
            Kind::NoSpace,
            Kind::Corrupt,
            Kind::Unavailable,
            Kind::Cancelled,
            Kind::Unsupported,
            Kind::Internal,
        ] {
            assert_eq!(Kind::from_grpc_code(kind.grpc_code()), kind);
        }
    }
}

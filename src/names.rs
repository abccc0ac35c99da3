//! Names, parsed once.
//!
//! Whatever comes from outside (a request, a listing, an archive, a disk) becomes one of these types at the door,
//! and is not checked again behind it. Names inside checkpoints are bytes, as on Linux; names of
//! checkpoints, owners and jobs are text.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::limits;

/// The kernel's random bytes.
const RANDOM: &str = "/dev/urandom";

/// One component of a path inside a checkpoint: 1 to 255 bytes, no `/`, no NUL, not `.` or `..`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryName(Box<[u8]>);

impl EntryName {
    /// Checks one component.
    ///
    /// # Errors
    /// `BAD_ENTRY_NAME` with the name and the rule it breaks.
    pub fn new(bytes: impl Into<Box<[u8]>>) -> Result<Self> {
        let bytes = bytes.into();
        match component_fault(&bytes) {
            None => Ok(Self(bytes)),
            Some(fault) => Err(Error::invalid("BAD_ENTRY_NAME", format!("the name `{}` {fault}", show_bytes(&bytes)))),
        }
    }

    /// The raw bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for EntryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EntryName({})", show_bytes(&self.0))
    }
}

/// A relative path inside a checkpoint: valid components joined by single `/`. The root is the empty path.
///
/// Ordered component by component, so that a directory comes right before what is below it: the canonical order
/// of manifests.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct EntryPath(Arc<[u8]>);

impl EntryPath {
    /// Checks a relative path; the empty path is the root.
    ///
    /// # Errors
    /// `BAD_ENTRY_PATH` for an absolute path, an empty or forbidden component, or one that is too long or too deep.
    pub fn new(bytes: impl Into<Arc<[u8]>>) -> Result<Self> {
        let bytes = bytes.into();
        match path_fault(&bytes) {
            None => Ok(Self(bytes)),
            Some(fault) => Err(Error::invalid("BAD_ENTRY_PATH", format!("the path `{}` {fault}", show_bytes(&bytes)))),
        }
    }

    /// The root of a checkpoint.
    pub fn root() -> Self {
        Self::default()
    }

    /// The path of `name` inside this directory.
    ///
    /// # Errors
    /// `BAD_ENTRY_PATH` where the whole becomes too long or too deep.
    pub fn join(&self, name: &EntryName) -> Result<Self> {
        if self.is_root() {
            return Ok(Self(name.0.as_ref().into()));
        }
        let mut bytes = Vec::with_capacity(self.0.len() + 1 + name.0.len());
        bytes.extend_from_slice(&self.0);
        bytes.push(b'/');
        bytes.extend_from_slice(&name.0);
        Self::new(bytes)
    }

    /// The path of `path`, seen from this directory.
    ///
    /// # Errors
    /// As [`EntryPath::join`].
    pub fn below(&self, path: &Self) -> Result<Self> {
        match (self.is_root(), path.is_root()) {
            (true, _) => Ok(path.clone()),
            (_, true) => Ok(self.clone()),
            _ => Self::new([&self.0, b"/".as_slice(), &path.0].concat()),
        }
    }

    /// The raw bytes; empty for the root.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is the root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The components from the top.
    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/').filter(|part| !part.is_empty())
    }

    /// The last component; empty for the root.
    pub fn file_name(&self) -> &[u8] {
        self.0.rsplit(|byte| *byte == b'/').next().unwrap_or_default()
    }

    /// The directory that holds this entry; `None` for the root.
    pub fn parent(&self) -> Option<Self> {
        if self.is_root() {
            return None;
        }
        let end = self.0.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        Some(Self(self.0[..end].into()))
    }
}

impl Ord for EntryPath {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.components().cmp(other.components())
    }
}

impl PartialOrd for EntryPath {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&show_bytes(&self.0))
    }
}

impl fmt::Debug for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EntryPath({self})")
    }
}

/// Bytes of a name for people: text as it is, anything else escaped.
pub fn show_bytes(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(is_deceptive) => text.to_owned(),
        _ => bytes.escape_ascii().to_string(),
    }
}

/// `text`, cut at its end to at most `bytes` and a sign that it was.
pub fn shorten(text: &str, bytes: usize) -> String {
    if text.len() <= bytes {
        return text.to_owned();
    }
    let end = (0..=bytes).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    format!("{} [...]", &text[..end])
}

/// Whether a character is none to be seen, and changes what is seen around it: controls, line ends, and what turns or hides text, with which
/// one name could be shown as another.
fn is_deceptive(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{200b}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

fn component_fault(bytes: &[u8]) -> Option<&'static str> {
    if bytes.is_empty() {
        Some("is empty")
    } else if bytes == b"." || bytes == b".." {
        Some("is `.` or `..`")
    } else if bytes.contains(&b'/') {
        Some("contains a `/`")
    } else if bytes.contains(&0) {
        Some("contains a NUL byte")
    } else if bytes.len() > limits::ENTRY_NAME_BYTES {
        Some("is longer than 255 bytes")
    } else {
        None
    }
}

fn path_fault(bytes: &[u8]) -> Option<&'static str> {
    if bytes.is_empty() {
        return None;
    }
    if bytes[0] == b'/' {
        return Some("is absolute");
    }
    if bytes.len() > limits::ENTRY_PATH_BYTES {
        return Some("is longer than 4095 bytes");
    }
    let mut depth = 0;
    for component in bytes.split(|byte| *byte == b'/') {
        if let Some(fault) = component_fault(component) {
            return Some(match fault {
                "is empty" => "has an empty component",
                "is `.` or `..`" => "has a component `.` or `..`",
                "is longer than 255 bytes" => "has a component longer than 255 bytes",
                other => other,
            });
        }
        depth += 1;
    }
    (depth > limits::ENTRY_DEPTH).then_some("is nested too deeply")
}

/// Defines a text name with a checked constructor.
macro_rules! text_name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $reason:literal, $valid:expr, $rule:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub struct $name(String);

        impl $name {
            /// Checks the text.
            ///
            /// # Errors
            /// Invalid, with the text and the rule.
            pub fn new(text: impl Into<String>) -> Result<Self> {
                let text = text.into();
                let valid: fn(&str) -> bool = $valid;
                if valid(&text) {
                    Ok(Self(text))
                } else {
                    let shown = shorten(&show_bytes(text.as_bytes()), limits::LABEL_BYTES);
                    Err(Error::invalid($reason, format!(concat!("`{}` is not a valid ", $what), shown))
                        .remedy(concat!("use ", $rule)))
                }
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                Self::new(text)
            }
        }
    };
}

fn is_id(text: &str) -> bool {
    (1..=limits::ID_BYTES).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
        && !text.starts_with(['.', '-'])
}

fn is_label(text: &str) -> bool {
    (1..=limits::LABEL_BYTES).contains(&text.len()) && !text.chars().any(is_deceptive) && text.trim() == text
}

text_name!(
    /// Identifies one checkpoint for ever; never used again. Safe as a file name.
    CheckpointId, "checkpoint id", "BAD_CHECKPOINT_ID", is_id,
    "1 to 128 letters, digits, `-`, `_` or `.`, not starting with `.` or `-`"
);
text_name!(
    /// Identifies a job to the scheduler. Safe as a file name.
    JobId, "job id", "BAD_JOB_ID", is_id,
    "1 to 128 letters, digits, `-`, `_` or `.`, not starting with `.` or `-`"
);
text_name!(
    /// What people call a checkpoint; need not be unique.
    CheckpointName, "checkpoint name", "BAD_CHECKPOINT_NAME", is_label,
    "1 to 255 bytes without control or invisible characters or surrounding spaces"
);
text_name!(
    /// Who a checkpoint belongs to.
    OwnerId, "owner", "BAD_OWNER", is_label,
    "1 to 255 bytes without control or invisible characters or surrounding spaces"
);

impl CheckpointId {
    /// An id that nobody else has: 122 random bits in the usual shape of a UUID (version 4).
    ///
    /// # Errors
    /// The I/O error of the kernel's source of random bytes.
    pub fn fresh() -> Result<Self> {
        let mut bytes = [0_u8; 16];
        File::open(RANDOM)
            .and_then(|mut random| random.read_exact(&mut bytes))
            .map_err(|error| Error::io("reading", RANDOM, error))?;
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self(format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])))
    }
}

impl CheckpointName {
    /// The name as a directory below a job's target: `/` and NUL become `_`, and so do `.` and `..` as a whole.
    pub fn as_directory(&self) -> String {
        let name = self.0.replace(['/', '\0'], "_");
        if name == "." || name == ".." { name.replace('.', "_") } else { name }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_below_a_path_is_both() {
        let path = |text: &str| EntryPath::new(text.as_bytes()).unwrap();
        for (directory, below, whole) in [("a/b", "c/d", "a/b/c/d"), ("", "c", "c"), ("a", "", "a"), ("", "", "")] {
            assert_eq!(path(directory).below(&path(below)).unwrap(), path(whole));
        }
        assert!(path(&["a"; 100].join("/")).below(&path(&["b"; 100].join("/"))).is_err());
    }

    #[test]
    fn paths_that_climb_or_lie_are_refused() {
        for bad in ["/a", "a//b", "a/", "./a", "a/../b", "..", "a/.", "a\0b"] {
            assert!(EntryPath::new(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(EntryPath::new("a/".repeat(300).into_bytes()).is_err());
        assert!(EntryPath::new(vec![b'x'; 256]).is_err());
        for good in ["", "a", "a/b", "a b/ü/%41+#", "...", "a/..b"] {
            assert!(EntryPath::new(good.as_bytes()).is_ok(), "{good:?}");
        }
        assert!(EntryPath::new(vec![0xff, b'/', 0xfe]).is_ok());
    }

    #[test]
    fn a_directory_comes_right_before_what_is_below_it() {
        let mut paths: Vec<_> =
            ["a.b", "a/c", "a", "a-b", "", "a/c/d"].iter().map(|p| EntryPath::new(p.as_bytes()).unwrap()).collect();
        paths.sort();
        let shown: Vec<_> = paths.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["", "a", "a/c", "a/c/d", "a-b", "a.b"]);
    }

    #[test]
    fn parents_and_joins_are_inverse() {
        let path = EntryPath::new(*b"a/b/c").unwrap();
        let parent = path.parent().unwrap();
        assert_eq!(parent.join(&EntryName::new(*b"c").unwrap()).unwrap(), path);
        assert_eq!(EntryPath::new(*b"a").unwrap().parent(), Some(EntryPath::root()));
        assert_eq!(EntryPath::root().parent(), None);
    }

    #[test]
    fn ids_are_safe_as_file_names() {
        for bad in ["", ".x", "a/b", "-rf", "a b", &"x".repeat(129)] {
            assert!(JobId::new(bad).is_err(), "{bad}");
        }
        assert!(JobId::new("job-1_x.2").is_ok());
    }

    #[test]
    fn what_is_too_long_is_cut_between_characters() {
        assert_eq!(shorten("abc", 3), "abc");
        assert_eq!(shorten("abcd", 3), "abc [...]");
        assert_eq!(shorten("aüb", 2), "a [...]");
    }

    #[test]
    fn a_name_is_what_is_seen_of_it() {
        for bad in [
            "a\nb",
            "a\0b",
            "\u{202e}gnp.exe",
            "a\u{200b}b",
            "\u{feff}a",
            "a\u{2028}b",
            "a\u{e0061}",
            " a",
            "a\u{a0}",
            "",
        ] {
            assert!(CheckpointName::new(bad).is_err(), "{bad:?}");
            assert!(!show_bytes(bad.as_bytes()).chars().any(is_deceptive), "{bad:?}");
        }
        for good in ["a/b", "..", "-rf", "%2e%2e", "Modell für Köln", "模型", "نموذج", "👩\u{200d}🔬", "a\u{301}"]
        {
            assert!(CheckpointName::new(good).is_ok(), "{good:?}");
            assert_eq!(show_bytes(good.as_bytes()), good);
        }
        assert!(!show_bytes("a\u{202e}b".as_bytes()).contains('\u{202e}'));
    }

    #[test]
    fn a_name_becomes_one_directory() {
        assert_eq!(CheckpointName::new("a/b").unwrap().as_directory(), "a_b");
        assert_eq!(CheckpointName::new("..").unwrap().as_directory(), "__");
    }
}

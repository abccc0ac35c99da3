//! Pointers: the small texts that stand in a repository for large files
//! (<https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>).

use crate::limits;

/// Versions of the format, all alike in what counts here.
const VERSIONS: &[&str] =
    &["https://git-lfs.github.com/spec/v1", "https://hawser.github.com/spec/v1", "http://git-media.io/v/2"];

/// The large file that a pointer stands for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in crate::source::git) struct Pointer {
    pub(in crate::source::git) sha256: [u8; 32],
    pub(in crate::source::git) size: u64,
}

impl Pointer {
    /// Whether a file of `size` bytes could be a pointer.
    pub(in crate::source::git) fn may_be(size: u64) -> bool {
        (1..=limits::LFS_POINTER_BYTES).contains(&size)
    }

    /// `None` for what is no pointer, also for one whose content passes through extensions that only their owner has.
    pub(in crate::source::git) fn parse(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut lines = text.lines();
        let version = lines.next()?.strip_prefix("version ")?;
        if !VERSIONS.contains(&version.trim()) {
            return None;
        }
        let (mut sha256, mut size) = (None, None);
        for line in lines {
            match line.split_once(' ')? {
                ("oid", oid) => sha256 = decode(oid.trim().strip_prefix("sha256:")?),
                ("size", digits) => size = digits.trim().parse().ok(),
                (key, _) if key.starts_with("ext-") => return None,
                _ => {}
            }
        }
        Some(Self { sha256: sha256?, size: size? })
    }

    /// The object's id, in hexadecimal.
    pub(in crate::source::git) fn id(&self) -> String {
        self.sha256.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// So many bytes of hexadecimal digits, and nothing else.
pub(in crate::source::git) fn decode<const BYTES: usize>(text: &str) -> Option<[u8; BYTES]> {
    if text.len() != 2 * BYTES || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; BYTES];
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_are_told_from_other_texts() {
        let oid = "ab".repeat(32);
        let good = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 12\n");
        let pointer = Pointer::parse(good.as_bytes()).unwrap();
        assert_eq!((pointer.id(), pointer.size), (oid.clone(), 12));
        for other in [
            "",
            "version https://git-lfs.github.com/spec/v1\n",
            "{\"version\": 1}",
            &good.replace("sha256", "sha512"),
            &good.replace("size 12", "size x"),
            &good.replace(&oid, "ab"),
            &good.replace("oid", "ext-0-case sha256:00\noid"),
            &good.replace("spec/v1", "spec/v9"),
        ] {
            assert_eq!(Pointer::parse(other.as_bytes()), None, "{other}");
        }
    }
}

//! A member of a tar that is sent, as it is recorded: what it is, and where in the tar, so that a later run of the daemon can go on behind it.
//!
//! A protobuf message that nobody but a later ckptd reads: fields are added, never used again.

use prost::Message as _;

use crate::archive::{Member, Span, What};
use crate::error::{Error, Result};
use crate::names::EntryPath;

const DIRECTORY: u32 = 1;
const SYMLINK: u32 = 2;
const FILE: u32 = 3;
const SAME_AS: u32 = 4;

#[derive(Clone, PartialEq, prost::Message)]
struct Row {
    #[prost(bytes = "vec", tag = "1")]
    path: Vec<u8>,
    #[prost(uint32, tag = "2")]
    kind: u32,
    /// Of a link; the path that a file is the same as.
    #[prost(bytes = "vec", tag = "3")]
    target: Vec<u8>,
    #[prost(uint64, tag = "4")]
    size: u64,
    #[prost(bool, tag = "5")]
    executable: bool,
    #[prost(uint64, tag = "6")]
    bytes_at: u64,
    #[prost(uint64, tag = "7")]
    end: u64,
    #[prost(bool, tag = "8")]
    plain: bool,
}

/// `member` as it is recorded.
pub(super) fn encode(member: &Member) -> Vec<u8> {
    let Span { bytes_at, end, plain } = member.span;
    let row = Row { path: member.path.as_bytes().to_vec(), bytes_at, end, plain, ..Row::default() };
    let row = match &member.what {
        What::Directory => Row { kind: DIRECTORY, ..row },
        What::Symlink(target) => Row { kind: SYMLINK, target: target.to_vec(), ..row },
        What::File { size, executable, here: _ } => {
            Row { kind: FILE, size: size.unwrap_or_default(), executable: *executable, ..row }
        }
        What::SameAs(path) => Row { kind: SAME_AS, target: path.as_bytes().to_vec(), ..row },
    };
    row.encode_to_vec()
}

/// What [`encode`] made `row` of.
///
/// # Errors
/// `CATALOG_DAMAGED`.
pub(super) fn decode(row: &[u8]) -> Result<Member> {
    let damaged = || Error::corrupt("CATALOG_DAMAGED", "an entry of an upload is damaged");
    let Row { path, kind, target, size, executable, bytes_at, end, plain } =
        Row::decode(row).map_err(|error| damaged().because(error))?;
    let what = match kind {
        DIRECTORY => What::Directory,
        SYMLINK => What::Symlink(target.into()),
        FILE => What::File { size: Some(size), executable, here: false },
        SAME_AS => What::SameAs(EntryPath::new(target).map_err(|error| damaged().because(error))?),
        _ => return Err(damaged()),
    };
    let path = EntryPath::new(path).map_err(|error| damaged().because(error))?;
    Ok(Member { path, what, span: Span { bytes_at, end, plain } })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What version 1 wrote of the members of [`members`]. Never edited.
    const GOLDEN: [&str; 4] = [
        "0a01641001308004388004",
        "0a036420781002 1a0461 2f2062 308004 388004",
        "0a01661003200728013080063880084001",
        "0a016710041a016630 8008388008",
    ];

    fn members() -> [Member; 4] {
        let path = |text: &str| EntryPath::new(text.as_bytes()).unwrap();
        let span = |bytes_at, end, plain| Span { bytes_at, end, plain };
        [
            Member { path: path("d"), what: What::Directory, span: span(512, 512, false) },
            Member { path: path("d x"), what: What::Symlink(b"a/ b".as_slice().into()), span: span(512, 512, false) },
            Member {
                path: path("f"),
                what: What::File { size: Some(7), executable: true, here: false },
                span: span(768, 1024, true),
            },
            Member { path: path("g"), what: What::SameAs(path("f")), span: span(1024, 1024, false) },
        ]
    }

    #[test]
    fn a_row_is_what_it_was_made_of_in_every_version() {
        for (member, golden) in members().iter().zip(GOLDEN) {
            let hex: String = encode(member).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, golden.replace(' ', ""));
            assert_eq!(&decode(&encode(member)).unwrap(), member);
        }
        for bad in [b"".as_slice(), &[1], &encode(&members()[0])[..4], &[0x10, 9]] {
            assert_eq!(decode(bad).unwrap_err().reason(), "CATALOG_DAMAGED");
        }
    }
}

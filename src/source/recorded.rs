//! Members of a tar as they are recorded, so that a later run of the daemon goes on behind them: what each is, and where in the tar.
//!
//! A row is a protobuf message that nobody but a later ckptd reads: fields are added, never used again.

use bytes::Bytes;
use prost::Message as _;

use super::{Begun, Here};
use crate::archive::{Given, Member, Members, Span, What};
use crate::digest::Digest;
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
    #[prost(uint64, tag = "9")]
    mark_at: u64,
    #[prost(bytes = "vec", tag = "10")]
    mark: Vec<u8>,
    #[prost(uint64, tag = "11")]
    at: u64,
}

/// The state of what takes the digest of a tar, at a byte of it that is before what the row speaks of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Bytes that it has taken.
    pub at: u64,
    /// The state.
    pub state: Vec<u8>,
}

/// `member` as it is recorded, with a mark where there is a new one.
pub fn encode(member: &Member, mark: Option<&Mark>) -> Vec<u8> {
    let Span { at, bytes_at, end, plain } = member.span;
    let (mark_at, mark) = mark.map(|mark| (mark.at, mark.state.clone())).unwrap_or_default();
    let row = Row { path: member.path.as_bytes().to_vec(), at, bytes_at, end, plain, mark_at, mark, ..Row::default() };
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
pub fn decode(row: &[u8]) -> Result<(Member, Option<Mark>)> {
    let damaged = || Error::corrupt("CATALOG_DAMAGED", "an entry of an upload is damaged");
    let Row { path, kind, target, size, executable, bytes_at, end, plain, mark_at, mark, at } =
        Row::decode(row).map_err(|error| damaged().because(error))?;
    let what = match kind {
        DIRECTORY => What::Directory,
        SYMLINK => What::Symlink(target.into()),
        FILE => What::File { size: Some(size), executable, here: false },
        SAME_AS => What::SameAs(EntryPath::new(target).map_err(|error| damaged().because(error))?),
        _ => return Err(damaged()),
    };
    let path = EntryPath::new(path).map_err(|error| damaged().because(error))?;
    let mark = (mark_at > 0).then_some(Mark { at: mark_at, state: mark });
    Ok((Member { path, what, span: Span { at, bytes_at, end, plain } }, mark))
}

/// Path and size of a member that is a file.
pub fn file_of(member: &Member) -> Option<(Vec<u8>, u64)> {
    match member.what {
        What::File { size, .. } => size.map(|size| (member.path.as_bytes().to_vec(), size)),
        What::Directory | What::Symlink(_) | What::SameAs(_) => None,
    }
}

/// Members of a tar, behind those that an earlier run of the daemon has recorded, which come first.
pub struct RecordedMembers {
    members: Members,
    recorded: std::vec::IntoIter<(Member, Here)>,
    /// Whether bytes of the last of them are still to come.
    left_of_last: bool,
    /// How much is here of the present one.
    here: Option<Here>,
    /// Whether what comes next are its bytes.
    comes: bool,
    /// How many came.
    count: u64,
}

/// The next member.
pub struct Next {
    /// What it is.
    pub member: Member,
    /// Its position, from 0 on.
    pub position: u64,
    /// Whether it was recorded by an earlier run.
    pub is_recorded: bool,
}

/// What a reading of a tar goes on behind, where these are recorded: all whole but the last, perhaps.
pub fn given(recorded: &[(Member, Here)]) -> Given {
    let left = match recorded.last() {
        Some((Member { what: What::File { size: Some(size), .. }, .. }, Here::Begun(begun))) => {
            size.saturating_sub(begun.bytes)
        }
        _ => 0,
    };
    Given { members: recorded.iter().map(|(member, _)| member.clone()).collect(), left }
}

impl RecordedMembers {
    /// `members`, which go on behind these ([`given`]).
    pub fn new(members: Members, recorded: Vec<(Member, Here)>, left: u64) -> Self {
        let recorded = recorded.into_iter();
        Self { members, recorded, left_of_last: left > 0, here: None, comes: false, count: 0 }
    }

    /// The next member, skipping what is left of the present one; `None` at the end. Cancel-safe.
    ///
    /// # Errors
    /// Those of [`Members::next`].
    pub async fn next(&mut self) -> Result<Option<Next>> {
        let (member, here) = match self.recorded.next() {
            Some((member, here)) => (member, Some(here)),
            None => match self.members.next().await? {
                Some(member) => (member, None),
                None => return Ok(None),
            },
        };
        self.comes = here.is_none() || (self.recorded.len() == 0 && self.left_of_last);
        self.here = here;
        self.count += 1;
        Ok(Some(Next { member, position: self.count - 1, is_recorded: here.is_some() }))
    }

    /// The next bytes of the present file that are not here; `None` at its end. Cancel-safe.
    ///
    /// # Errors
    /// Those of [`Members::next_bytes`].
    pub async fn next_bytes(&mut self) -> Result<Option<Vec<Bytes>>> {
        if self.comes { self.members.next_bytes().await } else { Ok(None) }
    }

    /// Size and digest of the present file where it is sealed.
    pub fn sealed(&self) -> Option<(u64, Digest)> {
        if let Some(Here::Sealed(size, digest)) = self.here { Some((size, digest)) } else { None }
    }

    /// What is here of the present file where it is begun.
    pub fn begun(&self) -> Option<Begun> {
        if let Some(Here::Begun(begun)) = self.here { Some(begun) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What version 1 wrote of the members of [`members`]. Never edited.
    const GOLDEN: [&str; 4] = [
        "0a01641001308004388004",
        "0a036420781002 1a0461 2f2062 308004 388004",
        "0a01661003200728013080063880084001588002",
        "0a016710041a016630 80083880085880 04",
    ];

    fn members() -> [Member; 4] {
        let path = |text: &str| EntryPath::new(text.as_bytes()).unwrap();
        let span = |bytes_at, end, plain| Span { at: bytes_at - 512, bytes_at, end, plain };
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
            let hex: String = encode(member, None).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, golden.replace(' ', ""));
            for mark in [None, Some(Mark { at: 300, state: b"state".to_vec() })] {
                assert_eq!(decode(&encode(member, mark.as_ref())).unwrap(), (member.clone(), mark));
            }
        }
        let marked = encode(&members()[0], Some(&Mark { at: 300, state: b"s".to_vec() }));
        assert!(marked.ends_with(&[0x48, 0xac, 0x02, 0x52, 0x01, b's']), "{marked:x?}");
        for bad in [b"".as_slice(), &[1], &encode(&members()[0], None)[..4], &[0x10, 9]] {
            assert_eq!(decode(bad).unwrap_err().reason(), "CATALOG_DAMAGED");
        }
    }
}

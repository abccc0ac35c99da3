//! What FTP servers say of directories and files, as bytes: MLSD and MLST (RFC 3659), and the `ls -l` or DOS lines of LIST.
//!
//! Names are bytes. Commands and replies of the client are text, so bytes travel in it as the characters of the same number
//! ([`as_text`], [`as_bytes`]).

use suppaftp::list::ListParser;

use crate::error::{Error, Result};
use crate::names::show_bytes;

/// What is known of a file besides its name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) size: Option<u64>,
    pub(super) stamp: Stamp,
}

/// What tells that a file is still the one that was listed; either may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Stamp {
    /// Time of modification as the server writes it.
    pub(super) modified: Option<String>,
    /// What RFC 3659 calls the fact `unique`: names the file itself.
    pub(super) unique: Option<String>,
}

impl Stamp {
    /// Whether both may be of one file in one state: nothing that both tell differs.
    pub(super) fn agrees(&self, other: &Self) -> bool {
        let same = |one: &Option<String>, other: &Option<String>| match (one, other) {
            (Some(one), Some(other)) => one == other,
            _ => true,
        };
        same(&self.modified, &other.modified) && same(&self.unique, &other.unique)
    }
}

/// What an entry of a directory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File(Stat),
    /// A symbolic link; what is behind it is to be asked for.
    Link,
    /// Neither, with the server's word for it.
    Other(String),
}

/// One line of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) name: Vec<u8>,
    pub(super) kind: Kind,
}

/// The text whose characters have the numbers of `bytes`.
pub(super) fn as_text(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

/// The bytes that [`as_text`] was given; `None` for text that cannot come from it.
pub(super) fn as_bytes(text: &str) -> Option<Vec<u8>> {
    text.chars().map(|character| u8::try_from(u32::from(character)).ok()).collect()
}

/// The lines of a reply or listing, without those that are empty.
pub(super) fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .filter(|line| !line.is_empty())
}

/// One line of MLSD, or of MLST without its first space; `None` for the directory itself and its parent.
///
/// # Errors
/// `BAD_LISTING`.
pub(super) fn parse_facts(line: &[u8]) -> Result<Option<Line>> {
    // Facts have no space in them, and a name begins behind the first.
    let end = line.iter().position(|byte| *byte == b' ').ok_or_else(|| bad_line(line))?;
    let (facts, name) = (as_text(&line[..end]), line[end + 1..].to_vec());
    let mut kind = String::new();
    let mut stat = Stat::default();
    for (fact, value) in facts.split(';').filter_map(|fact| fact.split_once('=')) {
        match fact.to_ascii_lowercase().as_str() {
            "type" => kind = value.to_ascii_lowercase(),
            "size" => stat.size = Some(value.parse().map_err(|_| bad_line(line))?),
            "modify" => stat.stamp.modified = Some(value.to_owned()),
            "unique" => stat.stamp.unique = Some(value.to_owned()),
            _ => {}
        }
    }
    let kind = match kind.as_str() {
        "cdir" | "pdir" => return Ok(None),
        "dir" => Kind::Directory,
        "file" => Kind::File(stat),
        other if other.contains("link") => Kind::Link,
        other => Kind::Other(other.to_owned()),
    };
    Ok((!is_dots(&name)).then_some(Line { name, kind }))
}

/// One line of LIST; `None` for the directory itself, its parent, and the line with the sum. Its times are too coarse to be of use.
///
/// # Errors
/// `BAD_LISTING`.
pub(super) fn parse_list(line: &[u8]) -> Result<Option<Line>> {
    let text = as_text(line);
    if text.starts_with("total ") {
        return Ok(None);
    }
    if let Some(kind) = text.chars().next().filter(|kind| matches!(kind, 'b' | 'c' | 'p' | 's')) {
        let name = text.rsplit(' ').next().and_then(as_bytes).unwrap_or_default();
        return Ok(Some(Line { name, kind: Kind::Other(kind.to_string()) }));
    }
    let entry = ListParser::parse_posix(&text).or_else(|_| ListParser::parse_dos(&text)).map_err(|_| bad_line(line))?;
    let name = as_bytes(entry.name()).unwrap_or_default();
    let kind = if entry.is_directory() {
        Kind::Directory
    } else if entry.is_symlink() {
        Kind::Link
    } else {
        Kind::File(Stat { size: u64::try_from(entry.size()).ok(), stamp: Stamp::default() })
    };
    Ok((!is_dots(&name)).then_some(Line { name, kind }))
}

fn is_dots(name: &[u8]) -> bool {
    matches!(name, b"." | b"..")
}

fn bad_line(line: &[u8]) -> Error {
    let shown = show_bytes(&line[..line.len().min(200)]);
    Error::invalid("BAD_LISTING", format!("the server's listing has a line that is not understood: `{shown}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, size: u64, modified: Option<&str>, unique: Option<&str>) -> Line {
        let stamp = Stamp { modified: modified.map(str::to_owned), unique: unique.map(str::to_owned) };
        Line { name: name.as_bytes().to_vec(), kind: Kind::File(Stat { size: Some(size), stamp }) }
    }

    fn other(name: &str, kind: Kind) -> Line {
        Line { name: name.as_bytes().to_vec(), kind }
    }

    #[test]
    fn facts_are_read_with_names_of_any_kind() {
        for (line, found) in [
            (
                "type=file;size=12;modify=20261123210000;unique=8gab; a b;c=d",
                Some(file("a b;c=d", 12, Some("20261123210000"), Some("8gab"))),
            ),
            ("Type=dir;Modify=20261123210000; d", Some(other("d", Kind::Directory))),
            ("type=OS.unix=slink:/x; l", Some(other("l", Kind::Link))),
            ("type=cdir; .", None),
            ("type=dir; ..", None),
            ("size=3;type=file;  x ", Some(file(" x ", 3, None, None))),
        ] {
            assert_eq!(parse_facts(line.as_bytes()).unwrap(), found, "{line}");
        }
        for junk in ["", "type=file;size=x; a", "type=file;"] {
            assert_eq!(parse_facts(junk.as_bytes()).unwrap_err().reason(), "BAD_LISTING", "{junk}");
        }
    }

    #[test]
    fn long_listings_are_read() {
        for (line, found) in [
            (
                "-rw-r--r--    1 0        0            4096 Nov 23 21:00 a b.bin",
                Some(file("a b.bin", 4096, None, None)),
            ),
            ("drwxr-xr-x    2 0        0            4096 Nov 23  2025 sub", Some(other("sub", Kind::Directory))),
            ("lrwxrwxrwx    1 0        0               3 Nov 23 21:00 l -> a b", Some(other("l", Kind::Link))),
            ("11-23-26  09:00PM       <DIR>          sub", Some(other("sub", Kind::Directory))),
            ("11-23-26  09:00PM                 12 a.bin", Some(file("a.bin", 12, None, None))),
            ("total 12", None),
            ("drwxr-xr-x    2 0        0            4096 Nov 23 21:00 ..", None),
        ] {
            assert_eq!(parse_list(line.as_bytes()).unwrap(), found, "{line}");
        }
        assert_eq!(parse_list(b"what?").unwrap_err().reason(), "BAD_LISTING");
    }

    #[test]
    fn bytes_come_back_from_text() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(as_bytes(&as_text(&all)).unwrap(), all);
        assert_eq!(as_bytes("\u{100}"), None);
    }

    #[test]
    fn stamps_disagree_only_on_what_both_tell() {
        let stamp = |modified: Option<&str>, unique: Option<&str>| Stamp {
            modified: modified.map(str::to_owned),
            unique: unique.map(str::to_owned),
        };
        assert!(stamp(Some("1"), None).agrees(&stamp(Some("1"), Some("u"))));
        assert!(!stamp(Some("1"), Some("u")).agrees(&stamp(Some("1"), Some("v"))));
        assert!(!stamp(Some("1"), None).agrees(&stamp(Some("2"), None)));
        assert!(stamp(None, None).agrees(&stamp(Some("2"), None)));
    }
}

//! What a commit holds, as git lists it.

use super::child::Workshop;
use super::fetch::{collect, good, is_object_id};
use super::link::git;
use crate::error::{Error, Result};
use crate::limits;
use crate::names::{EntryPath, show_bytes};

/// Longest record of a listing: a path and its figures.
const RECORD_BYTES: usize = 2 * limits::ENTRY_PATH_BYTES;

/// One entry of a tree, directories left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    /// From the repository's root.
    pub(super) path: EntryPath,
    pub(super) kind: Kind,
    /// The object's id, in hexadecimal.
    pub(super) id: String,
    /// 0 for a submodule.
    pub(super) size: u64,
}

/// Kinds of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File { executable: bool },
    Symlink,
    Submodule,
}

/// Everything in `commit`; `counter` is told how many entries come.
///
/// # Errors
/// Those of `counter`, `REPOSITORY_MALFORMED`, and names that cannot be shown on a mount.
pub(super) async fn list(
    workshop: &Workshop,
    number: usize,
    commit: &str,
    counter: &(dyn Fn(usize) -> Result<()> + Sync),
) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    let mut rest: Vec<u8> = Vec::new();
    let call = git(workshop, number, &["ls-tree", "-r", "-z", "-l", "--full-tree", commit]);
    let take = |bytes: &[u8]| {
        let mut pieces = bytes.split(|byte| *byte == 0);
        let last = pieces.next_back().unwrap_or_default();
        for piece in pieces {
            rest.extend_from_slice(piece);
            items.push(parse(&rest)?);
            rest.clear();
        }
        collect(&mut rest, last, RECORD_BYTES)?;
        counter(items.len()).map_err(|error| error.during("listing a commit"))
    };
    let ended = call.run(workshop, take).await?;
    good(ended, "listing a commit")?;
    Ok(items)
}

/// `<mode> <type> <id> <size>\t<path>`, the size padded and `-` for what has none.
fn parse(record: &[u8]) -> Result<Item> {
    let bad = || {
        Error::corrupt("REPOSITORY_MALFORMED", format!("the entry `{}` of a tree makes no sense", show_bytes(record)))
    };
    let at = record.iter().position(|byte| *byte == b'\t').ok_or_else(bad)?;
    let head = std::str::from_utf8(&record[..at]).map_err(|_| bad())?;
    let mut fields = head.split_ascii_whitespace();
    let (mode, _type, id, size) = (fields.next(), fields.next(), fields.next(), fields.next());
    let kind = match mode {
        Some("100755") => Kind::File { executable: true },
        Some("100644" | "100664") => Kind::File { executable: false },
        Some("120000") => Kind::Symlink,
        Some("160000") => Kind::Submodule,
        _ => return Err(bad()),
    };
    let id = id.filter(|id| is_object_id(id)).ok_or_else(bad)?.to_owned();
    let size = match (kind, size) {
        (Kind::Submodule, _) => 0,
        (_, Some(size)) => size.parse().map_err(|_| bad())?,
        (_, None) => return Err(bad()),
    };
    let path = EntryPath::new(&record[at + 1..])?;
    if path.is_root() {
        return Err(bad());
    }
    Ok(Item { path, kind, id, size })
}

/// Keys and values of a blob in the form of git's configuration (`.gitmodules`, `.lfsconfig`).
pub(super) async fn settings(workshop: &Workshop, number: usize, item: &Item) -> Result<Vec<(String, String)>> {
    if item.size > limits::GIT_SETTINGS_BYTES {
        let message = format!("`{}` is longer than {} bytes", item.path, limits::GIT_SETTINGS_BYTES);
        return Err(Error::invalid("REPOSITORY_MALFORMED", message));
    }
    let mut text = Vec::new();
    let blob = format!("--blob={}", item.id);
    let call = git(workshop, number, &["config", &blob, "--no-includes", "-z", "--list"]);
    let most = usize::try_from(limits::GIT_SETTINGS_BYTES * 4).unwrap_or(usize::MAX);
    let ended = call.run(workshop, |bytes| collect(&mut text, bytes, most)).await?;
    good(ended, &format!("reading `{}`", item.path))?;
    let text = String::from_utf8_lossy(&text);
    let pairs = text.split('\0').filter_map(|pair| pair.split_once('\n'));
    Ok(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
}

/// What `.gitmodules` says of the submodule at `path`: its URL, unless it is not to be fetched.
pub(super) fn submodule_url<'a>(settings: &'a [(String, String)], path: &EntryPath) -> Option<&'a str> {
    let name = settings.iter().find_map(|(key, value)| {
        let name = key.strip_prefix("submodule.")?.strip_suffix(".path")?;
        (value.trim_end_matches('/').as_bytes() == path.as_bytes()).then_some(name)
    })?;
    let value = |word: &str| {
        let key = format!("submodule.{name}.{word}");
        settings.iter().rev().find(|(found, _)| *found == key).map(|(_, value)| value.as_str())
    };
    value("url").filter(|_| value("update") != Some("none"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_parsed_and_nonsense_is_refused() {
        let id = "0123456789abcdef0123456789abcdef01234567";
        let item = |text: &str| parse(text.as_bytes());
        let found = item(&format!("100755 blob {id}      12\ta b\nc\td")).unwrap();
        assert_eq!((found.kind, found.size), (Kind::File { executable: true }, 12));
        assert_eq!(found.path.as_bytes(), b"a b\nc\td");
        assert_eq!(item(&format!("160000 commit {id}       -\tsub")).unwrap().kind, Kind::Submodule);
        for bad in [
            format!("100644 blob {id} 1\t../x"),
            format!("100644 blob {id} 1\t"),
            format!("100644 blob {id} x\ta"),
            "100644 blob -x 1\ta".to_string(),
            format!("040000 tree {id} -\ta"),
            "nonsense".to_owned(),
        ] {
            assert!(item(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn submodules_are_found_by_their_path() {
        let text = "submodule.a.b.path\nx/y\0submodule.a.b.url\n../z\0submodule.n.path\nn\0submodule.n.url\nu\0submodule.n.update\nnone";
        let pairs: Vec<_> =
            text.split('\0').map(|pair| pair.split_once('\n').unwrap()).map(|(k, v)| (k.into(), v.into())).collect();
        let url = |path: &str| submodule_url(&pairs, &EntryPath::new(path.as_bytes()).unwrap());
        assert_eq!((url("x/y"), url("n"), url("x")), (Some("../z"), None, None));
    }
}

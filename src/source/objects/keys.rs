//! From keys to entries: the rules by which a flat list of keys becomes a tree.
//!
//! The prefix is trimmed. A key that ends in `/` is a directory, if it holds nothing. Empty components and `.` say nothing and
//! are left out (`a//b` and `a/./b` are `a/b`), unless two keys would become one entry. A key cannot become a file if it has `..`, NUL,
//! a component of more than 255 bytes, or is a file and the directory of others at the same time. The checkpoint is refused
//! then, naming the keys.

use super::super::{File, Listed, What};
use super::{Locator, Object, shown_key};
use crate::error::{Error, Result};
use crate::names::EntryPath;

/// Keys named in one refusal.
const NAMED: usize = 20;

/// The entries of `objects`, whose keys have `skip` bytes of prefix, in their canonical order.
///
/// # Errors
/// `BAD_KEYS`, naming the first [`NAMED`] keys that cannot become entries and why.
pub(super) fn entries(objects: Vec<Object>, skip: usize) -> Result<Vec<Listed>> {
    let mut refused = Refused::default();
    let mut placed: Vec<(EntryPath, Object)> = Vec::with_capacity(objects.len());
    for object in objects {
        match path_of(object.key.get(skip..).unwrap_or_default()) {
            Ok(path) if is_directory(&object.key) && object.size > 0 => {
                refused.add(&object.key, format!("is named as the directory `{path}` but holds {} bytes", object.size));
            }
            // The prefix itself, written down as a directory.
            Ok(path) if path.is_root() && is_directory(&object.key) => {}
            Ok(path) if path.is_root() => refused.add(&object.key, "has no name below the prefix".to_owned()),
            Ok(path) => placed.push((path, object)),
            Err(why) => refused.add(&object.key, why),
        }
    }
    placed.sort_by(|one, other| (&one.0, is_directory(&one.1.key)).cmp(&(&other.0, is_directory(&other.1.key))));
    refuse_clashes(&placed, &mut refused);
    refused.into_result()?;
    placed.dedup_by(|one, other| one.0 == other.0);
    Ok(placed.into_iter().map(|(path, object)| listed(path, object)).collect())
}

fn listed(path: EntryPath, object: Object) -> Listed {
    if is_directory(&object.key) {
        return Listed { path, what: What::Directory };
    }
    let file = File {
        locator: Locator::to_text(&object.pin, &object.key).into(),
        size: Some(object.size),
        executable: false,
        ranges: true,
        expected: object.expected,
    };
    Listed { path, what: What::File(file) }
}

fn is_directory(key: &str) -> bool {
    key.ends_with('/')
}

/// The path that a key means, less its prefix.
fn path_of(below: &str) -> Result<EntryPath, String> {
    let components: Vec<&str> = below.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if components.contains(&"..") {
        return Err("has a component `..`".to_owned());
    }
    // Its message repeats the path; the key is named anyway.
    EntryPath::new(components.join("/").into_bytes()).map_err(|error| {
        let message = error.to_string();
        message.rsplit_once("` ").map_or(message.clone(), |(_, why)| why.to_owned())
    })
}

/// Finds two keys for one entry, and files that are directories of others; `placed` is in order, files before directories.
fn refuse_clashes(placed: &[(EntryPath, Object)], refused: &mut Refused) {
    let mut last_file: Option<&(EntryPath, Object)> = None;
    for this in placed {
        if let Some(file) = last_file {
            let other = shown_key(&file.1.key);
            if file.0 == this.0 && !is_directory(&this.1.key) {
                refused.add(&this.1.key, format!("and `{other}` would both be the file `{}`", this.0));
                continue;
            }
            if file.0 == this.0 || is_below(&this.0, &file.0) {
                refused.add(&this.1.key, format!("makes a directory of `{other}`, which is an object itself"));
                continue;
            }
        }
        last_file = if is_directory(&this.1.key) { None } else { Some(this) };
    }
}

fn is_below(path: &EntryPath, folder: &EntryPath) -> bool {
    path.as_bytes().strip_prefix(folder.as_bytes()).is_some_and(|rest| rest.first() == Some(&b'/'))
}

/// Keys that cannot become entries.
#[derive(Default)]
struct Refused {
    named: Vec<String>,
    count: usize,
}

impl Refused {
    fn add(&mut self, key: &str, why: String) {
        self.count += 1;
        if self.named.len() < NAMED {
            self.named.push(format!("`{}` {why}", shown_key(key)));
        }
    }

    fn into_result(self) -> Result<()> {
        if self.count == 0 {
            return Ok(());
        }
        let more = self.count - self.named.len();
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        let keys = if self.count == 1 { "1 key" } else { &format!("{} keys", self.count) };
        let message = format!("{keys} cannot become files: {}{more}", self.named.join("; "));
        Err(Error::invalid("BAD_KEYS", message)
            .remedy("rename them at the source, or give a path without them")
            .fact("keys", self.count))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Pin;
    use super::*;
    use crate::source::Expected;

    fn tree(prefix: &str, keys: &[&str]) -> Result<Vec<String>> {
        let object = |key: &&str| Object {
            key: format!("{prefix}{key}"),
            size: u64::from(!key.is_empty() && !is_directory(key)),
            pin: Pin::default(),
            expected: Expected::default(),
        };
        let entries = entries(keys.iter().map(object).collect(), prefix.len())?;
        Ok(entries
            .iter()
            .map(|entry| format!("{}{}", entry.path, if matches!(entry.what, What::Directory) { "/" } else { "" }))
            .collect())
    }

    #[test]
    fn keys_become_a_tree_without_their_prefix() {
        assert_eq!(tree("p/", &["b", "a/c", "", "a/"]).unwrap(), ["a/", "a/c", "b"]);
        assert_eq!(tree("", &["a//b", "c/./d", "/e", "f//", "f/"]).unwrap(), ["a/b", "c/d", "e", "f/"]);
        assert_eq!(tree("p/", &["/", "./"]).unwrap(), [""; 0]);
    }

    #[test]
    fn keys_that_cannot_be_files_are_named() {
        let long = "x".repeat(256);
        for (keys, words) in [
            (&["ok", "a/../b"][..], &["1 key", "`p/a/../b` has a component `..`"][..]),
            (&["a\0b"], &["NUL"]),
            (&[&long], &["longer than 255"]),
            (&["a/b", "a//b"], &["p/a//b", "p/a/b", "both be the file `a/b`"]),
            (&["w", "w/part1", "w/part2"], &["2 keys", "`p/w/part1` makes a directory of `p/w`", "p/w/part2"]),
            (&["w", "w/"], &["`p/w/` makes a directory of `p/w`"]),
            (&["w", "w-x", "w/part1"], &["1 key", "`p/w/part1` makes a directory of `p/w`"]),
            (&["."], &["no name below"]),
        ] {
            let error = tree("p/", keys).unwrap_err();
            assert_eq!(error.reason(), "BAD_KEYS");
            for word in words {
                assert!(error.to_string().contains(word), "{error}");
            }
        }
        let many: Vec<String> = (0..50).map(|number| format!("{number}/../x")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let message = tree("p/", &many).unwrap_err().to_string();
        assert!(message.contains("50 keys") && message.ends_with("and 30 more"), "{message}");
    }

    #[test]
    fn a_directory_that_holds_bytes_is_no_directory() {
        let object = Object { key: "a/".into(), size: 3, pin: Pin::default(), expected: Expected::default() };
        assert!(entries(vec![object], 0).unwrap_err().to_string().contains("holds 3 bytes"));
    }
}

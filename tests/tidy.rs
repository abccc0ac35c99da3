//! What lints cannot say about the house: floors, sizes, words. See the table `FLOORS`.
//!
//! The scans work on text whose comments and literals are blanked, so they need no parser; they err towards silence,
//! never towards a false alarm, and the tests at the end show that each of them can fail.

#![cfg(test)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms of `src/`, lowest floor first. A room imports from lower floors only.
const FLOORS: &[(&str, &[&str])] = &[
    (
        "0 words",
        &["allocator", "digest", "units", "names", "places", "certificates", "limits", "error", "in_place", "panics"],
    ),
    ("1 model", &["manifest", "layout"]),
    ("2 disk", &["disk", "pieces"]),
    ("3 state and sources", &["catalog", "store", "source", "archive"]),
    ("4 work", &["ingest", "retain"]),
    ("5 serve", &["serve"]),
    ("6 control", &["control", "http"]),
    ("7 process", &["daemon", "cli"]),
];

/// Who may know a neighbour on its own floor, and why. One direction each.
const NEIGHBOURS: &[(&str, &str, &str)] = &[
    ("certificates", "error", "parsing a certificate fails with the one error"),
    ("digest", "error", "parsing a digest fails with the one error"),
    ("names", "error", "parsing a name fails with the one error"),
    ("in_place", "error", "a panic of what another thread did becomes the one error"),
    ("panics", "error", "a panic of a turn becomes the one error"),
    ("names", "limits", "names are bounded"),
    ("places", "error", "parsing a stamp fails with the one error"),
    ("places", "names", "a place is a path below a datastore's root"),
    ("units", "error", "parsing a size fails with the one error"),
    ("daemon", "cli", "the quickstart drives its own instance as an operator would, and shows progress the same way"),
    ("store", "catalog", "a blob's state is its row: the store is the catalog's rows and the disk's files together"),
    ("source", "archive", "an archive at a source is opened into its entries"),
];

/// Parts of a room that are all another may use of it: (who, room, part, why).
const ONLY: &[(&str, &str, &str, &str)] =
    &[("cli", "control", "wire", "a client speaks the protocol and knows nothing of its server")];

/// Top-level entries besides dot-files and what is ignored.
const TOP: &[&str] =
    &["Cargo.toml", "Cargo.lock", "src", "proto", "systemd", "tests", "benches", "README.md", "target"];

/// Words that name nothing: a thing called so wants its own name.
const EMPTY_WORDS: &[&str] = &["util", "utils", "helper", "helpers", "common", "misc", "manager", "handler"];

const FILE_LINES: usize = 600;
const FUNCTION_LINES: usize = 70;

#[test]
fn rooms_import_from_lower_floors_only() {
    let faults: Vec<_> = sources("src").iter().flat_map(|file| upward_imports(&file.name, &file.text)).collect();
    none(&faults);
}

#[test]
fn the_rooms_are_declared_in_floor_order() {
    let text = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    none(&order_faults(&text));
}

#[test]
fn every_file_begins_with_what_it_is() {
    let files = everything();
    let faults: Vec<_> =
        files.iter().filter(|file| !file.text.starts_with("//! ")).map(|file| file.name.clone()).collect();
    none(&faults);
}

#[test]
fn files_and_functions_are_small() {
    let mut faults = Vec::new();
    for file in everything() {
        let lines = file.text.lines().count();
        if lines > FILE_LINES {
            faults.push(format!("{}: {lines} lines, {FILE_LINES} at most", file.name));
        }
        faults.extend(long_functions(&file.text).into_iter().map(|fault| format!("{}: {fault}", file.name)));
    }
    none(&faults);
}

#[test]
fn exceptions_from_lints_are_expectations() {
    let files = everything();
    let faults: Vec<_> = files.iter().flat_map(|file| with_name(file, allow_attributes(&file.text))).collect();
    none(&faults);
}

#[test]
fn what_is_left_to_do_has_a_condition() {
    let files = everything();
    let faults: Vec<_> = files.iter().flat_map(|file| with_name(file, bare_reminders(&file.text))).collect();
    none(&faults);
}

#[test]
fn names_say_something() {
    let mut faults = Vec::new();
    for file in everything() {
        let words = file.name.split(['/', '_', '.', '-']);
        faults.extend(words.filter(|word| EMPTY_WORDS.contains(word)).map(|word| format!("{}: `{word}`", file.name)));
        faults.extend(with_name(&file, empty_words(&file.text)));
    }
    none(&faults);
}

#[test]
fn the_top_level_has_its_fixed_entries() {
    let entries = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let faults: Vec<_> = entries.filter(|name| !name.starts_with('.') && !TOP.contains(&name.as_str())).collect();
    none(&faults);
}

/// A source file: its path from the top, and its text.
struct Source {
    name: String,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn everything() -> Vec<Source> {
    ["src", "tests", "benches"].into_iter().flat_map(sources).collect()
}

fn sources(below: &str) -> Vec<Source> {
    let mut open = vec![root().join(below)];
    let mut found: Vec<PathBuf> = Vec::new();
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            match entry.path() {
                path if path.is_dir() => open.push(path),
                path if path.extension().is_some_and(|ext| ext == "rs") => found.push(path),
                _ => {}
            }
        }
    }
    found.sort();
    let name = |path: &PathBuf| path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
    found.iter().map(|path| Source { name: name(path), text: fs::read_to_string(path).unwrap() }).collect()
}

fn with_name(file: &Source, faults: Vec<String>) -> Vec<String> {
    faults.into_iter().map(|fault| format!("{}: {fault}", file.name)).collect()
}

fn none(faults: &[String]) {
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

fn floor(room: &str) -> Option<usize> {
    FLOORS.iter().position(|(_, rooms)| rooms.contains(&room))
}

/// Rooms that the file of path `name` must not import but does, each with its line.
fn upward_imports(name: &str, text: &str) -> Vec<String> {
    let inside = name.trim_start_matches("src/").trim_end_matches(".rs");
    let own = inside.split('/').next().unwrap_or_default();
    if matches!(own, "lib" | "main" | "bin") {
        return Vec::new();
    }
    if floor(own).is_none() {
        return vec![format!("{name}: the room `{own}` is on no floor; enter it in FLOORS")];
    }
    let code = blank(text);
    let mut faults = Vec::new();
    for (at, path) in crate_paths(&code) {
        if let Some(fault) = import_fault(own, &path) {
            faults.push(format!("{name}:{}: {fault}", line_of(&code, at)));
        }
    }
    faults.dedup();
    for at in climbs_to_the_root(&code, inside) {
        faults.push(format!("{name}:{}: `super` climbs to the crate's root; write `crate::`", line_of(&code, at)));
    }
    faults
}

fn import_fault(own: &str, path: &[String]) -> Option<String> {
    let other = path.first()?.as_str();
    let (ours, theirs) = (floor(own)?, floor(other)?);
    if other == own {
        return None;
    }
    if let Some((.., part, why)) = ONLY.iter().find(|(who, room, ..)| (*who, *room) == (own, other))
        && path.get(1).is_none_or(|used| used != part)
    {
        return Some(format!("`{own}` may use only `{other}::{part}`: {why}"));
    }
    let known = NEIGHBOURS.iter().any(|(from, to, _)| (*from, *to) == (own, other));
    match theirs.cmp(&ours) {
        std::cmp::Ordering::Less => None,
        std::cmp::Ordering::Equal if known => None,
        std::cmp::Ordering::Equal => Some(format!("`{own}` and `{other}` are neighbours and do not know each other")),
        std::cmp::Ordering::Greater => Some(format!("`{own}` imports `{other}` from a higher floor")),
    }
}

/// Every path that begins with `crate::` in blanked code, as where it is and its first two components; groups are opened.
fn crate_paths(code: &str) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        if at > 0 && is_word(code.as_bytes()[at - 1]) {
            continue;
        }
        for first in path_heads(&code[at + "crate::".len()..]) {
            let rest = &code[first.1 + at + "crate::".len()..];
            let seconds =
                rest.strip_prefix("::").map(|rest| path_heads(rest).into_iter().map(|(word, _)| word).collect());
            let seconds: Vec<String> = seconds.unwrap_or_default();
            if seconds.is_empty() {
                found.push((at, vec![first.0.clone()]));
            }
            found.extend(seconds.into_iter().map(|second| (at, vec![first.0.clone(), second])));
        }
    }
    found
}

/// The words that begin a path or each path of a `{...}` group, with the offset behind each.
fn path_heads(text: &str) -> Vec<(String, usize)> {
    if !text.starts_with('{') {
        let word = leading_word(text);
        return if word.is_empty() { Vec::new() } else { vec![(word.to_owned(), word.len())] };
    }
    let mut heads = Vec::new();
    let (mut depth, mut expect) = (0_usize, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
        if expect && depth == 1 && is_word(byte) {
            let word = leading_word(&text[at..]);
            heads.push((word.to_owned(), at + word.len()));
            expect = false;
        }
        expect |= depth == 1 && matches!(byte, b'{' | b',');
    }
    heads
}

fn leading_word(text: &str) -> &str {
    &text[..text.bytes().position(|byte| !is_word(byte)).unwrap_or(text.len())]
}

/// Where chains of `super::` leave the room by the roof: as many as the module is deep.
fn climbs_to_the_root(code: &str, inside: &str) -> Vec<usize> {
    let file_depth = inside.trim_end_matches("/mod").split('/').count();
    let mut found = Vec::new();
    let mut after = 0;
    for (at, _) in code.match_indices("super::") {
        if at < after {
            continue;
        }
        let chain = code[at..].split("::").take_while(|part| *part == "super").count();
        after = at + chain * "super::".len();
        let public_in = code[..at].trim_end().ends_with("(in");
        if chain >= file_depth + inline_modules(&code[..at]) && !public_in {
            found.push(at);
        }
    }
    found
}

/// How many inline modules are open at the end of `code`.
fn inline_modules(code: &str) -> usize {
    let mut open = Vec::new();
    for (at, byte) in code.bytes().enumerate() {
        match byte {
            b'{' => {
                let line = code[..at].rsplit(['\n', ';', '}']).next().unwrap_or_default();
                open.push(line.split_whitespace().rev().nth(1) == Some("mod"));
            }
            b'}' => {
                open.pop();
            }
            _ => {}
        }
    }
    open.into_iter().filter(|module| *module).count()
}

/// Faults in the order of `mod` lines of `lib.rs`.
fn order_faults(text: &str) -> Vec<String> {
    let code = blank(text);
    let mut faults = Vec::new();
    let (mut highest, mut seen) = (0, BTreeSet::new());
    for line in code.lines() {
        let Some(room) = line.trim().trim_start_matches("pub ").strip_prefix("mod ") else { continue };
        let room = leading_word(room);
        match floor(room) {
            None => faults.push(format!("the room `{room}` is on no floor; enter it in FLOORS")),
            Some(level) if level < highest => faults.push(format!("`{room}` comes after a higher floor")),
            Some(level) => highest = level,
        }
        if !seen.insert(room.to_owned()) {
            faults.push(format!("`{room}` is declared twice"));
        }
    }
    faults
}

/// Functions longer than allowed, from `fn` to the closing brace.
fn long_functions(text: &str) -> Vec<String> {
    let code = blank(text);
    let mut faults = Vec::new();
    for at in words(&code, "fn") {
        let name = leading_word(code[at + 2..].trim_start());
        let Some(end) = body_end(&code, at) else { continue };
        let lines = code[at..end].lines().count();
        if lines > FUNCTION_LINES && !name.is_empty() {
            faults.push(format!("{}: `{name}` has {lines} lines, {FUNCTION_LINES} at most", line_of(&code, at)));
        }
    }
    faults
}

/// The end of the body of the function that begins at `at`; `None` for one without a body.
fn body_end(code: &str, at: usize) -> Option<usize> {
    let (mut braces, mut brackets) = (0_usize, 0_usize);
    for (offset, byte) in code[at..].bytes().enumerate() {
        match byte {
            b'(' | b'[' => brackets += 1,
            b')' | b']' => brackets = brackets.saturating_sub(1),
            b';' if braces == 0 && brackets == 0 => return None,
            b'{' => braces += 1,
            b'}' if braces <= 1 => return Some(at + offset + 1),
            b'}' => braces -= 1,
            _ => {}
        }
    }
    None
}

fn allow_attributes(text: &str) -> Vec<String> {
    let code = blank(text);
    let attribute =
        |at: usize| code[..at].lines().last().is_some_and(|line| line.contains("#[") || line.contains("#!["));
    let found = words(&code, "allow").into_iter().filter(|at| code[at + 5..].starts_with('(') && attribute(*at));
    found.map(|at| format!("{}: `allow`; use `expect` with a reason", line_of(&code, at))).collect()
}

/// Reminders must say when they are due: the word, then the condition in parentheses.
fn bare_reminders(text: &str) -> Vec<String> {
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX")];
    let bare = |line: &str| words.iter().any(|word| line.contains(word) && !line.contains(&format!("{word}(")));
    let lines = text.lines().enumerate().filter(|(_, line)| bare(line));
    lines.map(|(number, _)| format!("{}: a reminder without a condition", number + 1)).collect()
}

/// Types, functions and modules whose names hold an empty word.
fn empty_words(text: &str) -> Vec<String> {
    let code = blank(text);
    let mut faults = Vec::new();
    for keyword in ["struct", "enum", "trait", "type", "mod", "fn"] {
        for at in words(&code, keyword) {
            let name = leading_word(code[at + keyword.len()..].trim_start());
            if let Some(word) = parts_of(name).iter().find(|part| EMPTY_WORDS.contains(&part.as_str())) {
                faults.push(format!("{}: `{name}`: `{word}` says nothing", line_of(&code, at)));
            }
        }
    }
    faults
}

/// The words of an identifier, in lower case: of `SnakeCase`, `snake_case` and both.
fn parts_of(name: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    for letter in name.chars() {
        if letter == '_' || letter.is_ascii_uppercase() {
            parts.push(String::new());
        }
        if let (Some(part), true) = (parts.last_mut(), letter != '_') {
            part.push(letter.to_ascii_lowercase());
        }
    }
    parts
}

/// Where the keyword `word` stands by itself.
fn words(code: &str, word: &str) -> Vec<usize> {
    let bytes = code.as_bytes();
    let alone = |at: usize| {
        let before = at.checked_sub(1).is_none_or(|before| !is_word(bytes[before]));
        before && bytes.get(at + word.len()).is_none_or(|after| !is_word(*after))
    };
    code.match_indices(word).map(|(at, _)| at).filter(|at| alone(*at)).collect()
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn line_of(code: &str, at: usize) -> usize {
    code[..at].matches('\n').count() + 1
}

/// The code with comments and literals replaced by spaces, line breaks kept, every other byte where it was.
fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match literal_end(bytes, at) {
            Some(end) => end.min(bytes.len()),
            None => {
                at += if is_word(bytes[at]) { leading_word(&text[at..]).len() } else { 1 };
                continue;
            }
        };
        out[at..end].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
        at = end;
    }
    // What is not ASCII outside literals and comments is an identifier's letter: any other word byte will do.
    out.iter_mut().filter(|byte| !byte.is_ascii()).for_each(|byte| *byte = b'x');
    String::from_utf8(out).unwrap()
}

/// Where the comment or literal that begins at `at` ends; `None` if none does.
fn literal_end(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = &bytes[at..];
    let prefix = rest.iter().take_while(|byte| matches!(byte, b'b' | b'c' | b'r')).count();
    if prefix <= 2 && matches!(rest.get(prefix), Some(b'"' | b'#')) && rest[..prefix].contains(&b'r') {
        return raw_end(rest, prefix).map(|end| at + end);
    }
    match rest {
        [b'/', b'/', ..] => Some(at + rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len())),
        [b'/', b'*', ..] => Some(at + comment_end(rest)),
        [b'"', ..] => Some(at + quoted_end(rest, 1)),
        [b'b' | b'c', b'"', ..] => Some(at + quoted_end(rest, 2)),
        [b'b', b'\'', ..] => char_end(&rest[1..]).map(|end| at + 1 + end),
        [b'\'', ..] => char_end(rest).map(|end| at + end),
        _ => None,
    }
}

fn raw_end(rest: &[u8], prefix: usize) -> Option<usize> {
    let hashes = rest[prefix..].iter().take_while(|byte| **byte == b'#').count();
    let open = prefix + hashes + 1;
    if rest.get(open - 1) != Some(&b'"') {
        return None;
    }
    let close = format!("\"{}", "#".repeat(hashes));
    let length = rest[open..].windows(close.len()).position(|window| window == close.as_bytes());
    Some(length.map_or(rest.len(), |length| open + length + close.len()))
}

fn comment_end(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at + 1 < rest.len() {
        match &rest[at..at + 2] {
            b"/*" => depth += 1,
            b"*/" => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

fn quoted_end(rest: &[u8], from: usize) -> usize {
    let mut at = from;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// The end of a character literal; `None` for a lifetime.
fn char_end(rest: &[u8]) -> Option<usize> {
    if rest.get(1) == Some(&b'\\') {
        return rest.iter().skip(3).position(|byte| *byte == b'\'').map(|at| at + 4);
    }
    let text = String::from_utf8_lossy(&rest[1..rest.len().min(6)]);
    let width = text.chars().next()?.len_utf8();
    (rest.get(1 + width) == Some(&b'\'')).then_some(width + 2)
}

mod the_scans_themselves {
    use super::*;

    #[test]
    fn find_an_upward_import_in_every_form() {
        for (name, text) in [
            ("src/disk.rs", "use crate::store::Blob;"),
            ("src/manifest/codec.rs", "use crate::{digest::Digest, disk::{Dir, File}};"),
            ("src/layout/zip.rs", "fn f() { crate::manifest::X; }"),
            ("src/source/web.rs", "use crate::catalog::Row;"),
            ("src/catalog/schema.rs", "use crate::store;"),
            ("src/cli/list.rs", "use crate::control::jobs::Jobs;"),
            ("src/cli/list.rs", "use crate::{control::{wire, jobs}, error};"),
            ("src/store/blob.rs", "use super::super::serve::X;"),
            ("src/store/mod.rs", "use super::serve::X;"),
            ("src/digest.rs", "mod tests { use super::super::serve; }"),
            ("src/cellar.rs", ""),
        ] {
            assert_eq!(upward_imports(name, text).len(), 1, "{name}: {text}");
        }
    }

    #[test]
    fn leave_proper_imports_alone() {
        for (name, text) in [
            (
                "src/store/blob.rs",
                "use crate::catalog::Row; use super::fill; use crate::{disk, error::{Error, Result}};",
            ),
            ("src/digest.rs", "mod tests { use super::*; }"),
            ("src/store/blob.rs", "mod tests { use super::super::fill; }"),
            ("src/cli/list.rs", "use crate::control::wire::Checkpoint;"),
            ("src/disk.rs", "// crate::serve\n/* crate::serve */ fn f() { \"crate::serve\"; r#\"crate::serve\"#; }"),
            ("src/serve/mod.rs", "pub(in crate::serve) fn f() {} pub(crate) struct X;"),
            ("src/main.rs", "use crate::anything;"),
        ] {
            none(&upward_imports(name, text));
        }
    }

    #[test]
    fn see_rooms_out_of_order() {
        none(&order_faults("pub mod error;\npub mod disk;\npub mod serve;"));
        assert_eq!(order_faults("pub mod serve;\npub mod disk;").len(), 1);
        assert_eq!(order_faults("pub mod cellar;").len(), 1);
    }

    #[test]
    fn count_lines_of_functions_whatever_their_text_says() {
        let long = format!("fn long() {{\n{}}}\n", "    let x = \"}\"; // }\n".repeat(FUNCTION_LINES));
        assert_eq!(long_functions(&long).len(), 1, "{long}");
        let short = format!(
            "fn a(x: [u8; 3]) -> char {{ '{{' }}\nfn b<'a>(x: &'a str) {{}}\n{}",
            "const X: u8 = b'\\'';\n".repeat(100)
        );
        none(&long_functions(&short));
        none(&long_functions(&format!("trait T {{ fn f(x: [u8; 3]);\n{} }}", "fn g();\n".repeat(100))));
    }

    #[test]
    fn find_attributes_reminders_and_empty_words() {
        assert_eq!(allow_attributes("#[allow(dead_code)]\nfn f() { policy.allow(1) }").len(), 1);
        assert_eq!(allow_attributes("#![cfg_attr(test, allow(unused))]").len(), 1);
        let word = concat!("TO", "DO");
        assert_eq!(bare_reminders(&format!("// {word}: later\n// {word}(when the kernel has it): drop")).len(), 1);
        assert_eq!(empty_words("struct MountManager; fn parse_helper() {} fn helpful() {}").len(), 2);
    }
}

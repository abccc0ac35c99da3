//! The rules of what a member may be called and where a link may lead.
//!
//! The gate knows every path that passed, parents that were only implied included, so that no path occurs twice and nothing is
//! below what is no directory. Since no member is below a symbolic link, a member's place is what its name says.
//!
//! A link's target must be relative and, read from the link's directory, never climb above the root. Reading it so is sound
//! as long as it goes up first and down afterwards, since every link that it meets on its way down is held to the same. A target
//! that goes up again after it went down (`a/../b`) would be misread if `a` were a link; at the end, when all links are
//! known, such targets are refused.

use std::collections::HashMap;

use super::refused;
use crate::error::{Error, Result};
use crate::limits;
use crate::names::{EntryPath, show_bytes};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A directory that a member below it implies.
    Implied,
    Directory,
    File,
    Symlink,
}

/// What a hard link is the same as.
#[derive(Debug)]
pub(super) enum Linked {
    /// A regular file.
    File(EntryPath),
    /// A symbolic link, which leads there.
    Symlink(Box<[u8]>),
}

/// See the module's page.
#[derive(Debug, Default)]
pub(super) struct Gate {
    known: HashMap<EntryPath, Kind>,
    names_bytes: usize,
    /// Where symbolic links lead, as it stands in them.
    targets: HashMap<EntryPath, Box<[u8]>>,
    /// Links whose targets go up after going down, with what has to be a directory for that.
    winding: Vec<(EntryPath, EntryPath)>,
}

impl Gate {
    /// Lets a directory pass; `None` where it is known or is the root.
    pub(super) fn directory(&mut self, name: &[u8]) -> Result<Option<EntryPath>> {
        let path = normalise(name)?;
        if path.is_root() {
            return Ok(None);
        }
        match self.known.get(&path) {
            Some(Kind::Directory) => return Ok(None),
            Some(Kind::Implied) => {
                self.known.insert(path.clone(), Kind::Directory);
            }
            _ => self.enter(&path, Kind::Directory)?,
        }
        Ok(Some(path))
    }

    /// Lets a regular file pass.
    pub(super) fn file(&mut self, name: &[u8]) -> Result<EntryPath> {
        let path = normalise(name)?;
        self.enter(&path, Kind::File)?;
        Ok(path)
    }

    /// Lets a symbolic link pass.
    pub(super) fn symlink(&mut self, name: &[u8], target: &[u8]) -> Result<EntryPath> {
        let path = normalise(name)?;
        self.enter(&path, Kind::Symlink)?;
        self.judge_target(&path, target)?;
        self.count_name(target.len())?;
        self.targets.insert(path.clone(), target.into());
        Ok(path)
    }

    /// Lets a hard link pass, with what it is the same as. One to a symbolic link is that link once more, held to the rules at its own place.
    pub(super) fn hard_link(&mut self, name: &[u8], target: &[u8]) -> Result<(EntryPath, Linked)> {
        let path = normalise(name)?;
        let target = normalise(target).map_err(|error| error.during(format!("the hard link `{path}`")))?;
        match self.known.get(&target) {
            Some(Kind::File) => {
                self.enter(&path, Kind::File)?;
                Ok((path, Linked::File(target)))
            }
            Some(Kind::Symlink) => {
                let leads_to = self.targets.get(&target).cloned().unwrap_or_default();
                let path = self.symlink(name, &leads_to)?;
                Ok((path, Linked::Symlink(leads_to)))
            }
            _ => Err(refused(format!(
                "the hard link `{path}` leads to `{target}`, which is no file and no link before it"
            ))),
        }
    }

    /// Judges what could only be judged with all members known.
    pub(super) fn end(&self) -> Result<()> {
        for (path, through) in &self.winding {
            if let Some(link) = self.link_on(through) {
                return Err(refused(format!("the symbolic link `{path}` goes up through the link `{link}`")));
            }
        }
        Ok(())
    }

    /// The first symbolic link on the way from `path` to the root.
    fn link_on(&self, path: &EntryPath) -> Option<EntryPath> {
        let mut above = Some(path.clone());
        while let Some(path) = above {
            if self.known.get(&path) == Some(&Kind::Symlink) {
                return Some(path);
            }
            above = path.parent();
        }
        None
    }

    /// Notes a path that must be new, and the directories it implies.
    fn enter(&mut self, path: &EntryPath, kind: Kind) -> Result<()> {
        if path.is_root() {
            return Err(refused("a member that is no directory has the name of the root"));
        }
        if let Some(known) = self.known.get(path) {
            let both = matches!(known, Kind::Directory | Kind::Implied) != (kind == Kind::Directory);
            let how = if both { ", as a directory and as what is none" } else { "" };
            return Err(refused(format!("the name `{path}` occurs twice{how}")));
        }
        let mut parent = path.parent();
        while let Some(above) = parent.filter(|above| !above.is_root()) {
            match self.known.get(&above) {
                Some(Kind::Directory | Kind::Implied) => break,
                Some(_) => return Err(refused(format!("`{path}` is below `{above}`, which is not a directory"))),
                None => {
                    parent = above.parent();
                    self.note(above, Kind::Implied)?;
                }
            }
        }
        self.note(path.clone(), kind)
    }

    fn note(&mut self, path: EntryPath, kind: Kind) -> Result<()> {
        self.count_name(path.as_bytes().len())?;
        self.known.insert(path, kind);
        if self.known.len() > limits::CHECKPOINT_ENTRIES {
            return Err(too_many(format!("it has more than {} members", limits::CHECKPOINT_ENTRIES)));
        }
        Ok(())
    }

    fn count_name(&mut self, bytes: usize) -> Result<()> {
        self.names_bytes += bytes;
        if self.names_bytes > limits::ARCHIVE_NAMES_BYTES {
            return Err(too_many(format!("its names have more than {} bytes", limits::ARCHIVE_NAMES_BYTES)));
        }
        Ok(())
    }

    fn judge_target(&mut self, path: &EntryPath, target: &[u8]) -> Result<()> {
        let leads_out = || refused(format!("the symbolic link `{path}` leads out, to `{}`", show_bytes(target)));
        if target.is_empty() || target.contains(&0) || target.len() > limits::ENTRY_PATH_BYTES {
            return Err(refused(format!(
                "the target of the symbolic link `{path}` is empty, too long or has a NUL byte"
            )));
        }
        if target[0] == b'/' {
            return Err(leads_out());
        }
        let parent = path.parent().unwrap_or_default();
        let mut at: Vec<&[u8]> = parent.components().collect();
        let mut descended = 0_usize;
        let mut through = Vec::new();
        for part in target.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." if at.is_empty() => return Err(leads_out()),
                b".." => {
                    if descended > 0 {
                        through.push(at.join(&b'/'));
                        descended -= 1;
                    }
                    at.pop();
                }
                name => {
                    at.push(name);
                    descended += 1;
                }
            }
        }
        for through in through {
            let through = EntryPath::new(through)?;
            self.count_name(through.as_bytes().len())?;
            self.winding.push((path.clone(), through));
        }
        Ok(())
    }
}

/// The path that a name in an archive means: `.` and empty components dropped.
fn normalise(name: &[u8]) -> Result<EntryPath> {
    let shown = || show_bytes(&name[..name.len().min(limits::ENTRY_PATH_BYTES)]);
    if name.starts_with(b"/") {
        return Err(refused(format!("the name `{}` is absolute", shown())));
    }
    let parts: Vec<_> = name.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b".")).collect();
    if parts.contains(&b"..".as_slice()) {
        return Err(refused(format!("the name `{}` climbs", shown())));
    }
    EntryPath::new(parts.join(&b'/')).map_err(|error| refused(error.to_string()))
}

fn too_many(what: String) -> Error {
    Error::no_space("TOO_MANY_ENTRIES", what).remedy("split it")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason<T: std::fmt::Debug>(outcome: Result<T>) -> String {
        outcome.unwrap_err().to_string()
    }

    #[test]
    fn names_lose_dots_and_never_climb() {
        for (name, path) in [
            ("./a", "a"),
            ("a/./b//c/", "a/b/c"),
            ("./", ""),
            ("", ""),
            ("a/..b", "a/..b"),
            ("__MACOSX/._x", "__MACOSX/._x"),
        ] {
            assert_eq!(normalise(name.as_bytes()).unwrap().to_string(), path);
        }
        for name in ["/a", "../a", "a/../b", "..", "a\0b", "./../a"] {
            assert_eq!(normalise(name.as_bytes()).unwrap_err().reason(), "ARCHIVE_REFUSED", "{name}");
        }
        assert!(normalise(&[b'x'; 256]).is_err());
        assert!(normalise("a/".repeat(200).as_bytes()).is_err());
    }

    #[test]
    fn a_name_occurs_once_and_directories_may_repeat() {
        let mut gate = Gate::default();
        gate.file(b"d/f").unwrap();
        assert!(gate.directory(b"d/").unwrap().is_some());
        assert!(gate.directory(b"./d").unwrap().is_none());
        assert!(reason(gate.file(b"./d/f")).contains("`d/f` occurs twice"));
        assert!(reason(gate.file(b"d")).contains("`d` occurs twice, as a directory and"));
        assert!(reason(gate.directory(b"d/f")).contains("occurs twice"));
        assert!(reason(gate.file(b"d/f/g")).contains("below `d/f`"));
        assert!(reason(gate.file(b".")).contains("root"));
    }

    #[test]
    fn nothing_is_below_a_link() {
        let mut gate = Gate::default();
        gate.symlink(b"l", b"d").unwrap();
        assert!(reason(gate.file(b"l/x")).contains("`l/x` is below `l`"));
        let mut gate = Gate::default();
        gate.file(b"l/x").unwrap();
        assert!(gate.symlink(b"l", b"d").is_err());
    }

    #[test]
    fn links_that_lead_out_are_refused() {
        for (name, target) in
            [("l", "/etc"), ("l", ".."), ("d/l", "../.."), ("d/l", "../../x"), ("l", "a/../../x"), ("l", "")]
        {
            assert!(Gate::default().symlink(name.as_bytes(), target.as_bytes()).is_err(), "{name} -> {target}");
        }
        for (name, target) in [("l", "a"), ("d/l", "../a"), ("d/e/l", "../../a/b"), ("l", "."), ("l", "nowhere/./x")] {
            let mut gate = Gate::default();
            gate.symlink(name.as_bytes(), target.as_bytes()).unwrap();
            gate.end().unwrap();
        }
    }

    #[test]
    fn a_target_that_winds_through_a_link_is_refused_at_the_end() {
        let mut gate = Gate::default();
        gate.symlink(b"d/e/y", b"x/../z").unwrap();
        assert!(gate.end().is_ok());
        gate.symlink(b"d/e/x", b"../..").unwrap();
        assert!(reason(gate.end()).contains("`d/e/y` goes up through the link `d/e/x`"));
        let mut gate = Gate::default();
        gate.symlink(b"x", b".").unwrap();
        gate.symlink(b"a", b".").unwrap();
        gate.symlink(b"l", b"a/x/../..").unwrap();
        assert!(reason(gate.end()).contains("`l` goes up through the link `a`"));
    }

    #[test]
    fn a_hard_link_leads_to_a_file_before_it() {
        let mut gate = Gate::default();
        assert!(gate.hard_link(b"b", b"a").is_err());
        gate.file(b"a").unwrap();
        gate.symlink(b"s", b"a").unwrap();
        assert!(gate.hard_link(b"b", b"./a").is_ok());
        assert!(gate.hard_link(b"c", b"b").is_ok());
        assert!(matches!(gate.hard_link(b"d", b"s").unwrap().1, Linked::Symlink(target) if *target == *b"a"));
        assert!(gate.hard_link(b"g", b"nothing").is_err());
        assert!(gate.hard_link(b"e", b"../a").is_err());
    }
}

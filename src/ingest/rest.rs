//! Trees that somebody may still be writing to: taken anew until nothing of them has changed between the first look and the last.
//!
//! A flight over such a tree ends with a second listing, which must be of the same revision. If it is not, or a file changed under its
//! reader, the tree is taken again after a pause: of what is listed as before, whatever was sealed is kept, so that an attempt costs no more than
//! what was touched. What never comes to rest is refused with the names of what changed last, and nothing of it stays.
//!
//! Where jobs read what there is of it already it is not taken anew: nothing else may take its place under them.

use std::collections::HashSet;
use std::time::Duration;

use super::flying::Flying;
use super::{plan, retry};
use crate::digest::{Digest, Digester};
use crate::error::{Error, Result};
use crate::limits::{CHANGED_NAMES_SHOWN, LOOKS_AT_A_CHANGING_TREE};
use crate::names::{EntryPath, shorten};
use crate::source::{Counter, Listed, Listing, Opened, SOURCE_CHANGED, Source, What};

/// First pause; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// Tries of the last listing, which tells what changed: somebody may rename what is being listed.
const NAMING_TRIES: u32 = 20;

/// Pause between those.
const NAMING_PAUSE: Duration = Duration::from_millis(25);

/// So much of a name is shown: several of them are one sentence.
const NAME_SHOWN_BYTES: usize = 120;

/// How long to wait after the `looks`-th look in vain (from 1); `None` when to give up.
fn pause(looks: u32) -> Option<Duration> {
    (looks < LOOKS_AT_A_CHANGING_TREE).then(|| FIRST_PAUSE * 2_u32.pow(looks.saturating_sub(1)))
}

/// # Errors
/// `SOURCE_CHANGED` where the tree is not the one that was listed as `revision`.
pub(super) async fn check_unchanged(flying: &Flying, revision: &str) -> Result<()> {
    let attempts = flying.shared.settings.attempts;
    let counter = plan::counter(&flying.shared.settings);
    match retry::until_it_works(attempts, || flying.source.open(&counter)).await? {
        Opened::Listed(again) if again.revision == revision => Ok(()),
        Opened::Listed(_) | Opened::Streamed(_) => {
            let message = "files were added, removed or changed while they were read";
            Err(Error::wrong_state(SOURCE_CHANGED, message).remedy("let the directory come to rest, then retry"))
        }
    }
}

/// The looks at one tree.
#[derive(Default)]
pub(super) struct Rest {
    /// Those in vain.
    looks: u32,
    last: Look,
}

impl Rest {
    /// Notes a listing. Returns the files that are listed as they were the time before.
    pub(super) fn look(&mut self, listing: &Listing) -> Vec<Vec<u8>> {
        let look = Look::at(&listing.entries);
        let is_file = |entry: &&Listed| matches!(entry.what, What::File(_));
        let files = listing.entries.iter().filter(is_file).filter(|entry| self.last.has(entry));
        let unchanged = files.map(|entry| entry.path.as_bytes().to_vec()).collect();
        self.last = look;
        unchanged
    }

    /// Whether no look was in vain.
    pub(super) fn is_first(&self) -> bool {
        self.looks == 0
    }

    /// Waits until it is time for the next look.
    ///
    /// # Errors
    /// `error`, with the names of what has changed since the last look, where there were looks enough.
    pub(super) async fn wait(&mut self, source: &dyn Source, counter: &Counter, error: Error) -> Result<()> {
        self.looks += 1;
        if let Some(pause) = pause(self.looks) {
            tracing::info!(error = %error.chain(), looks = self.looks, pause_ms = pause.as_millis(), "will look again");
            tokio::time::sleep(pause).await;
            return Ok(());
        }
        Err(self.changes(source, counter, &error).await.named(error))
    }

    /// What has changed since the last look: what a listing says, or else what `error` and the listings in vain say.
    async fn changes(&self, source: &dyn Source, counter: &Counter, error: &Error) -> Changes {
        let mut told = Changes::default();
        told.told(error);
        for _ in 0..NAMING_TRIES {
            match source.open(counter).await {
                Ok(Opened::Listed(now)) => return self.last.changes(&now.entries),
                Err(error) if error.reason() == SOURCE_CHANGED => told.told(&error),
                Ok(Opened::Streamed(_)) | Err(_) => break,
            }
            tokio::time::sleep(NAMING_PAUSE).await;
        }
        told
    }
}

/// What a listing says, entry by entry: as digests, since a tree may have millions.
#[derive(Default)]
struct Look(HashSet<Digest>);

/// What is otherwise than at the look before.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    /// The first of those that changed or came.
    names: Vec<String>,
    changed: usize,
    /// How many of the look before are not there as they were.
    gone: usize,
}

impl Look {
    fn at(entries: &[Listed]) -> Self {
        Self(entries.iter().map(mark).collect())
    }

    fn has(&self, entry: &Listed) -> bool {
        self.0.contains(&mark(entry))
    }

    fn changes(&self, now: &[Listed]) -> Changes {
        let mut changes = Changes::default();
        let others = now.iter().filter(|entry| !self.has(entry));
        for entry in others {
            changes.changed += 1;
            if changes.names.len() < CHANGED_NAMES_SHOWN {
                changes.names.push(shorten(&entry.path.to_string(), NAME_SHOWN_BYTES));
            }
        }
        changes.gone = (self.0.len() + changes.changed).saturating_sub(now.len());
        changes
    }
}

impl Changes {
    /// Adds the one file that `error` names.
    fn told(&mut self, error: &Error) {
        let Some((_, file)) = error.facts().iter().find(|(key, _)| key == "file") else { return };
        let name = shorten(file, NAME_SHOWN_BYTES);
        if !self.names.contains(&name) && self.names.len() < CHANGED_NAMES_SHOWN {
            self.names.push(name);
            self.changed += 1;
        }
    }

    fn named(self, error: Error) -> Error {
        let Self { names, changed, gone } = self;
        if changed == 0 && gone == 0 {
            return error;
        }
        let more = if changed > names.len() { format!(" and {} more", changed - names.len()) } else { String::new() };
        let shown = match names.as_slice() {
            [] => format!("{gone} entries were removed or renamed"),
            names => format!("{} changed{more}", names.join(", ")),
        };
        let message = format!(
            "the directory was still written to after {LOOKS_AT_A_CHANGING_TREE} looks: {shown} since the last"
        );
        Error::wrong_state(SOURCE_CHANGED, message)
            .fact("changed", changed)
            .fact("files", names.join("\n"))
            .remedy("let the job close what it writes, then capture again")
            .because(error)
    }
}

fn mark(entry: &Listed) -> Digest {
    let (kind, rest) = match &entry.what {
        What::Directory => (b'd', [].as_slice()),
        What::Symlink(target) => (b'l', target.as_ref()),
        What::File(file) => (b'f', file.locator.as_bytes()),
        What::SameAs(path) => (b'h', EntryPath::as_bytes(path)),
    };
    let mut digester = Digester::new();
    digester.update(&[kind]);
    digester.update(&(entry.path.as_bytes().len() as u64).to_le_bytes());
    digester.update(entry.path.as_bytes());
    digester.update(rest);
    digester.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Expected, File};

    fn file(path: &str, stamp: &str) -> Listed {
        let file =
            File { locator: stamp.into(), size: None, executable: false, ranges: true, expected: Expected::default() };
        Listed { path: EntryPath::new(path.as_bytes()).unwrap(), what: What::File(file) }
    }

    fn listing(entries: Vec<Listed>) -> Listing {
        Listing::new("r".into(), entries)
    }

    #[test]
    fn pauses_grow_and_end() {
        let pauses: Vec<_> = (1..LOOKS_AT_A_CHANGING_TREE).map(|looks| pause(looks).unwrap().as_millis()).collect();
        assert_eq!(pauses, [250, 500, 1000, 2000, 4000, 8000]);
        assert_eq!(pause(LOOKS_AT_A_CHANGING_TREE), None);
    }

    #[test]
    fn what_bears_its_stamp_is_kept_and_nothing_else() {
        let mut rest = Rest::default();
        assert!(rest.look(&listing(vec![file("a", "1"), file("b", "1"), file("c", "1")])).is_empty());
        let unchanged = rest.look(&listing(vec![file("a", "1"), file("b", "2"), file("d", "1")]));
        assert_eq!(unchanged, [b"a".to_vec()]);
    }

    #[test]
    fn changes_are_named_up_to_a_bound_and_counted() {
        let before: Vec<_> = (0..30).map(|n| file(&format!("f{n}"), "1")).collect();
        let now: Vec<_> = (0..29).map(|n| file(&format!("f{n}"), if n < 15 { "2" } else { "1" })).collect();
        let changes = Look::at(&before).changes(&now);
        assert_eq!((changes.names.len(), changes.changed, changes.gone), (CHANGED_NAMES_SHOWN, 15, 16));
        let error = changes.named(Error::internal("x"));
        assert_eq!(error.reason(), SOURCE_CHANGED);
        assert!(error.to_string().contains("f0, f1") && error.to_string().contains("and 5 more"), "{error}");
        assert_eq!(Look::at(&before).changes(&before), Changes::default());
        let mut told = Changes::default();
        told.told(&error);
        assert_eq!(told, Changes::default(), "it names no single file");
        for file in ["a", "b", "a"] {
            told.told(&Error::internal("x").fact("file", file));
        }
        assert_eq!((told.names.as_slice(), told.changed), (["a".to_owned(), "b".to_owned()].as_slice(), 2));
        assert_eq!(Changes::default().named(Error::internal("x")).reason(), "INTERNAL");
    }
}

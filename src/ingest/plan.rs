//! What a listing asks for, against what is here: pure functions, before a byte moves.

use std::collections::HashMap;
use std::sync::Arc;

use super::Settings;
use super::early::Early;
use crate::catalog::fills::FillRow;
use crate::catalog::retention::Standing;
use crate::digest::Digest;
use crate::error::{Error, Kind, Result, TOO_MANY};
use crate::limits;
use crate::manifest::{Entry, EntryKind};
use crate::names::EntryPath;
use crate::source::{Counter, File, Listing, What};
use crate::store::filling::UnitMap;
use crate::units::show_bytes;

/// Figures of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Regular files.
    pub files: u64,
    /// Sum of the sizes that the source states.
    pub known_bytes: u64,
}

impl Sizes {
    /// Counts and checks against the limits.
    ///
    /// # Errors
    /// `CHECKPOINT_TOO_LARGE`, `TOO_MANY_ENTRIES`.
    pub fn of(listing: &Listing, settings: &Settings) -> Result<Self> {
        check_entries(listing.entries.len(), settings)?;
        if let Some(link) = listing.entries.iter().find(|entry| matches!(entry.what, What::SameAs(_))) {
            return Err(Error::internal(format!("the listing has the hard link `{}`", link.path)));
        }
        let files = listing.entries.iter().filter_map(|entry| match &entry.what {
            What::File(file) => Some(file.size.unwrap_or(0)),
            What::Directory | What::Symlink(_) | What::SameAs(_) => None,
        });
        let mut sizes = Self { files: 0, known_bytes: 0 };
        for size in files {
            sizes.files += 1;
            sizes.known_bytes = sizes.known_bytes.saturating_add(size);
        }
        check_limit(sizes.known_bytes, settings.checkpoint_bytes)?;
        Ok(sizes)
    }
}

/// Entries that one tree may have, and for which there is memory at a time.
pub fn most_entries(settings: &Settings) -> usize {
    let fits = usize::try_from(settings.memory_budget_bytes / limits::ENTRY_MEMORY_BYTES).unwrap_or(usize::MAX);
    fits.min(limits::CHECKPOINT_ENTRIES)
}

/// Refuses a tree of more entries than one may have, or than there is memory for.
///
/// # Errors
/// `TOO_MANY_ENTRIES`.
pub fn check_entries(entries: usize, settings: &Settings) -> Result<()> {
    let most = most_entries(settings);
    if entries <= most {
        return Ok(());
    }
    let refused =
        Error::no_space("TOO_MANY_ENTRIES", format!("the checkpoint has more than {most} entries")).fact("limit", most);
    Err(if most < limits::CHECKPOINT_ENTRIES {
        refused.remedy(
            "pack small files together, or ask the operator to raise memory.budget, of which each entry takes 1 KiB",
        )
    } else {
        refused.remedy(TOO_MANY)
    })
}

/// [`check_entries`], as listings are told of it.
pub fn counter(settings: &Settings) -> Counter {
    let settings = settings.clone();
    Arc::new(move |entries| check_entries(entries, &settings))
}

/// Refuses a checkpoint beyond the limit.
///
/// # Errors
/// `CHECKPOINT_TOO_LARGE` with the figures.
pub fn check_limit(bytes: u64, limit_bytes: u64) -> Result<()> {
    if bytes <= limit_bytes {
        return Ok(());
    }
    Err(Error::no_space(
        "CHECKPOINT_TOO_LARGE",
        format!("the checkpoint has {} ({bytes} bytes), at most {limit_bytes} bytes are allowed", show_bytes(bytes)),
    )
    .fact("bytes", bytes)
    .fact("limit_bytes", limit_bytes)
    .remedy("make it smaller or ask the operator to raise the limit"))
}

/// A file that has to be filled.
#[derive(Clone, Debug)]
pub struct ToFill {
    /// Where it is in the checkpoint.
    pub path: EntryPath,
    /// At the source.
    pub file: File,
    /// Its number in the flight's directory.
    pub number: u64,
    /// Units that are durable.
    pub units: Option<UnitMap>,
}

/// A plan: entries that need no bytes, and files to fill.
#[derive(Debug, Default)]
pub struct Plan {
    /// Directories, symlinks, and files that are sealed already.
    pub settled: Vec<Entry>,
    /// Files of up to one fill unit.
    pub small: Vec<ToFill>,
    /// Larger files and those of unknown size.
    pub large: Vec<ToFill>,
    /// Bytes that are here already.
    pub here_bytes: u64,
    /// Of those, the ones of files that are not sealed.
    pub begun_bytes: u64,
    /// Bytes that still have to come, as far as known.
    pub missing_bytes: u64,
}

/// Compares a listing with the rows of its flight. Rows belong to the same revision, so equal path and size mean equal bytes.
/// `next_number` gives numbers for files that have none.
pub fn plan(listing: Listing, rows: Vec<FillRow>, mut next_number: impl FnMut() -> u64) -> Plan {
    let mut rows: HashMap<Vec<u8>, FillRow> = rows.into_iter().map(|row| (row.path.clone(), row)).collect();
    let mut plan = Plan::default();
    for listed in listing.entries {
        let file = match listed.what {
            What::Directory => {
                plan.settle(listed.path, EntryKind::Directory);
                continue;
            }
            // Refused when the listing was counted.
            What::SameAs(_) => continue,
            What::Symlink(target) => {
                plan.settle(listed.path, EntryKind::Symlink { target });
                continue;
            }
            What::File(file) => file,
        };
        let row = rows.remove(listed.path.as_bytes()).filter(|row| file.size.is_none_or(|size| size == row.size));
        if let Some((digest, size)) = row.as_ref().and_then(|row| Some((row.sealed?, row.size))) {
            plan.settle_file(listed.path, size, file.executable, digest);
            continue;
        }
        let number = row.as_ref().map_or_else(&mut next_number, |row| row.number);
        let units = row.and_then(|row| file.size.map(|size| UnitMap::from_bytes(size, &row.units)));
        plan.add(ToFill { path: listed.path, file, number, units });
    }
    // What says what to do with the others comes before them; they stay in the order of the listing.
    plan.large.sort_by_key(|file| Early::of(&file.path, file.file.size) != Early::Whole);
    plan
}

impl Plan {
    /// What the missing bytes will occupy, as far as known: whole blocks of the disk, which is several times as much where files are tiny.
    pub fn occupying_bytes(&self) -> u64 {
        let files = self.small.iter().chain(&self.large);
        let sizes = files.filter_map(|file| file.file.size);
        self.missing_bytes + sizes.map(|size| size.next_multiple_of(limits::DISK_BLOCK_BYTES) - size).sum::<u64>()
    }

    fn settle(&mut self, path: EntryPath, kind: EntryKind) {
        self.settled.push(Entry { path, kind });
    }

    fn settle_file(&mut self, path: EntryPath, size: u64, executable: bool, digest: Digest) {
        self.here_bytes += size;
        self.settle(path, EntryKind::File { size, executable, digest });
    }

    fn add(&mut self, file: ToFill) {
        let here = file.units.as_ref().map_or(0, UnitMap::here_bytes);
        self.here_bytes += here;
        self.begun_bytes += here;
        self.missing_bytes += file.file.size.unwrap_or(0).saturating_sub(here);
        match file.file.size {
            Some(size) if size <= limits::UNIT_BYTES => self.small.push(file),
            _ => self.large.push(file),
        }
    }
}

/// Why `needed_bytes` cannot be filled where `available_bytes` are, and what keeps the rest.
pub fn no_space(needed_bytes: u64, available_bytes: u64, standing: &Standing) -> Error {
    let lacking = needed_bytes.saturating_sub(available_bytes);
    let mut message = format!(
        "the checkpoint still needs {} and the store has {} left",
        show_bytes(needed_bytes),
        show_bytes(available_bytes)
    );
    let kept = [
        (standing.leased_bytes, "is in use by jobs"),
        (standing.pinned_bytes, "is pinned"),
        (standing.not_refetchable_bytes, "cannot be fetched again"),
        (standing.evictable_bytes, "could be evicted, which is not enough"),
    ];
    let kept: Vec<_> = kept
        .iter()
        .filter(|(bytes, _)| *bytes > 0)
        .map(|(bytes, why)| format!("{} {why}", show_bytes(*bytes)))
        .collect();
    if !kept.is_empty() {
        message.push_str(&format!("; of what it has {}", kept.join(", ")));
    }
    Error::new(Kind::NoSpace, "NO_SPACE", message)
        .fact("needed_bytes", needed_bytes)
        .fact("available_bytes", available_bytes)
        .fact("lacking_bytes", lacking)
        .fact("leased_bytes", standing.leased_bytes)
        .fact("pinned_bytes", standing.pinned_bytes)
        .fact("not_refetchable_bytes", standing.not_refetchable_bytes)
        .fact("evictable_bytes", standing.evictable_bytes)
        .remedy(format!("free {}: release jobs, unpin or remove checkpoints; then retry", show_bytes(lacking)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Expected, Listed};

    fn listed(path: &str, size: Option<u64>) -> Listed {
        let file = File { locator: path.into(), size, executable: false, ranges: true, expected: Expected::default() };
        Listed { path: EntryPath::new(path.as_bytes()).unwrap(), what: What::File(file) }
    }

    fn listing(entries: Vec<Listed>) -> Listing {
        Listing::new("r".into(), entries)
    }

    fn row(path: &str, number: u64, size: u64, sealed: bool) -> FillRow {
        let mut units = UnitMap::new(size);
        _ = units.set(0);
        FillRow {
            path: path.as_bytes().to_vec(),
            number,
            size,
            units: units.to_bytes(),
            sealed: sealed.then(|| Digest::of(path.as_bytes())),
        }
    }

    #[test]
    fn sealed_files_are_settled_and_durable_units_are_kept() {
        let big = 3 * limits::UNIT_BYTES;
        let listing =
            listing(vec![listed("a", Some(5)), listed("b", Some(big)), listed("c", Some(7)), listed("d", None)]);
        let mut numbers = 5..;
        let rows = vec![row("a", 4, 5, true), row("b", 2, big, false), row("c", 3, 8, true)];
        let plan = plan(listing, rows, || numbers.next().unwrap());
        assert_eq!(plan.settled.len(), 1);
        assert_eq!((plan.here_bytes, plan.begun_bytes), (5 + limits::UNIT_BYTES, limits::UNIT_BYTES));
        assert_eq!(plan.missing_bytes, 2 * limits::UNIT_BYTES + 7);
        assert_eq!(plan.occupying_bytes(), 2 * limits::UNIT_BYTES + 4096);
        assert_eq!(plan.large.iter().map(|file| file.number).collect::<Vec<_>>(), [2, 6]);
        assert_eq!(plan.small.iter().map(|file| (file.number, file.units.is_some())).collect::<Vec<_>>(), [(5, false)]);
    }

    #[test]
    fn what_is_too_large_is_refused_with_the_figures() {
        let huge = listing(vec![listed("a", Some(u64::MAX)), listed("b", Some(9))]);
        assert_eq!(Sizes::of(&huge, &Settings::default()).unwrap_err().reason(), "CHECKPOINT_TOO_LARGE");
        let small = Settings { memory_budget_bytes: 2 * limits::ENTRY_MEMORY_BYTES, ..Settings::default() };
        assert!(check_entries(2, &small).is_ok());
        assert!(check_entries(3, &small).unwrap_err().report().contains("memory.budget"));
        let large = Settings { memory_budget_bytes: u64::MAX, ..Settings::default() };
        assert!(check_entries(limits::CHECKPOINT_ENTRIES, &large).is_ok());
        assert_eq!(check_entries(limits::CHECKPOINT_ENTRIES + 1, &large).unwrap_err().remedy_text(), Some(TOO_MANY));
        let error = no_space(100, 40, &Standing { pinned_bytes: 7, ..Standing::default() });
        assert_eq!(error.reason(), "NO_SPACE");
        for (key, value) in [("lacking_bytes", "60"), ("pinned_bytes", "7"), ("leased_bytes", "0")] {
            assert!(error.facts().contains(&(key.to_owned(), value.to_owned())), "{key}");
        }
        assert!(error.report().contains("7 B is pinned"), "{}", error.report());
    }
}

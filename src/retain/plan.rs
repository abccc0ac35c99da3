//! What is given up when room is needed, and why: a pure function over rows.
//!
//! Order: copies of borrowed ranges that nobody reads, which costs nothing but the daemon's reads; then whole trees that can be fetched again, the
//! least recently used first. A tree goes only if every record that has it may lose it, since else nothing would come of it. A blob that
//! several trees name is counted when the last of them goes, and without the copies that the same plan has punched before.
//!
//! What stays, by the first reason that holds: jobs have a right to it, an operator pinned it, it is in use this moment (a call waits for it),
//! it was sent or captured, it was filled with secrets that the daemon does not have, its source does not say whether it is still the same, its files
//! were found to be open. The last is learned by trying: a plan is made again with what it found, so one that stays keeps no other from going.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use crate::catalog::blobs::BlobRow;
use crate::catalog::retention::{Duplicate, Kept, Standing};
use crate::digest::Digest;
use crate::source::{self, SourceKind};

/// Why a checkpoint's bytes stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keeper {
    /// A job has a right to it.
    Leased,
    /// An operator wants it kept.
    Pinned,
    /// A call waits for it, or reads it.
    InUse,
    /// Its files are open, or read by what borrows from them: nothing would come of it now.
    Open,
    /// It was sent, or captured.
    Sent,
    /// The daemon does not have the secrets that it was filled with.
    Secrets,
    /// Its source does not say whether it still has the same.
    Unvouched,
}

impl fmt::Display for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Leased => "a job has a right to it",
            Self::Pinned => "it is pinned",
            Self::InUse => "it is in use",
            Self::Open => "its files are open, or read for another checkpoint that shares bytes with it",
            Self::Sent => "it was sent or captured, and cannot be fetched again",
            Self::Secrets => {
                "it was filled with secrets that came with the request, without which it cannot be fetched again"
            }
            Self::Unvouched => "its source does not say whether it still has the same bytes",
        })
    }
}

/// What is known when a plan is made.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Every record that is ready and stored, least recently used first.
    pub kept: Vec<Kept>,
    /// Ids of records that calls wait for or read.
    pub in_use: BTreeSet<String>,
    /// Ids of records that could not be evicted, since their files are open.
    pub open: BTreeSet<String>,
    /// Blobs with copies of what they borrow that nobody reads.
    pub duplicates: Vec<Duplicate>,
    /// Blobs that several trees name, with what they occupy, once for each tree, in order of blobs; may be left out, and less comes of a plan then.
    pub shared: Vec<(i64, u64, Digest)>,
}

/// Why bytes are given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Something is to come that there is no room for.
    Lacking,
    /// The store is above its high watermark.
    Watermark,
    /// An operator asked for it.
    Hand,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lacking => "to make room for what is to come",
            Self::Watermark => "since the store was above its high watermark",
            Self::Hand => "by hand",
        })
    }
}

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Bytes to be given up.
    pub bytes: u64,
    /// Why.
    pub why: Why,
    /// Whether what was used last is to stay: somebody is about to use it.
    pub keep_latest: bool,
    /// Whether those go that were filled with secrets that the daemon does not have, or that nobody vouches for.
    pub force: bool,
}

/// Something to be given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Copies of what a blob borrows.
    Punch(BlobRow, u64),
    /// The bytes of a checkpoint.
    Evict(Eviction),
}

/// A checkpoint whose bytes are to be given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Eviction {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Whose it is; empty for public ones.
    pub owner: String,
    /// What comes of it; 0 where another record has the same tree and goes too.
    pub bytes: u64,
    /// Why it goes.
    pub why: Why,
    /// And why it rather than another: for how long nobody has used it, in milliseconds.
    pub idle_ms: u64,
    /// Sum of its files' sizes.
    pub logical_bytes: u64,
}

impl Eviction {
    /// That of a record of which `bytes` come at the time `now_ms`.
    pub(super) fn of(record: &Kept, bytes: u64, why: Why, now_ms: i64) -> Self {
        Self {
            id: record.id.clone(),
            name: record.name.clone(),
            owner: record.owner.clone(),
            bytes,
            why,
            idle_ms: u64::try_from(now_ms.saturating_sub(record.used_ms)).unwrap_or(0),
            logical_bytes: record.logical_bytes,
        }
    }
}

impl Step {
    /// What comes of it, in bytes.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Punch(_, bytes) => *bytes,
            Self::Evict(eviction) => eviction.bytes,
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// One after the other.
    pub steps: Vec<Step>,
    /// What comes of them, in bytes; what others borrow stays, so it may be less.
    pub bytes: u64,
    /// What is wanted and cannot be had.
    pub lacking_bytes: u64,
    /// What becomes of everything that is kept.
    pub standing: Standing,
}

/// Why a record stays whose files are not open; `None` where it may go.
fn keeper_of(record: &Kept, in_use: bool, force: bool) -> Option<Keeper> {
    let is_fetched = record.origin.kind.parse().is_ok_and(SourceKind::is_fetched);
    let reasons = [
        (record.leased, Keeper::Leased),
        (record.pinned, Keeper::Pinned),
        (in_use, Keeper::InUse),
        (!is_fetched, Keeper::Sent),
        (record.secrets_given && !force, Keeper::Secrets),
        (source::is_never_met_again(&record.revision) && !force, Keeper::Unvouched),
    ];
    reasons.into_iter().find(|(holds, _)| *holds).map(|(_, keeper)| keeper)
}

impl Known {
    /// Why a record stays; `None` where it may go.
    pub fn keeper_of(&self, record: &Kept, force: bool) -> Option<Keeper> {
        let open = || self.open.contains(&record.id).then_some(Keeper::Open);
        keeper_of(record, self.in_use.contains(&record.id), force).or_else(open)
    }
}

/// Decides what is given up.
pub fn plan(known: &Known, wanted: Wanted, now_ms: i64) -> Plan {
    let trees = trees_of(known, wanted.force);
    let mut plan = Plan { standing: standing(&trees), ..Plan::default() };
    let mut shared = SharedBlobs::of(known, &trees);
    let mut punched: HashMap<Digest, u64> = HashMap::new();
    for duplicate in &known.duplicates {
        if plan.bytes >= wanted.bytes {
            break;
        }
        plan.bytes += duplicate.bytes;
        plan.steps.push(Step::Punch(duplicate.blob, duplicate.bytes));
        match duplicate.tree {
            Some(tree) => *punched.entry(tree).or_default() += duplicate.bytes,
            None => shared.punch(duplicate.blob.id, duplicate.bytes),
        }
    }
    let mut victims: Vec<&Tree<'_>> = trees.values().filter(|tree| tree.keeper.is_none()).collect();
    victims.sort_by_key(|tree| tree.rank);
    if wanted.keep_latest
        && let Some(latest) = trees.values().map(|tree| tree.rank).max()
    {
        victims.retain(|tree| tree.rank != latest);
    }
    for tree in victims {
        if plan.bytes >= wanted.bytes {
            break;
        }
        let own_bytes = tree.own_bytes.saturating_sub(punched.get(&tree.manifest).copied().unwrap_or(0));
        let bytes = own_bytes + shared.without(&tree.manifest);
        plan.bytes += bytes;
        let last = tree.records.len() - 1;
        plan.steps.extend(tree.records.iter().enumerate().map(|(at, record)| {
            Step::Evict(Eviction::of(record, if at == last { bytes } else { 0 }, wanted.why, now_ms))
        }));
    }
    plan.lacking_bytes = wanted.bytes.saturating_sub(plan.bytes);
    plan
}

/// A tree with the records that have it.
struct Tree<'a> {
    manifest: Digest,
    records: Vec<&'a Kept>,
    keeper: Option<Keeper>,
    /// Where the last used of its records stands among all.
    rank: usize,
    own_bytes: u64,
}

fn trees_of(known: &Known, force: bool) -> BTreeMap<Digest, Tree<'_>> {
    let mut trees: BTreeMap<Digest, Tree<'_>> = BTreeMap::new();
    for (rank, record) in known.kept.iter().enumerate() {
        let keeper = known.keeper_of(record, force);
        let tree = trees.entry(record.manifest).or_insert(Tree {
            manifest: record.manifest,
            records: Vec::new(),
            keeper: None,
            rank,
            own_bytes: record.own_bytes,
        });
        tree.records.push(record);
        tree.rank = rank;
        tree.keeper = match (tree.keeper, keeper) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
    }
    trees
}

fn standing(trees: &BTreeMap<Digest, Tree<'_>>) -> Standing {
    let mut standing = Standing::default();
    for tree in trees.values() {
        let of = match tree.keeper {
            None => &mut standing.evictable_bytes,
            Some(Keeper::Leased | Keeper::InUse | Keeper::Open) => &mut standing.leased_bytes,
            Some(Keeper::Pinned) => &mut standing.pinned_bytes,
            Some(Keeper::Sent | Keeper::Secrets | Keeper::Unvouched) => &mut standing.not_refetchable_bytes,
        };
        *of += tree.own_bytes;
    }
    standing
}

/// Blobs that several trees name: by how many still, and which each tree names. Trees that nobody has are on their way out and do not count.
struct SharedBlobs {
    names: HashMap<i64, (usize, u64)>,
    of_tree: HashMap<Digest, Vec<i64>>,
}

impl SharedBlobs {
    fn of(known: &Known, trees: &BTreeMap<Digest, Tree<'_>>) -> Self {
        let mut shared = Self { names: HashMap::new(), of_tree: HashMap::new() };
        for (blob, bytes, tree) in known.shared.iter().filter(|(_, _, tree)| trees.contains_key(tree)) {
            shared.names.entry(*blob).or_insert((0, *bytes)).0 += 1;
            shared.of_tree.entry(*tree).or_default().push(*blob);
        }
        shared
    }

    /// Takes copies away that a blob has.
    fn punch(&mut self, blob: i64, bytes: u64) {
        if let Some((_, stored)) = self.names.get_mut(&blob) {
            *stored = stored.saturating_sub(bytes);
        }
    }

    /// Takes a tree away; bytes of blobs that no other names.
    fn without(&mut self, tree: &Digest) -> u64 {
        let mut freed = 0;
        for blob in self.of_tree.remove(tree).unwrap_or_default() {
            if let Some((names, bytes)) = self.names.get_mut(&blob) {
                *names -= 1;
                freed += if *names == 0 { *bytes } else { 0 };
            }
        }
        freed
    }
}

#[cfg(test)]
mod tests;

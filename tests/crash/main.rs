//! The power fails after any durable step, and nothing that was promised is lost: the order of writes is shown, not believed.
//!
//! A daemon is recorded while it ingests, takes what is sent, shares, hydrates, is killed, resumes, removes, finds rot, mends and makes room ([`story`], [`trace`]). The records
//! are played to a disk that keeps nothing but what it was told to keep ([`disk`]): SQLite's files included, since they order
//! with the others. Before and after every step the disk is stopped, with all, some or nothing of the rest lost, and what is left is
//! held against the law ([`law`]); from a sample of it a real daemon starts ([`reopen`]). That this can fail is
//! shown by taking out one kind of sync after the other.
//!
//! Shared extents (XFS, btrfs) are left out: files are copied here. `FIDEDUPERANGE` changes no byte of either file, so a disk of bytes has nothing of it to
//! keep or lose; what `FICLONERANGE` brings is synced by the same calls before the same rows as what is copied.
//!
//! `TEST_CRASHES` says how many crashes a daemon starts from (default 40, or `all`), `TEST_SEED` which, and what is lost of
//! what is half durable; `TEST_CRASH=LEG:RECORD` (or `LEG:FIRST-LAST`) that it starts from those, as a failure names them. Needs root, as mounting does, and a C compiler, as SQLite does.

#![cfg(test)]

#[path = "../support/mod.rs"]
mod support;

mod disk;
mod law;
mod reopen;
mod story;
mod trace;

use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use disk::{Disk, Image, Loss};
use law::{Law, Promises};
use story::{Leg, Story};
use support::corpus::{Random, seed};
use trace::Act;

/// Crashes that a daemon starts from by default.
const CRASHES: usize = 40;

/// A kind of sync that is left out in one leg, from a remark on or from the beginning.
struct Gap {
    kind: &'static str,
    leg: usize,
    after: Option<&'static str>,
    /// What it takes away from the law.
    why: &'static str,
}

const fn gap(kind: &'static str, leg: usize, after: Option<&'static str>, why: &'static str) -> Gap {
    Gap { kind, leg, after, why }
}

/// Syncs that the law stands on, each.
const GAPS: [Gap; 17] = [
    gap("bytes that are filled", story::KEEPS, Some("begin a"), "a blob's bytes before its row"),
    gap("the file system", story::KEEPS, Some("begin a"), "the bytes of many small blobs before their rows"),
    gap("names of blobs", story::KEEPS, Some("begin a"), "a blob's name before its row"),
    gap("the catalog", story::KEEPS, Some("begin a"), "rows before whoever asked is answered"),
    gap("bytes of sealed blobs", story::KEEPS, Some("ready b"), "bytes that are back before the row that says so"),
    gap("bytes that are filled", story::INTERRUPTED, Some("begin w"), "a unit's bytes before its bit"),
    gap("names of blobs", story::REMOVES, Some("remove b"), "an unlinked name before its row goes"),
    gap("the file system", story::UNDOES, None, "a name that is taken back before the note of it goes"),
    gap("names of blobs", story::FINISHES, None, "an unlinked name before its row goes, at a start"),
    gap("bytes of sealed blobs", story::MENDS, None, "bytes that are put right before the row that says so"),
    gap("the catalog", story::MENDS, Some("punch b"), "rows that count on no copy before it is punched"),
    gap("bytes of sealed blobs", story::MENDS, Some("lose a"), "what borrowers need before the file of its home goes"),
    gap("names of blobs", story::MENDS, Some("lose a"), "a rotten file out of sight before the row that says so"),
    gap("bytes that are filled", story::MENDS, Some("lose v"), "bytes that come again before the row that says so"),
    gap("bytes that are filled", story::MENDS, Some("retry r"), "bytes of a retry before their rows"),
    gap("names of blobs", story::PRESSED, Some("evict p"), "an unlinked name before its row goes, under pressure"),
    gap("bytes that are filled", story::SENDS, Some("begin u"), "what was sent before the bit that says it is here"),
];

/// A moment and what is found after it.
struct Crash {
    leg: usize,
    step: usize,
    act: String,
    loss: Loss,
    image: Image,
    promises: Promises,
}

impl Crash {
    fn name(&self) -> String {
        format!("leg {}, stopped at record {} ({}), with this loss: {:?}", self.leg, self.step, self.act, self.loss)
    }
}

/// Shows every crash of a story to `each`, until it has seen enough; with a gap, those of its leg.
fn crashes(story: &Story, gap: Option<&Gap>, mut each: impl FnMut(&Crash) -> bool) {
    for (leg, Leg { begins_with, promises, acts }) in story.legs.iter().enumerate() {
        if gap.is_some_and(|gap| gap.leg != leg) {
            continue;
        }
        let mut promises = promises.clone();
        let mut disk = Disk::holding(begins_with);
        let mut open = gap.is_some_and(|gap| gap.after.is_none());
        for (step, act) in acts.iter().enumerate() {
            if let Act::Mark(remark) = act {
                law::note(&mut promises, remark);
                open |= gap.is_some_and(|gap| gap.after == Some(remark));
            }
            if gap.is_some() && !open {
                // All is as it should be: whoever leaves nothing out looks at it.
                disk.apply(act);
                continue;
            }
            let mut look = |disk: &Disk, losses: &[Loss]| {
                losses.iter().any(|loss| {
                    let (act, promises) = (act.to_string(), promises.clone());
                    each(&Crash { leg, step, act, loss: *loss, image: disk.image(*loss), promises })
                })
            };
            let some = Loss::Some(seed_of(leg, step));
            if act.is_step() && look(&disk, &[some, Loss::Bytes]) {
                return;
            }
            if gap.is_none() || act.sync_kind() != gap.map(|gap| gap.kind) {
                disk.apply(act);
            }
            let after: &[Loss] = match act {
                _ if step + 1 == acts.len() => &[some, Loss::Bytes, Loss::Everything, Loss::Nothing],
                _ if act.sync_kind().is_some() => &[Loss::Everything],
                _ if act.is_step() => &[Loss::Nothing],
                _ => &[],
            };
            if look(&disk, after) {
                return;
            }
        }
    }
}

fn seed_of(leg: usize, step: usize) -> u64 {
    static SEED: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    SEED.get_or_init(seed).wrapping_mul(1_000_003).wrapping_add((leg * 1_000_000 + step) as u64)
}

#[test]
fn the_law_holds_after_every_step() {
    let story = Story::told();
    let mut law = Law::new(story.truth.clone());
    let mut count = 0;
    crashes(&story, None, |crash| {
        count += 1;
        if let Err(fault) = law.check(&crash.image, &crash.promises) {
            panic!("{}: {fault}", crash.name());
        }
        false
    });
    eprintln!("{count} crashes, {} units and {} borrowed ranges looked at", law.units_seen, law.borrows_seen);
    let seen = law.units_seen.min(law.borrows_seen).min(law.shown_seen).min(law.lost_seen);
    assert!(seen > 0, "the story has become too simple");
}

#[test]
fn the_law_breaks_where_a_sync_is_left_out() {
    let story = Story::told();
    for gap in &GAPS {
        let mut law = Law::new(story.truth.clone());
        let mut broken = None;
        crashes(&story, Some(gap), |crash| {
            broken = law.check(&crash.image, &crash.promises).err().map(|fault| format!("{}: {fault}", crash.name()));
            broken.is_some()
        });
        let Gap { kind, leg, why, .. } = gap;
        match broken {
            Some(fault) => eprintln!("without syncing {kind} ({why}): {fault}"),
            None => panic!("leg {leg} does not need {kind} to be synced ({why}), or this test sees nothing"),
        }
    }
}

/// The crashes that are asked for by name: a leg and its records.
fn asked_for() -> Option<(usize, RangeInclusive<usize>)> {
    let asked = std::env::var("TEST_CRASH").ok()?;
    let (leg, records) = asked.split_once(':').expect("TEST_CRASH is LEG:RECORD");
    let (first, last) = records.split_once('-').unwrap_or((records, records));
    Some((leg.parse().unwrap(), first.parse().unwrap()..=last.parse().unwrap()))
}

/// Starts a daemon from one crash; a failure names it.
fn start_from(story: &Arc<Story>, crash: &Crash, clear: bool) {
    let start = AssertUnwindSafe(|| reopen::reopen(story, &crash.image, &crash.promises, clear));
    if let Err(panic) = catch_unwind(start) {
        eprintln!("this was {}", crash.name());
        resume_unwind(panic);
    }
}

#[test]
fn a_daemon_starts_from_what_a_crash_left() {
    let story = Story::told();
    if let Some((leg, records)) = asked_for() {
        crashes(&story, None, |crash| {
            if crash.leg == leg && records.contains(&crash.step) {
                start_from(&story, crash, crash.step % 2 == 0);
            }
            false
        });
        return;
    }
    let mut found = 0_u64;
    crashes(&story, None, |_| {
        found += 1;
        false
    });
    let wanted = std::env::var("TEST_CRASHES").unwrap_or_else(|_| CRASHES.to_string());
    let wanted: u64 = if wanted == "all" { found } else { wanted.parse().unwrap() };
    let mut random = Random::new(seed_of(9, 0));
    let (mut left, mut wanted) = (found, wanted.min(found));
    crashes(&story, None, |crash| {
        if random.below(left) < wanted {
            wanted -= 1;
            start_from(&story, crash, wanted % 2 == 0);
        }
        left -= 1;
        wanted == 0
    });
}

//! The power fails after any durable step, and nothing that was promised is lost: the order of writes is shown, not believed.
//!
//! A daemon is recorded while it ingests, shares, hydrates, is killed, resumes and removes ([`story`], [`trace`]). The records
//! are played to a disk that keeps nothing but what it was told to keep ([`disk`]): SQLite's files included, since they order
//! with the others. Before and after every step the disk is stopped, with all, some or nothing of the rest lost, and what is left is
//! held against the law ([`law`]); from a sample of it a real daemon starts ([`reopen`]). That this can fail is
//! shown by taking out one kind of sync after the other.
//!
//! `TEST_CRASHES` says how many crashes a daemon starts from (default 40, `all` for every one that differs), `TEST_SEED` which, and what is lost of
//! what is half durable. Needs root, as mounting does, and a C compiler, as SQLite does.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod disk;
mod law;
mod reopen;
mod story;
mod trace;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use disk::{Disk, Image, Loss};
use law::{Law, Promises};
use story::{Leg, Story};
use support::corpus::{Random, seed};
use trace::Act;

/// Crashes that a daemon starts from by default.
const CRASHES: usize = 40;

/// Kinds of syncs that the law stands on, each.
const NEEDED: [&str; 5] =
    ["bytes that are filled", "names of blobs", "bytes that are hydrated", "the file system", "the catalog"];

/// A moment and what is found after it.
struct Crash {
    leg: usize,
    step: usize,
    loss: Loss,
    image: Image,
    promises: Promises,
}

impl Crash {
    fn name(&self) -> String {
        format!("leg {} stopped at record {} with {:?} lost", self.leg, self.step, self.loss)
    }
}

/// Shows every crash of a story to `each`, until it has seen enough. Syncs of the kind `without` are left out, save those of the start.
fn crashes(story: &Story, without: Option<&str>, mut each: impl FnMut(&Crash) -> bool) {
    let mut promises = Promises::new();
    for (leg, Leg { begins_with, acts }) in story.legs.iter().enumerate() {
        let mut disk = Disk::holding(begins_with);
        let mut started = false;
        for (step, act) in acts.iter().enumerate() {
            if let Act::Mark(remark) = act {
                law::note(&mut promises, remark);
                started = true;
            }
            let mut look = |disk: &Disk, loss| {
                each(&Crash { leg, step, loss, image: disk.image(loss), promises: promises.clone() })
            };
            let seed = seed_of(leg, step);
            if act.is_step() && look(&disk, Loss::Some(seed)) {
                return;
            }
            if !started || without.is_none() || act.sync_kind() != without {
                disk.apply(act);
            }
            let loss = if act.sync_kind().is_some() { Loss::Everything } else { Loss::Nothing };
            if act.is_step() && look(&disk, loss) {
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
    assert!(law.units_seen > 0 && law.borrows_seen > 0, "the story has become too simple");
}

#[test]
fn the_law_breaks_where_a_kind_of_sync_is_left_out() {
    let story = Story::told();
    for kind in NEEDED {
        let mut law = Law::new(story.truth.clone());
        let mut broken = None;
        crashes(&story, Some(kind), |crash| {
            broken = law.check(&crash.image, &crash.promises).err().map(|fault| format!("{}: {fault}", crash.name()));
            broken.is_some()
        });
        match broken {
            Some(fault) => eprintln!("without syncing {kind}: {fault}"),
            None => panic!("nothing is lost when {kind} is not synced: the test sees nothing, or the sync is not needed"),
        }
    }
}

#[test]
fn a_daemon_starts_from_what_a_crash_left() {
    let story = Story::told();
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
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                reopen::reopen(&story, &crash.image, &crash.promises, wanted % 2 == 0);
            }));
            if let Err(panic) = outcome {
                eprintln!("this was {}", crash.name());
                resume_unwind(panic);
            }
        }
        left -= 1;
        wanted == 0
    });
}

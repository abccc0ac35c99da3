//! A small file system that jobs ask more of than it holds, at full speed: nobody is told that it is full.
//!
//! `TEST_SIMULATION_S` says for how long; without it a minute, in which many times what fits comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::*;
use crate::support::corpus::Random;
use crate::support::files::assert_same_file;
use crate::support::loopfs::LoopFs;

/// Trees that jobs ask for, and how large each is.
const TREES: u64 = 16;
const TREE_MIB: u64 = 12;

/// Jobs that ask at the same time.
const JOBS: u64 = 3;

/// How long it goes on where nothing else is said, and what has to have come by then.
const LONG_ENOUGH: Duration = Duration::from_secs(60);
const ENOUGH_MIB: u64 = 400;

#[test]
fn a_store_that_is_asked_for_more_than_it_holds_never_runs_full() {
    let models = Models::new();
    (0..TREES).for_each(|tree| drop(models.tree(&format!("t{tree}"), TREE_MIB)));
    // With the reserve and what the file system needs, about half of the trees fit.
    let disk = LoopFs::ext4(192);
    let state = disk.dir("state");
    let daemon = Daemon::start_on(state, &[(MODELS, models.0.path().to_str().unwrap())]);
    for tree in 0..TREES {
        create(&daemon, &format!("t{tree}")).ok();
    }
    let until = std::env::var("TEST_SIMULATION_S").map(|text| Duration::from_secs(text.parse().unwrap()));
    let until = until.unwrap_or(LONG_ENOUGH);
    let (begun, asked) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let is_enough = || begun.elapsed() > until && came_mib(&daemon) >= ENOUGH_MIB;
    std::thread::scope(|scope| {
        for job in 0..JOBS {
            let (daemon, models, asked, is_enough) = (&daemon, &models, &asked, &is_enough);
            scope.spawn(move || {
                let mut random = Random::new(seed() + job);
                while !is_enough() {
                    let name = format!("t{}", random.below(TREES));
                    let at = daemon.attach(&format!("job{job}"), &name);
                    assert_same_file(&models.path(&name).join("w.bin"), &at.join("w.bin"));
                    daemon.ctl(&["release", &format!("job{job}")]).ok();
                    asked.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(events(&daemon, "CHECKPOINT_FAILED"), [] as [&str; 0]);
    let evicted = events(&daemon, "CHECKPOINT_EVICTED").len();
    assert!(evicted > 10, "{evicted} evictions for {} attachments", asked.load(Ordering::Relaxed));
    let usage = daemon.json(&["usage"]);
    assert_eq!(usage["leased_bytes"], 0, "{usage}");
}

/// MiB of checkpoints that became ready, as the events say.
fn came_mib(daemon: &Daemon) -> u64 {
    events(daemon, "CHECKPOINT_READY").len() as u64 * TREE_MIB
}

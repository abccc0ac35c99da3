//! Reading everything at rest again: how fast from page cache, and what readers lose to it at its usual rate.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::read::{large, read_rate, warm};
use super::support::corpus::{Tensors, seed};
use super::support::daemon::{Daemon, NO_PASSTHROUGH};
use super::support::ran::wait_until;
use super::table::{Scale, Table, best, float, three};

/// Reads that are compared, for each round.
const READS: usize = 4;

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    let daemon = Daemon::start_with(&[NO_PASSTHROUGH]);
    let source = daemon.place().dir("source");
    Tensors::new(seed(), scale.tensors, scale.tensor_bytes).write_safetensors(&source.join("model.safetensors"));
    daemon.capture("k", &source);
    fs::remove_dir_all(&source).unwrap();
    let blobs = large(&daemon.state().join("blobs"));
    let mut rates = Vec::new();
    for _ in 0..scale.rounds {
        read_rate(&blobs);
        daemon.ctl(&["scrub", "--full-rate"]).ok();
        let (mut bytes, mut took_ms) = (0, 0);
        wait_until("the scrub has ended", Duration::from_secs(600), || {
            let scrub = daemon.json(&["status"])["scrub"].clone();
            bytes = scrub["bytes"].as_u64().unwrap();
            took_ms = scrub["took_ms"].as_u64().unwrap_or(0);
            scrub["running"] == false
        });
        rates.push(float(bytes) / 1e6 / float(took_ms.max(1)));
    }
    table.row("scrub at full rate", format!("{} GB/s", three(best(rates))), ">= 3 GB/s", "from page cache");

    let served = large(&daemon.attach("job", "k"));
    let reads = scale.rounds * READS;
    let alone = best((0..reads).map(|_| served_rate(&served, &blobs)));
    daemon.ctl(&["scrub"]).ok();
    let beside = best((0..reads).map(|_| served_rate(&served, &blobs)));
    let goes_on = daemon.json(&["status"])["scrub"]["running"] == true;
    let detail = format!("at its usual rate{}", if goes_on { "" } else { "; it ended too early" });
    table.row("reads beside a scrub / alone", three(beside / alone), ">= 0.95", detail);
}

/// GB/s of reading what is served when every byte is asked of the daemon: the mount's own pages go, the blobs' are in page cache.
fn served_rate(served: &[PathBuf], blobs: &[PathBuf]) -> f64 {
    for path in served {
        let file = File::open(path).unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    }
    warm(blobs);
    read_rate(served)
}

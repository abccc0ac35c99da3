//! Extracting a tar.zst of this host, against `zstd -dc | tar x` and sync of the same.

use std::fs;
use std::path::Path;
use std::time::Instant;

use super::ingest::memory_kib;
use super::support::corpus::{Tensors, seed};
use super::support::daemon::Daemon;
use super::support::ran::shell;
use super::table::{Scale, Table, best, three};
use super::warm::warm;

/// Shards, as large checkpoints have them.
const SHARDS: usize = 4;

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    let daemon = Daemon::start();
    let (mut native, mut ours) = (Vec::new(), Vec::new());
    for round in 0..scale.rounds.min(3) {
        // New bytes every round: what is known already would not be written again.
        let archive = daemon.place().join(&format!("model-{round}.tar.zst"));
        write_archive(scale, daemon.place().dir("tree").as_path(), &archive, seed() + round as u64);
        warm(scale.bytes());
        native.push(1.0 / seconds_of_tar(&archive, &daemon.place().join("out")));
        warm(scale.bytes());
        let began = Instant::now();
        daemon.capture(&format!("k{round}"), &archive);
        ours.push(1.0 / began.elapsed().as_secs_f64());
        fs::remove_file(&archive).unwrap();
        daemon.ctl(&["remove", &format!("k{round}"), "--yes"]).ok();
    }
    let (native, ours) = (1.0 / best(native), 1.0 / best(ours));
    table.row(
        "tar.zst to ready / zstd -dc | tar x and sync",
        three(ours / native),
        "<= 1.2",
        format!("{ours:.2} s of {native:.2} s"),
    );
    let peak = memory_kib(daemon.pid(), "VmHWM") / 1024;
    table.row("peak memory of the daemon", format!("{peak} MiB"), "<= 300 MiB", "VmHWM after extracting");
}

fn write_archive(scale: &Scale, tree: &Path, archive: &Path, seed: u64) {
    for shard in 0..SHARDS {
        let tensors = Tensors::new(seed + shard as u64 * 1000, scale.tensors.div_ceil(SHARDS), scale.tensor_bytes);
        tensors.write_safetensors(&tree.join(format!("model-{shard}.safetensors")));
    }
    for index in 0..200 {
        fs::write(tree.join(format!("extra_{index:03}.json")), format!("{{\"i\": {index}}}").repeat(50)).unwrap();
    }
    let pack = "tar -C \"$1\" -cf - . | zstd -q -1 -o \"$2\"; rm -r \"$1\"; sync -f \"$2\"; cat \"$2\" > /dev/null";
    shell(pack, &[tree, archive]).ok();
}

fn seconds_of_tar(archive: &Path, out: &Path) -> f64 {
    let began = Instant::now();
    shell("mkdir \"$2\"; zstd -dcq \"$1\" | tar -xf - -C \"$2\"; sync -f \"$2\"", &[archive, out]).ok();
    let took = began.elapsed().as_secs_f64();
    fs::remove_dir_all(out).unwrap();
    shell("sync -f \"$1\"", &[archive]).ok();
    took
}

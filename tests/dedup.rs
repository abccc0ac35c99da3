//! What is equal is kept once: the disk's word against the ideal, and every byte read back through the mount.

#![cfg(test)]

mod support;

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use support::corpus::{Tensors, seed};
use support::daemon::Daemon;
use support::files::{assert_same_tree, disk_bytes, regular_files, xattr};
use support::loopfs::LoopFs;
use support::place::Place;

const TENSORS: usize = 12;
const TENSOR_BYTES: usize = 4 << 20;
const MIB: u64 = 1 << 20;
/// What the catalog and its log may take: a constant, large only beside checkpoints this small.
const CATALOG_BYTES: u64 = 8 * MIB;

#[test]
fn two_fine_tunes_share_what_they_did_not_train() {
    let place = Place::new();
    let base = Tensors::new(seed(), TENSORS, TENSOR_BYTES);
    base.write_safetensors(&place.join("a/model.safetensors"));
    base.fine_tuned(3).write_safetensors(&place.join("b/model.safetensors"));
    base.fine_tuned(7).write_safetensors(&place.join("c/model.safetensors"));
    on_ext4(&place, &["a", "b", "c"], base.bytes() + 2 * base.bytes_each());
}

#[test]
fn two_fine_tunes_share_what_they_did_not_train_on_xfs() {
    let place = Place::new();
    let base = Tensors::new(seed(), TENSORS, TENSOR_BYTES);
    base.write_safetensors(&place.join("a/model.safetensors"));
    base.fine_tuned(3).write_safetensors(&place.join("b/model.safetensors"));
    base.trained_on(7).write_safetensors(&place.join("c/model.safetensors"));
    let mut store = OnXfs::capture(&place, &["a", "b", "c"], base.bytes() + 2 * base.bytes_each());
    // What lies at the same places of disk blocks is shared by the file system: each is a file of its own to the kernel, at once.
    for name in ["a", "c"] {
        for file in regular_files(&store.daemon.attach(&format!("looks-at-{name}"), name)) {
            assert_eq!(xattr(&file, "user.ckptd.state"), "passthrough", "{}", file.display());
        }
    }
    same_before_and_after_a_restart(&mut store.daemon, &place, &["a", "b", "c"]);
}

#[test]
fn a_torch_zip_shares_its_tensors_with_safetensors() {
    let place = Place::new();
    let base = Tensors::new(seed(), TENSORS, TENSOR_BYTES);
    base.write_safetensors(&place.join("a/model.safetensors"));
    base.write_torch_zip(&place.join("b/pytorch_model.bin"));
    on_ext4(&place, &["a", "b"], base.bytes());
}

#[test]
fn a_torch_zip_shares_its_tensors_with_safetensors_on_xfs() {
    let place = Place::new();
    let base = Tensors::new(seed(), TENSORS, TENSOR_BYTES);
    base.write_safetensors(&place.join("a/model.safetensors"));
    base.write_torch_zip(&place.join("b/pytorch_model.bin"));
    let mut store = OnXfs::capture(&place, &["a", "b"], base.bytes());
    same_before_and_after_a_restart(&mut store.daemon, &place, &["a", "b"]);
}

#[test]
fn equal_files_are_one_blob_whatever_they_are_called() {
    let place = Place::new();
    let base = Tensors::new(seed(), TENSORS, TENSOR_BYTES);
    base.write_safetensors(&place.join("a/model.safetensors"));
    base.write_safetensors(&place.join("a/again/copy.safetensors"));
    base.write_safetensors(&place.join("b/other.bin"));
    on_ext4(&place, &["a", "b"], base.bytes());
}

#[test]
fn usage_tells_logical_and_unique_bytes_apart() {
    let place = Place::new();
    let base = Tensors::new(seed(), TENSORS, TENSOR_BYTES);
    base.write_safetensors(&place.join("a/model.safetensors"));
    base.fine_tuned(0).write_safetensors(&place.join("b/model.safetensors"));
    let daemon = Daemon::start();
    daemon.capture("a", &place.join("a"));
    daemon.capture("b", &place.join("b"));
    let usage = daemon.json(&["usage"]);
    let of = |key: &str| usage[key].as_u64().unwrap();
    assert!(of("logical_bytes") >= 2 * base.bytes(), "{usage}");
    let ideal = base.bytes() + base.bytes_each();
    assert!(of("unique_bytes") >= ideal && of("unique_bytes") * 100 <= ideal * 105, "{usage}");
    let on_disk = disk_bytes(&daemon.state().join("blobs"));
    assert!(of("physical_bytes").abs_diff(on_disk) < 2 * MIB, "{on_disk} on disk; {usage}");
}

fn on_ext4(place: &Place, names: &[&str], ideal: u64) {
    let mut daemon = Daemon::start();
    for name in names {
        daemon.capture(name, &place.join(name));
    }
    let blobs = disk_bytes(&daemon.state().join("blobs"));
    assert_near(blobs, ideal, 0);
    assert_near(disk_bytes(daemon.state()), ideal, CATALOG_BYTES);
    same_before_and_after_a_restart(&mut daemon, place, names);
}

/// A daemon whose store is on an XFS. Fields end in this order.
struct OnXfs {
    daemon: Daemon,
    _disk: LoopFs,
}

impl OnXfs {
    /// Captures each of `names` and compares what the file system has in use with `ideal`.
    fn capture(place: &Place, names: &[&str], ideal: u64) -> Self {
        let disk = LoopFs::xfs(512);
        let daemon = Daemon::start_on(disk.dir("state"), &[]);
        let before = disk.used_bytes();
        for name in names {
            daemon.capture(name, &place.join(name));
        }
        assert_near(disk.used_bytes() - before, ideal, CATALOG_BYTES);
        Self { daemon, _disk: disk }
    }
}

fn assert_near(found: u64, ideal: u64, extra: u64) {
    let most = ideal * 105 / 100 + extra;
    assert!(found <= most, "{found} bytes on disk, {ideal} are ideal, {most} were allowed");
    assert!(
        found * 100 >= ideal * 95,
        "{found} bytes on disk cannot hold {ideal} of unique bytes: the measure is wrong"
    );
}

fn same_before_and_after_a_restart(daemon: &mut Daemon, place: &Place, names: &[&str]) {
    compare(daemon, place.path(), names, "before");
    daemon.stop();
    daemon.restart();
    compare(daemon, place.path(), names, "after");
}

fn compare(daemon: &Daemon, sources: &Path, names: &[&str], when: &str) {
    for name in names {
        let target = daemon.attach(&format!("{when}-{name}"), name);
        assert_same_tree(&sources.join(name), &target);
    }
}

#[test]
fn the_disk_of_the_store_reads_ahead_as_configured() {
    let read_ahead = |disk: &LoopFs| {
        let device = disk.root().metadata().unwrap().dev();
        let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
        let knob = format!("/sys/dev/block/{major}:{minor}/queue/read_ahead_kb");
        std::fs::read_to_string(knob).unwrap().trim().parse::<u64>().unwrap()
    };
    let disk = LoopFs::ext4(256);
    let before = read_ahead(&disk);
    drop(Daemon::start_on(disk.dir("state"), &[("CKPTD_STORE__READ_AHEAD", "0")]));
    assert_eq!(read_ahead(&disk), before);
    drop(Daemon::start_on(disk.dir("state"), &[]));
    assert!(read_ahead(&disk) >= 4096);
    let raised = read_ahead(&disk);
    drop(Daemon::start_on(disk.dir("state"), &[("CKPTD_STORE__READ_AHEAD", "65536")]));
    assert_eq!(read_ahead(&disk), raised, "never lowered");
}

//! Mapped reads of what was brought into memory ahead, against the kernel's own read-only file system over the same bytes.

use std::path::{Path, PathBuf};

use nix::sys::resource::{UsageWho, getrusage};

use super::read::{large, map_rate, warm, with_checkpoint};
use super::support::place::Place;
use super::support::ran::shell;
use super::table::{Scale, Table, best, three};

const NAME: &str = "mmap after prefetch to memory / EROFS";
/// Passes over the same pages: the first also pays for what a virtual machine's host does at the first touch of large pages.
const PASSES: usize = 3;
const WANTED: &str = ">= 0.95";

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    if shell("command -v mkfs.erofs", &[]).code != Some(0) {
        table.row(NAME, "-", WANTED, "not taken: mkfs.erofs (erofs-utils) is not installed");
        return;
    }
    let daemon = with_checkpoint(scale, &[]);
    let files = large(&daemon.attach("job", "k"));
    let erofs = Erofs::of(&daemon.attach("copied", "k"));
    let native_files = large(&erofs.root);
    let (mut mapped, mut native) = (vec![], vec![]);
    for _ in 0..scale.rounds {
        shell("sync; echo 3 > /proc/sys/vm/drop_caches", &[]).ok();
        daemon.ctl(&["prefetch", "k", "--memory"]).ok();
        warm(&native_files);
        for _ in 0..PASSES {
            mapped.push(map_rate(&files));
            native.push(map_rate(&native_files));
        }
    }
    let (mapped, native) = (best(mapped), best(native));
    let faults = format!("{} and {} faults the last time", faults_of(&files), faults_of(&native_files));
    let detail = format!("{mapped:.2} of {native:.2} GB/s, a byte of every page; {faults}");
    table.row(NAME, three(mapped / native), WANTED, detail);
}

/// Page faults that mapping them takes: the fewer, the larger the pages that came into memory.
fn faults_of(files: &[PathBuf]) -> i64 {
    let so_far = || getrusage(UsageWho::RUSAGE_SELF).unwrap().minor_page_faults();
    let before = so_far();
    map_rate(files);
    so_far() - before
}

/// A tree in an image, mounted; its pages come in by as large a read-ahead as the store's do.
struct Erofs {
    _place: Place,
    root: PathBuf,
}

impl Erofs {
    fn of(tree: &Path) -> Self {
        let place = Place::new();
        let (image, root) = (place.join("image"), place.dir("fs"));
        shell(
            "mkfs.erofs --quiet \"$1\" \"$2\"; mount -t erofs -o loop,ro \"$1\" \"$3\"
             blockdev --setra 8192 \"$(losetup -n -O NAME -j \"$1\")\"",
            &[&image, tree, &root],
        )
        .ok();
        Self { _place: place, root }
    }
}

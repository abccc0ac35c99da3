//! Reading through the mount against reading the blob itself, both from page cache.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::support::corpus::{Tensors, seed};
use super::support::daemon::{Daemon, NO_PASSTHROUGH};
use super::support::files::regular_files;
use super::support::ran::shell;
use super::table::{Scale, Table, best, float, three};

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    passthrough(scale, table);
    through_the_daemon(scale, table);
}

fn passthrough(scale: &Scale, table: &mut Table) {
    let daemon = with_checkpoint(scale, &[]);
    let blobs = large(&daemon.state().join("blobs"));
    warm(&large(&daemon.attach("first", "k")));
    warm(&blobs);

    let (mut direct, mut first, mut again, mut direct_mapped, mut mapped) = (vec![], vec![], vec![], vec![], vec![]);
    for round in 0..scale.rounds {
        let files = large(&daemon.attach(&format!("job-{round}"), "k"));
        direct.push(read_rate(&blobs));
        first.push(read_rate(&files));
        again.push(read_rate(&files));
        direct_mapped.push(map_rate(&blobs));
        mapped.push(map_rate(&files));
    }
    let native = best(direct);
    let ratio = |values: Vec<f64>, native: f64| {
        let value = best(values);
        (three(value / native), format!("{value:.2} of {native:.2} GB/s"))
    };
    let (figure, detail) = ratio(first, native);
    table.row("second job's first read / blob", figure, ">= 0.95", detail);
    let (figure, detail) = ratio(again, native);
    table.row("warm read / blob", figure, ">= 0.95", detail);
    let (figure, detail) = ratio(mapped, best(direct_mapped));
    table.row("mmap, a byte a page / blob", figure, ">= 0.95", detail);
    one_fault(&daemon, &blobs, table);
}

/// What one touched page brings in, nothing being in page cache.
fn one_fault(daemon: &Daemon, blobs: &[PathBuf], table: &mut Table) {
    let files = large(&daemon.attach("faulting", "k"));
    shell("sync; echo 3 > /proc/sys/vm/drop_caches", &[]).ok();
    let file = File::open(&files[0]).unwrap();
    // SAFETY: a file of the mount is never written or truncated.
    let mapped = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    std::hint::black_box(mapped[mapped.len() / 2]);
    let come = resident_bytes(&blobs[0]);
    table.row("a page fault brings in", format!("{} KiB", come >> 10), ">= 1024 KiB", "through the mount, cold");
}

/// Bytes of a file that are in page cache.
fn resident_bytes(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    // SAFETY: a sealed blob is never written or truncated.
    let mapped = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    let mut pages = vec![0_u8; mapped.len().div_ceil(4096)];
    // SAFETY: the mapping is as long as stated, and there is a byte for each of its pages.
    let asked = unsafe { libc::mincore(mapped.as_ptr().cast_mut().cast(), mapped.len(), pages.as_mut_ptr()) };
    assert_eq!(asked, 0, "mincore");
    pages.iter().filter(|page| **page & 1 == 1).count() as u64 * 4096
}

fn through_the_daemon(scale: &Scale, table: &mut Table) {
    let daemon = with_checkpoint(scale, &[NO_PASSTHROUGH]);
    let blobs = large(&daemon.state().join("blobs"));
    let files = large(&daemon.attach("job", "k"));
    let mut rates = Vec::new();
    for _ in 0..scale.rounds {
        // The mount's own pages go, the blob's come back: every byte is asked of the daemon.
        shell("sync; echo 3 > /proc/sys/vm/drop_caches", &[]).ok();
        warm(&blobs);
        rates.push(read_rate(&files));
    }
    table.row(
        "first read without passthrough",
        three(best(rates)),
        ">= 2 GB/s",
        "passthrough = never, blob in page cache",
    );
}

/// A daemon with one checkpoint `k` of one large file; its source is gone.
pub(crate) fn with_checkpoint(scale: &Scale, env: &[(&'static str, &str)]) -> Daemon {
    let daemon = Daemon::start_with(env);
    let source = daemon.place().dir("source");
    Tensors::new(seed(), scale.tensors, scale.tensor_bytes).write_safetensors(&source.join("model.safetensors"));
    daemon.capture("k", &source);
    fs::remove_dir_all(&source).unwrap();
    daemon
}

/// Large files below a directory.
pub(crate) fn large(root: &Path) -> Vec<PathBuf> {
    let found: Vec<_> =
        regular_files(root).into_iter().filter(|path| path.metadata().unwrap().len() > 1 << 20).collect();
    assert!(!found.is_empty(), "no large file below {}", root.display());
    found
}

/// Brings files into the page cache.
pub(crate) fn warm(files: &[PathBuf]) {
    read_rate(files);
}

/// GB/s of reading the files from front to back.
pub(crate) fn read_rate(files: &[PathBuf]) -> f64 {
    let mut buffer = vec![0; 1 << 20];
    let (mut bytes, began) = (0_u64, Instant::now());
    for path in files {
        let mut file = File::open(path).unwrap();
        loop {
            let read = file.read(&mut buffer).unwrap();
            if read == 0 {
                break;
            }
            bytes += read as u64;
        }
    }
    float(bytes) / 1e9 / began.elapsed().as_secs_f64()
}

/// GB/s of touching a byte of every page of the files, mapped.
pub(crate) fn map_rate(files: &[PathBuf]) -> f64 {
    let (mut bytes, mut sum, began) = (0_u64, 0_u64, Instant::now());
    for path in files {
        let file = File::open(path).unwrap();
        // SAFETY: neither a sealed blob nor a file of the mount is written or truncated while it is mapped.
        let mapped = unsafe { memmap2::Mmap::map(&file) }.unwrap();
        sum += mapped.iter().step_by(4096).map(|byte| u64::from(*byte)).sum::<u64>();
        bytes += mapped.len() as u64;
    }
    std::hint::black_box(sum);
    float(bytes) / 1e9 / began.elapsed().as_secs_f64()
}

//! What the disk gave up, over the bytes of the unique tensors.

use std::path::Path;

use super::support::corpus::{Tensors, seed};
use super::support::daemon::Daemon;
use super::support::files::disk_bytes;
use super::table::{Scale, Table, float, three};

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    let base = Tensors::new(seed(), scale.tensors, scale.tensor_bytes);
    let tuned = base.fine_tuned(3);
    let ideal = base.bytes() + base.bytes_each();
    let write_base = |path: &Path| base.write_safetensors(&path.join("model.safetensors"));
    row(
        table,
        "base and fine-tune",
        ideal,
        &[&write_base, &|path| tuned.write_safetensors(&path.join("m.safetensors"))],
    );
    row(
        table,
        "safetensors and torch zip",
        base.bytes(),
        &[&write_base, &|path| base.write_torch_zip(&path.join("m.bin"))],
    );
}

/// Captures what the writers write, one checkpoint each.
fn row(table: &mut Table, name: &str, ideal: u64, writers: &[&dyn Fn(&Path)]) {
    let daemon = Daemon::start();
    for (index, write) in writers.iter().enumerate() {
        let source = daemon.place().dir("source");
        write(&source);
        daemon.capture(&format!("k{index}"), &source);
        std::fs::remove_dir_all(&source).unwrap();
    }
    let found = disk_bytes(daemon.state());
    let detail = format!("{} MiB in the state directory, {} MiB are ideal", found >> 20, ideal >> 20);
    table.row(
        &format!("{name}: disk / unique tensors"),
        three(float(found) / float(ideal)),
        "<= 1.02, <= 1.05 across formats",
        detail,
    );
}

//! The figures by which ckptd is judged, each a ratio of two things measured in the same run.
//!
//! `cargo bench` prints them all, `cargo bench -- read ingest` those whose names begin so. `CKPTD_BENCH_SHORT=1` takes small
//! checkpoints and few rounds: enough to see that everything runs, too little to quote. Needs root, some GiB of disk
//! that is not tmpfs, and an otherwise idle machine; machines are noisy, so every figure is the best of several rounds.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a figure that cannot be taken ends the run"
)]

mod attach;
mod dedup;
mod idle;
mod ingest;
mod lazy;
mod many;
mod memory;
mod objects;
mod read;
mod remove;
mod scrub;
#[path = "../../tests/support/mod.rs"]
mod support;
mod table;
mod transfer;
mod unpack;
mod walk;
mod warm;
mod web;

use table::{Scale, Table};

/// Takes some figures at a scale, in rows of the table.
type Take = fn(&Scale, &mut Table);

const FIGURES: &[(&str, Take)] = &[
    ("read", read::take),
    ("memory", memory::take),
    ("ingest", ingest::take),
    ("objects", objects::take),
    ("web", web::take),
    ("transfer", transfer::take),
    ("unpack", unpack::take),
    ("lazy", lazy::take),
    ("dedup", dedup::take),
    ("attach", attach::take),
    ("walk", walk::take),
    ("idle", idle::take),
    ("many", many::take),
    ("remove", remove::take),
    ("scrub", scrub::take),
];

fn main() {
    let wished: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let scale = Scale::from_environment();
    let mut table = Table::new(&scale);
    for (name, take) in FIGURES {
        if wished.is_empty() || wished.iter().any(|wish| name.starts_with(wish.as_str())) {
            eprintln!("taking: {name}");
            take(&scale, &mut table);
        }
    }
    print!("{table}");
}

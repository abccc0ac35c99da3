//! Jobs that read while it arrives through a network that falters: they see the right bytes, later.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::buckets::start;
use crate::support::corpus::{Random, random_file, seed};
use crate::support::daemon::Daemon;
use crate::support::files::{assert_mounted, regular_files};
use crate::support::network::Network;
use crate::support::place::Place;
use crate::support::ran::run;
use crate::support::webserver::nginx;

const MIB: u64 = 1 << 20;

/// Read at a time, each from a place of its own.
const PIECE: u64 = 200_000;

const READERS: usize = 6;

/// A network before the server at `port`.
pub(super) fn before(port: u16) -> Network {
    Network::before(port, seed())
}

/// A checkpoint of two large files and some small ones.
pub(super) fn plain_tree(root: &Path) {
    random_file(&root.join("weights.bin"), 21, 40 * MIB + 7);
    fs::create_dir_all(root.join("deep/er")).unwrap();
    random_file(&root.join("deep/few.bin"), 22, 9 * MIB);
    fs::write(root.join("deep/empty"), "").unwrap();
    for number in 0..20 {
        fs::write(root.join(format!("deep/er/{number}.json")), format!("{{\"n\": {number}}}")).unwrap();
    }
}

/// Attaches `name`, which is being created, before it is here, reads all of it in random order and compares every byte; every trouble of
/// `network` is met meanwhile.
pub(super) fn assert_read_lazily(daemon: &Daemon, network: &Network, name: &str, expected: &Path) {
    let target = daemon.place().dir(&format!("lazily-{name}"));
    let ran = run(daemon.ctl_command().args(["attach", "job", name, "--lazy", "--at"]).arg(&target)).ok();
    assert!(!ran.stderr.contains("waited until"), "{}", ran.stderr);
    assert_eq!(daemon.json(&["get", name])["state"], "filling", "it was here before anybody read it");
    let mut pieces: Vec<_> = regular_files(expected)
        .into_iter()
        .flat_map(|file| {
            let size = file.metadata().unwrap().len();
            (0..size.div_ceil(PIECE)).map(move |piece| (file.clone(), piece * PIECE, size))
        })
        .collect();
    let mut random = Random::new(seed());
    for at in (1..pieces.len()).rev() {
        pieces.swap(at, usize::try_from(random.below(at as u64 + 1)).unwrap());
    }
    thread::scope(|scope| {
        for share in pieces.chunks(pieces.len().div_ceil(READERS)) {
            let target = &target;
            scope.spawn(move || {
                for (file, offset, size) in share {
                    let shown = target.join(file.strip_prefix(expected).unwrap());
                    let length = usize::try_from(PIECE.min(size - offset)).unwrap();
                    let (mut wanted, mut found) = (vec![0; length], vec![0; length]);
                    File::open(file).unwrap().read_exact_at(&mut wanted, *offset).unwrap();
                    let read = File::open(&shown).and_then(|open| open.read_exact_at(&mut found, *offset));
                    read.unwrap_or_else(|error| panic!("{} at {offset}: {error}", shown.display()));
                    assert!(wanted == found, "{} at {offset}: other bytes", shown.display());
                }
            });
        }
    });
    daemon.wait_state(name, "ready", Duration::from_secs(120));
    assert_mounted(expected, &target);
    assert_eq!(network.troubles_left(), [], "not all was met");
}

#[test]
fn jobs_that_read_a_web_site_lazily_see_nothing_of_a_network_that_falters() {
    let place = Place::new();
    let tree = place.dir("tree");
    plain_tree(&tree);
    let server = nginx(&place, &tree, "");
    let network = before(server.port);
    let daemon = Daemon::start_with(super::buckets::HASTY);
    start(&daemon, "web", "k", &network.url("/"), &[]);
    assert_read_lazily(&daemon, &network, "k", &tree);
}

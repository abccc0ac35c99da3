//! Files of the web behind nginx-like servers, here Python's own.

use std::fs;
use std::process::Command;

use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::faults::{Fault, Faults};
use crate::support::files::assert_same_tree;
use crate::support::place::Place;
use crate::support::server::{Server, free_port};

#[test]
fn a_file_comes_whole_through_resets_and_refusals() {
    let place = Place::new();
    let site = place.dir("site");
    let bytes: Vec<u8> = (0..9_000_000_u32).flat_map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(site.join("weights.bin"), bytes).unwrap();
    let port = free_port();
    let server = Server::start(
        Command::new("python3")
            .args(["-m", "http.server", "--bind", "127.0.0.1"])
            .arg(port.to_string())
            .current_dir(&site),
        port,
    );
    let faults = Faults::before(server.port);
    faults.spoil("/weights.bin", Fault::Status(503, "Retry-After: 0"), 1);
    faults.spoil("/weights.bin", Fault::Reset(10 << 20), 1);
    let daemon = Daemon::start_with(&[LOOPBACK]);
    daemon.ctl(&["create", "w", "--uri", &faults.url("/weights.bin"), "--wait"]).ok();
    assert_eq!(faults.faults_left(), 0);
    assert_same_tree(&site, &daemon.attach("job", "w"));
}

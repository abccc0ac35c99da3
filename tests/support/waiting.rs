//! What the kernel counts of a FUSE connection.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use super::place::Place;

/// How many requests of the file system of `file` are without an answer, each time it is called.
pub(crate) fn waiting_requests(place: &Place, file: &Path) -> impl Fn() -> usize + use<> {
    let connection = nix::libc::minor(file.metadata().unwrap().dev()).to_string();
    let control = place.dir(&format!("fusectl-{connection}"));
    mount(Some("none"), &control, Some("fusectl"), MsFlags::empty(), None::<&str>).unwrap();
    let connection = control.join(connection);
    move || std::fs::read_to_string(connection.join("waiting")).unwrap().trim().parse().unwrap()
}

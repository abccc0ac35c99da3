//! Which boot of the kernel this is: what holds within one alone is written with it.

use crate::error::{Error, Result};

const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// Identity of the running kernel: other after each boot.
///
/// # Errors
/// The I/O error.
pub fn boot_id() -> Result<String> {
    let id = std::fs::read_to_string(BOOT).map_err(|error| Error::io("reading", BOOT, error))?;
    Ok(id.trim().to_owned())
}

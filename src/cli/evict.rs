//! `evict`: bytes that can be fetched again, given up by hand.

use clap::Args;

use super::console::Console;
use super::exit::Ended;
use super::{document, text};
use crate::control::wire;

/// What a size may end in, and what it means.
const UNITS: &[(&str, u64)] = &[
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

/// Give up the bytes of checkpoints that can be fetched again; attaching one has it filled again
///
/// What a job has, what is pinned, and what was uploaded or captured stays.
#[derive(Args)]
pub(super) struct Evict {
    /// Ids or names
    #[arg(required_unless_present = "until")]
    checkpoints: Vec<String>,
    /// Evict the least recently used until the store can take so much: 20GiB, 500GB, or bytes
    #[arg(long, value_name = "FREE_BYTES", value_parser = parse_bytes)]
    until: Option<u64>,
    /// Only show what would be evicted
    #[arg(long)]
    dry_run: bool,
    /// Also what was filled with a `--credential`, or from a source that does not say what it has
    #[arg(long)]
    force: bool,
}

impl Evict {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let daemon = console.daemon().await?;
        let request = wire::EvictCheckpointsRequest {
            checkpoints: self.checkpoints,
            until_available_bytes: self.until.unwrap_or(0),
            dry_run: self.dry_run,
            force: self.force,
        };
        let evicted = daemon.ask(daemon.node().evict_checkpoints(request)).await?;
        console.answer(&document::Evicted::from(&evicted), || text::evicted(&evicted))
    }
}

/// A number of bytes, or of a unit.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size such as 20GiB, 500GB or 1048576");
    let unit = UNITS.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes)));
    let (number, unit) = unit.unwrap_or((text, 1));
    let number: u64 = number.trim().parse().map_err(|_| wrong())?;
    number.checked_mul(unit).filter(|bytes| *bytes > 0).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_a_number_with_or_without_its_unit() {
        for (text, bytes) in [("5", 5), ("5B", 5), ("2KiB", 2048), ("20 GiB", 20 << 30), ("500GB", 500_000_000_000)] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "-1", "1.5GiB", "lots", "0", "99999999999TiB"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}

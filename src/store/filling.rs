//! A blob being filled: units written in any order, a frontier behind which everything is here.
//!
//! Fetchers write ranges and report units complete; the sealer waits for the frontier and reads behind it. What is
//! *here* (readable) and what is *durable* are told apart: [`Filling::flush`] makes what was here when it began durable and
//! returns the bitmap for the row. Waiting uses a condition variable, so only blocking threads wait here, and they are woken
//! when the fill is given up.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::limits::UNIT_BYTES;

/// Which fill units of a file are here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitMap {
    size: u64,
    bits: Vec<u8>,
    frontier: u64,
    here: u64,
}

impl UnitMap {
    /// A map of nothing, of a file of `size` bytes.
    pub fn new(size: u64) -> Self {
        let units = size.div_ceil(UNIT_BYTES);
        let bytes = usize::try_from(units.div_ceil(8)).unwrap_or(usize::MAX);
        Self { size, bits: vec![0; bytes], frontier: 0, here: 0 }
    }

    /// A map of a file that is all here.
    pub fn full(size: u64) -> Self {
        let mut map = Self::new(size);
        (0..map.units()).for_each(|unit| _ = map.set(unit));
        map
    }

    /// A map of a file of which the units within its first `bytes` are here.
    pub fn of_beginning(size: u64, bytes: u64) -> Self {
        let mut map = Self::new(size);
        for unit in 0..map.units() {
            if map.range(unit).end > bytes {
                break;
            }
            map.set(unit);
        }
        map
    }

    /// A map from a row; a bitmap of another length counts as nothing here.
    pub fn from_bytes(size: u64, bits: &[u8]) -> Self {
        let mut map = Self::new(size);
        if bits.len() == map.bits.len() {
            (0..map.units()).filter(|unit| bit(bits, *unit)).for_each(|unit| _ = map.set(unit));
        }
        map
    }

    /// The bitmap for a row: bit n of byte n/8 is unit n.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.bits.clone()
    }

    /// Length of the file in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Number of units.
    pub fn units(&self) -> u64 {
        self.size.div_ceil(UNIT_BYTES)
    }

    /// Whether a unit is here.
    pub fn contains(&self, unit: u64) -> bool {
        unit < self.units() && bit(&self.bits, unit)
    }

    /// Notes a unit as here; its length in bytes, 0 if it was here before.
    pub fn set(&mut self, unit: u64) -> u64 {
        if unit >= self.units() || self.contains(unit) {
            return 0;
        }
        let range = self.range(unit);
        if let Some(byte) = usize::try_from(unit / 8).ok().and_then(|at| self.bits.get_mut(at)) {
            *byte |= 1 << (unit % 8);
        }
        self.here += range.end - range.start;
        while self.contains(self.frontier) {
            self.frontier += 1;
        }
        range.end - range.start
    }

    /// Bytes from the beginning that are all here.
    pub fn frontier_bytes(&self) -> u64 {
        (self.frontier * UNIT_BYTES).min(self.size)
    }

    /// Bytes here.
    pub fn here_bytes(&self) -> u64 {
        self.here
    }

    /// Whether everything is here.
    pub fn is_full(&self) -> bool {
        self.here == self.size
    }

    /// The bytes of a unit.
    pub fn range(&self, unit: u64) -> std::ops::Range<u64> {
        let start = (unit * UNIT_BYTES).min(self.size);
        start..(start + UNIT_BYTES).min(self.size)
    }

    /// Units that are not here, ascending.
    pub fn missing(&self) -> Vec<u64> {
        (self.frontier..self.units()).filter(|unit| !self.contains(*unit)).collect()
    }
}

fn bit(bits: &[u8], unit: u64) -> bool {
    usize::try_from(unit / 8).ok().and_then(|at| bits.get(at)).is_some_and(|byte| byte & (1 << (unit % 8)) != 0)
}

#[derive(Debug)]
struct Progress {
    units: UnitMap,
    given_up: bool,
}

/// A blob being filled: see the module's page.
#[derive(Debug)]
pub struct Filling {
    disk: Arc<Disk>,
    path: PathBuf,
    file: File,
    progress: Mutex<Progress>,
    moved: Condvar,
}

impl Filling {
    /// Creates or reopens file `number` of a flight with the units that are durable. Where the file is not there (a crash took it on its
    /// way to its final name) nothing is believed to be here.
    ///
    /// # Errors
    /// The I/O error.
    pub fn open(disk: Arc<Disk>, flight: &str, number: u64, units: UnitMap) -> Result<Self> {
        let path = disk.filling_path(flight, number);
        let (file, was_there) = disk.open_filling(flight, number, units.size)?;
        let units = if was_there { units } else { UnitMap::new(units.size) };
        Ok(Self { disk, path, file, progress: Mutex::new(Progress { units, given_up: false }), moved: Condvar::new() })
    }

    /// Creates file `number` of a flight of unknown size, to be written from its beginning; see [`Filling::set_complete`].
    ///
    /// # Errors
    /// The I/O error.
    pub fn open_unsized(disk: Arc<Disk>, flight: &str, number: u64) -> Result<Self> {
        Self::open(disk, flight, number, UnitMap::new(0))
    }

    /// Notes that a file of unknown size turned out to have `size` bytes, all of them here.
    ///
    /// # Errors
    /// The I/O error.
    pub fn set_complete(&self, size: u64) -> Result<()> {
        self.file.set_len(size).map_err(|error| Error::io("sizing", &self.path, error))?;
        self.locked().units = UnitMap::full(size);
        self.moved.notify_all();
        Ok(())
    }

    /// The file itself, for copies in the kernel.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is, for errors.
    pub fn path(&self) -> &PathBuf {
        &self.path
    }

    /// Whether all bytes of `range` are here.
    pub fn has(&self, range: std::ops::Range<u64>) -> bool {
        let units = &self.locked().units;
        let until = range.end.min(units.size());
        range.start >= until || (range.start / UNIT_BYTES..until.div_ceil(UNIT_BYTES)).all(|unit| units.contains(unit))
    }

    /// Length of the file in bytes.
    pub fn size(&self) -> u64 {
        self.locked().units.size()
    }

    /// Bytes here.
    pub fn here_bytes(&self) -> u64 {
        self.locked().units.here_bytes()
    }

    /// A copy of the map of what is here.
    pub fn units(&self) -> UnitMap {
        self.locked().units.clone()
    }

    /// Writes bytes; they count as here once their unit is completed.
    ///
    /// # Errors
    /// `NO_SPACE`, the I/O error.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|error| Error::io("writing", &self.path, error))
    }

    /// Refuses `bytes` more where the disk has no room for them.
    ///
    /// # Errors
    /// `NO_SPACE`, the I/O error.
    pub fn check_room(&self, bytes: u64) -> Result<()> {
        self.disk.check_room(bytes)
    }

    /// Reads bytes behind the frontier.
    ///
    /// # Errors
    /// The I/O error.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|error| Error::io("reading", &self.path, error))
    }

    /// Notes a unit as here, starts its write-back, which may wait for the disk, and wakes the sealer. Returns its length in bytes, 0 if it was here
    /// before.
    pub fn complete(&self, unit: u64) -> u64 {
        let range = {
            let units = &self.locked().units;
            if units.contains(unit) {
                return 0;
            }
            units.range(unit)
        };
        self.disk.begin_write_back(&self.file, range);
        let new = self.locked().units.set(unit);
        self.moved.notify_all();
        new
    }

    /// Wakes everybody who waits, for good: the fill failed.
    pub fn give_up(&self) {
        self.locked().given_up = true;
        self.moved.notify_all();
    }

    /// Says so once the fill is given up, to whoever fills without waiting.
    ///
    /// # Errors
    /// Cancelled.
    pub fn check_wanted(&self) -> Result<()> {
        if self.locked().given_up { Err(given_up()) } else { Ok(()) }
    }

    /// Waits until more than `bytes` are here from the beginning, or all; returns the frontier. Blocks.
    ///
    /// # Errors
    /// Cancelled once the fill is given up.
    pub fn wait_beyond(&self, bytes: u64) -> Result<u64> {
        let mut progress = self.locked();
        loop {
            if progress.given_up {
                return Err(given_up());
            }
            let frontier = progress.units.frontier_bytes();
            if frontier > bytes || frontier == progress.units.size {
                return Ok(frontier);
            }
            progress = self.moved.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Makes what is here now durable and returns its map. Blocks.
    ///
    /// # Errors
    /// The I/O error, after which the store is poisoned.
    pub fn flush(&self) -> Result<UnitMap> {
        let units = self.units();
        self.disk.sync_file(&self.file, &self.path)?;
        Ok(units)
    }

    fn locked(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn given_up() -> Error {
    Error::new(Kind::Cancelled, "FILL_GIVEN_UP", "the fill was given up")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frontier_is_the_first_gap() {
        let mut map = UnitMap::new(3 * UNIT_BYTES + 5);
        assert_eq!((map.units(), map.frontier_bytes(), map.is_full()), (4, 0, false));
        map.set(3);
        map.set(0);
        assert_eq!((map.frontier_bytes(), map.here_bytes()), (UNIT_BYTES, UNIT_BYTES + 5));
        assert_eq!(map.missing(), [1, 2]);
        map.set(1);
        map.set(2);
        map.set(2);
        assert_eq!((map.frontier_bytes(), map.is_full()), (3 * UNIT_BYTES + 5, true));
    }

    #[test]
    fn a_map_survives_its_row_and_a_foreign_row_counts_as_nothing() {
        let mut map = UnitMap::new(20 * UNIT_BYTES);
        [0, 1, 7, 8, 19].into_iter().for_each(|unit| _ = map.set(unit));
        assert_eq!(UnitMap::from_bytes(20 * UNIT_BYTES, &map.to_bytes()), map);
        assert_eq!(UnitMap::from_bytes(20 * UNIT_BYTES, &[0xff]).here_bytes(), 0);
    }

    #[test]
    fn an_empty_file_is_full() {
        let map = UnitMap::new(0);
        assert!(map.is_full());
        assert_eq!((map.units(), map.frontier_bytes()), (0, 0));
    }
}

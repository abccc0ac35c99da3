//! How much room the store has, and when it is short of it.
//!
//! The store may occupy what it occupies already and what its filesystem has free beyond the reserve, and no more than the operator's
//! capacity. So what others put on the filesystem makes its part smaller, and never makes it look full by itself. What counts as occupied is
//! blobs, what fills, what was put aside, and scratch; the catalog is left to the reserve.

use std::sync::Arc;

use super::Store;
use crate::catalog::{accounting, retention};
use crate::digest::Digest;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::limits::DISK_RESERVE_BYTES;

/// What operators allow the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes that it may occupy; 0: as many as the filesystem has.
    pub capacity_bytes: u64,
    /// Above so many thousandths of what it may occupy, bytes are given up.
    pub high_thousandths: u64,
    /// Down to so many.
    pub low_thousandths: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { capacity_bytes: 0, high_thousandths: 900, low_thousandths: 800 }
    }
}

/// The store's room now, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// That it may occupy.
    pub whole_bytes: u64,
    /// That it occupies.
    pub used_bytes: u64,
    /// Above which bytes are given up.
    pub high_bytes: u64,
    /// Down to which they are.
    pub low_bytes: u64,
}

impl Room {
    /// The room of a store that occupies `used_bytes` where `free_bytes` are free.
    fn of(bounds: Bounds, used_bytes: u64, free_bytes: u64) -> Self {
        let most = used_bytes.saturating_add(free_bytes.saturating_sub(DISK_RESERVE_BYTES));
        let whole_bytes = if bounds.capacity_bytes == 0 { most } else { most.min(bounds.capacity_bytes) };
        let part = |thousandths: u64| {
            u64::try_from(u128::from(whole_bytes) * u128::from(thousandths) / 1000).unwrap_or(whole_bytes)
        };
        Self {
            whole_bytes,
            used_bytes,
            high_bytes: part(bounds.high_thousandths),
            low_bytes: part(bounds.low_thousandths),
        }
    }

    /// That can be filled now.
    pub fn available_bytes(&self) -> u64 {
        self.whole_bytes.saturating_sub(self.used_bytes)
    }

    /// That can come before anything has to be given up.
    pub fn below_high_bytes(&self) -> u64 {
        self.high_bytes.saturating_sub(self.used_bytes)
    }

    /// That are to be given up; 0 below the high watermark.
    pub fn excess_bytes(&self) -> u64 {
        if self.used_bytes > self.high_bytes { self.used_bytes - self.low_bytes } else { 0 }
    }
}

impl Store {
    /// The same within `bounds`.
    #[must_use]
    pub fn within(self, bounds: Bounds) -> Self {
        Self { bounds, ..self }
    }

    /// What operators allow it.
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// The room there is now. Goes through what fills, which is little.
    ///
    /// # Errors
    /// Those of the catalog; the I/O error.
    pub async fn room(&self) -> Result<Room> {
        let totals = self.catalog().read(accounting::totals).await?;
        let disk = Arc::clone(self.disk());
        let look = move |disk: &Disk| {
            let occupied = disk.occupied()?;
            let others = occupied.filling_bytes + occupied.quarantine_bytes + occupied.scratch_bytes;
            Ok::<_, Error>((others, disk.free_bytes()?))
        };
        let (others, free_bytes) = tokio::task::spawn_blocking(move || look(&disk))
            .await
            .map_err(|error| Error::internal("looking at the disk ended early").because(error))??;
        Ok(Room::of(self.bounds, totals.physical_bytes() + others, free_bytes))
    }

    /// The room there is when `is_enough`, or when what removals under way give back has come: see [`Store::under_way`].
    ///
    /// # Errors
    /// As [`Store::room`].
    pub async fn room_when(&self, is_enough: impl Fn(&Room) -> bool) -> Result<Room> {
        let mut under_way = self.under_way();
        loop {
            let room = self.room().await?;
            if is_enough(&room) || !under_way.go_on().await {
                return Ok(room);
            }
        }
    }

    /// Whether the blob is never punched now: somebody reads it, or may.
    pub fn is_spared(&self, digest: &Digest) -> bool {
        self.holds.is_spared(digest)
    }

    /// Gives up copies of what blobs borrow that nobody reads until `bytes` came of it or none is left; what came of it.
    ///
    /// # Errors
    /// Poisoned store; the I/O error.
    pub(super) async fn give_up_unread_duplicates(&self, bytes: u64) -> Result<u64> {
        let mut freed = 0;
        for duplicate in self.catalog().read(retention::duplicates).await? {
            if freed >= bytes {
                break;
            }
            if !self.is_spared(&duplicate.blob.digest) {
                freed += self.give_up_duplicates(duplicate.blob).await?;
            }
        }
        Ok(freed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn room(capacity_bytes: u64, used: u64, free: u64) -> Room {
        Room::of(Bounds { capacity_bytes, ..Bounds::default() }, used, free)
    }

    #[test]
    fn a_store_without_a_capacity_may_have_what_is_free_less_the_reserve() {
        let room = room(0, 5 * GIB, 5 * GIB + DISK_RESERVE_BYTES);
        assert_eq!((room.whole_bytes, room.available_bytes()), (10 * GIB, 5 * GIB));
        assert_eq!((room.below_high_bytes(), room.excess_bytes()), (4 * GIB, 0));
    }

    #[test]
    fn what_others_take_of_the_filesystem_makes_the_room_smaller_and_not_empty() {
        let room = room(100 * GIB, GIB, GIB + DISK_RESERVE_BYTES);
        assert_eq!((room.whole_bytes, room.available_bytes(), room.excess_bytes()), (2 * GIB, GIB, 0));
    }

    #[test]
    fn above_the_high_watermark_everything_down_to_the_low_one_is_too_much() {
        for (used, excess) in [(900, 0), (901, 101), (1000, 200), (1100, 300)] {
            assert_eq!(room(1000, used, GIB).excess_bytes(), excess, "{used}");
        }
        assert_eq!(room(1000, 1100, GIB).available_bytes(), 0);
    }

    #[test]
    fn a_full_filesystem_has_no_room_and_is_short_of_it() {
        let room = room(0, 10 * GIB, DISK_RESERVE_BYTES / 2);
        assert_eq!((room.available_bytes(), room.excess_bytes()), (0, 2 * GIB));
    }
}

//! Whether there is room for what is to come: decided before a byte is fetched, and again as bytes arrive whose number nobody knew.
//!
//! What a flight was admitted for is promised to it until it has taken it from the disk, and counts as gone for all others. Flights are
//! admitted one after the other: of two that begin in the same instant the second finds what the first was promised.
//!
//! What there is no room for may get it: what removals under way give back is waited for, within bounds ([`Store::under_way`]); then retention is
//! asked to give up as much as is lacking ([`MakeRoom`]), and it is looked again. Each round has given something back, so there is an end to
//! them. Both wait for the publisher, which waits for nobody here.
//!
//! [`Store::under_way`]: crate::store::Store::under_way
//!
//! Pieces are small and many, and figures cost a look at the disk: those of a moment ago are used as long as they last.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;

use super::flight::Flight;
use super::plan::{self, Plan, Sizes};
use super::progress::Progress;
use super::{Ingests, Shared, lock};
use crate::catalog::retention::Standing;
use crate::error::{Error, Result};
use crate::store::room::Room;

/// Gives up bytes that the store can have again, as many as are asked for or none: how many came of it, and what keeps the rest.
pub type MakeRoom = Arc<dyn Fn(u64) -> BoxFuture<'static, Result<(u64, Standing)>> + Send + Sync>;

/// How long figures are good for pieces: in that time little comes that they do not know of.
const FIGURES_KEPT: Duration = Duration::from_millis(100);

/// What was available lately, less what was admitted since.
#[derive(Debug, Default)]
pub(super) struct Lately(Mutex<Option<(Instant, u64)>>);

impl Lately {
    fn set(&self, available_bytes: u64) {
        *lock(&self.0) = Some((Instant::now(), available_bytes));
    }

    /// Takes `bytes` of it, if there are so many and it is still good.
    fn take(&self, bytes: u64) -> bool {
        let mut known = lock(&self.0);
        match known.as_mut() {
            Some((at, available)) if at.elapsed() < FIGURES_KEPT && *available >= bytes => {
                *available -= bytes;
                true
            }
            _ => false,
        }
    }
}

impl Ingests {
    /// Bytes that flights under way still have to write.
    pub fn promised_bytes(&self) -> u64 {
        self.0.promised_bytes()
    }
}

impl Shared {
    /// Promises a flight the bytes that it lacks, and lets `progress` say what is to come. Its files occupy `occupied_bytes` already: what a run before
    /// wrote and did not record is written once more at the same place, and takes nothing.
    ///
    /// # Errors
    /// `NO_SPACE` with the figures; nothing is promised then.
    pub(super) async fn admit_flight(
        &self,
        progress: &Progress,
        sizes: &Sizes,
        plan: &Plan,
        occupied_bytes: u64,
    ) -> Result<()> {
        let _one_at_a_time = self.admission().await?;
        let unrecorded = occupied_bytes.saturating_sub(plan.begun_bytes);
        self.admit_bytes(plan.occupying_bytes().saturating_sub(unrecorded)).await?;
        progress.expect(sizes.known_bytes, sizes.files);
        progress.resume(plan.here_bytes);
        Ok(())
    }

    /// Refuses `bytes` that nothing was promised for where there is no room for them. Whoever brings them was charged with them before: others
    /// must not be evicted for what his quota does not allow.
    ///
    /// # Errors
    /// `NO_SPACE` with the figures.
    pub(super) async fn admit_more(&self, bytes: u64) -> Result<()> {
        if self.lately.take(bytes) {
            return Ok(());
        }
        let _one_at_a_time = self.admission().await?;
        self.admit_bytes(bytes).await
    }

    async fn admission(&self) -> Result<tokio::sync::SemaphorePermit<'_>> {
        self.admission.acquire().await.map_err(|_| Error::internal("admission is closed"))
    }

    async fn admit_bytes(&self, bytes: u64) -> Result<()> {
        loop {
            let available_of = |room: &Room| room.available_bytes().saturating_sub(self.promised_bytes());
            let available = available_of(&self.store.room_when(|room| bytes <= available_of(room)).await?);
            if bytes <= available {
                self.lately.set(available - bytes);
                return Ok(());
            }
            let (freed, standing) = (self.make_room)(bytes - available).await?;
            if freed == 0 {
                return Err(plan::no_space(bytes, available, &standing));
            }
        }
    }

    /// Bytes that flights under way still have to write: promised to them, though not taken yet.
    fn promised_bytes(&self) -> u64 {
        let flights = lock(&self.flights);
        let flying = flights.values().filter_map(std::sync::Weak::upgrade);
        let writing = flying.filter(|flight: &Arc<Flight>| flight.in_place().is_none());
        let readings = writing.map(|flight| flight.progress().reading());
        readings.map(|reading| reading.bytes_total.saturating_sub(reading.bytes_done)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::Settings;
    use crate::store::Store;
    use crate::store::room::Bounds;

    /// Files of 16 KiB that are on their way out.
    const FILES: u64 = 4000;
    const FILE: &[u8] = &[7; 16 << 10];

    #[tokio::test(flavor = "multi_thread")]
    async fn bytes_on_their_way_out_are_waited_for_and_nothing_is_given_up_in_their_place() {
        let directory = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/target")).unwrap();
        let path = directory.path().to_owned();
        let store = tokio::task::spawn_blocking(move || Store::open(&path)).await.unwrap().unwrap();
        let store = store.within(Bounds { capacity_bytes: 70 << 20, ..Bounds::default() });
        let disk = store.disk().clone();
        disk.begin_flight("f").unwrap();
        (0..FILES).for_each(|number| disk.write_filling("f", number, FILE).unwrap());
        let make_room: MakeRoom = Arc::new(|_| panic!("nothing is to be given up"));
        let ingests = Ingests::new(store.clone(), Arc::new(|_, _, _| panic!("unused")), make_room, Settings::default());
        let removing = store.clone();
        let removal = tokio::spawn(async move { removing.remove_flight("f").await });
        while disk.filling_path("f", 0).exists() {
            tokio::task::yield_now().await;
        }
        ingests.0.admit_more(65 << 20).await.unwrap();
        removal.await.unwrap().unwrap();
    }

    #[test]
    fn figures_of_a_moment_ago_are_used_as_long_as_they_last() {
        let lately = Lately::default();
        assert!(!lately.take(0), "nothing is known yet");
        lately.set(10);
        assert!(lately.take(6) && !lately.take(5) && lately.take(4));
        *lock(&lately.0) = Some((Instant::now() - 2 * FIGURES_KEPT, 10));
        assert!(!lately.take(1), "they are old");
    }
}

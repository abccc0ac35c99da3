//! Which units of a flight are durable: told to the catalog while they arrive, and once more before a flight that will go on is ended.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::Arriving;
use crate::catalog::fills;
use crate::error::Result;
use crate::ingest::fetch::blocking;
use crate::ingest::plan::ToFill;
use crate::store::filling::Filling;

/// Longest time between two recordings of durable units while bytes arrive.
const RECORD_EVERY: Duration = Duration::from_secs(1);

impl Arriving {
    /// Records durable units of all large files for as long as it runs; ends only with an error.
    pub(in crate::ingest) async fn record_units(&self) -> Result<()> {
        let mut recorded: HashMap<u64, u64> = HashMap::new();
        loop {
            tokio::time::sleep(RECORD_EVERY).await;
            self.record_grown(&mut recorded).await?;
        }
    }

    /// Records what has come of all large files so far, so that the next attempt need not fetch it.
    ///
    /// # Errors
    /// Those of the disk and of the catalog.
    pub(in crate::ingest) async fn record_now(&self) -> Result<()> {
        self.record_grown(&mut HashMap::new()).await
    }

    /// Records durable units of those large files that have grown since; `recorded` is what each had then, by number.
    async fn record_grown(&self, recorded: &mut HashMap<u64, u64>) -> Result<()> {
        for (file, filling) in self.fillings() {
            let here = filling.here_bytes();
            if recorded.insert(file.number, here) != Some(here) && here > 0 {
                self.record(&file, &filling).await?;
            }
        }
        Ok(())
    }

    async fn record(&self, file: &ToFill, filling: &Arc<Filling>) -> Result<()> {
        let flushing = filling.clone();
        let units = blocking(move || flushing.flush()).await?;
        let (key, path, number) = (self.key.clone(), file.path.clone(), file.number);
        let (size, bits) = (file.file.size.unwrap_or(0), units.to_bytes());
        let record = move |tx: &rusqlite::Connection| fills::set_units(tx, &key, path.as_bytes(), number, size, &bits);
        self.store.catalog().write(record).await
    }
}

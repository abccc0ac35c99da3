//! What a scheduler asks before a job runs: bring it here, and how long would that take?

use super::caller::Caller;
use super::{Floors, wire};
use crate::catalog::checkpoints::{self as rows, State};
use crate::catalog::retention;
use crate::error::{Error, Result};
use crate::source::Credentials;
use crate::units::now_unix_ms;

impl Floors {
    /// Begins to bring a checkpoint here if nothing does; with `memory` also into the page cache, and then returns when it is there.
    pub(super) async fn prefetch(
        &self,
        request: wire::PrefetchCheckpointRequest,
        caller: &Caller,
    ) -> Result<wire::PrefetchCheckpointResponse> {
        self.admit()?;
        let record = self.find(request.checkpoint, caller).await?;
        let _kept = self.retention.keep(vec![record.id.clone()]);
        self.bring_back(&record).await?;
        let used = record.id.clone();
        self.store.catalog().write(move |tx| retention::touch(tx, &used, now_unix_ms())).await?;
        let idle = self.ingests.progress(&record.id).is_none();
        // One that has become ready meanwhile is left alone by whoever begins to fill it.
        if matches!(record.state, State::New | State::Filling) && idle {
            self.start_unless_sent(&record, Credentials::default());
        }
        if !request.memory {
            let record = self.find(record.id, caller).await?;
            return Ok(wire::PrefetchCheckpointResponse {
                checkpoint: Some(self.show(record, caller).await?),
                memory_bytes: 0,
            });
        }
        let record = self.until_ready(&record.id).await?;
        if record.in_place.is_some() {
            let message =
                format!("`{}` stays in its datastore and cannot be brought into memory from here", record.name);
            return Err(Error::wrong_state("SERVED_IN_PLACE", message).remedy("create it with `copy=true`"));
        }
        let digest = record.manifest.ok_or_else(|| Error::internal("a ready checkpoint has no manifest"))?;
        let manifest = std::sync::Arc::new(self.store.catalog().read(move |tx| rows::manifest(tx, &digest)).await?);
        let reader = self.store.reader(digest, manifest.clone()).await?;
        self.store.hydrate(digest, &reader, || self.ingests.promised_bytes()).await?;
        let store = self.store.clone();
        let memory_bytes = tokio::task::spawn_blocking(move || {
            let _held = reader;
            store.warm(&manifest)
        })
        .await
        .map_err(|error| Error::internal("prefetching ended early").because(error))??;
        Ok(wire::PrefetchCheckpointResponse { checkpoint: Some(self.show(record, caller).await?), memory_bytes })
    }

    /// What is expected of bringing a checkpoint here.
    pub(super) async fn estimate(
        &self,
        request: wire::EstimateCheckpointRequest,
        caller: &Caller,
    ) -> Result<wire::Estimate> {
        let record = self.find(request.checkpoint, caller).await?;
        let estimate = self.ingests.estimate(&record).await?;
        Ok(wire::Estimate {
            checkpoint: record.id,
            missing_bytes: estimate.missing_bytes,
            from: estimate.from,
            rate_bytes_per_s: estimate.bytes_per_s,
            expected_ms: estimate.expected.map(|expected| u64::try_from(expected.as_millis()).unwrap_or(u64::MAX)),
        })
    }
}

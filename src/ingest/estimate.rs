//! What an ingest still has to bring and how long that may take: from what is here and what its source gave before.
//!
//! A rate is noted when a flight has brought at least [`RATE_FROM_BYTES`]; rates of one place are averaged, each owner's for itself. Nothing here is exact and nothing
//! depends on it; `status` keeps every estimate beside its outcome, so that operators see what it is worth.

use std::time::Duration;

use super::{Ingests, Shared};
use crate::catalog::checkpoints::{Origin, Record, State};
use crate::catalog::forecasts::{self, Estimated};
use crate::error::Result;
use crate::source;
use crate::store::filling::UnitMap;
use crate::units::now_unix_ms;

/// Less than this says nothing of a rate.
const RATE_FROM_BYTES: u64 = 8 << 20;

/// What is expected of bringing a checkpoint here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes that are not here; `None` while the listing is not known.
    pub missing_bytes: Option<u64>,
    /// Where they come from: the type of the source, and its host where there is one.
    pub from: String,
    /// Bytes a second that it gives: now, or as it did before; `None` where it has not been seen.
    pub bytes_per_s: Option<u64>,
    /// Time until it is ready; `None` where it cannot be told.
    pub expected: Option<Duration>,
}

/// Where an origin's bytes come from, for people and for its rate.
pub(super) fn place_of(origin: &Origin) -> String {
    let uri = origin.options.get("endpoint").unwrap_or(&origin.uri);
    let shown = origin.kind.parse().map_or_else(|_| String::new(), |kind| source::shown_uri(kind, uri));
    let host = shown.split_once("://").map_or("", |(_, rest)| rest.split('/').next().unwrap_or_default());
    if host.is_empty() { origin.kind.clone() } else { format!("{} {host}", origin.kind) }
}

impl Ingests {
    /// What is expected of bringing the checkpoint of `record` here.
    ///
    /// # Errors
    /// Those of the catalog.
    pub async fn estimate(&self, record: &Record) -> Result<Estimate> {
        let from = place_of(&record.origin);
        if record.state == State::Ready {
            return Ok(Estimate { missing_bytes: Some(0), from, bytes_per_s: None, expected: Some(Duration::ZERO) });
        }
        let (place, id, owner) = (from.clone(), record.id.clone(), record.owner.clone());
        let known = self.0.store.catalog().read(move |tx| {
            let flight = crate::catalog::checkpoints::flight_of(tx, &id)?;
            Ok((forecasts::rate(tx, &owner, &place)?, crate::catalog::fills::of_flight(tx, &flight)?))
        });
        let (before, rows) = known.await?;
        let now = self.progress(&record.id);
        let durable = rows.iter().map(|row| match row.sealed {
            Some(_) => row.size,
            None => UnitMap::from_bytes(row.size, &row.units).here_bytes(),
        });
        let durable: u64 = durable.sum();
        let missing_bytes = match now.filter(|now| now.bytes_total > 0) {
            Some(now) => Some(now.bytes_total.saturating_sub(now.bytes_done)),
            None => (record.logical_bytes > 0).then(|| record.logical_bytes.saturating_sub(durable)),
        };
        let bytes_per_s = now.map(|now| now.rate_bytes_per_s).filter(|rate| *rate > 0).or(before);
        let expected = missing_bytes.zip(bytes_per_s).map(|(bytes, rate)| time_for(bytes, rate));
        Ok(Estimate { missing_bytes, from, bytes_per_s, expected })
    }

    /// The latest estimates with what became of them, newest first.
    ///
    /// # Errors
    /// Those of the catalog.
    pub async fn estimates(&self, most: usize) -> Result<Vec<Estimated>> {
        self.0.store.catalog().read(move |tx| forecasts::estimates(tx, most)).await
    }
}

impl Shared {
    /// Notes what is expected of `bytes` from the origin of `record`, where anything is.
    pub(super) async fn note_estimate(&self, record: &Record, bytes: u64) -> Result<()> {
        let (checkpoint, owner, place) = (record.id.clone(), record.owner.clone(), place_of(&record.origin));
        let note = move |tx: &rusqlite::Connection| match forecasts::rate(tx, &owner, &place)? {
            None => Ok(()),
            Some(rate) => {
                let expected_ms = u64::try_from(time_for(bytes, rate).as_millis()).unwrap_or(u64::MAX);
                let at_ms = now_unix_ms();
                forecasts::note_estimate(tx, &Estimated { checkpoint, at_ms, bytes, expected_ms, took_ms: None })
            }
        };
        self.store.catalog().write(note).await
    }

    /// Notes how fast `place` gave `bytes` to `owner`.
    pub(super) async fn note_rate(&self, owner: &str, place: &str, bytes: u64, took: Duration) {
        if bytes < RATE_FROM_BYTES {
            return;
        }
        let rate = u64::try_from(u128::from(bytes) * 1000 / took.as_millis().max(1)).unwrap_or(u64::MAX);
        let (owner, place) = (owner.to_owned(), place.to_owned());
        let note = move |tx: &rusqlite::Connection| forecasts::note_rate(tx, &owner, &place, rate, now_unix_ms());
        let noted = self.store.catalog().write(note).await;
        if let Err(error) = noted {
            tracing::debug!(error = %error.report(), "a rate could not be noted");
        }
    }
}

fn time_for(bytes: u64, bytes_per_s: u64) -> Duration {
    Duration::from_millis(u64::try_from(u128::from(bytes) * 1000 / u128::from(bytes_per_s.max(1))).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_type_and_a_host_and_no_secret() {
        let place = |kind: &str, uri: &str, endpoint: Option<&str>| {
            let options = endpoint.map(|at| ("endpoint".to_owned(), at.to_owned())).into_iter().collect();
            place_of(&Origin { kind: kind.into(), uri: uri.into(), options })
        };
        assert_eq!(place("web", "https://user:pass@h:1/x?sig=s", None), "web h:1");
        assert_eq!(place("aws", "s3://bucket/key", None), "aws bucket");
        assert_eq!(place("aws", "s3://bucket/key", Some("http://minio:9000")), "aws minio:9000");
        assert_eq!(place("huggingface", "a/b", None), "huggingface");
    }
}

//! What a session shows: the tree and the bytes of a checkpoint, whole, in place, or still arriving; and what is done for it beside.

use std::sync::Arc;
use std::time::Duration;

use super::super::content::Content;
use super::super::partial::PartialContent;
use super::super::stored::StoredContent;
use super::Attachments;
use crate::catalog::checkpoints::{self, Record, State};
use crate::catalog::forecasts;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::ingest::arriving::Arriving;
use crate::manifest::Tree;
use crate::store::read::Reader;
use crate::units::now_unix_ms;

/// How often it is looked whether a checkpoint that is served early has become ready, where no change says so.
const READY_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// Reason of an attach that came too late: the bytes were given up before the job had its right. Asking again has them filled again.
pub const EVICTED_MEANWHILE: &str = "EVICTED_MEANWHILE";

impl Attachments {
    /// The records as they are now that a right keeps them.
    ///
    /// # Errors
    /// [`EVICTED_MEANWHILE`]; those of the catalog.
    pub(super) async fn still_here(&self, wanted: &[(Record, String)]) -> Result<Vec<(Record, String)>> {
        let wanted = wanted.to_vec();
        let look = move |tx: &rusqlite::Connection| {
            let now = |(before, subdir): (Record, String)| match checkpoints::get(tx, &before.id)? {
                Some(record) if record.state == State::Evicted => Err(evicted_meanwhile(&record)),
                record => Ok((record.unwrap_or(before), subdir)),
            };
            wanted.into_iter().map(now).collect()
        };
        self.0.store.catalog().read(look).await
    }

    /// The tree and bytes of a checkpoint; a reader where the bytes are in the store, all of them.
    pub(super) async fn content_of(
        &self,
        record: &Record,
    ) -> Result<(Arc<Tree>, Arc<dyn Content>, Option<Arc<Reader>>)> {
        match record.ready_manifest() {
            Some(digest) => self.whole_content_of(record, digest).await,
            None => self.partial_content_of(record).await,
        }
    }

    /// [`Attachments::content_of`] a checkpoint that is here; reading what is lost of it fails.
    async fn whole_content_of(
        &self,
        record: &Record,
        digest: Digest,
    ) -> Result<(Arc<Tree>, Arc<dyn Content>, Option<Arc<Reader>>)> {
        let manifest = self.0.store.catalog().read(move |tx| checkpoints::manifest(tx, &digest)).await?;
        let manifest = Arc::new(manifest);
        let (content, reader): (Arc<dyn Content>, _) = if let Some(place) = record.in_place.clone() {
            (Arc::new(self.0.in_place.content(record, place, manifest.clone()).await?), None)
        } else {
            let reader = self.0.store.reader(digest, manifest.clone()).await?;
            (Arc::new(StoredContent(reader.clone())), Some(reader))
        };
        Ok((Arc::new(Tree::new(manifest)), content, reader))
    }

    /// [`Attachments::content_of`] a checkpoint that still fills. Its tree is durable before anybody sees it.
    async fn partial_content_of(&self, record: &Record) -> Result<(Arc<Tree>, Arc<dyn Content>, Option<Arc<Reader>>)> {
        let Some(arriving) = self.0.ingests.shown_before(record).await? else {
            let id = record.id.clone();
            let now = self.0.store.catalog().read(move |tx| checkpoints::get(tx, &id)).await?;
            // Ready meanwhile, or one that is mended: who had it keeps what is right of it.
            let whole = |now: Record| Some((now.ready_manifest().or(now.healing_manifest())?, now));
            let (digest, now) = now.and_then(whole).ok_or_else(|| not_readable(record))?;
            return self.whole_content_of(&now, digest).await;
        };
        arriving.keep_listing().await?;
        let tree = Arc::new(Tree::new(arriving.tree().clone()));
        let content = PartialContent::new(arriving.clone()).await?;
        self.hydrate_when_ready(record.id.clone(), &arriving);
        Ok((tree, Arc::new(content), None))
    }

    /// Makes whole, in the background, what is compact of a served checkpoint.
    pub(super) fn hydrate(&self, id: String, digest: Digest, reader: Arc<Reader>) {
        let (store, ingests) = (self.0.store.clone(), self.0.ingests.clone());
        tokio::spawn(async move {
            match store.hydrate(digest, &reader, || ingests.promised_bytes()).await {
                Ok(hydrated) if hydrated.left > 0 => {
                    tracing::info!(checkpoint = id, left = hydrated.left, "blobs stay compact for want of space");
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(checkpoint = id, error = %error.report(), "hydrating failed"),
            }
        });
    }

    /// Hydrates a checkpoint that is served already, once it is ready; ends when nobody reads it any more.
    fn hydrate_when_ready(&self, id: String, arriving: &Arc<Arriving>) {
        let (attachments, arriving) = (self.clone(), Arc::downgrade(arriving));
        let mut changes = self.0.ingests.changes();
        tokio::spawn(async move {
            while arriving.strong_count() > 0 {
                let asked = id.clone();
                let record = attachments.0.store.catalog().read(move |tx| checkpoints::get(tx, &asked)).await;
                if let Ok(Some(digest)) = record.map(|record| record.and_then(|record| record.ready_manifest())) {
                    if let Some(arriving) = arriving.upgrade() {
                        attachments.note_ready(&id, !arriving.is_distrusted()).await;
                        if let Some(reader) = arriving.reader() {
                            attachments.hydrate(id, digest, reader);
                        }
                    }
                    return;
                }
                let _ = tokio::time::timeout(READY_AGAIN_AFTER, changes.recv()).await;
            }
        });
    }

    /// What was read while it arrived is right, if it is `verified`; and in which order it was read is known for as far as that matters.
    async fn note_ready(&self, checkpoint: &str, verified: bool) {
        let served = super::lock(&self.0.live).get(checkpoint).cloned();
        let Some(served) = served else { return };
        let order = super::lock(&served.session).as_ref().map(|session| {
            if verified {
                session.note_verified();
            }
            session.read_order()
        });
        if let Some(order) = order {
            self.keep_order(checkpoint, order).await;
        }
    }

    /// Remembers what was read first of a checkpoint, for its owner's next fill of the same tree.
    pub(super) async fn keep_order(&self, checkpoint: &str, (shape, order): (Digest, Vec<(u32, u32)>)) {
        if order.is_empty() {
            return;
        }
        let id = checkpoint.to_owned();
        let keep = move |tx: &rusqlite::Connection| match checkpoints::get(tx, &id)? {
            Some(record) => forecasts::keep_order(tx, &record.owner, &shape, &order, now_unix_ms()),
            None => Ok(()),
        };
        if let Err(error) = self.0.store.catalog().write(keep).await {
            tracing::debug!(error = %error.report(), "the order of reading could not be kept");
        }
    }
}

fn evicted_meanwhile(record: &Record) -> Error {
    Error::unavailable(EVICTED_MEANWHILE, format!("the bytes of `{}` were given up this instant", record.name))
        .fact("checkpoint", &record.id)
        .remedy("attach it again, which has it filled again")
}

fn not_readable(record: &Record) -> Error {
    Error::wrong_state("NOT_READY", format!("the checkpoint `{}` is not ready and has not been listed", record.name))
        .fact("checkpoint", &record.id)
        .remedy("attach it when it is ready")
}

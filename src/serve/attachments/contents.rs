//! What a session shows: the tree and the bytes of a checkpoint, whole, in place, or still arriving; and what is done for it beside.

use std::sync::Arc;
use std::time::Duration;

use super::super::content::Content;
use super::super::partial::PartialContent;
use super::super::stored::StoredContent;
use super::Attachments;
use crate::catalog::checkpoints::{self, Record};
use crate::catalog::forecasts;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::ingest::arriving::Arriving;
use crate::manifest::Tree;
use crate::store::read::Reader;
use crate::units::now_unix_ms;

/// How often it is looked whether a checkpoint that is served early has become ready, where no change says so.
const READY_AGAIN_AFTER: Duration = Duration::from_secs(60);

impl Attachments {
    /// The tree and bytes of a checkpoint; a reader where the bytes are in the store, all of them.
    pub(super) async fn content_of(
        &self,
        record: &Record,
    ) -> Result<(Arc<Tree>, Arc<dyn Content>, Option<Arc<Reader>>)> {
        let Some(digest) = record.ready_manifest() else {
            return self.partial_content_of(record).await;
        };
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
            let ready = now.filter(|now| now.ready_manifest().is_some()).ok_or_else(|| not_readable(record))?;
            return Box::pin(self.content_of(&ready)).await;
        };
        arriving.keep_listing().await?;
        let tree = Arc::new(Tree::new(arriving.tree().clone()));
        let content = PartialContent::new(arriving.clone()).await?;
        self.hydrate_when_ready(record.id.clone(), &arriving);
        Ok((tree, Arc::new(content), None))
    }

    /// Makes whole, in the background, what is compact of a served checkpoint.
    pub(super) fn hydrate(&self, id: String, digest: Digest, reader: Arc<Reader>) {
        let store = self.0.store.clone();
        tokio::spawn(async move {
            match store.hydrate(digest, &reader).await {
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
                    if let Some(reader) = arriving.upgrade().and_then(|arriving| arriving.reader()) {
                        attachments.hydrate(id, digest, reader);
                    }
                    return;
                }
                let _ = tokio::time::timeout(READY_AGAIN_AFTER, changes.recv()).await;
            }
        });
    }

    /// Remembers what was read first, for the next fill of the same tree.
    pub(super) async fn keep_order(&self, (shape, order): (Digest, Vec<(u32, u32)>)) {
        if order.is_empty() {
            return;
        }
        let keep = move |tx: &rusqlite::Connection| forecasts::keep_order(tx, &shape, &order, now_unix_ms());
        if let Err(error) = self.0.store.catalog().write(keep).await {
            tracing::debug!(error = %error.report(), "the order of reading could not be kept");
        }
    }
}

fn not_readable(record: &Record) -> Error {
    Error::wrong_state("NOT_READY", format!("the checkpoint `{}` is not ready and has not been listed", record.name))
        .fact("checkpoint", &record.id)
        .remedy("attach it when it is ready")
}

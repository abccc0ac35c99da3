//! Which version of an object was listed, where a bucket keeps several.

use reqwest::Method;

use super::super::super::http::{Failure, read_document};
use super::super::xml::{Document, Fields};
use super::super::{Locator, PAGE_BYTES};
use super::{S3, key_of_listing, same_etag};
use crate::error::Result;

impl S3 {
    /// The version of the object that has the `ETag` it was listed with. `None` where there is none, or nobody tells: the bucket keeps no versions, or these
    /// credentials may not list them.
    ///
    /// One page is looked at. Versions come in the order of their keys, those of one key with the newest first, and no key with this
    /// prefix comes before the key itself.
    ///
    /// # Errors
    /// What keeps the question from being answered at all.
    pub(super) async fn version_of(&self, object: &Locator<'_>) -> Result<Option<String>> {
        if !object.pin.etag.starts_with('"') {
            return Ok(None);
        }
        let query = [("versions", ""), ("encoding-type", "url"), ("max-keys", "1000"), ("prefix", object.key)];
        let reply = match self.ask(Method::GET, None, &query, &[]).await {
            Ok(reply) => reply,
            Err(Failure::Refused(answer)) if answer.status.is_client_error() && answer.status != 429 => {
                return Ok(None);
            }
            Err(failure) => return Err(super::explain(failure)),
        };
        let document = read_document(reply, PAGE_BYTES, &self.http).await?;
        Ok(Document::read(&document, "Version").and_then(|document| version_in(&document, object)))
    }
}

fn version_in(document: &Document, object: &Locator<'_>) -> Option<String> {
    let encoded = document.fields.get("EncodingType").is_some_and(|kind| kind == "url");
    let is_it = |fields: &&Fields| {
        let text = fields.get("Key");
        let key = if encoded { text.and_then(|text| key_of_listing(text)) } else { text.cloned() };
        let etag = fields.get("ETag").is_some_and(|etag| same_etag(etag, &object.pin.etag));
        etag && key.as_deref() == Some(object.key)
    };
    document.records.iter().find(is_it)?.get("VersionId").filter(|id| !id.is_empty()).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_that_of_the_key_and_the_etag() {
        let record = |key: &str, etag: &str, version: &str| {
            format!("<Version><Key>{key}</Key><ETag>\"{etag}\"</ETag><VersionId>{version}</VersionId></Version>")
        };
        let deleted = "<DeleteMarker><Key>a b</Key><VersionId>d</VersionId></DeleteMarker>".to_owned();
        let records = [deleted, record("a+b", "new", "3"), record("a+b", "old", "2"), record("a+b%2B", "old", "1")];
        let text = format!("<List><EncodingType>url</EncodingType>{}</List>", records.concat());
        let document = Document::read(text.as_bytes(), "Version").unwrap();
        let found = |key: &str, etag: &str| {
            let text = format!("\n\"{etag}\"\n{key}");
            version_in(&document, &Locator::parse(&text).unwrap())
        };
        assert_eq!(found("a b", "old").as_deref(), Some("2"));
        assert_eq!(found("a b+", "old").as_deref(), Some("1"));
        assert_eq!((found("a b", "other"), found("a", "old")), (None, None));
    }
}

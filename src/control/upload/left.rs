//! Uploads that a dead daemon had under way, and their senders, who go on where what is durable of them ends ([`Ingests::left_of`]).

use std::sync::Arc;

use prost::Message as _;

use super::sent::{Sent, listed};
use super::under_way::Upload;
use super::{Floors, follow};
use crate::catalog::checkpoints::Record;
use crate::control::wire;
use crate::digest::Digester;
use crate::error::{Error, Kind, Result};
#[cfg(doc)]
use crate::ingest::Ingests;
use crate::ingest::{Announced, Decoded, Left, Survives};
use crate::source::{Listed, What};

impl Floors {
    /// Lets the uploads that a predecessor had under way wait for their senders, `limits::UPLOADS_LEFT` at most: those of which most is here. Returns the
    /// records of those that nobody can go on with.
    pub async fn await_senders(&self, records: Vec<Record>) -> Vec<Record> {
        let (mut found, mut lost) = (Vec::new(), Vec::new());
        for record in records {
            match self.ingests.left_of(&record, decode).await {
                Ok(Some(left)) => found.push((record, left)),
                Ok(None) => lost.push(record),
                Err(error) if error.kind() == Kind::Corrupt => {
                    tracing::warn!(checkpoint = record.id, error = %error.report(), "an upload cannot be gone on with");
                    lost.push(record);
                }
                // Of this moment: nothing of it is given up for that.
                Err(error) => {
                    tracing::error!(checkpoint = record.id, error = %error.report(), "an upload waits for the next start");
                }
            }
        }
        // The first to be left is the first to make way.
        found.sort_by_key(|(_, left)| left.bytes);
        for (record, left) in found {
            tracing::info!(checkpoint = record.id, bytes = left.bytes, "an upload waits for its sender");
            let (position, present, so_far) = told(&left);
            let Left { begun, entries, kept, .. } = left;
            let upload = Arc::new(Upload::left(&record, position, present, so_far));
            self.uploads.add(&upload);
            let sent = Sent::new(Arc::clone(&upload), begun.one_file, entries);
            let survives = Some(Survives { one_file: begun.one_file, kept: Some(kept) });
            let announced = Announced { bytes: begun.bytes_total, survives };
            tokio::spawn(follow(self.clone(), upload, record, sent, announced));
        }
        self.uploads.keep_few();
        lost
    }
}

fn decode(row: &[u8]) -> Result<Decoded<Listed>> {
    let damaged = |error| Error::corrupt("CATALOG_DAMAGED", "an entry of an upload is damaged").because(error);
    let listed = listed(&wire::UploadEntry::decode(row).map_err(damaged)?)?;
    let size = if let What::File(file) = &listed.what { file.size } else { None };
    let file = size.map(|size| (listed.path.as_bytes().to_vec(), size));
    Ok((listed, file))
}

/// What its sender is told of it: how far it is, the last entry, and the digester of all.
fn told(left: &Left<Listed>) -> (wire::UploadPosition, Option<wire::UploadEntry>, Digester) {
    let mut digester = Digester::new();
    for row in &left.rows {
        let mut length = Vec::new();
        // Cannot fail: a vector grows.
        let _ = prost::encode_length_delimiter(row.len(), &mut length);
        digester.update(&length);
        digester.update(row);
    }
    let position = wire::UploadPosition { entries: left.rows.len() as u64, bytes: left.last_bytes };
    let present = left.rows.last().and_then(|row| wire::UploadEntry::decode(row.as_slice()).ok());
    (position, present, digester)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::uploads;
    use crate::control::wire::upload_entry::Kind as Sort;
    use crate::ingest::Kept;

    #[test]
    fn a_sender_is_told_of_exactly_the_entries_that_are_here() {
        let file = |size_bytes| Sort::File(wire::UploadFile { size_bytes, modified_unix_ns: 5, ..Default::default() });
        let sent = [("d", Sort::Directory(wire::UploadDirectory {})), ("d/a", file(300))]
            .map(|(path, kind)| wire::UploadEntry { path: path.into(), kind: Some(kind) });
        let rows: Vec<_> = sent.iter().map(prost::Message::encode_to_vec).collect();
        let begun = uploads::Begun { bytes_total: 0, one_file: false };
        let left = Left { begun, rows, entries: Vec::new(), kept: Kept::default(), bytes: 300, last_bytes: 300 };
        let (position, present, digester) = told(&left);
        assert_eq!((position.entries, position.bytes, present.as_ref()), (2, 300, sent.last()));
        let mut expected = Digester::new();
        sent.iter().for_each(|entry| expected.update(&entry.encode_length_delimited_to_vec()));
        assert_eq!(digester.finish(), expected.finish());
        let (_, file) = decode(&left.rows[1]).unwrap();
        assert_eq!(file, Some((b"d/a".to_vec(), 300)));
        assert_eq!(decode(&left.rows[0]).unwrap().1, None);
        assert_eq!(decode(b"\x0a\x09").unwrap_err().reason(), "CATALOG_DAMAGED");
    }
}

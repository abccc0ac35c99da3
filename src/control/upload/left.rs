//! Uploads that a dead daemon had under way: what of them is durable, from where their senders go on.
//!
//! What is believed are the entries that are recorded ([`uploads`]), from the first on: a directory, a link, a file that is sealed or all of whose units
//! are durable. The first that has less is the last, where some of it is durable, and its bytes end with the first unit that is not. All else is as
//! if it had never come: its rows go, before anybody is heard, so that they meet nothing that is sent in its place. Its bytes go with the start's sweep.
//!
//! All of it is read before the daemon answers: some seconds where there are millions of entries.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use prost::Message as _;

use super::sent::{Here, Sent, listed};
use super::under_way::Upload;
use super::{Floors, follow};
use crate::catalog::checkpoints::{self, Record};
use crate::catalog::fills::{self, FillRow};
use crate::catalog::uploads;
use crate::control::wire;
use crate::digest::Digester;
use crate::error::{Error, Kind, Result};
use crate::ingest::{Announced, Kept, Survives};
use crate::source::{Begun, Listed, What};
use crate::store::filling::UnitMap;

/// Rows that go in one transaction: some milliseconds of the catalog's one writer.
const CUT_AT_A_TIME: usize = 4096;

/// What is durable of an upload.
#[derive(Default)]
struct Durable {
    entries: Vec<(Listed, Here)>,
    position: wire::UploadPosition,
    present: Option<wire::UploadEntry>,
    /// Of the entries.
    listed: Digester,
    kept: Kept,
    /// Bytes of files.
    bytes: u64,
}

impl Floors {
    /// Lets the uploads that a predecessor had under way wait for their senders, `limits::UPLOADS_LEFT` at most: those of which most is here. Returns the
    /// records of those that nobody can go on with.
    pub async fn await_senders(&self, records: Vec<Record>) -> Vec<Record> {
        let (mut found, mut lost) = (Vec::new(), Vec::new());
        for record in records {
            match self.durable(&record).await {
                Ok(Some((begun, durable))) => found.push((record, begun, durable)),
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
        found.sort_by_key(|(_, _, durable)| durable.bytes);
        for (record, begun, durable) in found {
            tracing::info!(checkpoint = record.id, bytes = durable.bytes, "an upload waits for its sender");
            let Durable { entries, position, present, listed, kept, .. } = durable;
            let upload = Arc::new(Upload::left(&record, position, present, listed));
            self.uploads.add(&upload);
            let sent = Sent::new(Arc::clone(&upload), begun.one_file, entries);
            let survives = Some(Survives { one_file: begun.one_file, kept: Some(kept) });
            let announced = Announced { bytes: begun.bytes_total, survives };
            tokio::spawn(follow(self.clone(), upload, record, sent, announced));
        }
        self.uploads.keep_few();
        lost
    }

    /// What is durable of an upload, and nothing else of it any more; `None` where it cannot be gone on with.
    async fn durable(&self, record: &Record) -> Result<Option<(uploads::Begun, Durable)>> {
        let flight = record.id.clone();
        let read = move |tx: &rusqlite::Connection| {
            let Some(begun) = uploads::get(tx, &flight)? else { return Ok(None) };
            if checkpoints::flight_of(tx, &flight)? != flight {
                // It had been given back.
                return Ok(None);
            }
            Ok(Some((begun, uploads::entries(tx, &flight)?, fills::of_flight(tx, &flight)?)))
        };
        let Some((begun, entries, files)) = self.store.catalog().read(read).await? else { return Ok(None) };
        let files: HashMap<_, _> = files.into_iter().map(|row| (row.path.clone(), row)).collect();
        let durable = Durable::of(&entries, &files)?;
        let paths: HashSet<_> = durable.entries.iter().map(|(listed, _)| listed.path.as_bytes()).collect();
        let beyond = files.into_keys().filter(|path| !paths.contains(path.as_slice())).collect();
        self.cut(&record.id, durable.position.entries, beyond).await?;
        Ok(Some((begun, durable)))
    }

    /// Forgets the entries from `from` on, and these files.
    async fn cut(&self, flight: &str, from: u64, files: Vec<Vec<u8>>) -> Result<()> {
        let catalog = self.store.catalog();
        let cut = |flight: String| move |tx: &rusqlite::Connection| uploads::cut(tx, &flight, from, CUT_AT_A_TIME);
        while catalog.write(cut(flight.to_owned())).await? {}
        for some in files.chunks(CUT_AT_A_TIME) {
            let (flight, some) = (flight.to_owned(), some.to_vec());
            catalog.write(move |tx| fills::forget_files(tx, &flight, &some)).await?;
        }
        Ok(())
    }
}

impl Durable {
    fn of(entries: &[Vec<u8>], files: &HashMap<Vec<u8>, FillRow>) -> Result<Self> {
        let mut durable = Self::default();
        for encoded in entries {
            let entry = wire::UploadEntry::decode(encoded.as_slice()).map_err(|error| {
                Error::corrupt("CATALOG_DAMAGED", "an entry of an upload is damaged").because(error)
            })?;
            let listed = listed(&entry)?;
            let size = if let What::File(file) = &listed.what { file.size } else { None };
            let here = size.map_or(Here::No, |size| here(size, files.get(&entry.path)));
            let bytes = match here {
                Here::No if size.is_some() => break,
                Here::No => 0,
                Here::Begun(begun) => begun.bytes,
                Here::Sealed(size, _) => size,
            };
            durable.put(entry, listed, here, bytes);
            if size.is_some_and(|size| bytes < size) {
                break;
            }
        }
        Ok(durable)
    }

    fn put(&mut self, entry: wire::UploadEntry, listed: Listed, here: Here, bytes: u64) {
        match here {
            Here::No => {}
            Here::Begun(begun) => self.kept.begun.push(begun.number),
            Here::Sealed(size, _) => self.kept.sealed_bytes += size,
        }
        self.bytes += bytes;
        self.position = wire::UploadPosition { entries: self.position.entries + 1, bytes };
        self.listed.update(&entry.encode_length_delimited_to_vec());
        self.present = Some(entry);
        self.entries.push((listed, here));
    }
}

/// How much is durable of a file of `size` bytes that has this row.
fn here(size: u64, row: Option<&FillRow>) -> Here {
    let Some(row) = row.filter(|row| row.size == size) else { return Here::No };
    if let Some(digest) = row.sealed {
        return Here::Sealed(size, digest);
    }
    match UnitMap::from_bytes(size, &row.units).frontier_bytes() {
        0 => Here::No,
        bytes => Here::Begun(Begun { number: row.number, bytes }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire::upload_entry::Kind;
    use crate::digest::Digest;
    use crate::limits::UNIT_BYTES;

    const SIZE: u64 = 3 * UNIT_BYTES + 1;

    fn entry(path: &str, size_bytes: Option<u64>) -> wire::UploadEntry {
        let file = |size_bytes| Kind::File(wire::UploadFile { size_bytes, modified_unix_ns: 5, ..Default::default() });
        let kind = size_bytes.map_or(Kind::Directory(wire::UploadDirectory {}), file);
        wire::UploadEntry { path: path.into(), kind: Some(kind) }
    }

    fn row(path: &str, size: u64, units: &[u8], sealed: bool) -> (Vec<u8>, FillRow) {
        let sealed = sealed.then(|| Digest::of(path.as_bytes()));
        (path.into(), FillRow { path: path.into(), number: 7, size, units: units.to_vec(), sealed })
    }

    fn at(sent: &[wire::UploadEntry], rows: &[(Vec<u8>, FillRow)]) -> (u64, u64) {
        let encoded: Vec<_> = sent.iter().map(prost::Message::encode_to_vec).collect();
        let durable = Durable::of(&encoded, &rows.iter().cloned().collect()).unwrap();
        let mut listed = Digester::new();
        let entries = usize::try_from(durable.position.entries).unwrap();
        sent[..entries].iter().for_each(|entry| listed.update(&entry.encode_length_delimited_to_vec()));
        assert_eq!(durable.listed.finish(), listed.finish(), "the digest is of exactly those");
        assert_eq!(durable.present.as_ref(), sent[..entries].last());
        (durable.position.entries, durable.position.bytes)
    }

    #[test]
    fn what_is_durable_ends_with_the_first_that_is_not_all_here() {
        let sent = [entry("d", None), entry("d/a", Some(3)), entry("d/b", Some(SIZE)), entry("d/c", Some(0))];
        let [a, b, c] = [row("d/a", 3, &[], true), row("d/b", SIZE, &[], true), row("d/c", 0, &[], true)];
        assert_eq!(at(&sent, &[a.clone(), b.clone(), c.clone()]), (4, 0));
        assert_eq!(at(&sent[..3], &[a.clone(), b.clone()]), (3, SIZE));
        assert_eq!(at(&sent, &[b.clone(), c.clone()]), (1, 0), "a small file is here or it is not");
        assert_eq!(at(&sent, &[a.clone(), c.clone()]), (2, 3));
        for (units, position) in [
            (0b1111, (4, 0)),
            (0b0111, (3, 3 * UNIT_BYTES)),
            (0b1011, (3, 2 * UNIT_BYTES)),
            (0b1110, (2, 3)),
            (0, (2, 3)),
        ] {
            let begun = row("d/b", SIZE, &[units], false);
            assert_eq!(at(&sent, &[a.clone(), begun, c.clone()]), position, "{units:b}");
        }
        let another = row("d/b", SIZE - 1, &[], true);
        assert_eq!(at(&sent, &[a, another, c]), (2, 3), "it is not of that size");
        assert_eq!(at(&[], &[b]), (0, 0));
    }
}

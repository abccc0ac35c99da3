//! Uploads that a dead daemon had under way, and tars that it extracted: what of them is durable, from where they go on.
//!
//! What is believed are the entries that are recorded ([`uploads`]), from the first on: a directory, a link, a file that is sealed or all of whose units
//! are durable. The first that has less is the last, where some of it is durable, and its bytes end with the first unit that is not. All else is as
//! if it had never come: its rows go, before anybody is heard, so that they meet nothing that is sent in its place. Its bytes go with the start's sweep.
//!
//! All of it is read before the daemon answers: some seconds where there are millions of entries.

use std::collections::HashMap;

use super::{Ingests, Kept};
use crate::catalog::checkpoints::{self, Record};
use crate::catalog::fills::{self, FillRow};
use crate::catalog::{Catalog, uploads};
use crate::error::Result;
use crate::source::{Begun, Here};
use crate::store::Store;
use crate::store::filling::UnitMap;

/// Rows that go in one transaction: some milliseconds of the catalog's one writer.
const CUT_AT_A_TIME: usize = 4096;

/// An entry as its protocol reads its row, and path and size where it is a file.
pub type Decoded<E> = (E, Option<(Vec<u8>, u64)>);

/// What is durable of an upload.
#[derive(Debug)]
pub struct Left<E> {
    /// What was said of it when it was begun.
    pub begun: uploads::Begun,
    /// Its entries as they were recorded.
    pub rows: Vec<Vec<u8>>,
    /// The same, each with how much of it is here.
    pub entries: Vec<(E, Here)>,
    /// What their files are.
    pub kept: Kept,
    /// Bytes of files, in all.
    pub bytes: u64,
    /// The same of the last entry.
    pub last_bytes: u64,
}

impl Ingests {
    /// What is durable of the upload of `record`, and nothing else of it any more; `None` where it cannot be gone on with.
    ///
    /// # Errors
    /// Those of the catalog; what `decode` says of a row.
    pub async fn left_of<E>(
        &self,
        record: &Record,
        decode: impl Fn(&[u8]) -> Result<Decoded<E>>,
    ) -> Result<Option<Left<E>>> {
        let id = record.id.clone();
        let flight = self.0.store.catalog().read(move |tx| checkpoints::flight_of(tx, &id)).await?;
        if flight != record.id {
            // It had been given back.
            return Ok(None);
        }
        left_of(&self.0.store, &flight, decode).await
    }
}

/// What is durable of the entries of a flight, and nothing else of it any more; `None` where none are recorded.
///
/// # Errors
/// As [`Ingests::left_of`].
pub(super) async fn left_of<E>(
    store: &Store,
    flight: &str,
    decode: impl Fn(&[u8]) -> Result<Decoded<E>>,
) -> Result<Option<Left<E>>> {
    let key = flight.to_owned();
    let read = move |tx: &rusqlite::Connection| {
        let Some(begun) = uploads::get(tx, &key)? else { return Ok(None) };
        Ok(Some((begun, uploads::entries(tx, &key)?, fills::of_flight(tx, &key)?)))
    };
    let Some((begun, rows, files)) = store.catalog().read(read).await? else { return Ok(None) };
    let mut files = files.into_iter().map(|row| (row.path.clone(), row)).collect();
    let left = Left::of(begun, rows, &mut files, decode)?;
    forget_from(store.catalog(), flight, left.entries.len() as u64, files.into_keys().collect()).await?;
    Ok(Some(left))
}

/// Forgets the entries from `from` on, and these files.
///
/// # Errors
/// Those of the catalog.
pub(super) async fn forget_from(catalog: &Catalog, flight: &str, from: u64, files: Vec<Vec<u8>>) -> Result<()> {
    let cut = |flight: String| move |tx: &rusqlite::Connection| uploads::cut(tx, &flight, from, CUT_AT_A_TIME);
    while catalog.write(cut(flight.to_owned())).await? {}
    for some in files.chunks(CUT_AT_A_TIME) {
        let (flight, some) = (flight.to_owned(), some.to_vec());
        catalog.write(move |tx| fills::forget_files(tx, &flight, &some)).await?;
    }
    Ok(())
}

/// Forgets all that is recorded of the entries of a flight.
///
/// # Errors
/// Those of the catalog.
pub(super) async fn forget_all(store: &Store, flight: &str) -> Result<()> {
    let key = flight.to_owned();
    let files = store.catalog().read(move |tx| fills::of_flight(tx, &key)).await?;
    forget_from(store.catalog(), flight, 0, files.into_iter().map(|row| row.path).collect()).await
}

impl<E> Left<E> {
    /// Of `rows`; of `files` those are left that are not of it.
    fn of(
        begun: uploads::Begun,
        mut rows: Vec<Vec<u8>>,
        files: &mut HashMap<Vec<u8>, FillRow>,
        decode: impl Fn(&[u8]) -> Result<Decoded<E>>,
    ) -> Result<Self> {
        let (mut entries, mut kept, mut bytes, mut last_bytes) = (Vec::new(), Kept::default(), 0, 0);
        for row in &rows {
            let (entry, file) = decode(row)?;
            let here = match &file {
                None => Here::No,
                Some((path, size)) => match here(*size, files.get(path)) {
                    Here::No => break,
                    here => {
                        files.remove(path);
                        here
                    }
                },
            };
            last_bytes = match here {
                Here::No => 0,
                Here::Begun(begun) => {
                    kept.begun.push(begun.number);
                    begun.bytes
                }
                Here::Sealed(size, _) => {
                    kept.sealed_bytes += size;
                    size
                }
            };
            bytes += last_bytes;
            entries.push((entry, here));
            if file.is_some_and(|(_, size)| last_bytes < size) {
                break;
            }
        }
        rows.truncate(entries.len());
        Ok(Self { begun, rows, entries, kept, bytes, last_bytes })
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
    use crate::digest::Digest;
    use crate::limits::UNIT_BYTES;

    const SIZE: u64 = 3 * UNIT_BYTES + 1;

    /// A row of a path, with the size where it is a file.
    fn entry(path: &str, size: Option<u64>) -> Vec<u8> {
        serde_json::to_vec(&(path, size)).unwrap()
    }

    fn decode(row: &[u8]) -> Result<Decoded<()>> {
        let (path, size): (String, Option<u64>) = serde_json::from_slice(row).unwrap();
        Ok(((), size.map(|size| (path.into_bytes(), size))))
    }

    fn row(path: &str, size: u64, units: &[u8], sealed: bool) -> (Vec<u8>, FillRow) {
        let sealed = sealed.then(|| Digest::of(path.as_bytes()));
        (path.into(), FillRow { path: path.into(), number: 7, size, units: units.to_vec(), sealed })
    }

    fn at(sent: &[Vec<u8>], rows: &[(Vec<u8>, FillRow)]) -> (usize, u64) {
        let begun = uploads::Begun { bytes_total: 0, one_file: false };
        let mut files: HashMap<_, _> = rows.iter().cloned().collect();
        let all = files.len();
        let left = Left::of(begun, sent.to_vec(), &mut files, decode).unwrap();
        assert_eq!(left.rows, sent[..left.entries.len()]);
        let of_it = left.entries.iter().filter(|(_, here)| *here != Here::No).count();
        assert_eq!(files.len() + of_it, all, "what is not of it is told");
        (left.entries.len(), left.last_bytes)
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

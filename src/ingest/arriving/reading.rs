//! The readers' side of a flight: what is here, and being told when more is.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Arriving, At, Ready, Resume, WAITING, Waiting};
use crate::catalog::fills;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits::UNIT_BYTES;
use crate::store::read::{OpenBlob, Reader};

impl Arriving {
    /// Why it cannot be read before it is whole; `None` where it can.
    pub fn obstacle(&self) -> Option<&str> {
        self.obstacle.as_deref()
    }

    /// Makes the tree durable, so that the next start can show it before it has asked the source.
    ///
    /// # Errors
    /// Those of the catalog.
    pub async fn keep_listing(&self) -> Result<()> {
        let (key, tree) = (self.key.clone(), self.tree.clone());
        // Nothing is written that is there: a full disk must not keep a session from going on.
        let kept = self.store.catalog().read(move |tx| fills::listing(tx, &key)).await?;
        if kept.as_ref() == Some(&*tree) {
            return Ok(());
        }
        let key = self.key.clone();
        self.store.catalog().write(move |tx| fills::put_listing(tx, &key, &tree)).await
    }

    /// Begins to be read: the background makes way from now on, and what is sealed stays whole. Undone by dropping.
    ///
    /// # Errors
    /// Those of the catalog.
    pub async fn read(self: &Arc<Self>) -> Result<Reading> {
        let (reading, reader, sealed) = {
            let mut state = self.lock();
            state.readers += 1;
            state.queue.set_read(true);
            let reader = state.reader.get_or_insert_with(|| self.store.growing_reader()).clone();
            let sealed: Vec<Digest> = state.at.iter().filter_map(At::sealed).collect();
            (Reading(self.clone()), reader, sealed)
        };
        self.work.notify_waiters();
        self.store.add_to(&reader, sealed).await?;
        Ok(reading)
    }

    /// Whether anybody reads it.
    pub(in crate::ingest) fn is_read(&self) -> bool {
        self.lock().readers > 0
    }

    /// The blob of a file that is sealed.
    ///
    /// # Errors
    /// Those of the store.
    pub fn open_sealed(&self, entry: u32) -> Result<Option<OpenBlob>> {
        let (reader, digest, size) = {
            let state = self.lock();
            match (state.at.get(entry as usize), &state.reader) {
                (Some(At::Sealed(digest, size)), Some(reader)) => (reader.clone(), *digest, *size),
                _ => return Ok(None),
            }
        };
        reader.open(&digest, size).map(Some)
    }

    /// Whether the blob of a file is sealed and whole.
    pub fn is_whole(&self, entry: u32) -> bool {
        let state = self.lock();
        match (state.at.get(entry as usize), &state.reader) {
            (Some(At::Sealed(digest, _)), Some(reader)) => reader.is_whole(digest),
            _ => false,
        }
    }

    /// The reading side of what is sealed, once somebody reads.
    pub fn reader(&self) -> Option<Arc<Reader>> {
        self.lock().reader.clone()
    }

    /// Digest of a file that is sealed.
    pub fn digest(&self, entry: u32) -> Option<Digest> {
        self.lock().at.get(entry as usize).and_then(At::sealed)
    }

    /// Bytes of a file that are here; `None` once it is sealed.
    pub fn here_bytes(&self, entry: u32) -> Option<u64> {
        match self.lock().at.get(entry as usize) {
            Some(At::Sealed(..)) => None,
            Some(At::Filling(filling)) => Some(filling.here_bytes()),
            Some(At::Missing | At::Sealing) | None => Some(0),
        }
    }

    /// Whether wrong bytes were noticed after they may have been read: what the kernel keeps from before is not to be believed.
    pub fn is_distrusted(&self) -> bool {
        self.distrusted.load(Ordering::Relaxed)
    }

    /// Whether `range` of a file can be read now.
    pub fn is_here(&self, entry: u32, range: Range<u64>) -> bool {
        matches!(self.lock().ready(entry, &range), Ready::Now)
    }

    /// Reads bytes that are here.
    ///
    /// # Errors
    /// The I/O error; internal for bytes that are not here.
    pub fn read_at(&self, entry: u32, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let at = self.lock().at.get(entry as usize).cloned().unwrap_or_default();
        match at {
            At::Filling(filling) => filling.read_exact_at(buffer, offset).map(|()| buffer.len()),
            At::Sealed(..) => match self.open_sealed(entry)? {
                Some(blob) => blob.read_at(buffer, offset),
                None => Err(Error::internal("a sealed file is read by nobody")),
            },
            At::Missing | At::Sealing => {
                Err(Error::unavailable("NOT_HERE", "the bytes went away while they were read"))
            }
        }
    }

    /// Runs `resume` when `range` of a file is here or cannot come; at once where that is so now. The bytes are wanted: they are fetched
    /// before anything that nobody waits for. What waits has the number that is returned.
    pub fn when_here(&self, entry: u32, range: Range<u64>, resume: Resume) -> Option<u64> {
        let mut state = self.lock();
        let outcome = match state.ready(entry, &range) {
            Ready::Now => Ok(()),
            Ready::Never(error) => Err(error),
            Ready::Later if state.waits >= WAITING => Err(too_many()),
            Ready::Later => {
                state.queue.want(entry, range.start / UNIT_BYTES..range.end.div_ceil(UNIT_BYTES));
                state.waits += 1;
                state.waited += 1;
                let number = state.waited;
                state.waiting.entry(entry).or_default().push(Waiting { number, range, resume });
                let is_small = state.queue.small_is_wanted(entry);
                drop(state);
                self.work.notify_waiters();
                if is_small {
                    self.small_wanted.notify_waiters();
                }
                return Some(number);
            }
        };
        drop(state);
        resume(outcome);
        None
    }

    /// Drops what waits for bytes of a file under `number`, if it still does: nobody is there any more.
    pub fn give_up(&self, entry: u32, number: u64) {
        let mut state = self.lock();
        let Some(waiting) = state.waiting.get_mut(&entry) else { return };
        // In the order of asking, so by number.
        let Ok(at) = waiting.binary_search_by_key(&number, |waiting| waiting.number) else { return };
        let given_up = waiting.remove(at);
        if waiting.is_empty() {
            state.waiting.remove(&entry);
        }
        state.waits = state.waits.saturating_sub(1);
        drop(state);
        drop(given_up);
    }
}

/// Somebody reads; ends when it is dropped.
pub struct Reading(Arc<Arriving>);

impl Drop for Reading {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.readers -= 1;
        let read = state.readers > 0;
        state.queue.set_read(read);
        drop(state);
        self.0.work.notify_waiters();
    }
}

fn too_many() -> Error {
    Error::unavailable("TOO_MANY_READS", format!("more than {WAITING} reads wait for one checkpoint"))
        .remedy("see why its source is slow")
}

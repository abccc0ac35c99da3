//! Files out of the fetched repositories.
//!
//! One `git cat-file --batch` answers any number of requests, so that thousands of small files cost a few processes. Large files stream
//! through it in pieces. Each reader is used by one stream at a time; one that was left in the middle is ended.
//!
//! Small and large files have places of their own: small ones shall not wait for minutes behind large ones, since who waits
//! here holds a place among the streams of the daemon.

use std::collections::VecDeque;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use futures_util::stream;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{ChildStdin, ChildStdout};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::super::ByteStream;
use super::child::{Child, Workshop};
use super::fetch::good;
use super::link::git;
use super::tree::Item;
use crate::error::{Error, LATER, Result};
use crate::limits;

/// Readers of small files at a time.
const SMALL_AT_A_TIME: usize = 4;

/// Readers that wait for the next file.
const IDLE_KEPT: usize = SMALL_AT_A_TIME;

/// Bytes in one piece of a stream.
const PIECE_BYTES: usize = 256 << 10;

/// Readers for all repositories of one checkpoint.
#[derive(Debug)]
pub(super) struct Blobs {
    workshop: Workshop,
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
    idle: Mutex<VecDeque<Reader>>,
}

impl Blobs {
    pub(super) fn new(workshop: Workshop) -> Self {
        Self {
            workshop,
            small: Arc::new(Semaphore::new(SMALL_AT_A_TIME)),
            large: Arc::new(Semaphore::new(limits::FETCHES_PER_SOURCE)),
            idle: Mutex::default(),
        }
    }

    /// The `size` bytes of the blob `id` in the `number`-th repository, from its beginning.
    pub(super) async fn read(self: &Arc<Self>, number: usize, id: &str, size: u64) -> Result<ByteStream> {
        let places = if size <= limits::UNIT_BYTES { &self.small } else { &self.large };
        let place = Arc::clone(places).acquire_owned().await;
        let place = place.map_err(|error| Error::internal("the places of readers are closed").because(error))?;
        let mut reader = self.reader(number)?;
        reader.ask(&self.workshop, id).await?;
        reader.answer(&self.workshop, id, size).await?;
        let reading = Reading { blobs: Arc::clone(self), reader, left: size, _place: place };
        Ok(Box::pin(stream::try_unfold(Some(reading), |reading| async move {
            let Some(mut reading) = reading else { return Ok(None) };
            match reading.next().await? {
                Some(bytes) => Ok(Some((bytes, Some(reading)))),
                None => {
                    reading.blobs.keep(reading.reader);
                    Ok(None)
                }
            }
        })))
    }

    fn reader(&self, number: usize) -> Result<Reader> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        match idle.iter().position(|reader| reader.number == number).and_then(|at| idle.remove(at)) {
            Some(reader) => Ok(reader),
            None => Reader::start(&self.workshop, number),
        }
    }

    fn keep(&self, reader: Reader) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push_back(reader);
        if idle.len() > IDLE_KEPT {
            idle.pop_front();
        }
    }
}

/// A stream under way.
struct Reading {
    blobs: Arc<Blobs>,
    reader: Reader,
    left: u64,
    _place: OwnedSemaphorePermit,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        if self.left == 0 {
            self.reader.end_answer(&self.blobs.workshop).await?;
            return Ok(None);
        }
        let most = usize::try_from(self.left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        let bytes = self.reader.piece(&self.blobs.workshop, most).await?;
        self.left -= bytes.len() as u64;
        Ok(Some(bytes))
    }
}

/// One `git cat-file --batch`.
#[derive(Debug)]
struct Reader {
    number: usize,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    _child: Child,
}

impl Reader {
    fn start(workshop: &Workshop, number: usize) -> Result<Self> {
        let mut child = git(workshop, number, &["cat-file", "--batch"]).start(Stdio::piped(), 0)?;
        // Nobody listens to what it may say: a full pipe would stop it.
        drop(child.0.stderr.take());
        match (child.0.stdin.take(), child.0.stdout.take()) {
            (Some(input), Some(output)) => {
                Ok(Self { number, input, output: BufReader::with_capacity(64 << 10, output), _child: child })
            }
            _ => Err(Error::internal("a child has no pipes")),
        }
    }

    async fn ask(&mut self, workshop: &Workshop, id: &str) -> Result<()> {
        let line = format!("{id}\n");
        timed(workshop, self.input.write_all(line.as_bytes())).await
    }

    /// `<id> blob <size>`.
    async fn answer(&mut self, workshop: &Workshop, id: &str, size: u64) -> Result<()> {
        let mut line = Vec::new();
        let mut head = (&mut self.output).take(256);
        timed(workshop, head.read_until(b'\n', &mut line)).await?;
        if line == format!("{id} blob {size}\n").as_bytes() {
            return Ok(());
        }
        Err(Error::corrupt("REPOSITORY_MALFORMED", format!("the object {id} is not the file that was listed"))
            .remedy("let `git fsck` look at the repository"))
    }

    async fn piece(&mut self, workshop: &Workshop, most: usize) -> Result<Bytes> {
        let mut bytes = BytesMut::with_capacity(most);
        let mut from = (&mut self.output).take(most as u64);
        while bytes.len() < most {
            if timed(workshop, from.read_buf(&mut bytes)).await? == 0 {
                return Err(Error::unavailable("BODY_TOO_SHORT", "git ended in the middle of a file").remedy(LATER));
            }
        }
        Ok(bytes.freeze())
    }

    /// Every answer ends its line.
    async fn end_answer(&mut self, workshop: &Workshop) -> Result<()> {
        let mut end = [0];
        timed(workshop, self.output.read_exact(&mut end)).await.map(drop)
    }
}

async fn timed<T>(workshop: &Workshop, work: impl Future<Output = std::io::Result<T>>) -> Result<T> {
    match timeout(workshop.patience, work).await {
        Ok(done) => done.map_err(|error| Error::io("reading a file from", "git", error)),
        Err(_) => Err(Error::unavailable("STALLED", "git does not answer").remedy(LATER)),
    }
}

/// The whole content of small blobs, in order, each handed to `take` with its place in `items`.
///
/// # Errors
/// As [`Blobs::read`], and what `take` says.
pub(super) async fn read_all(
    workshop: &Workshop,
    number: usize,
    items: &[&Item],
    mut take: impl FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    if items.is_empty() {
        return Ok(());
    }
    let Reader { mut input, output, _child: mut child, .. } = Reader::start(workshop, number)?;
    let questions = async move {
        // Some hundred at a time: answers are read meanwhile, so neither pipe stays full.
        for some in items.chunks(256) {
            let lines: String = some.iter().map(|item| format!("{}\n", item.id)).collect();
            timed(workshop, input.write_all(lines.as_bytes())).await?;
        }
        Ok(input)
    };
    let answers = async {
        // The other end of `input` is held by whoever asks.
        let mut reader = output;
        for (place, item) in items.iter().enumerate() {
            let bytes = read_one(workshop, &mut reader, item).await?;
            take(place, &bytes)?;
        }
        Ok::<_, Error>(())
    };
    let (input, ()) = tokio::try_join!(questions, answers)?;
    drop(input);
    let status = timed(workshop, child.0.wait()).await?;
    good(super::child::Ended { good: status.success(), said: String::new() }, "reading files")
}

async fn read_one(workshop: &Workshop, from: &mut BufReader<ChildStdout>, item: &Item) -> Result<Vec<u8>> {
    let mut line = Vec::new();
    timed(workshop, (&mut *from).take(256).read_until(b'\n', &mut line)).await?;
    if line != format!("{} blob {}\n", item.id, item.size).as_bytes() {
        let message = format!("`{}` is not the file that was listed", item.path);
        return Err(Error::corrupt("REPOSITORY_MALFORMED", message));
    }
    let mut bytes = vec![0; usize::try_from(item.size).unwrap_or(usize::MAX).saturating_add(1)];
    timed(workshop, from.read_exact(&mut bytes)).await?;
    bytes.pop();
    Ok(bytes)
}

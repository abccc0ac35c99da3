//! Files of at most one fill unit: held in memory, digested there, and written once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;

use super::arriving::SmallTurn;
use super::fetch::{blocking, changed, confirm, filled, is_corrupt, put_aside, too_long, too_short};
use super::flying::{Bringing, Flying, Permits};
use super::plan::ToFill;
use super::retry::Ladder;
use super::seal;
use crate::error::{Error, Result};
use crate::pieces::{Pieces, Whole};
use crate::source::{File, Source};

/// One that comes for longer than this may be written over meanwhile, as a large one may: the source is asked once more then.
const SOON: Duration = Duration::from_secs(1);

/// A file that came.
struct Came {
    bytes: Whole,
    slowly: bool,
    permits: Permits,
}

/// For whom a file is fetched.
pub(super) enum For {
    /// A reader waits for it.
    Reader(u32),
    /// The background; for a reader as soon as one waits for it.
    Background(SmallTurn),
}

/// Fetches and seals one.
pub(super) async fn small(bringing: Bringing, whom: For) -> Result<()> {
    let Bringing { flying, arriving } = &bringing;
    let entry = match &whom {
        For::Reader(entry) => *entry,
        For::Background(turn) => turn.entry(),
    };
    let file = arriving.to_fill(entry)?;
    let size = file.file.size.unwrap_or(0);
    let (bytes, slowly, permits, core) = if flying.source.is_local() {
        // Memory last: what waits for a disk must not hold it.
        let core = flying.core().await?;
        let memory = flying.shared.bounds.claim(size).await?;
        (None, false, (None, Some((None, memory))), core)
    } else {
        // The stream's permit is kept until the bytes are written: what comes faster than it is digested waits at the source, not in memory.
        let Came { bytes, slowly, permits } = from_stream(&bringing, &file, size, &whom).await?;
        (Some(bytes), slowly, permits, flying.core().await?)
    };
    drop(whom);
    let (work, flight) = (file.clone(), flying.clone());
    let digested = blocking(move || {
        let whole = match bytes {
            Some(bytes) => bytes,
            None => from_here(flight.source.as_ref(), &work.file, size)?.into(),
        };
        let disk = flight.shared.store.disk();
        let digested = disk.write_filling_with(&flight.key, work.number, size, |write| {
            seal::digest_small(&whole, &work.path, &work.file.expected, write)
        });
        if is_corrupt(&digested) {
            // To be put aside, if there is room.
            let _ = disk.write_filling_with(&flight.key, work.number, size, |write| whole.each_window(write));
        }
        digested
    })
    .await;
    // Before the source is asked again, which may take long.
    drop((permits, core));
    if is_corrupt(&digested) {
        put_aside(&bringing, &file, None).await;
    }
    let digested = digested?;
    if slowly && let Err(error) = confirm(flying, &file.file).await {
        put_aside(&bringing, &file, None).await;
        return Err(error);
    }
    if file.file.size.is_some() {
        flying.progress.arrived(size);
    }
    filled(&bringing, &file, entry, size, digested, false).await
}

fn from_here(source: &dyn Source, file: &File, size: u64) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let opened = source
        .open_local(file)?
        .ok_or_else(|| Error::internal("a file of this host cannot be opened as one any more"))?;
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    (&opened).take(size + 1).read_to_end(&mut bytes).map_err(|error| Error::io("reading", &*file.locator, error))?;
    source.check_unchanged(file, &opened)?;
    if bytes.len() as u64 != size {
        return Err(changed(&file.locator));
    }
    Ok(bytes)
}

async fn from_stream(bringing: &Bringing, file: &ToFill, size: u64, whom: &For) -> Result<Came> {
    let Bringing { flying, arriving } = bringing;
    let bounds = &flying.shared.bounds;
    let mut ladder = Ladder::new(flying.shared.settings.attempts);
    loop {
        let permits = match whom {
            For::Reader(_) => None,
            For::Background(turn) => turn.unless_wanted(bounds.background(size * 2)).await.transpose()?,
        };
        let permits = match permits {
            Some(permits) => permits,
            None => bounds.request().await?,
        };
        match once(flying, file, size, permits).await {
            Ok(came) => return Ok(came),
            Err(error) => {
                let _rests = matches!(whom, For::Reader(_)).then(|| arriving.rest_with_small());
                ladder.wait(error.during(format!("fetching `{}`", file.path))).await?;
            }
        }
    }
}

/// One request, under `permits`; without memory it is a reader's, and claims it when something comes.
async fn once(flying: &Arc<Flying>, file: &ToFill, size: u64, (request, mut memory): Permits) -> Result<Came> {
    let mut stream = flying.source.read(&file.file, 0..size).await?;
    let began = Instant::now();
    let mut bytes = Pieces::default();
    while let Some(piece) = stream.try_next().await? {
        if memory.is_none() {
            memory = Some(flying.claim_wanted(size * 2).await?);
        }
        if (bytes.len() + piece.len()) as u64 > size {
            return Err(too_long(size));
        }
        bytes.push(piece);
    }
    if (bytes.len() as u64) < size {
        return Err(too_short(bytes.len() as u64, size));
    }
    Ok(Came { bytes: bytes.whole(), slowly: began.elapsed() > SOON, permits: (request, memory) })
}

//! What the store knows, durably: checkpoints, manifests, blobs, chunks, borrowed ranges, jobs and events, in one SQLite file.
//!
//! One thread owns the one writing connection and one owns a reading connection; async code sends closures and awaits their
//! answer, so no task ever waits on SQLite itself and there is no lock. Every [`Catalog::write`] is one transaction: it is durable
//! (WAL, `synchronous=FULL`) when the call returns, or nothing of it happened. Commands queue up to
//! `limits::QUEUE_COMMANDS`; beyond that senders wait. A caller that goes away does not undo its command. A panic in a command rolls its
//! transaction back and is that command's error; one that cannot be rolled back ends the daemon, as the next one finds the file whole.
//!
//! The functions over rows live in one file per subject and take the connection; nothing outside this module writes SQL.
//! Schema changes are migrations (`schema`), append-only; a catalog written by a newer ckptd is refused.

pub mod accounting;
pub mod blobs;
pub mod checkpoints;
pub mod events;
pub mod fills;
pub mod forecasts;
pub mod jobs;
pub mod losses;
pub mod placements;
pub mod quotas;
mod record;
pub mod retention;
mod schema;
pub mod scrubs;
pub mod uploads;

use std::path::Path;

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, Kind, Result};
use crate::limits;
use crate::panics::guarded;

type Command = Box<dyn FnOnce(&mut Connection) + Send>;

/// Handle to the catalog; cheap to clone. The threads end when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct Catalog {
    writer: mpsc::Sender<Command>,
    reader: mpsc::Sender<Command>,
}

impl Catalog {
    /// Opens or creates the catalog and migrates it.
    ///
    /// # Errors
    /// `CATALOG_TOO_NEW`, or the SQLite error with the path.
    pub fn open(path: &Path) -> Result<Self> {
        let mut connection = connect(path)?;
        schema::migrate(&mut connection)?;
        let reader = connect(path)?;
        Ok(Self { writer: lane("catalog-write", connection)?, reader: lane("catalog-read", reader)? })
    }

    /// Runs `work` as one transaction; durable on return.
    ///
    /// # Errors
    /// Those of `work` (then nothing happened) and those of SQLite.
    pub async fn write<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        let (command, answer) = command(move |connection| in_transaction(connection, work));
        self.writer.send(command).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }

    /// Runs `work` on a consistent view of what is committed.
    ///
    /// # Errors
    /// Those of `work`.
    pub async fn read<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        let (command, answer) = command(move |connection| in_view(connection, work));
        self.reader.send(command).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }

    /// [`Catalog::read`] for threads that may block.
    ///
    /// # Errors
    /// As [`Catalog::read`].
    pub fn read_blocking<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        let (command, answer) = command(move |connection| in_view(connection, work));
        self.reader.blocking_send(command).map_err(|_| stopped())?;
        answer.blocking_recv().map_err(|_| stopped())?
    }

    /// [`Catalog::write`] for threads that may block.
    ///
    /// # Errors
    /// As [`Catalog::write`].
    pub fn write_blocking<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        let (command, answer) = command(move |connection| in_transaction(connection, work));
        self.writer.blocking_send(command).map_err(|_| stopped())?;
        answer.blocking_recv().map_err(|_| stopped())?
    }
}

fn command<R: Send + 'static>(
    work: impl FnOnce(&mut Connection) -> Result<R> + Send + 'static,
) -> (Command, oneshot::Receiver<Result<R>>) {
    let (answer, receiver) = oneshot::channel();
    let command: Command = Box::new(move |connection| {
        let done = guarded("a command of the catalog", || work(connection));
        roll_back(connection);
        let _ = answer.send(done);
    });
    (command, receiver)
}

/// Ends what a command left open. Dropping a transaction has rolled it back already, also in a panic, unless SQLite refused to.
fn roll_back(connection: &Connection) {
    if !connection.is_autocommit()
        && let Err(error) = connection.execute_batch("ROLLBACK")
    {
        tracing::error!(%error, "a transaction cannot be rolled back; ckptd ends, and its successor finds nothing of it");
        std::process::abort();
    }
}

fn in_transaction<R>(connection: &mut Connection, work: impl FnOnce(&Connection) -> Result<R>) -> Result<R> {
    let transaction =
        connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate).map_err(catalog_error)?;
    let outcome = work(&transaction)?;
    transaction.commit().map_err(catalog_error)?;
    Ok(outcome)
}

fn in_view<R>(connection: &mut Connection, work: impl FnOnce(&Connection) -> Result<R>) -> Result<R> {
    let transaction = connection.transaction().map_err(catalog_error)?;
    work(&transaction)
}

fn lane(name: &str, mut connection: Connection) -> Result<mpsc::Sender<Command>> {
    let (sender, mut receiver) = mpsc::channel::<Command>(limits::QUEUE_COMMANDS);
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            while let Some(command) = receiver.blocking_recv() {
                command(&mut connection);
            }
        })
        .map_err(|error| Error::unavailable("NO_THREAD", format!("starting the thread {name}")).because(error))?;
    Ok(sender)
}

fn connect(path: &Path) -> Result<Connection> {
    let open = || -> rusqlite::Result<Connection> {
        let connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", "ON")?;
        connection.busy_timeout(std::time::Duration::from_secs(10))?;
        connection.set_prepared_statement_cache_capacity(64);
        Ok(connection)
    };
    open().map_err(|error| catalog_error(error).during(format!("opening the catalog {}", path.display())))
}

/// Reason of a command that no thread takes any more.
pub(crate) const CATALOG_STOPPED: &str = "CATALOG_STOPPED";

fn stopped() -> Error {
    Error::unavailable(CATALOG_STOPPED, "the catalog has stopped").remedy("restart ckptd and look at its log")
}

/// An SQLite failure in our words.
pub(crate) fn catalog_error(error: rusqlite::Error) -> Error {
    use rusqlite::ErrorCode;
    let (kind, reason) = match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => (Kind::NoSpace, "DISK_FULL"),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => (Kind::Corrupt, "CATALOG_DAMAGED"),
        Some(
            ErrorCode::SystemIoFailure
            | ErrorCode::CannotOpen
            | ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::OutOfMemory,
        ) => (Kind::Unavailable, "CATALOG_IO_ERROR"),
        Some(ErrorCode::PermissionDenied | ErrorCode::ReadOnly) => (Kind::Denied, "CATALOG_NOT_WRITABLE"),
        _ => (Kind::Internal, "CATALOG_ERROR"),
    };
    Error::new(kind, reason, "the catalog failed").because(error)
}

/// SQLite integers are signed; sizes beyond `i64::MAX` cannot occur in files.
pub(crate) fn to_sql(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// The inverse of [`to_sql`]; a negative value, which we never write, reads as 0.
pub(crate) fn from_sql(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// A digest column; a wrong length means a damaged catalog.
pub(crate) fn digest_at(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<crate::digest::Digest> {
    let bytes: [u8; crate::digest::DIGEST_BYTES] = row.get(column)?;
    Ok(crate::digest::Digest::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failed_transaction_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&directory.path().join("catalog.db")).unwrap();
        let refused: Result<()> = catalog
            .write(|tx| {
                events::record(tx, 1, &events::NewEvent { kind: "X", message: "x".into(), ..Default::default() })?;
                Err(Error::invalid("NO", "no"))
            })
            .await;
        assert_eq!(refused.unwrap_err().reason(), "NO");
        let count = catalog.read(|tx| events::after(tx, 0, 10)).await.unwrap().len();
        assert_eq!(count, 0);
    }

    #[tokio::test]
    async fn a_panic_is_the_error_of_its_command_alone_on_both_lanes() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&directory.path().join("catalog.db")).unwrap();
        let event = || events::NewEvent { kind: "X", message: "x".into(), ..Default::default() };
        let refused: Result<()> = catalog
            .write(move |tx| {
                events::record(tx, 1, &event())?;
                panic!("on purpose, having written")
            })
            .await;
        let refused = refused.unwrap_err();
        assert_eq!(refused.kind(), Kind::Internal);
        assert!(refused.report().contains("on purpose, having written"), "{refused:?}");
        let read: Result<()> = catalog.read(|_| panic!("on purpose, reading")).await;
        assert_eq!(read.unwrap_err().kind(), Kind::Internal);
        assert!(catalog.read(|tx| events::after(tx, 0, 10)).await.unwrap().is_empty(), "what it wrote is undone");
        catalog.write(move |tx| events::record(tx, 2, &event())).await.unwrap();
        assert_eq!(catalog.read(|tx| events::after(tx, 0, 10)).await.unwrap().len(), 1);
    }

    #[test]
    fn a_newer_catalog_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("catalog.db");
        drop(Catalog::open(&path).unwrap());
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 999).unwrap();
        assert_eq!(Catalog::open(&path).unwrap_err().reason(), "CATALOG_TOO_NEW");
    }
}

//! The listing of a tree at an FTP server: directory by directory over one connection, then the times of files over several where
//! listings do not tell them.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::super::super::{Counter, Listed, Listing, What};
use super::listing::{Kind, Line, Stat};
use super::{Borrowed, CONNECTIONS, Located, Server, below, revision};
use crate::error::{Error, Kind as Fault, Result};
use crate::names::{EntryName, EntryPath, show_bytes};

/// A listing under way.
struct Walk {
    root: Vec<u8>,
    open: VecDeque<EntryPath>,
    directories: Vec<EntryPath>,
    files: Vec<(EntryPath, Located)>,
    skipped: Vec<(String, String)>,
}

/// Everything below the directory at the absolute path `root`.
pub(super) async fn tree(
    server: &Arc<Server>,
    mut borrowed: Borrowed,
    root: Vec<u8>,
    (ranges, counter): (bool, &Counter),
) -> Result<Listing> {
    let open = VecDeque::from([EntryPath::root()]);
    let mut walk = Walk { root, open, directories: Vec::new(), files: Vec::new(), skipped: Vec::new() };
    while let Some(directory) = walk.open.pop_front() {
        let lines = borrowed.connection.list(&below(&walk.root, directory.as_bytes())).await?;
        for line in lines {
            let known = walk.directories.len() + walk.files.len() + walk.skipped.len() + 1;
            counter(known)
                .map_err(|error| error.during(format!("listing {}", borrowed.connection.shown(&walk.root))))?;
            walk.admit(&directory, line, &mut borrowed).await?;
        }
    }
    server.give_back(borrowed);
    let Walk { directories, files, skipped, .. } = walk;
    let (mut files, unstamped): (Vec<_>, Vec<_>) =
        files.into_iter().partition(|(_, file)| file.stamp.modified.is_some());
    files.extend(stamped(server, unstamped).await?);
    files.sort_by(|(one, _), (other, _)| one.cmp(other));
    let revision = revision(files.iter().map(|(path, file)| (path.as_bytes(), file)));
    let directories = directories.into_iter().map(|path| Listed { path, what: What::Directory });
    let files = files.into_iter().map(|(path, file)| Listed { path, what: What::File(file.into_file(ranges)) });
    Ok(Listing { skipped, ..Listing::new(revision, directories.chain(files).collect()) })
}

impl Walk {
    async fn admit(&mut self, directory: &EntryPath, line: Line, borrowed: &mut Borrowed) -> Result<()> {
        let name = match EntryName::new(line.name.as_slice()) {
            Ok(name) => name,
            Err(fault) => {
                self.skipped.push((show_bytes(&below(directory.as_bytes(), &line.name)), fault.to_string()));
                return Ok(());
            }
        };
        let path = directory.join(&name)?;
        match line.kind {
            Kind::Directory => {
                self.open.push_back(path.clone());
                self.directories.push(path);
            }
            Kind::File(stat) => self.add(path, stat),
            Kind::Link => {
                let at = below(&self.root, path.as_bytes());
                match borrowed.connection.stat(&at).await {
                    Ok(stat) => self.add(path, stat),
                    Err(error) if error.kind() == Fault::NotFound => {
                        self.skipped.push((path.to_string(), "is a link to a directory or to nothing".to_owned()));
                    }
                    Err(error) => return Err(error),
                }
            }
            Kind::Other(kind) => {
                self.skipped.push((path.to_string(), format!("is neither file nor directory ({kind})")));
            }
        }
        Ok(())
    }

    fn add(&mut self, path: EntryPath, stat: Stat) {
        let at = below(&self.root, path.as_bytes());
        self.files.push((path, Located { path: at, size: stat.size, stamp: stat.stamp }));
    }
}

/// The same files with their times, as far as the server tells them; asked for over several connections.
async fn stamped(server: &Arc<Server>, files: Vec<(EntryPath, Located)>) -> Result<Vec<(EntryPath, Located)>> {
    let share = files.len().div_ceil(CONNECTIONS).max(1);
    let mut files = files.into_iter();
    let shares =
        std::iter::from_fn(|| Some(files.by_ref().take(share).collect::<Vec<_>>()).filter(|share| !share.is_empty()));
    let shares: Vec<_> = shares.collect();
    let done: Vec<Vec<_>> = stream::iter(shares)
        .map(|mut share| async move {
            let mut borrowed = server.connection().await?;
            for (_, file) in &mut share {
                file.stamp = borrowed.connection.stamp(&file.path).await?;
            }
            server.give_back(borrowed);
            Ok::<_, Error>(share)
        })
        .buffer_unordered(CONNECTIONS)
        .try_collect()
        .await?;
    Ok(done.into_iter().flatten().collect())
}

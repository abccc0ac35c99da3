//! Secrets of requests with whoever holds the mounts' descriptors: each filling's are a file in memory (`memfd`), which the holder has until it is decided.
//!
//! So a restart, an upgrade or a kill goes on with what needs them. They are in no file system, go when the holder goes, and are seen by nobody who
//! could not look into the daemon's own memory.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::ingest::secrets::SecretsHolder;
use crate::serve::{HandedOver, Keeper};
use crate::source::Credentials;

/// Begins the names of their descriptors.
const PREFIX: &str = "secrets.";

/// More is not believed.
const BYTES_MAX: u64 = 1 << 20;

/// What such a file holds, as JSON.
#[derive(Deserialize, Serialize)]
struct Held {
    version: u32,
    checkpoint: String,
    secrets: BTreeMap<String, String>,
}

/// Version of [`Held`]; another is let go.
const VERSION: u32 = 1;

/// The secrets that are held: see the module's page.
pub(super) struct Secrets {
    keeper: Option<Arc<dyn Keeper>>,
    /// Names of what is held.
    held: Mutex<HashSet<String>>,
    /// What a predecessor had, until it is gone on with.
    found: Mutex<HashMap<String, Credentials>>,
}

impl Secrets {
    /// Takes those out of what was handed over.
    pub(super) fn of(keeper: Option<Arc<dyn Keeper>>, handed_over: &mut Vec<HandedOver>) -> Self {
        let (mut held, mut found) = (HashSet::new(), HashMap::new());
        for one in handed_over.extract_if(.., |one| one.name.starts_with(PREFIX)) {
            match read(&File::from(one.descriptor)) {
                Ok(Held { version: VERSION, checkpoint, secrets }) => {
                    found.insert(checkpoint, Credentials::new(secrets));
                }
                Ok(_) => tracing::warn!("secrets that another version of ckptd held are let go"),
                Err(error) => tracing::warn!(%error, "secrets that were held cannot be read"),
            }
            held.insert(one.name);
        }
        Self { keeper, held: Mutex::new(held), found: Mutex::new(found) }
    }

    /// What a predecessor had for `checkpoint`.
    pub(super) fn of_predecessor(&self, checkpoint: &str) -> Credentials {
        lock(&self.found).remove(checkpoint).unwrap_or_default()
    }

    /// Lets go of what nobody went on with. Blocks.
    pub(super) fn let_go_of_the_rest(&self) {
        let rest: Vec<_> = lock(&self.found).drain().map(|(checkpoint, _)| checkpoint).collect();
        rest.iter().for_each(|checkpoint| self.let_go(checkpoint));
    }
}

impl SecretsHolder for Secrets {
    fn hold(&self, checkpoint: &str, secrets: &Credentials) {
        let Some(keeper) = &self.keeper else { return };
        self.let_go(checkpoint);
        let held = Held { version: VERSION, checkpoint: checkpoint.to_owned(), secrets: secrets.reveal().clone() };
        let name = name_of(checkpoint);
        match written(&held) {
            Ok(file) => match keeper.keep(&name, file.as_fd()) {
                Ok(()) => drop(lock(&self.held).insert(name)),
                Err(error) => {
                    tracing::warn!(checkpoint, error = %error.report(), "its secrets will not outlive this process");
                }
            },
            Err(error) => tracing::warn!(checkpoint, %error, "its secrets will not outlive this process"),
        }
    }

    fn let_go(&self, checkpoint: &str) {
        let name = name_of(checkpoint);
        if !lock(&self.held).remove(&name) {
            return;
        }
        if let Some(Err(error)) = self.keeper.as_ref().map(|keeper| keeper.forget(&name)) {
            tracing::warn!(checkpoint, error = %error.report(), "its secrets could not be let go");
        }
    }
}

/// A name that the holder takes: ids may have any character.
fn name_of(checkpoint: &str) -> String {
    format!("{PREFIX}{}", &Digest::of(checkpoint.as_bytes()).to_hex()[..32])
}

fn written(held: &Held) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"ckptd-secrets", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&serde_json::to_vec(held)?)?;
    Ok(file)
}

/// From the beginning, wherever the writer has left the descriptor's position.
fn read(file: &File) -> io::Result<Held> {
    let length = file.metadata()?.len();
    if length > BYTES_MAX {
        return Err(io::Error::other("they are too long"));
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)?;
    // What is wrong in it may quote it.
    serde_json::from_slice(&bytes).map_err(|_| io::Error::other("they make no sense"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{BorrowedFd, OwnedFd};

    use super::*;
    use crate::error::Result;

    /// Holds what it is given, as systemd does.
    #[derive(Default)]
    struct Holder(Mutex<Vec<(String, OwnedFd)>>);

    impl Keeper for Holder {
        fn keep(&self, name: &str, descriptor: BorrowedFd<'_>) -> Result<()> {
            lock(&self.0).push((name.to_owned(), descriptor.try_clone_to_owned().unwrap()));
            Ok(())
        }

        fn forget(&self, name: &str) -> Result<()> {
            lock(&self.0).retain(|(held, _)| held != name);
            Ok(())
        }
    }

    impl Holder {
        fn hands_over(&self) -> Vec<HandedOver> {
            let over =
                |(name, fd): &(String, OwnedFd)| HandedOver { name: name.clone(), descriptor: fd.try_clone().unwrap() };
            lock(&self.0).iter().map(over).collect()
        }
    }

    fn secrets(token: &str) -> Credentials {
        Credentials::new([("token".to_owned(), token.to_owned())].into())
    }

    #[test]
    fn a_successor_finds_the_last_and_lets_go_of_what_nobody_needs() {
        let holder = Arc::new(Holder::default());
        let first = Secrets::of(Some(holder.clone()), &mut Vec::new());
        for (checkpoint, token) in [("a:b", "old"), ("a:b", "new"), ("c", "other"), ("d", "third")] {
            first.hold(checkpoint, &secrets(token));
        }
        first.let_go("d");
        first.let_go("unknown");
        drop(first);
        let mut handed = holder.hands_over();
        assert_eq!(handed.len(), 2);
        let session = HandedOver {
            name: "session.1".to_owned(),
            descriptor: written(&Held { version: 9, checkpoint: String::new(), secrets: BTreeMap::new() })
                .unwrap()
                .into(),
        };
        handed.push(session);
        let next = Secrets::of(Some(holder.clone()), &mut handed);
        assert_eq!(handed.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["session.1"]);
        assert!(next.of_predecessor("a:b") == secrets("new"));
        assert!(next.of_predecessor("d").is_empty());
        next.let_go_of_the_rest();
        assert_eq!(holder.hands_over().len(), 1, "what is gone on with is held on");
        next.let_go("a:b");
        assert!(holder.hands_over().is_empty());
    }
}

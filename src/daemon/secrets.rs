//! Secrets of requests with whoever holds the mounts' descriptors: each filling's are a file in memory (`memfd`), which the holder has until it is decided.
//!
//! So a restart, an upgrade or a kill goes on with what needs them. They are in no file system, go when the holder goes, and are seen by nobody who
//! could not look into the daemon's own memory.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use crate::catalog::checkpoints::{Origin, Record};
use crate::digest::Digest;
use crate::error::Error;
use crate::ingest::secrets::SecretsHolder;
use crate::serve::{HandedOver, Keeper};
use crate::source::Credentials;

/// Begins the names of their descriptors.
const PREFIX: &str = "secrets.";

/// More is not believed.
const BYTES_MAX: u64 = 64 << 10;

/// Fillings whose secrets are held at a time: their names are one variable of the environment of the next daemon, which the kernel bounds at
/// 128 KiB, and the holder's store has an end, which sessions must not meet.
const HELD_MAX: usize = 256;

/// What such a file holds, as JSON.
#[derive(Deserialize, Serialize)]
struct Held {
    version: u32,
    checkpoint: String,
    owner: String,
    /// What they are for: ids are free again when a checkpoint is removed.
    origin: Origin,
    secrets: BTreeMap<String, String>,
}

/// Version of [`Held`]; another is let go.
const VERSION: u32 = 1;

/// The secrets that are held: see the module's page.
pub(super) struct Secrets {
    keeper: Option<Arc<dyn Keeper>>,
    /// What is held under each name.
    held: Mutex<HashMap<String, Credentials>>,
    /// What a predecessor had, by the name of its descriptor, until it is gone on with; `None` makes no sense.
    found: Mutex<HashMap<String, Option<Held>>>,
}

impl Secrets {
    /// Takes those out of what was handed over.
    pub(super) fn of(keeper: Option<Arc<dyn Keeper>>, handed_over: &mut Vec<HandedOver>) -> Self {
        let mut found = HashMap::new();
        for one in handed_over.extract_if(.., |one| one.name.starts_with(PREFIX)) {
            let held = match read(&File::from(one.descriptor)) {
                Ok(held) if held.version == VERSION && name_of(&held.checkpoint) == one.name => Some(held),
                Ok(_) => None,
                Err(error) => {
                    tracing::warn!(%error, "secrets that were held cannot be read");
                    None
                }
            };
            found.insert(one.name, held);
        }
        Self { keeper, held: Mutex::default(), found: Mutex::new(found) }
    }

    /// What a predecessor had for `record`, and for nothing else of that id.
    pub(super) fn of_predecessor(&self, record: &Record) -> Credentials {
        let name = name_of(&record.id);
        let mut found = lock(&self.found);
        let is_same = |held: &Held| held.owner == record.owner && held.origin == record.origin;
        match found.get(&name) {
            Some(Some(held)) if is_same(held) => {}
            _ => return Credentials::default(),
        }
        let Some(Some(held)) = found.remove(&name) else { return Credentials::default() };
        let secrets = Credentials::new(held.secrets);
        lock(&self.held).insert(name, secrets.clone());
        secrets
    }

    /// Lets go of what nobody went on with. Blocks.
    pub(super) fn let_go_of_the_rest(&self) {
        let rest: Vec<_> = lock(&self.found).drain().map(|(name, _)| name).collect();
        rest.iter().for_each(|name| self.forget(name));
    }

    fn forget(&self, name: &str) {
        match self.keeper.as_ref().map(|keeper| keeper.forget(name)) {
            Some(Err(error)) => tracing::warn!(error = %error.report(), "secrets could not be let go"),
            _ => drop(lock(&self.held).remove(name)),
        }
    }
}

impl SecretsHolder for Secrets {
    fn hold(&self, record: &Record, secrets: &Credentials) {
        let Some(keeper) = &self.keeper else { return };
        let name = name_of(&record.id);
        let (is_held, many) = {
            let held = lock(&self.held);
            (held.get(&name).map(|held| held == secrets), held.len() >= HELD_MAX)
        };
        match is_held {
            Some(true) => return,
            Some(false) => self.forget(&name),
            None if many => {
                tracing::warn!(
                    checkpoint = record.id,
                    "so many secrets are held that its will not outlive this process"
                );
                return;
            }
            None => {}
        }
        let held = Held {
            version: VERSION,
            checkpoint: record.id.clone(),
            owner: record.owner.clone(),
            origin: record.origin.clone(),
            secrets: secrets.reveal().clone(),
        };
        // Before it is, so that it is let go however that ends.
        lock(&self.held).insert(name.clone(), secrets.clone());
        let kept = written(&held)
            .map_err(|error| Error::internal("writing secrets into memory").because(error))
            .and_then(|file| keeper.keep(&name, file.as_fd()));
        if let Err(error) = kept {
            tracing::warn!(checkpoint = record.id, error = %error.report(), "its secrets will not outlive this process");
        }
    }

    fn let_go(&self, checkpoint: &str) {
        let name = name_of(checkpoint);
        if lock(&self.held).contains_key(&name) {
            self.forget(&name);
        }
    }
}

/// A name that the holder takes: ids may have any character.
fn name_of(checkpoint: &str) -> String {
    format!("{PREFIX}{}", &Digest::of(checkpoint.as_bytes()).to_hex()[..16])
}

fn written(held: &Held) -> io::Result<File> {
    let bytes = serde_json::to_vec(held)?;
    if bytes.len() as u64 > BYTES_MAX {
        return Err(io::Error::other("they are too long"));
    }
    let mut file = File::from(memfd_create(c"ckptd-secrets", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&bytes)?;
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

    fn record(id: &str, owner: &str, uri: &str) -> Record {
        let origin = Origin { kind: "web".into(), uri: uri.into(), options: Default::default() };
        Record { owner: owner.into(), ..Record::new(id, "n", origin, 0) }
    }

    #[test]
    fn a_successor_finds_the_last_and_lets_go_of_what_nobody_needs() {
        let holder = Arc::new(Holder::default());
        let first = Secrets::of(Some(holder.clone()), &mut Vec::new());
        for (id, token) in [("a:b", "old"), ("a:b", "new"), ("c", "other"), ("d", "third"), ("e", "fourth")] {
            first.hold(&record(id, "alice", "u"), &secrets(token));
        }
        first.let_go("d");
        first.let_go("unknown");
        drop(first);
        let mut handed = holder.hands_over();
        assert_eq!(handed.len(), 3);
        let other = || File::from(memfd_create(c"x", MFdFlags::MFD_CLOEXEC).unwrap()).into();
        handed.push(HandedOver { name: "session.1".to_owned(), descriptor: other() });
        handed.push(HandedOver { name: "secrets.nonsense".to_owned(), descriptor: other() });
        let next = Secrets::of(Some(holder.clone()), &mut handed);
        assert_eq!(handed.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["session.1"]);
        for stranger in [record("e", "bob", "u"), record("e", "alice", "elsewhere"), record("d", "alice", "u")] {
            assert!(next.of_predecessor(&stranger).is_empty());
        }
        assert!(next.of_predecessor(&record("a:b", "alice", "u")) == secrets("new"));
        next.let_go_of_the_rest();
        assert_eq!(holder.hands_over().len(), 1, "what is gone on with is held on");
        next.hold(&record("a:b", "alice", "u"), &secrets("new"));
        next.let_go("a:b");
        assert!(holder.hands_over().is_empty());
        for number in 0..HELD_MAX + 9 {
            next.hold(&record(&number.to_string(), "", "u"), &secrets("t"));
        }
        assert_eq!(holder.hands_over().len(), HELD_MAX);
    }
}

//! What a successor must know of a session, where it outlives the process: one file per session in the runtime directory.
//!
//! ```text
//!    0   "ckptd-ledger" and 4 zero bytes
//!   16   u32 version   u32 bytes of the head (4096)
//!   24   u32 major   u32 minor        device number of the session's file system: its connection
//!   32   shape of the tree, 32 bytes  Manifest::shape
//!   64   u32 flags (1: passthrough was agreed on)   u32 stack depth that was agreed on
//!   72   u64 inodes
//!   80   u16 length, checkpoint id    u16 length, raw INIT request    zeros
//! 4064   digest of the bytes before it
//! 4096   u64 for each inode from 0: mode in the two highest bits (0 closed, 1 daemon, 2 passthrough), handles in the next 30,
//!        number of the backing file in the lowest 32; of inode 0, which there is not: 3 in the two highest bits where inodes may be open
//!        through the daemon that are noted as closed, and 1 in the lowest where pages that the kernel keeps may be wrong
//! ```
//! Integers are little-endian. The head is complete before the file has its name and never changes. A slot is eight aligned
//! bytes and written by one `pwrite`, which a kill cannot tear; a file system without space is an error of that write (a mapped
//! page would be SIGBUS). Closed inodes cost nothing: the file is sparse. The slot of inode 0 is written at the beginning, so that it can be
//! written again where there is no room any more; the page that it is on has those of some five hundred inodes besides.
//!
//! Nothing is synced: when the machine stops, the connection that this is about is gone too.
//!
//! A head of a newer version is refused with an error of its own, so that whoever starts can leave everything alone.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::mount_calls::Device;
use super::open_files::{Held, Ledger};
use crate::digest::{DIGEST_BYTES, Digest};
use crate::error::{Error, Kind, Result};

/// Version of the format; a newer one is refused.
pub(super) const VERSION: u32 = 1;

const MAGIC: &[u8; 16] = b"ckptd-ledger\0\0\0\0";
const HEAD_BYTES: usize = 4096;
const SEAL_AT: usize = HEAD_BYTES - DIGEST_BYTES;
const SLOT_BYTES: u64 = 8;

const PASSTHROUGH: u32 = 1;

const MODE_DAEMON: u64 = 1;
const MODE_PASSTHROUGH: u64 = 2;
/// Of inode 0.
const SILENT: u64 = 3 << 62;
const DOUBTED: u64 = 1;
const HANDLES_MAX: u32 = (1 << 30) - 1;

/// Bytes of slots read at a time.
const READ_BYTES: usize = 1 << 20;

/// What does not change as long as the session lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// Checkpoint id.
    pub(super) checkpoint: String,
    /// Shape of the tree: inode numbers follow from it.
    pub(super) shape: Digest,
    /// The session's file system.
    pub(super) device: Device,
    /// Whether passthrough was agreed on with the kernel.
    pub(super) passthrough: bool,
    /// How deep file systems may stack then.
    pub(super) stack_depth: u32,
    /// One more than the highest inode number.
    pub(super) inodes: u64,
    /// The kernel's raw INIT request.
    pub(super) init: Vec<u8>,
}

/// The ledger of one session: see the module's page.
#[derive(Debug)]
pub(super) struct LedgerFile {
    file: File,
    path: PathBuf,
    inodes: u64,
    /// What the slot of inode 0 says, so that one of its marks is changed without the other.
    marks: Mutex<u64>,
}

impl LedgerFile {
    /// Makes the ledger of a new session, in which everything is closed; takes the place of one of the same name.
    ///
    /// # Errors
    /// The I/O error.
    pub(super) fn create(path: &Path, head: &Head) -> Result<Self> {
        let bytes = encode(head)?;
        let mut unfinished = path.as_os_str().to_owned();
        unfinished.push(".new");
        let write = || {
            let _ = fs::remove_file(&unfinished);
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create_new(true).mode(0o600).open(&unfinished)?;
            file.write_all_at(&bytes, 0)?;
            file.set_len(slot_at(head.inodes.max(1)))?;
            file.write_all_at(&[0; 8], slot_at(0))?;
            fs::rename(&unfinished, path)?;
            Ok(file)
        };
        let file = write().map_err(|error| Error::io("writing the ledger of a session", path, error))?;
        Ok(Self { file, path: path.to_owned(), inodes: head.inodes, marks: Mutex::default() })
    }

    /// Opens what a predecessor has left.
    ///
    /// # Errors
    /// `LEDGER_TOO_NEW`; corrupt, `LEDGER_DAMAGED`; the I/O error.
    pub(super) fn open(path: &Path) -> Result<(Head, Self)> {
        let failed = |error| Error::io("reading the ledger of a session", path, error);
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        let mut bytes = vec![0; HEAD_BYTES];
        file.read_exact_at(&mut bytes, 0)
            .map_err(|error| if error.kind() == ErrorKind::UnexpectedEof { damaged() } else { failed(error) })?;
        let head = decode(&bytes).map_err(|error| error.during(format!("taking over by {}", path.display())))?;
        let inodes = head.inodes;
        let mut slot = [0; 8];
        // What cannot be told is as bad as it can be.
        let marks = file.read_exact_at(&mut slot, slot_at(0)).map_or(SILENT | DOUBTED, |()| u64::from_le_bytes(slot));
        Ok((head, Self { file, path: path.to_owned(), inodes, marks: Mutex::new(marks) }))
    }

    /// What was open when the predecessor ended.
    ///
    /// # Errors
    /// The I/O error.
    pub(super) fn held(&self) -> Result<Vec<(u64, Held)>> {
        let failed = |error| Error::io("reading the ledger of a session", &self.path, error);
        let mut held = Vec::new();
        let mut bytes = vec![0; READ_BYTES];
        let mut at = slot_at(0);
        while let Some(data) = self.next_data(at).map_err(failed)? {
            at = data - data % SLOT_BYTES;
            let read = self.file.read_at(&mut bytes, at).map_err(failed)?;
            let slots = bytes[..read].chunks_exact(8).filter_map(|slot| slot.try_into().ok()).map(u64::from_le_bytes);
            let first = (at - slot_at(0)) / SLOT_BYTES;
            held.extend((first..).zip(slots).filter_map(|(inode, slot)| Some((inode, unpack(slot)?))));
            let whole = read - read % 8;
            if whole == 0 {
                break;
            }
            at += whole as u64;
        }
        Ok(held)
    }

    /// Whether inodes may be open through the daemon that are noted as closed; so it is where that cannot be told.
    pub(super) fn is_silent(&self) -> bool {
        *self.lock() & SILENT == SILENT
    }

    /// Whether pages that the kernel keeps of its files may be wrong; so it is where that cannot be told.
    pub(super) fn is_doubted(&self) -> bool {
        *self.lock() & DOUBTED != 0
    }

    /// Notes whether pages that the kernel keeps may be wrong.
    ///
    /// # Errors
    /// The I/O error; what was noted before stands then.
    pub(super) fn doubt(&self, doubted: bool) -> Result<()> {
        self.mark(|marks| if doubted { marks | DOUBTED } else { marks & !DOUBTED })
    }

    fn mark(&self, change: impl FnOnce(u64) -> u64) -> Result<()> {
        let mut noted = self.lock();
        let marks = change(*noted);
        self.file
            .write_all_at(&marks.to_le_bytes(), slot_at(0))
            .map_err(|error| Error::io("noting how files are open in", &self.path, error))?;
        *noted = marks;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the kernel may have been given files through this session that somebody has open still; so it is where that cannot be told.
    pub(super) fn may_have_given(&self) -> bool {
        self.held().map_or(true, |held| held.iter().any(|(_, held)| matches!(held, Held::Passthrough { .. })))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn next_data(&self, at: u64) -> std::io::Result<Option<u64>> {
        let from = i64::try_from(at).map_err(std::io::Error::other)?;
        match lseek(&self.file, from, Whence::SeekData) {
            Ok(found) => Ok(u64::try_from(found).ok()),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Ledger for LedgerFile {
    fn note(&self, inode: u64, held: Option<Held>) -> Result<()> {
        if inode >= self.inodes {
            return Err(Error::internal(format!("inode {inode} is beyond the ledger of its session")));
        }
        self.file
            .write_all_at(&pack(held).to_le_bytes(), slot_at(inode))
            .map_err(|error| Error::io("noting an open file in", &self.path, error))
    }

    fn note_silence(&self) -> Result<()> {
        self.mark(|marks| marks | SILENT)
    }
}

fn slot_at(inode: u64) -> u64 {
    (HEAD_BYTES as u64).saturating_add(inode.saturating_mul(SLOT_BYTES))
}

fn pack(held: Option<Held>) -> u64 {
    let (mode, handles, backing) = match held {
        None => return 0,
        Some(Held::Daemon { handles }) => (MODE_DAEMON, handles, 0),
        Some(Held::Passthrough { backing, handles }) => (MODE_PASSTHROUGH, handles, backing),
    };
    mode << 62 | u64::from(handles.min(HANDLES_MAX)) << 32 | u64::from(backing)
}

fn unpack(slot: u64) -> Option<Held> {
    let handles = u32::try_from(slot >> 32 & u64::from(HANDLES_MAX)).unwrap_or(HANDLES_MAX);
    let backing = u32::try_from(slot & u64::from(u32::MAX)).unwrap_or(0);
    match slot >> 62 {
        MODE_DAEMON => Some(Held::Daemon { handles }),
        MODE_PASSTHROUGH => Some(Held::Passthrough { backing, handles }),
        _ => None,
    }
}

fn encode(head: &Head) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(HEAD_BYTES);
    out.extend_from_slice(MAGIC);
    for word in [VERSION, u32::try_from(HEAD_BYTES).unwrap_or(0), head.device.major, head.device.minor] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(head.shape.as_bytes());
    out.extend_from_slice(&(if head.passthrough { PASSTHROUGH } else { 0 }).to_le_bytes());
    out.extend_from_slice(&head.stack_depth.to_le_bytes());
    out.extend_from_slice(&head.inodes.to_le_bytes());
    for text in [head.checkpoint.as_bytes(), &head.init] {
        out.extend_from_slice(&u16::try_from(text.len()).unwrap_or(u16::MAX).to_le_bytes());
        out.extend_from_slice(text);
    }
    if out.len() > SEAL_AT {
        return Err(Error::internal("the head of a ledger does not hold this session"));
    }
    out.resize(SEAL_AT, 0);
    let seal = Digest::of(&out);
    out.extend_from_slice(seal.as_bytes());
    Ok(out)
}

fn decode(bytes: &[u8]) -> Result<Head> {
    let mut input = Input(bytes);
    if input.take(MAGIC.len())? != MAGIC {
        return Err(damaged());
    }
    let version = input.word()?;
    if version > VERSION {
        return Err(Error::wrong_state(
            "LEDGER_TOO_NEW",
            format!("a running session was left by a newer ckptd: its ledger is of version {version}, this ckptd knows {VERSION}"),
        )
        .remedy("run the newer ckptd; what is mounted was not touched"));
    }
    let (sealed, seal) = bytes.split_at(SEAL_AT);
    if version == 0 || Digest::of(sealed).as_bytes().as_slice() != seal {
        return Err(damaged());
    }
    input.word()?;
    let device = Device { major: input.word()?, minor: input.word()? };
    let shape = Digest::from_slice(input.take(DIGEST_BYTES)?).ok_or_else(damaged)?;
    let passthrough = input.word()? & PASSTHROUGH != 0;
    let stack_depth = input.word()?;
    let inodes = u64::from_le_bytes(input.take(8)?.try_into().map_err(|_| damaged())?);
    let checkpoint = String::from_utf8(input.short()?.to_owned()).map_err(|_| damaged())?;
    let init = input.short()?.to_owned();
    Ok(Head { checkpoint, shape, device, passthrough, stack_depth, inodes, init })
}

fn damaged() -> Error {
    Error::new(Kind::Corrupt, "LEDGER_DAMAGED", "the ledger of a session is damaged")
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or_else(damaged)?;
        self.0 = rest;
        Ok(taken)
    }

    fn word(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().map_err(|_| damaged())?))
    }

    fn short(&mut self) -> Result<&'a [u8]> {
        let length = u16::from_le_bytes(self.take(2)?.try_into().map_err(|_| damaged())?);
        self.take(length.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head {
        Head {
            checkpoint: "cp-1".to_owned(),
            shape: Digest::of(b"shape"),
            device: Device { major: 0, minor: 57 },
            passthrough: true,
            stack_depth: 1,
            inodes: 1_000_000,
            init: (0..104).collect(),
        }
    }

    /// Digest of the head that version 1 writes for [`head`], and of a passthrough slot behind it.
    const GOLDEN_1: &str = "860965d0414a681d1e6f92f331080a15a8ba603aba99f4d28bf55491f861e1e0";

    #[test]
    fn golden_bytes_of_version_1_stay_as_they_are() {
        let mut bytes = encode(&head()).unwrap();
        assert_eq!(bytes.len(), HEAD_BYTES);
        assert_eq!(decode(&bytes).unwrap(), head());
        let slot = pack(Some(Held::Passthrough { backing: 7, handles: 3 }));
        assert_eq!(slot, 0x8000_0003_0000_0007);
        bytes.extend_from_slice(&slot.to_le_bytes());
        assert_eq!(Digest::of(&bytes).to_hex(), GOLDEN_1);
    }

    #[test]
    fn what_was_noted_is_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("session.x.1");
        let ledger = LedgerFile::create(&path, &head()).unwrap();
        let (far, shut) = (Held::Passthrough { backing: u32::MAX, handles: 2 }, Held::Daemon { handles: 9 });
        for (inode, held) in [(2, Some(Held::Daemon { handles: 1 })), (999_999, Some(far)), (5, Some(shut)), (5, None)]
        {
            ledger.note(inode, held).unwrap();
        }
        assert!(ledger.note(1_000_000, None).is_err());
        assert!(!ledger.is_silent());
        ledger.note_silence().unwrap();
        drop(ledger);
        let (found, ledger) = LedgerFile::open(&path).unwrap();
        assert_eq!(found, head());
        assert!(ledger.is_silent());
        assert_eq!(ledger.held().unwrap(), [(2, Held::Daemon { handles: 1 }), (999_999, far)]);
    }

    #[test]
    fn doubt_and_silence_are_noted_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("session.x.1");
        let ledger = LedgerFile::create(&path, &head()).unwrap();
        let found = || LedgerFile::open(&path).map(|(_, ledger)| (ledger.is_doubted(), ledger.is_silent())).unwrap();
        assert_eq!(found(), (false, false));
        ledger.doubt(true).unwrap();
        assert_eq!(found(), (true, false));
        ledger.note_silence().unwrap();
        assert_eq!(found(), (true, true));
        ledger.doubt(false).unwrap();
        assert_eq!(found(), (false, true));
        assert_eq!(ledger.held().unwrap(), []);
    }

    #[test]
    fn a_newer_ledger_is_told_from_a_damaged_one() {
        let mut newer = encode(&head()).unwrap();
        newer[16..20].copy_from_slice(&(VERSION + 1).to_le_bytes());
        assert_eq!(decode(&newer).unwrap_err().reason(), "LEDGER_TOO_NEW");
        let whole = encode(&head()).unwrap();
        for at in (0..HEAD_BYTES).filter(|at| !(16..20).contains(at)) {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            assert_eq!(decode(&flipped).unwrap_err().reason(), "LEDGER_DAMAGED", "at {at}");
        }
    }
}

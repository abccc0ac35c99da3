//! Getting `fuser` to run on a connection whose INIT request we already have.
//!
//! `fuser` reads INIT from the descriptor it is given and answers it there. It is given one end of a datagram pair, primed with
//! the request; its answer is taken from the other end and passed on to the kernel; then the connection's descriptor takes
//! the place of the pair's (`dup3`, in one step). So the request is known before anything is decided and can be kept for
//! a successor, which goes through the same steps without passing the answer on.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use super::fuse::Adapter;
use super::{features, mount_calls};
use crate::error::{Error, Kind, Result};

/// An answer to INIT is 80 bytes; the rest is for later protocols.
const ANSWER_ROOM: usize = 4096;

/// `struct fuse_out_header`.
const NOTIFICATION_BYTES: usize = 16;

/// `FUSE_NOTIFY_RESEND`.
const NOTIFY_RESEND: u32 = 7;

/// Through which descriptor requests are taken, and so what becomes of them when this process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taking {
    /// The one that is held: they stay, for a successor to have them handed out again.
    Held,
    /// A clone of it that dies with this process: the kernel ends them.
    Cloned,
}

impl Taking {
    pub(super) const fn of(resend: bool) -> Self {
        if resend { Self::Held } else { Self::Cloned }
    }

    fn through(self, device: &OwnedFd, session: &fuser::Session<Adapter>) -> io::Result<()> {
        match self {
            Self::Held => mount_calls::replace_descriptor(device, session.as_fd()),
            Self::Cloned => mount_calls::replace_descriptor(features::clone_connection(device)?, session.as_fd()),
        }
    }
}

/// A `fuser` session that reads requests from the new connection `device`, with `loops` threads.
///
/// # Errors
/// `FUSE_HANDSHAKE`.
pub(super) fn begin(
    adapter: Adapter,
    device: &OwnedFd,
    init: &[u8],
    loops: usize,
    taking: Taking,
) -> Result<fuser::Session<Adapter>> {
    let begun = agree(adapter, init, loops).and_then(|(session, answer)| {
        nix::unistd::write(device, &answer)?;
        taking.through(device, &session)?;
        Ok(session)
    });
    begun.map_err(|error| failed("agreeing on the FUSE protocol with the kernel", error))
}

/// A `fuser` session that goes on with the connection `device`, whose `init` was answered by a predecessor.
///
/// # Errors
/// `FUSE_HANDSHAKE`.
pub(super) fn resume(
    adapter: Adapter,
    device: &OwnedFd,
    init: &[u8],
    loops: usize,
    taking: Taking,
) -> Result<fuser::Session<Adapter>> {
    let resumed = agree(adapter, init, loops).and_then(|(session, _)| {
        taking.through(device, &session)?;
        Ok(session)
    });
    resumed.map_err(|error| failed("taking over a FUSE connection", error))
}

/// What a system call refuses may pass; what the protocol does not allow stays so.
fn failed(doing: &str, error: io::Error) -> Error {
    let kind = if error.raw_os_error().is_some() { Kind::Unavailable } else { Kind::Unsupported };
    Error::new(kind, "FUSE_HANDSHAKE", doing).because(error)
}

/// Has the kernel hand out again what a predecessor had taken and not answered.
///
/// # Errors
/// What the kernel says; EINVAL where it cannot (before Linux 6.9).
pub(super) fn resend(device: &OwnedFd) -> io::Result<()> {
    // `struct fuse_out_header`: length, the notification's code where an error would be, no request.
    let mut notification = [0; NOTIFICATION_BYTES];
    notification[..4].copy_from_slice(&u32::try_from(NOTIFICATION_BYTES).unwrap_or(0).to_ne_bytes());
    notification[4..8].copy_from_slice(&NOTIFY_RESEND.to_ne_bytes());
    nix::unistd::write(device, &notification).map(drop).map_err(Into::into)
}

/// A `fuser` session on one end of a pair, and its answer to `init`.
fn agree(adapter: Adapter, init: &[u8], loops: usize) -> io::Result<(fuser::Session<Adapter>, Vec<u8>)> {
    let (ours, theirs) = UnixDatagram::pair()?;
    ours.send(init)?;
    let mut config = fuser::Config::default();
    config.acl = fuser::SessionACL::All;
    config.n_threads = Some(loops);
    // One descriptor for all loops: see [`Taking`].
    config.clone_fd = false;
    let session = fuser::Session::from_fd(adapter, theirs.into(), fuser::SessionACL::All, config)?;
    let mut answer = vec![0; ANSWER_ROOM];
    let length = ours.recv(&mut answer)?;
    answer.truncate(length);
    Ok((session, answer))
}

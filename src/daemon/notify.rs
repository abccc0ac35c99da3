//! The wire between a daemon and whoever holds its descriptors: datagrams of systemd's `sd_notify(3)`.
//!
//! A message is lines of `KEY=value`, with descriptors beside it where one of them is `FDSTORE=1` or `BARRIER=1`. The receiver is told
//! by the kernel which process sent it.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

/// Longest message that is taken: a name of 255 bytes and a few words.
const MESSAGE_BYTES: usize = 4096;

/// Most descriptors beside one message.
const DESCRIPTORS: usize = 16;

/// One message as it came.
#[derive(Debug)]
pub(super) struct Message {
    /// The process that sent it.
    pub(super) sender: i32,
    /// Its lines.
    pub(super) text: String,
    /// What came beside it.
    pub(super) descriptors: Vec<OwnedFd>,
}

impl Message {
    /// The value of a key.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    }
}

/// The address that `NOTIFY_SOCKET` gives: a path, or with `@` in front an abstract name.
pub(super) fn address(text: &std::ffi::OsStr) -> io::Result<SocketAddr> {
    match text.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(text),
    }
}

/// Sends one message; waits for room.
pub(super) fn send(socket: &UnixDatagram, text: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let beside = [ControlMessage::ScmRights(&numbers)];
    let beside = if numbers.is_empty() { &[] } else { &beside[..] };
    let lines = [IoSlice::new(text.as_bytes())];
    sendmsg::<UnixAddr>(socket.as_fd().as_raw_fd(), &lines, beside, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Takes one message, or `None` if there is none. The socket passes credentials.
pub(super) fn receive(socket: &UnixDatagram) -> io::Result<Option<Message>> {
    let mut bytes = vec![0; MESSAGE_BYTES];
    let mut beside = nix::cmsg_space!(libc::ucred, [RawFd; DESCRIPTORS]);
    let mut room = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let (mut sender, mut descriptors) = (0, Vec::new());
    let length = match recvmsg::<UnixAddr>(socket.as_fd().as_raw_fd(), &mut room, Some(&mut beside), flags) {
        Ok(received) => {
            for control in received.cmsgs()? {
                match control {
                    ControlMessageOwned::ScmCredentials(credentials) => sender = credentials.pid(),
                    ControlMessageOwned::ScmRights(numbers) => {
                        // SAFETY: the kernel has just made these descriptors for us and nothing else knows them.
                        descriptors.extend(numbers.iter().map(|number| unsafe { OwnedFd::from_raw_fd(*number) }));
                    }
                    _ => {}
                }
            }
            received.bytes
        }
        Err(nix::errno::Errno::EAGAIN) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    bytes.truncate(length);
    Ok(Some(Message { sender, text: String::from_utf8_lossy(&bytes).into_owned(), descriptors }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_arrives_with_its_sender_and_its_descriptors() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        nix::sys::socket::setsockopt(&theirs, nix::sys::socket::sockopt::PassCred, &true).unwrap();
        assert!(receive(&theirs).unwrap().is_none());
        let file = std::fs::File::open("/dev/null").unwrap();
        send(&ours, "FDSTORE=1\nFDNAME=session.x\nFDPOLL=0", &[file.as_fd()]).unwrap();
        let message = receive(&theirs).unwrap().unwrap();
        assert_eq!(message.sender.unsigned_abs(), std::process::id());
        assert_eq!((message.get("FDNAME"), message.get("FDSTORE")), (Some("session.x"), Some("1")));
        assert_eq!((message.get("FD"), message.descriptors.len()), (None, 1));
    }

    #[test]
    fn addresses_are_paths_or_abstract_names() {
        assert!(address("/run/x".as_ref()).unwrap().as_pathname().is_some());
        assert_eq!(address("@x/y".as_ref()).unwrap().as_abstract_name(), Some(b"x/y".as_slice()));
    }
}

//! A way to the daemon that breaks: a socket before its own, and `ckptctl` that goes by it.

use std::collections::VecDeque;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use super::daemon::{CKPTCTL, Daemon, clean};
use super::ran::{LIMIT, Ran, wait_for};

/// What happens to a connection once so many bytes have passed towards the daemon.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Break {
    /// Both ends see it break.
    Cut(u64),
    /// The client sees it break, the daemon hears nothing more and nothing of it.
    HalfOpen(u64),
    /// Nothing more passes towards the daemon; neither end sees anything.
    Stall(u64),
}

/// A socket before the daemon's, whose connections break one after the other as they are told to; those beyond do not.
#[derive(Debug)]
pub(crate) struct Way {
    socket: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    breaks: Mutex<VecDeque<Break>>,
    passed: AtomicU64,
    open: Mutex<Vec<UnixStream>>,
}

impl Way {
    /// A way to the daemon, with `breaks` on it.
    pub(crate) fn to(daemon: &Daemon, breaks: &[Break]) -> Self {
        let socket = daemon.place().join("way.sock");
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let shared = Arc::new(Shared { breaks: Mutex::new(breaks.iter().copied().collect()), ..Shared::default() });
        let (ours, target) = (Arc::clone(&shared), daemon.socket());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A daemon that is away closes the connection at once.
                let Ok(server) = UnixStream::connect(&target) else { continue };
                ours.open.lock().unwrap().extend([client.try_clone().unwrap(), server.try_clone().unwrap()]);
                let (back_from, back_to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || {
                    let _ = std::io::copy(&mut (&back_from), &mut (&back_to));
                    let _ = back_to.shutdown(Shutdown::Both);
                });
                let ours = Arc::clone(&ours);
                let fault = ours.breaks.lock().unwrap().pop_front();
                thread::spawn(move || ours.pass(&client, &server, fault));
            }
        });
        Self { socket, shared }
    }

    /// Whether every break has come about.
    pub(crate) fn is_mended(&self) -> bool {
        self.shared.breaks.lock().unwrap().is_empty()
    }

    /// Bytes that passed towards the daemon.
    pub(crate) fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::Relaxed)
    }

    /// Breaks every connection there is.
    pub(crate) fn cut(&self) {
        for stream in self.shared.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// `ckptctl` this way.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = clean(CKPTCTL);
        command.arg("--endpoint").arg(format!("unix:{}", self.socket.display())).args(args);
        command
    }

    /// `ckptctl` this way, in the background.
    pub(crate) fn spawn(&self, args: &[&str]) -> Client {
        let err = self.socket.with_extension("err");
        let stderr = fs::File::create(&err).unwrap();
        let mut command = self.command(args);
        let line = format!("{command:?}");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        Client { child, line, err }
    }
}

impl Shared {
    fn pass(&self, mut client: &UnixStream, mut server: &UnixStream, fault: Option<Break>) {
        let until = match fault {
            Some(Break::Cut(bytes) | Break::HalfOpen(bytes) | Break::Stall(bytes)) => bytes,
            None => u64::MAX,
        };
        let (mut passed, mut buffer) = (0, vec![0; 64 << 10]);
        while passed < until {
            let most = usize::try_from(until - passed).unwrap_or(usize::MAX).min(buffer.len());
            let Ok(length @ 1..) = client.read(&mut buffer[..most]) else { break };
            if server.write_all(&buffer[..length]).is_err() {
                break;
            }
            passed += length as u64;
            self.passed.fetch_add(length as u64, Ordering::Relaxed);
        }
        match fault {
            // Kept open by the list of what is.
            Some(Break::HalfOpen(_)) if passed == until => {}
            Some(Break::Stall(_)) if passed == until => {
                while client.read(&mut buffer).is_ok_and(|length| length > 0) {}
                let _ = server.shutdown(Shutdown::Both);
            }
            _ => _ = server.shutdown(Shutdown::Both),
        }
        let _ = client.shutdown(Shutdown::Both);
    }
}

/// A `ckptctl` that runs; killed on drop.
#[derive(Debug)]
pub(crate) struct Client {
    child: Child,
    line: String,
    err: PathBuf,
}

impl Client {
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn interrupt(&self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    }

    /// What it has said on stderr so far.
    pub(crate) fn stderr(&self) -> String {
        fs::read_to_string(&self.err).unwrap()
    }

    pub(crate) fn ended(mut self) -> Ran {
        let code = wait_for(&mut self.child, LIMIT);
        Ran { line: self.line.clone(), code, stdout: String::new(), stderr: self.stderr() }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! Servers that nobody here wrote, run on loopback for as long as a guard lives.

use std::net::{Ipv4Addr, TcpStream};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::ran::wait_until;

/// How long a server may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(60);

/// A running server; its whole process group ends with the guard, and with the test process if that is killed.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    /// Where it listens on loopback; 0 if it listens on a socket of the file system.
    pub(crate) port: u16,
}

impl Server {
    /// Starts `command`, which listens on `port` of loopback (see [`free_port`]), and waits until it does.
    pub(crate) fn start(command: &mut Command, port: u16) -> Self {
        Self::start_at(command, Ipv4Addr::LOCALHOST, port)
    }

    /// The same at any address of loopback.
    pub(crate) fn start_at(command: &mut Command, host: Ipv4Addr, port: u16) -> Self {
        Self::start_until(command, port, || TcpStream::connect((host, port)).is_ok())
    }

    /// Starts `command`, which listens on a socket of the file system, and waits until it does.
    pub(crate) fn start_on(command: &mut Command, socket: &Path) -> Self {
        Self::start_until(command, 0, || UnixStream::connect(socket).is_ok())
    }

    fn start_until(command: &mut Command, port: u16, listens: impl Fn() -> bool) -> Self {
        // SAFETY: only async-signal-safe calls between fork and exec.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                Ok(())
            });
        }
        command.stdin(Stdio::null()).process_group(0);
        if std::env::var_os("TEST_SERVERS_TALK").is_none() {
            command.stdout(Stdio::null()).stderr(Stdio::null());
        }
        let child = command.spawn().unwrap_or_else(|error| panic!("starting {command:?}: {error}"));
        let mut server = Self { child, port };
        wait_until(&format!("{command:?} listens"), START_LIMIT, || {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none(), "{command:?} ended with {ended:?}; TEST_SERVERS_TALK=1 shows what it says");
            listens()
        });
        server
    }

    /// Its first process, which leads a group of its own.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `http://127.0.0.1:<port>`, with `path` behind it.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.child.wait();
    }
}

/// A port of loopback that nobody listens on just now, and that this process gives once: below those that the kernel gives to anybody, so that it
/// is free still when a server that takes its time to start comes to listen.
pub(crate) fn free_port() -> u16 {
    free_ports(1).start
}

/// As [`free_port`], so many in a row, each free at the first two addresses of loopback.
pub(crate) fn free_ports(count: u16) -> Range<u16> {
    // All ports there are to give, with room for a range that begins at the last of them.
    const PORTS: u16 = 22_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let base = u16::try_from(std::process::id() % 200).unwrap() * 100;
    // Asked, and not bound to see whether that works: a process that is just being started would keep the port taken until it runs its program.
    let free = |port| ["127.0.0.1", "127.0.0.2"].iter().all(|host| TcpStream::connect((*host, port)).is_err());
    loop {
        let start = 10_000 + (base + NEXT.fetch_add(count, Ordering::Relaxed) % PORTS) % PORTS;
        if (start..start + count).all(free) {
            return start..start + count;
        }
    }
}

/// A program or folder that `tests/run` installed below its tools: `venv/bin/moto_server`, `azurite/...`.
///
/// The test fails where it is missing: what is to be shown against a real server is not shown without it.
pub(crate) fn tool(path: &str) -> PathBuf {
    let tools = std::env::var("TEST_TOOLS").expect("TEST_TOOLS is not set: run the tests with `tests/run`");
    let found = PathBuf::from(tools).join(path);
    assert!(found.exists(), "{} is missing: run the tests with `tests/run`", found.display());
    found
}

//! A relay of bytes before servers of any protocol, protected ones too: it breaks connections where it is told to, slows them, and counts.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

/// What happens to a connection once so many bytes have come to its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Break {
    /// It is reset.
    Reset(u64),
    /// Nothing more comes.
    Stall(u64),
}

/// Longest piece that is passed on at a time.
const PIECE: usize = 32 << 10;

#[derive(Debug, Default)]
struct Shared {
    breaks: Mutex<VecDeque<Break>>,
    asked: Mutex<Vec<String>>,
    bytes_per_s: AtomicU64,
    bytes: AtomicU64,
    open: AtomicU64,
    closed: AtomicBool,
}

/// Where connections lead.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// To this port of 127.0.0.1.
    Straight(u16),
    /// There too, after the client has asked for it as of a proxy (`CONNECT`), whatever the name it asks for.
    Asked(u16),
}

/// The relay; closed on drop.
#[derive(Debug)]
pub(crate) struct Relay {
    addresses: Vec<SocketAddr>,
    shared: Arc<Shared>,
}

impl Relay {
    /// From a free port of 127.0.0.1 to the server at `port` of it.
    pub(crate) fn before(port: u16) -> Self {
        Self::listen(&[(Ipv4Addr::LOCALHOST, 0, Way::Straight(port))])
    }

    /// From each of `ports` at another address of loopback to the same port of 127.0.0.1.
    pub(crate) fn at(host: Ipv4Addr, ports: &[u16]) -> Self {
        let ways: Vec<_> = ports.iter().map(|port| (host, *port, Way::Straight(*port))).collect();
        Self::listen(&ways)
    }

    /// A proxy for `CONNECT` that knows one server alone, at `port`: by whatever name.
    pub(crate) fn proxy(port: u16) -> Self {
        Self::listen(&[(Ipv4Addr::LOCALHOST, 0, Way::Asked(port))])
    }

    fn listen(ways: &[(Ipv4Addr, u16, Way)]) -> Self {
        let shared = Arc::new(Shared::default());
        let addresses = ways.iter().map(|(host, port, way)| {
            let listener = TcpListener::bind((*host, *port)).unwrap();
            let address = listener.local_addr().unwrap();
            let (ours, way) = (Arc::clone(&shared), *way);
            thread::spawn(move || ours.accept(&listener, way));
            address
        });
        Self { addresses: addresses.collect(), shared }
    }

    /// Where it listens, or does so first.
    pub(crate) fn port(&self) -> u16 {
        self.addresses[0].port()
    }

    /// These wait for connections that come as far: each meets one, in this order.
    pub(crate) fn break_at(&self, breaks: &[Break]) {
        self.shared.breaks.lock().unwrap().extend(breaks);
    }

    /// What was not met yet.
    pub(crate) fn breaks_left(&self) -> Vec<Break> {
        self.shared.breaks.lock().unwrap().iter().copied().collect()
    }

    /// What a proxy was asked for: the heads of requests.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// Limits each connection to so many bytes a second; 0 lifts the limit.
    pub(crate) fn slow_down(&self, bytes_per_s: u64) {
        self.shared.bytes_per_s.store(bytes_per_s, Ordering::Relaxed);
    }

    /// Bytes that were handed to clients.
    pub(crate) fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Connections that clients have open.
    pub(crate) fn open(&self) -> u64 {
        self.shared.open.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        for address in &self.addresses {
            let _ = TcpStream::connect(address);
        }
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: &TcpListener, way: Way) {
        for client in listener.incoming().flatten() {
            if self.closed.load(Ordering::Relaxed) {
                return;
            }
            let ours = Arc::clone(self);
            thread::spawn(move || {
                ours.open.fetch_add(1, Ordering::Relaxed);
                let _ = ours.relay(&client, way);
                drop(client);
                ours.open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }

    fn relay(&self, client: &TcpStream, way: Way) -> std::io::Result<()> {
        let port = match way {
            Way::Straight(port) => port,
            Way::Asked(port) => {
                let head = read_head(client)?;
                self.asked.lock().unwrap().push(head);
                (&mut (&*client)).write_all(b"HTTP/1.1 200 Connected\r\n\r\n")?;
                port
            }
        };
        let server = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        let (mut asking, mut told) = (client.try_clone()?, server.try_clone()?);
        let client_goes = thread::spawn(move || {
            let _ = std::io::copy(&mut asking, &mut told);
            let _ = told.shutdown(Shutdown::Write);
        });
        match self.answer(&server, client) {
            Ok(Some(Break::Stall(_))) => {
                // Until the client goes away.
                let _ = client_goes.join();
            }
            Ok(Some(Break::Reset(_))) => {
                let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                setsockopt(client, sockopt::Linger, &at_once)?;
                // Nobody else may have it open when it is closed, or nothing is sent.
                server.shutdown(Shutdown::Both)?;
                client.shutdown(Shutdown::Read)?;
                let _ = client_goes.join();
                return Ok(());
            }
            Ok(None) | Err(_) => client.shutdown(Shutdown::Both)?,
        }
        server.shutdown(Shutdown::Both)
    }

    /// Passes on what comes until it ends, or is to break.
    fn answer(&self, mut from: &TcpStream, mut to: &TcpStream) -> std::io::Result<Option<Break>> {
        let mut buffer = vec![0; PIECE];
        let mut passed = 0;
        loop {
            let length = from.read(&mut buffer)?;
            if length == 0 {
                return Ok(None);
            }
            passed += length as u64;
            let due = |next: &mut Break| matches!(next, Break::Reset(bytes) | Break::Stall(bytes) if *bytes <= passed);
            if let Some(met) = self.breaks.lock().unwrap().pop_front_if(due) {
                return Ok(Some(met));
            }
            to.write_all(&buffer[..length])?;
            self.bytes.fetch_add(length as u64, Ordering::Relaxed);
            let pace = self.bytes_per_s.load(Ordering::Relaxed);
            if let Some(micros) = (length as u64 * 1_000_000).checked_div(pace) {
                thread::sleep(Duration::from_micros(micros));
            }
        }
    }
}

/// The head of a request, read no further.
fn read_head(mut from: &TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && from.read(&mut byte)? > 0 {
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

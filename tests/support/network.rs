//! A network that falters: a proxy of bytes before any server, whose connections meet one trouble of a list after the other until all were met.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use super::corpus::Random;

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Every piece comes so much later.
    Latency(Duration),
    /// So many bytes a second come.
    Throttle(u64),
    /// It is reset in the middle of what comes.
    Reset,
    /// It ends in the middle of what comes, as if that were all.
    Truncate,
    /// Nothing more comes, from the middle on.
    Stop,
    /// It is taken and never answered.
    Silence,
}

/// One of each that costs time, and several that do not.
const TROUBLES: &[Trouble] = &[
    Trouble::Latency(Duration::from_millis(40)),
    Trouble::Reset,
    Trouble::Truncate,
    Trouble::Throttle(3 << 20),
    Trouble::Stop,
    Trouble::Reset,
    Trouble::Truncate,
    Trouble::Silence,
    Trouble::Latency(Duration::from_millis(15)),
    Trouble::Stop,
    Trouble::Truncate,
    Trouble::Reset,
];

/// Longest piece that is passed on at a time.
const PIECE: usize = 32 << 10;

/// The middle of a connection begins before so many bytes have come.
const MIDDLE: u64 = 1 << 20;

#[derive(Debug)]
struct Shared {
    troubles: Mutex<(VecDeque<Trouble>, Random)>,
    closed: AtomicBool,
}

/// The proxy; closed on drop.
#[derive(Debug)]
pub(crate) struct Network {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Network {
    /// A network on a free port between clients and the server at `port` of loopback.
    pub(crate) fn before(port: u16, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let troubles = Mutex::new((TROUBLES.iter().copied().collect(), Random::new(seed)));
        let shared = Arc::new(Shared { troubles, closed: AtomicBool::new(false) });
        let ours = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if ours.closed.load(Ordering::Relaxed) {
                    return;
                }
                let ours = Arc::clone(&ours);
                thread::spawn(move || {
                    let _ = ours.connect(client, port);
                });
            }
        });
        Self { address, shared }
    }

    /// `http://127.0.0.1:<port>`, with `path` behind it.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// What was not met yet.
    pub(crate) fn troubles_left(&self) -> Vec<Trouble> {
        self.shared.troubles.lock().unwrap().0.iter().copied().collect()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    /// The next trouble, and how many bytes come before it or under it.
    fn draw(&self) -> (Option<Trouble>, u64) {
        let mut troubles = self.troubles.lock().unwrap();
        let bytes = troubles.1.below(MIDDLE);
        (troubles.0.pop_front(), bytes)
    }

    /// Whether the next trouble is silence, which then is met.
    fn draw_silence(&self) -> bool {
        self.troubles.lock().unwrap().0.pop_front_if(|next| *next == Trouble::Silence).is_some()
    }

    fn connect(&self, client: TcpStream, port: u16) -> std::io::Result<()> {
        if self.draw_silence() {
            return until_gone(&client);
        }
        let server = TcpStream::connect(("127.0.0.1", port))?;
        let (mut asking, mut asked) = (client.try_clone()?, server.try_clone()?);
        thread::spawn(move || {
            let _ = std::io::copy(&mut asking, &mut asked);
            let _ = asked.shutdown(Shutdown::Write);
        });
        let answered = self.answer(&server, &client);
        let _ = server.shutdown(Shutdown::Both);
        answered
    }

    /// Passes on what comes, through one trouble after the other, until one ends it.
    fn answer(&self, server: &TcpStream, client: &TcpStream) -> std::io::Result<()> {
        while !self.closed.load(Ordering::Relaxed) {
            // Connections that are idle keep no trouble from those that are not.
            if server.peek(&mut [0])? == 0 {
                return client.shutdown(Shutdown::Both);
            }
            let (trouble, bytes) = self.draw();
            if pass(server, client, trouble, bytes).ok() != Some(bytes) {
                // It ended before: the trouble is for another.
                self.troubles.lock().unwrap().0.extend(trouble);
                return client.shutdown(Shutdown::Both);
            }
            match trouble {
                None | Some(Trouble::Latency(_) | Trouble::Throttle(_)) => {}
                Some(Trouble::Truncate) => return client.shutdown(Shutdown::Both),
                Some(Trouble::Stop | Trouble::Silence) => return until_gone(client),
                Some(Trouble::Reset) => {
                    let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                    return setsockopt(client, sockopt::Linger, &at_once).map_err(Into::into);
                }
            }
        }
        Ok(())
    }
}

/// Passes on so many bytes, or less if no more come; how many.
fn pass(mut from: &TcpStream, mut to: &TcpStream, trouble: Option<Trouble>, bytes: u64) -> std::io::Result<u64> {
    let mut buffer = vec![0; PIECE];
    let mut passed = 0;
    while passed < bytes {
        let most = usize::try_from(bytes - passed).unwrap_or(usize::MAX).min(PIECE);
        let length = from.read(&mut buffer[..most])?;
        if length == 0 {
            break;
        }
        match trouble {
            Some(Trouble::Latency(by)) => thread::sleep(by),
            Some(Trouble::Throttle(rate)) => thread::sleep(Duration::from_micros(length as u64 * 1_000_000 / rate)),
            _ => {}
        }
        to.write_all(&buffer[..length])?;
        passed += length as u64;
    }
    Ok(passed)
}

/// Takes what is asked, and answers nothing.
fn until_gone(mut client: &TcpStream) -> std::io::Result<()> {
    let mut asked = [0; 4096];
    while client.read(&mut asked)? > 0 {}
    Ok(())
}

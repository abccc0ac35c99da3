//! A proxy before an HTTP server that spoils what passes, as it is told to, and keeps a list of what was asked.
//!
//! One request a connection. What the client sends reaches the server as it is but for `Connection`; so signatures hold
//! as long as they are made for the proxy's own address.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use super::ran::{LIMIT, wait_until};

/// What happens to one request.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// It is answered with this status and these header lines (`Retry-After: 1`), and not passed on.
    Status(u16, &'static str),
    /// It is answered with this status and this document, and not passed on.
    Refusal(u16, &'static str),
    /// So many bytes of the body pass, then the connection is reset.
    Reset(u64),
    /// So many bytes of the body pass, then it ends as if that were all.
    Truncate(u64),
    /// So many bytes of the body pass, then nothing more comes.
    Stall(u64),
    /// So many bytes of the body pass, and the next is another than it was.
    Damage(u64),
}

#[derive(Debug, Default)]
struct Shared {
    faults: Mutex<Vec<(String, Fault, usize)>>,
    heads: Mutex<Vec<String>>,
    bytes_per_s: AtomicU64,
    body_bytes: AtomicU64,
    broken: AtomicUsize,
    under_way: AtomicUsize,
    closed: AtomicBool,
}

/// The proxy; closed on drop.
#[derive(Debug)]
pub(crate) struct Faults {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Faults {
    /// A proxy on a free port before the server at `port` of loopback.
    pub(crate) fn before(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let ours = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if ours.closed.load(Ordering::Relaxed) {
                    return;
                }
                let ours = Arc::clone(&ours);
                ours.under_way.fetch_add(1, Ordering::Relaxed);
                thread::spawn(move || {
                    let _ = ours.pass(&client, port);
                    ours.under_way.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
        Self { address, shared }
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// `http://127.0.0.1:<port>`, with `path` behind it.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// The next `times` requests whose head contains `words` meet `fault`.
    pub(crate) fn spoil(&self, words: &str, fault: Fault, times: usize) {
        self.shared.faults.lock().unwrap().push((words.to_owned(), fault, times));
    }

    /// Nothing more is spoiled.
    pub(crate) fn spare(&self) {
        self.shared.faults.lock().unwrap().clear();
    }

    /// How many spoilings are still to be met.
    pub(crate) fn faults_left(&self) -> usize {
        self.shared.faults.lock().unwrap().iter().map(|(_, _, times)| times).sum()
    }

    /// Heads of all requests so far, as they came.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.shared.heads.lock().unwrap().clone()
    }

    /// Bytes of bodies that were handed to clients.
    pub(crate) fn body_bytes(&self) -> u64 {
        self.shared.body_bytes.load(Ordering::Relaxed)
    }

    /// Waits until no request is under way: those of a client that is gone end, and count no more.
    pub(crate) fn wait_idle(&self) {
        wait_until("no request is under way", LIMIT, || self.shared.under_way.load(Ordering::Relaxed) == 0);
    }

    /// Bodies that were broken off: a fault after so many bytes leaves a shorter one as it is.
    pub(crate) fn broken(&self) -> usize {
        self.shared.broken.load(Ordering::Relaxed)
    }

    /// Limits each answer to so many bytes a second; 0 lifts the limit.
    pub(crate) fn slow_down(&self, bytes_per_s: u64) {
        self.shared.bytes_per_s.store(bytes_per_s, Ordering::Relaxed);
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn pass(&self, client: &TcpStream, port: u16) -> std::io::Result<()> {
        let mut from_client = BufReader::new(client);
        let head = read_head(&mut from_client)?;
        if head.is_empty() {
            return Ok(());
        }
        self.heads.lock().unwrap().push(head.clone());
        let fault = self.take_fault(&head);
        if let Some(Fault::Status(status, lines)) = fault {
            let lines = if lines.is_empty() { String::new() } else { format!("{lines}\r\n") };
            let answer = format!("HTTP/1.1 {status} Spoiled\r\n{lines}Content-Length: 0\r\nConnection: close\r\n\r\n");
            return (&mut (&*client)).write_all(answer.as_bytes());
        }
        if let Some(Fault::Refusal(status, document)) = fault {
            let length = document.len();
            let head = format!("HTTP/1.1 {status} Spoiled\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
            return (&mut (&*client)).write_all(format!("{head}{document}").as_bytes());
        }
        let mut server = TcpStream::connect(("127.0.0.1", port))?;
        server.write_all(with_close(&head).as_bytes())?;
        let length = header(&head, "content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
        std::io::copy(&mut from_client.take(length), &mut server)?;
        let mut from_server = BufReader::new(server);
        let answer = read_head(&mut from_server)?;
        (&mut (&*client)).write_all(with_close(&answer).as_bytes())?;
        self.pass_body(&mut from_server, client, fault)
    }

    fn pass_body(&self, from: &mut impl Read, client: &TcpStream, fault: Option<Fault>) -> std::io::Result<()> {
        let until = match fault {
            Some(Fault::Reset(bytes) | Fault::Truncate(bytes) | Fault::Stall(bytes)) => bytes,
            Some(Fault::Status(..) | Fault::Refusal(..) | Fault::Damage(_)) | None => u64::MAX,
        };
        let mut passed = 0;
        let mut buffer = vec![0; 64 << 10];
        while passed < until && !self.closed.load(Ordering::Relaxed) {
            let most = usize::try_from(until - passed).unwrap_or(usize::MAX).min(buffer.len());
            let length = from.read(&mut buffer[..most])?;
            if length == 0 {
                return client.shutdown(Shutdown::Both);
            }
            if let Some(Fault::Damage(at)) = fault
                && let Some(byte) =
                    usize::try_from(at - passed.min(at)).ok().and_then(|at| buffer[..length].get_mut(at))
                && at >= passed
            {
                *byte ^= 1;
            }
            (&mut (&*client)).write_all(&buffer[..length])?;
            let length = u64::try_from(length).unwrap_or(0);
            passed += length;
            self.body_bytes.fetch_add(length, Ordering::Relaxed);
            let pace = self.bytes_per_s.load(Ordering::Relaxed);
            if let Some(micros) = (length * 1_000_000).checked_div(pace) {
                thread::sleep(Duration::from_micros(micros));
            }
        }
        if passed == until {
            self.broken.fetch_add(1, Ordering::Relaxed);
        }
        match fault {
            Some(Fault::Reset(_)) => {
                let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                let _ = setsockopt(client, sockopt::Linger, &at_once);
            }
            Some(Fault::Stall(_)) => {
                // Until the client goes away.
                let _ = (&mut (&*client)).read(&mut [0]);
            }
            _ => client.shutdown(Shutdown::Both)?,
        }
        Ok(())
    }

    fn take_fault(&self, head: &str) -> Option<Fault> {
        let mut faults = self.faults.lock().unwrap();
        let at = faults.iter().position(|(words, _, times)| *times > 0 && head.contains(words.as_str()))?;
        faults[at].2 -= 1;
        let fault = faults[at].1.clone();
        faults.retain(|(_, _, times)| *times > 0);
        Some(fault)
    }
}

fn read_head(from: &mut impl BufRead) -> std::io::Result<String> {
    let mut head = String::new();
    while from.read_line(&mut head)? > 0 {
        if head.ends_with("\r\n\r\n") || head == "\r\n" {
            break;
        }
    }
    Ok(head)
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().skip(1).find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// The same head with `Connection: close`.
fn with_close(head: &str) -> String {
    let kept = head.lines().filter(|line| !line.is_empty() && !line.to_ascii_lowercase().starts_with("connection:"));
    let mut text: String = kept.map(|line| format!("{line}\r\n")).collect();
    text.push_str("Connection: close\r\n\r\n");
    text
}

//! A proxy before an FTP server that spoils what passes, as it is told to, and keeps a list of the commands.
//!
//! Plain FTP in passive mode. The proxy stands in for the server's data connections too: the port in the answer to `PASV` becomes its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

/// What happens to one command, or to the data that it brings.
#[derive(Clone, Debug)]
pub(crate) enum FtpFault {
    /// It is answered with this, and not passed on.
    Answer(&'static str),
    /// So many bytes of data pass, then the data connection is reset.
    Reset(u64),
    /// So many bytes of data pass, then nothing more comes.
    Stall(u64),
    /// The control connection is closed instead of an answer.
    HangUp,
    /// It is passed on once nothing is spoiled any more.
    Hold,
}

/// Bytes of data that wait to be passed on.
const RECEIVED_AHEAD: usize = 128 << 10;

#[derive(Debug, Default)]
struct Shared {
    faults: Mutex<Vec<(String, FtpFault, usize)>>,
    commands: Mutex<Vec<String>>,
    bytes_per_s: AtomicU64,
    data_bytes: AtomicU64,
    /// How often all was spared.
    spared: AtomicU64,
    closed: AtomicBool,
}

/// The proxy; closed on drop.
#[derive(Debug)]
pub(crate) struct FtpFaults {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl FtpFaults {
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
                thread::spawn(move || {
                    let _ = ours.pass_control(client, port);
                });
            }
        });
        Self { address, shared }
    }

    /// `ftp://127.0.0.1:<port>`, with `path` behind it.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("ftp://{}{path}", self.address)
    }

    /// The next `times` commands that contain `words` meet `fault`.
    pub(crate) fn spoil(&self, words: &str, fault: FtpFault, times: usize) {
        self.shared.faults.lock().unwrap().push((words.to_owned(), fault, times));
    }

    /// Nothing more is spoiled or held.
    pub(crate) fn spare(&self) {
        self.shared.faults.lock().unwrap().clear();
        self.shared.spared.fetch_add(1, Ordering::Relaxed);
    }

    /// How many spoilings are still to be met.
    pub(crate) fn faults_left(&self) -> usize {
        self.shared.faults.lock().unwrap().iter().map(|(_, _, times)| times).sum()
    }

    /// All commands so far, of all connections.
    pub(crate) fn commands(&self) -> Vec<String> {
        self.shared.commands.lock().unwrap().clone()
    }

    /// Bytes of data that were handed to clients.
    pub(crate) fn data_bytes(&self) -> u64 {
        self.shared.data_bytes.load(Ordering::Relaxed)
    }

    /// Limits each data connection to so many bytes a second; 0 lifts the limit.
    pub(crate) fn slow_down(&self, bytes_per_s: u64) {
        self.shared.bytes_per_s.store(bytes_per_s, Ordering::Relaxed);
    }
}

impl Drop for FtpFaults {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn pass_control(self: &Arc<Self>, client: TcpStream, port: u16) -> std::io::Result<()> {
        let mut server = TcpStream::connect(("127.0.0.1", port))?;
        let data_fault = Arc::new(Mutex::new(None));
        let answers = (Arc::clone(self), server.try_clone()?, client.try_clone()?, Arc::clone(&data_fault));
        thread::spawn(move || {
            let (ours, from, to, fault) = answers;
            let _ = ours.pass_answers(&from, &to, &fault);
            let _ = to.shutdown(Shutdown::Both);
        });
        let mut to_client = client.try_clone()?;
        for line in BufReader::new(client).split(b'\n') {
            let line = line?;
            let command = String::from_utf8_lossy(&line).trim_end().to_owned();
            let spared = self.spared.load(Ordering::Relaxed);
            let fault = self.take_fault(&command);
            self.commands.lock().unwrap().push(command);
            match fault {
                Some(FtpFault::Hold) => self.wait_until_spared(spared),
                Some(FtpFault::Answer(text)) => {
                    to_client.write_all(format!("{text}\r\n").as_bytes())?;
                    continue;
                }
                Some(FtpFault::HangUp) => break,
                Some(fault) => *data_fault.lock().unwrap() = Some(fault),
                None => {}
            }
            server.write_all(&line)?;
            server.write_all(b"\n")?;
        }
        to_client.shutdown(Shutdown::Both)?;
        server.shutdown(Shutdown::Both)
    }

    fn pass_answers(
        self: &Arc<Self>,
        from: &TcpStream,
        mut to: &TcpStream,
        fault: &Arc<Mutex<Option<FtpFault>>>,
    ) -> std::io::Result<()> {
        for line in BufReader::new(from).split(b'\n') {
            let mut line = line?;
            line.push(b'\n');
            if let Some(port) = passive_port(&String::from_utf8_lossy(&line)) {
                let listener = TcpListener::bind("127.0.0.1:0")?;
                let ours = listener.local_addr()?.port();
                // An address that nobody is to go to: data is fetched where commands are sent.
                line = format!("227 Entering Passive Mode (192,0,2,1,{},{}).\r\n", ours / 256, ours % 256).into_bytes();
                let (shared, fault) = (Arc::clone(self), Arc::clone(fault));
                thread::spawn(move || {
                    let _ = shared.pass_data(&listener, port, &fault);
                });
            }
            to.write_all(&line)?;
        }
        Ok(())
    }

    fn pass_data(&self, listener: &TcpListener, port: u16, fault: &Mutex<Option<FtpFault>>) -> std::io::Result<()> {
        let mut server = TcpStream::connect(("127.0.0.1", port))?;
        // So that a server reads its file as it is wanted, and not all of it beforehand.
        setsockopt(&server, sockopt::RcvBuf, &RECEIVED_AHEAD)?;
        let (mut client, _) = listener.accept()?;
        let mut buffer = vec![0; 64 << 10];
        let mut passed = 0;
        let mut length = server.read(&mut buffer)?;
        let fault = fault.lock().unwrap().take();
        let until = match fault {
            Some(FtpFault::Reset(bytes) | FtpFault::Stall(bytes)) => bytes,
            _ => u64::MAX,
        };
        while length > 0 && !self.closed.load(Ordering::Relaxed) {
            let most = usize::try_from(until - passed).unwrap_or(usize::MAX).min(length);
            client.write_all(&buffer[..most])?;
            passed += u64::try_from(most).unwrap();
            self.data_bytes.fetch_add(u64::try_from(most).unwrap(), Ordering::Relaxed);
            if passed == until {
                break;
            }
            let pace = self.bytes_per_s.load(Ordering::Relaxed);
            if let Some(micros) = (u64::try_from(most).unwrap() * 1_000_000).checked_div(pace) {
                thread::sleep(Duration::from_micros(micros));
            }
            length = server.read(&mut buffer)?;
        }
        match fault {
            Some(FtpFault::Reset(_)) => {
                let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                let _ = setsockopt(&client, sockopt::Linger, &at_once);
            }
            Some(FtpFault::Stall(_)) => {
                // Until the client goes away.
                let _ = client.read(&mut [0]);
            }
            _ => {}
        }
        Ok(())
    }

    fn wait_until_spared(&self, before: u64) {
        while self.spared.load(Ordering::Relaxed) == before && !self.closed.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn take_fault(&self, command: &str) -> Option<FtpFault> {
        let mut faults = self.faults.lock().unwrap();
        let at = faults.iter().position(|(words, _, times)| *times > 0 && command.contains(words.as_str()))?;
        faults[at].2 -= 1;
        let fault = faults[at].1.clone();
        faults.retain(|(_, _, times)| *times > 0);
        Some(fault)
    }
}

/// The port in an answer to `PASV`.
fn passive_port(line: &str) -> Option<u16> {
    let inside = line.strip_prefix("227 ")?.split_once('(')?.1.split_once(')')?.0;
    let numbers: Vec<u16> = inside.split(',').filter_map(|number| number.trim().parse().ok()).collect();
    Some(numbers.get(4)? * 256 + numbers.get(5)?)
}

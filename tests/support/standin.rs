//! Stand-ins for services that cannot be run here: the programs of `tests/fixtures`, which print their port and serve until they are
//! ended.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A running stand-in; ends with the test, also with one that fails.
#[derive(Debug)]
pub(crate) struct Standin {
    child: Child,
    pub(crate) port: u16,
}

impl Standin {
    /// The hub and odd web server.
    pub(crate) fn start() -> Self {
        Self::of("standin.py")
    }

    /// The program `script` of `tests/fixtures`.
    pub(crate) fn of(script: &str) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(script);
        let mut child =
            Command::new("python3").arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { port: line.trim().parse().unwrap(), child }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// What was asked so far, one line each.
    pub(crate) fn requests(&self) -> Vec<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.write_all(b"GET /-/requests HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.split_once("\r\n\r\n").unwrap().1.lines().map(str::to_owned).collect()
    }

    /// How many requests began with `start`.
    pub(crate) fn asked(&self, start: &str) -> usize {
        self.requests().iter().filter(|line| line.starts_with(start)).count()
    }
}

impl Drop for Standin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

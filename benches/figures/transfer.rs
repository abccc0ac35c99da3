//! Receiving an upload by the transfer protocol, against receiving the same bodies with nginx's WebDAV: CPU of the server alone.

use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha512};

use super::support::corpus::{random_file, seed};
use super::support::daemon::Daemon;
use super::support::ran::{shell, wait_until};
use super::support::server::{Server, free_port};
use super::support::webserver::nginx;
use super::table::{Scale, Table, float, three};
use super::warm::warm;

/// Bytes of a body: what the platform's client sends is between 64 and 192 KiB.
const BODY_BYTES: usize = 128 << 10;

/// Seconds of CPU that one server took, and the other, and what SHA-512 takes by itself with our library: the protocol states it of all bytes.
struct Round {
    ours: f64,
    native: f64,
    sha512: f64,
}

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    let listen = format!("\"127.0.0.1:{}\"", free_port());
    let daemon = Daemon::start_with(&[("CKPTD_HTTP__LISTEN", &listen)]);
    let site = daemon.place().dir("site");
    let server = nginx(
        daemon.place(),
        &site,
        "location /put/ { dav_methods PUT; client_max_body_size 8m; } keepalive_requests 10000000;",
    );
    // What a new file costs nginx is up to the file system, and differs by half between one round and the next: an odd number, for a middle one.
    let rounds = (0..scale.rounds.min(3) | 1).map(|round| {
        let tar = write_tar(scale, &daemon, round);
        // Beforehand: the client's own work on the other core would slow the server down.
        let (sha512, digest) = sha512_of(&tar);
        let native = native(scale, &site.join(format!("put/{round}")), &server, &tar);
        let ours = ours(scale, &daemon, &format!("sent-{round}"), &tar, &digest);
        fs::remove_file(&tar).unwrap();
        Round { ours, native, sha512 }
    });
    let mut rounds: Vec<_> = rounds.collect();
    rounds.sort_by(|one, other| one.ratio().total_cmp(&other.ratio()));
    let all: Vec<_> = rounds.iter().map(Round::to_string).collect();
    table.row(
        "CPU of an upload / of nginx's PUT, median of the rounds",
        three(rounds[rounds.len() / 2].ratio()),
        "<= 2",
        format!("bodies of 128 KiB: {}", all.join(", ")),
    );
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} s of {:.2} s (SHA-512 alone {:.2} s)", self.ours, self.native, self.sha512)
    }
}

impl Round {
    fn ratio(&self) -> f64 {
        self.ours / self.native
    }
}

/// A tar of one file, with new bytes every round: what is known already would not be written again. It is in memory then, and on disk.
fn write_tar(scale: &Scale, daemon: &Daemon, round: usize) -> PathBuf {
    let tree = daemon.place().dir("tree");
    random_file(&tree.join("weights.bin"), seed() + round as u64, scale.bytes() as u64);
    let tar = daemon.place().join("upload.tar");
    shell("tar -c -C \"$1\" -f \"$2\" .; rm -r \"$1\"; sync -f \"$2\"; cat \"$2\" > /dev/null", &[&tree, &tar]).ok();
    tar
}

/// What is received stays: for minutes the file system passes over the inodes of every file that is removed, which would be nginx's to pay.
fn native(scale: &Scale, put: &Path, server: &Server, tar: &Path) -> f64 {
    fs::create_dir_all(put).unwrap();
    let path = format!("/put/{}", put.file_name().unwrap().to_str().unwrap());
    warm(scale.bytes());
    let before = cpu_seconds_of_group(server.pid());
    send_to_nginx(tar, server.port, &path);
    cpu_seconds_of_group(server.pid()) - before
}

fn ours(scale: &Scale, daemon: &Daemon, name: &str, tar: &Path, digest: &str) -> f64 {
    let transfer = daemon.json(&["create", name, "--type", "local", "--uri", "/x"])["transfer"].clone();
    let address = transfer["url"].as_str().unwrap().trim_start_matches("http://").trim_end_matches('/').to_owned();
    warm(scale.bytes());
    let before = cpu_seconds(daemon.pid());
    send_to_ckptd(tar, &address, transfer["token"].as_str().unwrap(), digest);
    wait_until("the upload is ready", Duration::from_secs(60), || daemon.json(&["get", name])["state"] == "ready");
    let took = cpu_seconds(daemon.pid()) - before;
    daemon.ctl(&["remove", name, "--yes"]).ok();
    took
}

fn send_to_nginx(file: &Path, port: u16, path: &str) {
    let mut connection = Connection::to(&format!("127.0.0.1:{port}"));
    let mut number = 0;
    each_body(file, |body| {
        let length = body.len();
        connection.ask(&format!("PUT {path}/{number} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"), body);
        number += 1;
    });
}

/// The digest, and the seconds that it took by itself.
fn sha512_of(file: &Path) -> (f64, String) {
    let (mut digest, mut took) = (Sha512::new(), Duration::ZERO);
    each_body(file, |body| {
        let began = Instant::now();
        digest.update(body);
        took += began.elapsed();
    });
    (took.as_secs_f64(), digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn send_to_ckptd(file: &Path, address: &str, token: &str, digest: &str) {
    let mut connection = Connection::to(address);
    let mut at = 0;
    let common = format!("Host: x\r\nAuthorization: Bearer {token}\r\nUpload-Id: figure\r\n");
    each_body(file, |body| {
        let end = at + body.len();
        connection.ask(
            &format!(
                "PUT /upload HTTP/1.1\r\n{common}Content-Range: bytes {at}-{}/{end}\r\nContent-Length: {}\r\n\r\n",
                end - 1,
                body.len()
            ),
            body,
        );
        at = end;
    });
    let body = format!("{{\"hash\": \"{digest}\"}}");
    let length = body.len();
    connection.ask(&format!("POST /finalize HTTP/1.1\r\n{common}Content-Length: {length}\r\n\r\n"), body.as_bytes());
}

fn each_body(file: &Path, mut send: impl FnMut(&[u8])) {
    let mut file = File::open(file).unwrap();
    let mut body = vec![0; BODY_BYTES];
    loop {
        let read = file.read(&mut body).unwrap();
        if read == 0 {
            return;
        }
        send(&body[..read]);
    }
}

/// One connection that is kept.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn to(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        Self(BufReader::new(stream))
    }

    /// Sends a request; its answer must be a success.
    fn ask(&mut self, head: &str, body: &[u8]) {
        let mut stream = self.0.get_ref();
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut status = String::new();
        self.0.read_line(&mut status).unwrap();
        assert!(status.starts_with("HTTP/1.1 2"), "{status}");
        let mut length = 0;
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).unwrap();
            if line.trim().is_empty() {
                break;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut answer = vec![0; length];
        self.0.read_exact(&mut answer).unwrap();
    }
}

/// Seconds of CPU that a program took so far.
fn cpu_seconds(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = text.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    float(ticks) / 100.0
}

/// The same of a server and its workers.
fn cpu_seconds_of_group(leader: u32) -> f64 {
    let workers = shell(&format!("pgrep -g {leader}"), &[]).ok().stdout;
    workers.lines().map(|pid| cpu_seconds(pid.trim().parse().unwrap())).sum()
}

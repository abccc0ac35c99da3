//! Running a program to its end under a time limit, and what it said.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long a program may run before the test gives it up.
pub(crate) const LIMIT: Duration = Duration::from_secs(180);

/// What a program said and how it ended.
#[derive(Clone, Debug)]
pub(crate) struct Ran {
    /// The command, for messages.
    pub(crate) line: String,
    /// Exit code; `None` if a signal or the time limit ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Fails the test unless the program succeeded.
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self}");
        self
    }

    /// Fails the test unless the program ended with one of `codes` and said `words` on stderr, each of them.
    pub(crate) fn refused(self, codes: &[i32], words: &[&str]) -> Self {
        assert!(self.code.is_some_and(|code| codes.contains(&code)), "exit code one of {codes:?} expected\n{self}");
        for word in words {
            assert!(self.stderr.contains(word), "`{word}` expected on stderr\n{self}");
        }
        assert!(!self.stderr.contains("panicked at"), "{self}");
        self
    }

    /// The one JSON document on stdout.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("stdout is not one document: {error}\n{self}"))
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "$ {}\nexit {:?}\n-- stdout\n{}\n-- stderr\n{}", self.line, self.code, self.stdout, self.stderr)
    }
}

/// Runs `command` without stdin for at most [`LIMIT`].
pub(crate) fn run(command: &mut Command) -> Ran {
    run_for(command, LIMIT)
}

/// Runs `command` without stdin; kills it after `limit`.
pub(crate) fn run_for(command: &mut Command, limit: Duration) -> Ran {
    let line = format!("{command:?}");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("starting {line}: {error}"));
    let stdout = drain(child.stdout.take().unwrap());
    let stderr = drain(child.stderr.take().unwrap());
    let code = wait_for(&mut child, limit);
    Ran { line, code, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// Waits for a child's end; kills it after `limit`.
pub(crate) fn wait_for(child: &mut Child, limit: Duration) -> Option<i32> {
    let until = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if Instant::now() > until {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Runs a shell script with `set -eu`; its arguments are `$1`, `$2` ...
pub(crate) fn shell(script: &str, args: &[&std::path::Path]) -> Ran {
    run(Command::new("sh").arg("-euc").arg(script).arg("sh").args(args))
}

/// Asks `done` again and again until it says yes.
///
/// The test fails, saying `what` was awaited, once `limit` has passed.
pub(crate) fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < until, "waited {limit:?} in vain for this: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// As [`wait_until`], for what can say why it is not so yet: the test fails with the last that it said.
pub(crate) fn wait_until_told(limit: Duration, mut done: impl FnMut() -> Result<(), String>) {
    let until = Instant::now() + limit;
    while let Err(why) = done() {
        assert!(Instant::now() < until, "waited {limit:?} in vain: {why}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn drain(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

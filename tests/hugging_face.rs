//! Hugging Face repositories from end to end: create, ready, attach, compared with what the hub's own client brings.
//!
//! The hub is the stand-in `tests/fixtures/standin.py`; the client is `huggingface_hub`, which `tests/run` installs (`TEST_PYTHON`).
//! Without it the comparison says that it was skipped.

#![cfg(test)]

mod support;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use support::daemon::{Daemon, clean};
use support::files::assert_same_tree;
use support::ran::{Ran, run};

const LOOPBACK: (&str, &str) = ("CKPTD_SOURCES__ALLOW_NETWORKS", r#"["127.0.0.0/8", "::1/128"]"#);

/// The token that the stand-in trusts.
const TOKEN: &str = "hf_secret_token";

/// The running stand-in; ends with the test, also with one that fails.
struct Hub {
    child: Child,
    endpoint: String,
}

impl Hub {
    fn start() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/standin.py");
        let mut child =
            Command::new("python3").arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { endpoint: format!("http://127.0.0.1:{}", line.trim()), child }
    }

    /// Brings a repository with the hub's own client; `false` with a message where there is none.
    fn snapshot(&self, repository: &str, into: &Path) -> bool {
        let Ok(python) = std::env::var("TEST_PYTHON") else {
            eprintln!("skipped: TEST_PYTHON is not set; tests/run sets it");
            return false;
        };
        let program = "import sys; from huggingface_hub import snapshot_download; \
                       snapshot_download(sys.argv[1], local_dir=sys.argv[2])";
        let home = into.with_extension("hub-home");
        run(clean(&python)
            .args(["-c", program, repository])
            .arg(into)
            .env("HF_ENDPOINT", &self.endpoint)
            .env("HF_HOME", home))
        .ok();
        // The client's own notes.
        std::fs::remove_dir_all(into.join(".cache")).ok();
        true
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn create(daemon: &Daemon, hub: &Hub, name: &str, repository: &str, more: &[&str]) -> Ran {
    let endpoint = format!("endpoint={}", hub.endpoint);
    let mut arguments =
        vec!["create", name, "--type", "huggingface", "--uri", repository, "--option", &endpoint, "--wait"];
    arguments.extend(more);
    daemon.ctl(&arguments)
}

#[test]
fn a_repository_is_what_the_hubs_own_client_brings() {
    let (daemon, hub) = (Daemon::start_with(&[LOOPBACK]), Hub::start());
    create(&daemon, &hub, "tiny", "acme/tiny", &[]).ok();
    let record = daemon.json(&["get", "tiny"]);
    assert_eq!(record["revision"], "a".repeat(40), "{record}");
    let expected = daemon.place().join("snapshot");
    if hub.snapshot("acme/tiny", &expected) {
        assert_same_tree(&expected, &daemon.attach("job", "tiny"));
    }
}

#[test]
fn a_branch_is_resolved_to_its_commit() {
    let (daemon, hub) = (Daemon::start_with(&[LOOPBACK]), Hub::start());
    create(&daemon, &hub, "half", "acme/tiny", &["--option", "branch=float16"]).ok();
    assert_eq!(daemon.json(&["get", "half"])["revision"], "b".repeat(40));
    create(&daemon, &hub, "none", "acme/tiny", &["--option", "branch=nope"]).refused(&[3], &["nope"]);
}

#[test]
fn a_token_opens_what_is_private_and_is_kept_nowhere() {
    let (daemon, hub) = (Daemon::start_with(&[LOOPBACK]), Hub::start());
    create(&daemon, &hub, "shut", "acme/private", &[]).refused(&[2, 3], &["token"]);
    let credential = format!("token={TOKEN}");
    create(&daemon, &hub, "open", "acme/private", &["--credential", &credential]).ok();
    create(&daemon, &hub, "gated", "acme/gated", &["--credential", &credential]).refused(&[2], &["terms"]);
    let shown = format!("{}{}", daemon.ctl(&["events"]).ok().stdout, daemon.ctl(&["list", "--json"]).ok().stdout);
    assert!(!shown.contains(TOKEN) && !daemon.stderr_tail().contains(TOKEN));
    let rows = run(clean("grep").args(["-rlF", TOKEN]).arg(daemon.state()));
    assert_eq!(rows.stdout, "", "the token is in the state directory");
}

#[test]
fn bytes_that_are_not_what_the_hub_states_fail_the_checkpoint() {
    let (daemon, hub) = (Daemon::start_with(&[LOOPBACK]), Hub::start());
    create(&daemon, &hub, "bad", "acme/damaged", &[]).refused(&[6], &["model.safetensors", "SHA-256"]);
    assert_eq!(daemon.json(&["get", "bad"])["state"], "failed");
    daemon.ctl(&["attach", "job", "bad"]).refused(&[4], &["bad"]);
    create(&daemon, &hub, "good", "acme/tiny", &[]).ok();
}

#[test]
fn a_repository_that_does_not_exist_is_not_found() {
    let (daemon, hub) = (Daemon::start_with(&[LOOPBACK]), Hub::start());
    create(&daemon, &hub, "gone", "acme/gone", &[]).refused(&[2, 3], &["acme/gone"]);
}

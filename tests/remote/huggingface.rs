//! Repositories of a hub: the stand-in `tests/fixtures/standin.py`, which the hub's own client (`huggingface_hub`) accepts, and `olah`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::buckets::{assert_kept_nowhere, reason};
use super::faltering;
use crate::support::daemon::{Daemon, LOCALHOST, clean};
use crate::support::faults::{Fault, Faults};
use crate::support::files::{assert_mounted, assert_same_tree};
use crate::support::place::Place;
use crate::support::ran::{Ran, run, shell, wait_until};
use crate::support::server::{Server, free_port, tool};
use crate::support::standin::Standin;

/// The token that the stand-in trusts.
const TOKEN: &str = "hf_secret_token";
/// One whose account accepted the terms of what is gated, too.
const GRANTED: &str = "hf_secret_granted";
const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(180);

fn create(daemon: &Daemon, endpoint: &str, name: &str, repository: &str, more: &[&str]) -> Ran {
    let endpoint = format!("endpoint={endpoint}");
    let arguments = ["create", name, "--type", "huggingface", "--uri", repository, "--option", &endpoint];
    daemon.ctl(&[&arguments[..], more].concat())
}

/// A program of the Python that has the hub's own client, speaking to `endpoint`.
fn of_the_client(program: &str, endpoint: &str, home: &Path) -> Command {
    let mut command = clean(tool("venv/bin").join(program).to_str().unwrap());
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", home).env("HF_HUB_DISABLE_XET", "1");
    command
}

/// Runs a Python program with the hub's own client.
fn client(endpoint: &str, program: &str, arguments: &[&str], home: &Path) -> Ran {
    run(of_the_client("python", endpoint, home).arg("-c").arg(program).args(arguments))
}

/// Brings a repository as the hub's own client does.
pub(super) fn bring(endpoint: &str, repository: &str, into: &Path) {
    let program = "import sys; from huggingface_hub import snapshot_download\n\
                   kind, _, rest = sys.argv[1].partition('/')\n\
                   kind, name = (kind[:-1], rest) if kind in ('datasets', 'spaces') else (None, sys.argv[1])\n\
                   snapshot_download(name, repo_type=kind, local_dir=sys.argv[2])";
    client(endpoint, program, &[repository, into.to_str().unwrap()], &into.with_extension("home")).ok();
    // The client's own notes.
    let _ = fs::remove_dir_all(into.join(".cache"));
}

#[test]
fn models_datasets_and_spaces_are_what_the_hubs_own_client_brings() {
    let (daemon, hub) = (Daemon::start_with(&[LOCALHOST]), Standin::start());
    for (name, repository) in [
        ("model", "acme/tiny"),
        ("old-model", "gpt2"),
        ("dataset", "hf:datasets/acme/tables"),
        ("old-dataset", "datasets/squad"),
        ("space", "spaces/acme/demo"),
    ] {
        create(&daemon, &hub.url(""), name, repository, &["--wait"]).ok();
        assert_eq!(daemon.json(&["get", name])["revision"], "a".repeat(40), "{repository}");
        let expected = daemon.place().join(&format!("expected-{name}"));
        bring(&hub.url(""), repository.trim_start_matches("hf:"), &expected);
        assert_same_tree(&expected, &daemon.attach(name, name));
    }
    create(&daemon, &hub.url(""), "no-space", "spaces/demo", &[]).refused(&[2], &["datasets/ or spaces/"]);
    create(&daemon, &hub.url(""), "gone", "acme/gone", &["--wait"]).refused(&[3], &["acme/gone"]);
}

#[test]
fn the_hubs_own_client_accepts_the_standin() {
    let (place, hub) = (Place::new(), Standin::start());
    let faults = Faults::before(hub.port);
    let program = "import io\n\
        from huggingface_hub import HfApi, hf_hub_download, hf_hub_url\n\
        from huggingface_hub.file_download import http_get\n\
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError\n\
        def refused(kind, *a, **k):\n\
        \x20   try: hf_hub_download(*a, **k)\n\
        \x20   except kind: return\n\
        \x20   raise SystemExit('not refused: %r' % (a,))\n\
        refused(GatedRepoError, 'acme/gated', 'config.json', token='hf_secret_token')\n\
        hf_hub_download('acme/gated', 'config.json', token='hf_secret_granted')\n\
        refused(RepositoryNotFoundError, 'acme/private', 'config.json', token=False)\n\
        refused(RevisionNotFoundError, 'acme/tiny', 'config.json', revision='nope')\n\
        names = [item.path for item in HfApi().list_repo_tree('acme/many', repo_type='dataset', recursive=True)]\n\
        assert len(names) == 20_200, len(names)\n\
        # The client's way to take up a file that broke off: a range, also at the place it is redirected to.\n\
        whole, rest = io.BytesIO(), io.BytesIO()\n\
        address = hf_hub_url('acme/tiny', 'model.safetensors')\n\
        http_get(address, whole)\n\
        rest.write(whole.getvalue()[:3 << 20])\n\
        http_get(address, rest, resume_size=3 << 20, expected_size=5 << 20)\n\
        assert rest.getvalue() == whole.getvalue() and len(whole.getvalue()) == 5 << 20";
    faults.spoil("/tree/", Fault::Status(429, "Retry-After: 1"), 1);
    client(&faults.url(""), program, &[], &place.join("home")).ok();
    assert_eq!(faults.faults_left(), 0);
    let heads = faults.heads();
    let ranged = |head: &String| head.contains("/cdn/") && head.to_lowercase().contains("range: bytes=3145728-");
    assert!(heads.iter().any(|head| ranged(head) && head.to_lowercase().contains("host: localhost")), "{heads:?}");
}

#[test]
fn a_branch_is_its_commit_even_while_it_moves() {
    let (daemon, hub) = (Daemon::start_with(&[LOCALHOST]), Standin::start());
    create(&daemon, &hub.url(""), "half", "acme/tiny", &["--wait", "--option", "branch=float16"]).ok();
    assert_eq!(daemon.json(&["get", "half"])["revision"], "b".repeat(40));
    create(&daemon, &hub.url(""), "none", "acme/tiny", &["--wait", "--option", "branch=nope"]).refused(&[3], &["nope"]);
    for (name, commit, files) in [("then", "a", 4), ("now", "b", 1)] {
        create(&daemon, &hub.url(""), name, "acme/moving", &["--wait"]).ok();
        let record = daemon.json(&["get", name]);
        assert_eq!((&record["revision"], &record["files"]), (&Value::from(commit.repeat(40)), &Value::from(files)));
    }
}

#[test]
fn a_token_opens_what_is_private_and_is_kept_nowhere() {
    let (daemon, hub) = (Daemon::start_with(&[LOCALHOST, ("RUST_LOG", "debug")]), Standin::start());
    let endpoint = hub.url("");
    create(&daemon, &endpoint, "shut", "acme/private", &["--wait"]).refused(&[3], &["token"]);
    let credential = format!("token={TOKEN}");
    create(&daemon, &endpoint, "open", "acme/private", &["--wait", "--credential", &credential]).ok();
    create(&daemon, &endpoint, "gated", "acme/gated", &["--wait", "--credential", &credential])
        .refused(&[2], &["terms"]);
    let granted = format!("token={GRANTED}");
    create(&daemon, &endpoint, "granted", "acme/gated", &["--wait", "--credential", &granted]).ok();
    let expected = daemon.place().join("expected");
    bring(&endpoint, "acme/tiny", &expected);
    assert_same_tree(&expected, &daemon.attach("job", "granted"));
    let stale = ["--wait", "--credential", "token=hf_secret_stale"];
    create(&daemon, &endpoint, "stale", "acme/stale-token", &stale).refused(&[2], &["not expired"]);
    assert_kept_nowhere(&daemon, &["hf_secret"]);
}

#[test]
fn what_cannot_be_a_checkpoint_fails_by_name() {
    let (daemon, hub) = (Daemon::start_with(&[LOCALHOST]), Standin::start());
    for (repository, codes, words) in [
        ("acme/damaged", &[6][..], &["model.safetensors", "SHA-256"][..]),
        ("acme/clash", &[2, 6], &["weights"]),
        ("acme/empty", &[2, 3], &["no files"]),
    ] {
        let name = repository.replace('/', "-");
        create(&daemon, &hub.url(""), &name, repository, &["--wait"]).refused(codes, words);
        let record = daemon.json(&["get", &name]);
        assert_eq!(record["state"], "failed");
        assert_ne!(record["error"]["remedy"], "", "{record}");
    }
    daemon.ctl(&["attach", "job", "acme-damaged"]).refused(&[4], &["acme-damaged"]);
    create(&daemon, &hub.url(""), "good", "acme/tiny", &["--wait"]).ok();
}

#[test]
fn every_fault_on_the_way_is_got_over() {
    let daemon = Daemon::start_with(&[LOCALHOST, ("CKPTD_SOURCES__INACTIVITY_TIMEOUT_S", "2")]);
    let hub = Standin::start();
    let expected = daemon.place().join("expected");
    bring(&hub.url(""), "acme/tiny", &expected);
    let faults = Faults::before(hub.port);
    // The first byte of the largest file is asked for at opening, and passes: what comes after it is spoiled.
    let weights = "model.safetensors?Sig";
    for (number, (words, passes, fault, at_least_s)) in [
        ("/revision/", 0, Fault::Status(503, ""), 0),
        ("/tree/", 0, Fault::Status(429, "Retry-After: 2"), 2),
        ("cursor=2", 0, Fault::Status(429, "Retry-After: 1"), 1),
        ("/config.json", 0, Fault::Status(429, "Retry-After: 2"), 2),
        (weights, 0, Fault::Status(500, ""), 0),
        // The signature expired: the hub is asked for another.
        (weights, 1, Fault::Status(403, ""), 0),
        (weights, 1, Fault::Reset(MIB), 0),
        ("small.bin?Sig", 0, Fault::Truncate(20), 0),
        (weights, 1, Fault::Stall(MIB), 2),
    ]
    .into_iter()
    .enumerate()
    {
        faults.spoil(words, Fault::Truncate(u64::MAX), passes);
        faults.spoil(words, fault.clone(), 1);
        let (name, began) = (format!("n{number}"), Instant::now());
        create(&daemon, &faults.url(""), &name, "acme/tiny", &["--wait"]).ok();
        assert_eq!(faults.faults_left(), 0, "{words} {fault:?} was not met");
        assert!(began.elapsed() >= Duration::from_secs(at_least_s), "{words} {fault:?} was not waited for");
        assert_same_tree(&expected, &daemon.attach(&name, &name));
    }
}

#[test]
fn a_token_that_is_taken_back_in_the_middle_is_given_anew() {
    let (daemon, hub) = (Daemon::start_with(&[LOCALHOST]), Standin::start());
    let faults = Faults::before(hub.port);
    // The first range ends early; for what is left neither the place that the hub names takes anybody, nor the hub.
    faults.spoil("bytes=0-33554431", Fault::Truncate(6 * MIB), 1);
    faults.spoil("bytes=4194304-", Fault::Status(401, ""), 9);
    create(&daemon, &faults.url(""), "big", "acme/big", &["--credential", &format!("token={TOKEN}")]).ok();
    daemon.wait_state("big", "failed", LIMIT);
    assert_eq!(reason(&daemon, "big"), "CREDENTIALS_REFUSED");
    let (before, asked) = (faults.body_bytes(), faults.heads().len());
    faults.spare();
    daemon.ctl(&["retry", "big", "--credential", &format!("token={GRANTED}"), "--wait"]).ok();
    let expected = daemon.place().join("expected");
    bring(&hub.url(""), "acme/big", &expected);
    assert_mounted(&expected, &daemon.attach("job", "big"));
    let again = faults.body_bytes() - before;
    assert!(again <= 45 * MIB, "{again} bytes were fetched again, of which 4 MiB were here");
    let heads = faults.heads();
    let shown = |heads: &[String], token: &str| heads.iter().any(|head| head.contains(&format!("Bearer {token}\r\n")));
    assert!(shown(&heads[..asked], TOKEN) && shown(&heads[asked..], GRANTED), "{heads:?}");
    assert!(!shown(&heads[asked..], TOKEN), "{heads:?}");
    assert_kept_nowhere(&daemon, &["hf_secret"]);
}

#[test]
fn a_redirect_to_where_sources_may_not_go_is_refused() {
    let (daemon, hub) = (Daemon::start_with(&[LOCALHOST]), Standin::start());
    let faults = Faults::before(hub.port);
    let metadata = Fault::Status(302, "Location: http://169.254.169.254/x");
    for (number, words) in ["/revision/", "/tree/", "/config.json", "model.safetensors", "?Sig"].into_iter().enumerate()
    {
        faults.spoil(words, metadata.clone(), 9);
        let name = format!("n{number}");
        create(&daemon, &faults.url(""), &name, "acme/tiny", &["--wait"])
            .refused(&[2], &["169.254.169.254", "which sources may not reach"]);
        assert_eq!(reason(&daemon, &name), "EGRESS_REFUSED", "{words}");
        faults.spare();
    }
}

#[test]
fn twenty_thousand_files_come_over_their_pages() {
    let (daemon, hub) = (Daemon::start_with(&[LOCALHOST]), Standin::start());
    let expected = daemon.place().dir("expected");
    for number in 0..20_000 {
        if number % 100 == 0 {
            fs::create_dir(expected.join(format!("part-{:03}", number / 100))).unwrap();
        }
        let path = expected.join(format!("part-{:03}/{number:05}.txt", number / 100));
        fs::write(path, format!("{number}\n")).unwrap();
    }
    create(&daemon, &hub.url(""), "many", "datasets/acme/many", &["--wait"]).ok();
    assert_eq!(hub.asked("GET /api/datasets/acme/many/tree/"), 21);
    assert_same_tree(&expected, &daemon.attach("job", "many"));
}

#[test]
fn a_large_file_goes_on_where_a_kill_broke_it_off() {
    let (mut daemon, hub) = (Daemon::start_with(&[LOCALHOST]), Standin::start());
    let faults = Faults::before(hub.port);
    faults.slow_down(4 * MIB);
    create(&daemon, &faults.url(""), "big", "acme/big", &[]).ok();
    wait_until("half is here", LIMIT, || daemon.recorded_bytes("big") >= 24 * MIB);
    daemon.kill9();
    let before = faults.body_bytes();
    faults.slow_down(0);
    daemon.restart();
    daemon.wait_state("big", "ready", LIMIT);
    let again = faults.body_bytes() - before;
    assert!(again < 36 * MIB, "{again} bytes were fetched after {before}");
    let expected = daemon.place().join("expected");
    bring(&hub.url(""), "acme/big", &expected);
    assert_mounted(&expected, &daemon.attach("job", "big"));
}

#[test]
fn a_hub_that_others_wrote_gives_what_its_own_client_brings() {
    let place = Place::new();
    let olah = olah(&place);
    let expected = place.join("expected");
    run(of_the_client("hf", &olah.url(""), &place.join("home"))
        .args(["download", "acme/real", "--local-dir"])
        .arg(&expected))
    .ok();
    let _ = fs::remove_dir_all(expected.join(".cache"));
    assert_eq!(fs::metadata(expected.join("model.safetensors")).unwrap().len(), 9 * MIB);
    let daemon = Daemon::start_with(&[LOCALHOST]);
    create(&daemon, &olah.url(""), "real", "acme/real", &["--wait"]).ok();
    assert_same_tree(&expected, &daemon.attach("job", "real"));
}

#[test]
fn a_hub_that_others_wrote_gives_the_rest_after_a_kill() {
    let place = Place::new();
    let olah = olah(&place);
    let faults = Faults::before(olah.port);
    let mut daemon = Daemon::start_with(&[LOCALHOST]);
    faults.slow_down(3 * MIB);
    create(&daemon, &faults.url(""), "real", "acme/real", &[]).ok();
    // It knows no ranges, so what counts are whole files: three that are small, the shorter of two that are not.
    wait_until("some files are here", LIMIT, || daemon.files_done("real") >= 4);
    assert_eq!(daemon.files_done("real"), 4, "all of it was here");
    daemon.kill9();
    let before = faults.body_bytes();
    faults.slow_down(0);
    daemon.restart();
    daemon.wait_state("real", "ready", LIMIT);
    let again = faults.body_bytes() - before;
    assert!(again < 29 * MIB, "{again} bytes were fetched after {before}");
    let expected = place.join("expected");
    bring(&olah.url(""), "acme/real", &expected);
    assert_mounted(&expected, &daemon.attach("job", "real"));
}

/// `olah` with the repository `acme/real`: a git repository whose large files are LFS objects.
fn olah(place: &Place) -> Server {
    let repository = place.dir("mirrors/models/acme/real");
    shell(
        "cd \"$1\"; git init -q -b main .; mkdir -p data\n\
         large() { yes \"$1\" | head -c $2 >weights; oid=$(sha256sum weights | cut -c1-64)\n\
         lfs=.git/lfs/objects/$(echo $oid | cut -c1-2)/$(echo $oid | cut -c3-4); mkdir -p $lfs; mv weights $lfs/$oid\n\
         printf 'version https://git-lfs.github.com/spec/v1\\noid sha256:%s\\nsize %s\\n' $oid $2 >$1.safetensors; }\n\
         large model 9437184; large more 28311552\n\
         echo '*.safetensors filter=lfs diff=lfs merge=lfs -text' >.gitattributes\n\
         echo '{\"a\": 1}' >config.json; echo text >'data/odd + name.txt'\n\
         git -c filter.lfs.clean=cat -c filter.lfs.required=false add -A\n\
         git -c user.name=t -c user.email=t@example.org commit -qm first",
        &[&repository],
    )
    .ok();
    let port = free_port();
    let config = place.join("olah.toml");
    let text = format!(
        "[basic]\nhost = '127.0.0.1'\nport = {port}\nrepos-path = '{repos}'\nmirrors-path = ['{mirrors}']\n\
         mirror-netloc = '127.0.0.1:{port}'\nmirror-lfs-netloc = '127.0.0.1:{port}'\nhf-scheme = 'http'\n\
         hf-netloc = '127.0.0.1:1'\nhf-lfs-netloc = '127.0.0.1:1'\n[accessibility]\noffline = true\n\
         [[accessibility.proxy]]\nrepo = '*'\nallow = true\n[[accessibility.cache]]\nrepo = '*'\nallow = true\n",
        repos = place.dir("repos").display(),
        mirrors = place.join("mirrors").display(),
    );
    fs::write(&config, text).unwrap();
    let mut command = Command::new(tool("olah/bin/olah-cli"));
    command.arg("-c").arg(config).args(["--host", "127.0.0.1", "--port", &port.to_string()]).current_dir(place.path());
    Server::start(&mut command, port)
}

#[test]
fn jobs_that_read_a_repository_lazily_see_nothing_of_a_network_that_falters() {
    let hub = Standin::start();
    let network = faltering::before(hub.port);
    let daemon = Daemon::start_with(&[LOCALHOST, ("CKPTD_SOURCES__INACTIVITY_TIMEOUT_S", "2")]);
    let expected = daemon.place().join("expected");
    bring(&hub.url(""), "acme/big", &expected);
    create(&daemon, &network.url(""), "k", "acme/big", &[]).ok();
    faltering::assert_read_lazily(&daemon, &network, "k", &expected);
}

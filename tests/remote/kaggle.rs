//! Kaggle: the stand-in `tests/fixtures/kaggle.py`, which the official clients `kaggle` and `kagglehub` list and download from.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use super::buckets::{assert_comes_back_later, assert_kept_nowhere, reason};
use crate::support::daemon::{Daemon, LOCALHOST, clean};
use crate::support::faults::{Fault, Faults};
use crate::support::files::{assert_mounted, assert_same_tree};
use crate::support::place::Place;
use crate::support::ran::{Ran, run, wait_until};
use crate::support::server::tool;
use crate::support::standin::Standin;

/// What the stand-in trusts.
const TOKEN: &str = "kaggle_secret_token";
const KEY: &str = "kaggle_secret_key";
const MIB: u64 = 1 << 20;

fn create(daemon: &Daemon, endpoint: &str, name: &str, kind: &str, uri: &str, more: &[&str]) -> Ran {
    let (endpoint, kind) = (format!("endpoint={endpoint}"), format!("type={kind}"));
    let arguments =
        ["create", name, "--type", "kaggle", "--uri", uri, "--option", &endpoint, "--option", &kind, "--wait"];
    daemon.ctl(&[&arguments[..], more].concat())
}

/// Runs an official client against `endpoint`: `hub KIND NAME INTO` is `kagglehub`, `cli ...` the command line. On stderr it tells the route of
/// each call as it knows it itself: method, path, and the names of what is not in the path.
fn client(endpoint: &str, arguments: &[&str], home: &Path) -> Ran {
    let program = "import sys, shutil\n\
        from kagglesdk import kaggle_env\n\
        from kagglesdk.kaggle_http_client import KaggleHttpClient\n\
        endpoint, what = sys.argv.pop(1), sys.argv.pop(1)\n\
        call_of = KaggleHttpClient.call\n\
        def call(self, service, name, request, kind):\n\
        \x20   path = request.endpoint()\n\
        \x20   rest = [key for key, value in request.to_dict().items() if str(value) not in path.split('/')]\n\
        \x20   print('calls', request.method(), path, *sorted(rest), file=sys.stderr)\n\
        \x20   return call_of(self, service, name, request, kind)\n\
        KaggleHttpClient.call = call\n\
        places = kaggle_env._env_to_endpoint\n\
        places[kaggle_env.KaggleEnv.TEST], places[kaggle_env.KaggleEnv.PROD] = endpoint, endpoint + '/api'\n\
        if what == 'cli':\n\
        \x20   from kaggle.cli import main\n\
        \x20   sys.exit(main())\n\
        import kagglehub\n\
        call = {'dataset': kagglehub.dataset_download, 'competition': kagglehub.competition_download,\n\
        \x20       'kernel': kagglehub.notebook_output_download}[sys.argv[1]]\n\
        shutil.copytree(call(sys.argv[2]), sys.argv[3])";
    fs::create_dir_all(home).unwrap();
    run(clean(tool("kaggle/bin/python").to_str().unwrap())
        .args(["-c", program, endpoint])
        .args(arguments)
        .env("HOME", home)
        .env("KAGGLEHUB_CACHE", home.join("cache"))
        .env("KAGGLE_API_ENVIRONMENT", "TEST")
        .env("KAGGLE_USERNAME", "alice")
        .env("KAGGLE_KEY", KEY))
    .ok()
}

#[test]
fn datasets_competitions_and_kernels_are_what_the_official_clients_bring() {
    let daemon = Daemon::start_with(&[LOCALHOST, ("RUST_LOG", "debug")]);
    let (service, place) = (Standin::of("kaggle.py"), Place::new());
    let (token, username, key) = (format!("token={TOKEN}"), "username=alice", format!("key={KEY}"));
    for (number, (kind, uri, hub_name, credentials, revision)) in [
        ("dataset", "acme/tables", "acme/tables", &[][..], "version:2;"),
        ("dataset", "acme/tables/versions/1", "acme/tables/versions/1", &[], "version:1;"),
        ("dataset", "acme/private", "acme/private", &["--credential", &token], "version:1;"),
        ("competition", "lish-moa", "lish-moa", &["--credential", username, "--credential", &key], "files:"),
        ("kernel", "acme/notebook", "acme/notebook", &[], "version:4;"),
    ]
    .into_iter()
    .enumerate()
    {
        let (name, expected) = (format!("n{number}"), place.join(&format!("expected-{number}")));
        create(&daemon, &service.url(""), &name, kind, uri, credentials).ok();
        let found = daemon.json(&["get", &name])["revision"].as_str().unwrap().to_owned();
        assert!(found.contains(revision), "{kind} {uri}: {found}");
        let home = place.join(&format!("home-{number}"));
        client(&service.url(""), &["hub", kind, hub_name, expected.to_str().unwrap()], &home);
        assert_same_tree(&expected, &daemon.attach(&name, &name));
    }
    let storage: Vec<_> = service.requests().into_iter().filter(|line| line.contains(" /storage/")).collect();
    assert!(storage.iter().all(|line| line.contains("auth=- ")), "{storage:?}");
    assert_kept_nowhere(&daemon, &["kaggle_secret"]);
}

/// A route of a request that the daemon made, as [`client`] tells of its own.
fn route(line: &str) -> String {
    let (method, rest) = line.split_once(' ').unwrap();
    let address = rest.split(' ').next().unwrap();
    let (path, query) = address.split_once('?').unwrap_or((address, ""));
    let mut names: Vec<_> = query.split('&').filter_map(|pair| Some(pair.split_once('=')?.0)).collect();
    names.sort_unstable();
    [&[method, path][..], &names].concat().join(" ")
}

#[test]
fn what_is_asked_of_the_service_are_calls_that_the_official_clients_make() {
    let place = Place::new();
    let daemon = Daemon::start_with(&[LOCALHOST]);
    let token = format!("token={TOKEN}");
    for (number, (kind, uri, calls, also)) in [
        ("dataset", "acme/tables", 2, &[][..]),
        ("kernel", "acme/notebook", 2, &[]),
        // The hub's client downloads; the list is what the command line asks for, too.
        ("competition", "lish-moa", 2, &["cli", "competitions", "files", "lish-moa", "--page-size", "200"]),
    ]
    .into_iter()
    .enumerate()
    {
        let (ours, theirs) = (Standin::of("kaggle.py"), Standin::of("kaggle.py"));
        let (home, into) = (place.join(&format!("home{number}")), place.join(&format!("into{number}")));
        create(&daemon, &ours.url(""), &format!("n{number}"), kind, uri, &["--credential", &token]).ok();
        let mut said = client(&theirs.url(""), &["hub", kind, uri, into.to_str().unwrap()], &home).stderr;
        if !also.is_empty() {
            said += &client(&theirs.url(""), also, &home).stderr;
        }
        let known: BTreeSet<_> =
            said.lines().filter_map(|line| line.strip_prefix("calls ")).map(str::to_owned).collect();
        let asked = ours.requests().into_iter().filter(|line| line.contains(" /api/"));
        let asked: BTreeSet<_> = asked.map(|line| route(&line)).collect();
        assert_eq!(asked.len(), calls, "{kind}: {asked:?}");
        assert!(asked.is_subset(&known), "{kind}: {asked:?} was asked, the clients' calls are {known:?}");
    }
}

#[test]
fn the_official_command_line_accepts_the_standin() {
    let (service, place) = (Standin::of("kaggle.py"), Place::new());
    let (out, url) = (place.dir("out"), service.url(""));
    let out = out.to_str().unwrap();
    let home = place.join("home");
    let listed = client(&url, &["cli", "datasets", "files", "acme/tables"], &home).stdout;
    assert!(listed.contains("weights.bin") && listed.contains("6291456"), "{listed}");
    let listed = client(&url, &["cli", "competitions", "files", "lish-moa"], &home).stdout;
    assert!(listed.contains("train.csv"), "{listed}");
    client(&url, &["cli", "datasets", "download", "acme/tables", "-p", out, "--unzip"], &home);
    client(&url, &["cli", "competitions", "download", "lish-moa", "-p", out], &home);
    client(&url, &["cli", "kernels", "output", "acme/notebook", "-p", out], &home);
    for (name, least) in [("weights.bin", 6 * MIB), ("lish-moa.zip", 6 * MIB), ("all.tar.gz", 6 * MIB)] {
        assert!(fs::metadata(Path::new(out).join(name)).unwrap().len() >= least, "{name}");
    }
}

#[test]
fn the_services_refusals_say_what_to_do() {
    let (daemon, service) = (Daemon::start_with(&[LOCALHOST]), Standin::of("kaggle.py"));
    let (token, stale) = (format!("token={TOKEN}"), "token=kaggle_secret_stale");
    for (number, (kind, uri, credential, codes, words)) in [
        ("competition", "not-accepted", token.as_str(), &[2][..], "accept the rules at http"),
        ("competition", "lish-moa", "", &[2], "give the credentials"),
        ("competition", "lish-moa", stale, &[2], "has not expired"),
        ("competition", "acme/tables", &token, &[2], "the name alone"),
        ("dataset", "acme/none", &token, &[3], "check the name"),
        ("dataset", "acme/private", "", &[2], "not open to this account"),
        ("dataset", "acme/tables/versions/9", &token, &[3], "version"),
        ("dataset", "acme/empty", "", &[2, 3], "no files"),
        ("dataset", "acme/below", "", &[2], "`weights/part1` is below `weights`, which is not a directory"),
        ("dataset", "acme/above", "", &[2], "`weights` occurs twice, as a directory"),
        ("dataset", "acme/changing", "", &[4], "changed since it was opened"),
        ("kernel", "acme/none", "", &[2], "not open to this account"),
        ("model", "acme/tables", "", &[2], "competition, dataset or kernel"),
    ]
    .into_iter()
    .enumerate()
    {
        let more = if credential.is_empty() { vec![] } else { vec!["--credential", credential] };
        let ran = create(&daemon, &service.url(""), &format!("n{number}"), kind, uri, &more);
        assert!(!ran.stderr.contains("kaggle_secret"), "{ran}");
        ran.refused(codes, &[words]);
    }
}

#[test]
fn every_fault_on_the_way_is_got_over() {
    let daemon = Daemon::start_with(&[LOCALHOST, ("CKPTD_SOURCES__INACTIVITY_TIMEOUT_S", "2")]);
    let (service, place) = (Standin::of("kaggle.py"), Place::new());
    let expected = place.join("expected");
    client(&service.url(""), &["hub", "dataset", "acme/tables", expected.to_str().unwrap()], &place.join("home"));
    let faults = Faults::before(service.port);
    for (number, (kind, uri, words, fault)) in [
        ("dataset", "acme/tables", "/datasets/view/", Fault::Status(429, "Retry-After: 1")),
        ("dataset", "acme/tables", "/datasets/download/", Fault::Status(503, "")),
        ("dataset", "acme/tables", "/storage/", Fault::Status(500, "")),
        ("dataset", "acme/tables", "/storage/", Fault::Status(429, "Retry-After: 1")),
        ("dataset", "acme/tables", "/storage/", Fault::Reset(100)),
        ("dataset", "acme/tables", "if-match", Fault::Status(503, "")),
        ("kernel", "acme/notebook", "/storage/", Fault::Truncate(300)),
        ("kernel", "acme/notebook", "if-match", Fault::Reset(3 * MIB)),
        ("kernel", "acme/notebook", "if-match", Fault::Stall(MIB)),
    ]
    .into_iter()
    .enumerate()
    {
        faults.spoil(words, fault.clone(), 1);
        let name = format!("n{number}");
        create(&daemon, &faults.url(""), &name, kind, uri, &[]).ok();
        assert_eq!(faults.faults_left(), 0, "{kind} {words} {fault:?} was not met");
        assert_same_tree(&expected, &daemon.attach(&name, &name));
    }
    for (number, words) in ["/datasets/view/", "/datasets/download/", "/storage/"].into_iter().enumerate() {
        assert_comes_back_later(&faults, words, || {
            create(&daemon, &faults.url(""), &format!("later{number}"), "dataset", "acme/tables", &[])
        });
    }
    // Signed addresses that are good for two requests each.
    create(&daemon, &faults.url(""), "expiring", "dataset", "acme/expiring", &[]).ok();
    assert_same_tree(&expected, &daemon.attach("expiring", "expiring"));
}

#[test]
fn a_competition_of_twenty_thousand_files_is_listed_over_its_pages() {
    let (daemon, service) = (Daemon::start_with(&[LOCALHOST]), Standin::of("kaggle.py"));
    let credential = format!("token={TOKEN}");
    create(&daemon, &service.url(""), "many", "competition", "many", &["--credential", &credential]).ok();
    assert_eq!(service.asked("GET /api/v1/competitions/data/list/many"), 100);
    assert_eq!(daemon.json(&["get", "many"])["files"], 20_000);
    let at = daemon.attach("job", "many");
    assert_eq!(fs::read_to_string(at.join("part-123/12345.csv")).unwrap(), "12345\n");
}

/// Begins to bring a bundle of six files of 6 MiB, kills the daemon when some are here, and says how many were and what was fetched again.
fn killed_half_way(place: &Place, kind: &str, uri: &str) -> (u64, u64) {
    let service = Standin::of("kaggle.py");
    let keys = place.join("keys.toml");
    fs::write(&keys, format!("token = '{TOKEN}'\nhosts = ['127.0.0.1', 'localhost']\n")).unwrap();
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
    let mut daemon =
        Daemon::start_with(&[LOCALHOST, ("CKPTD_SOURCES__CREDENTIALS_DIR", place.path().to_str().unwrap())]);
    let faults = Faults::before(service.port);
    faults.slow_down(MIB);
    let options = [format!("endpoint={}", faults.url("")), format!("type={kind}"), "credentials=keys".to_owned()];
    let given = options.iter().flat_map(|option| ["--option", option]);
    daemon.ctl(&["create", "big", "--type", "kaggle", "--uri", uri].into_iter().chain(given).collect::<Vec<_>>()).ok();
    let limit = Duration::from_secs(60);
    wait_until("some of it is sealed", limit, || daemon.files_done("big") >= 2);
    let (sealed, before) = (daemon.files_done("big"), faults.body_bytes());
    assert!(sealed < 6, "all of it was here");
    daemon.kill9();
    faults.slow_down(0);
    daemon.restart();
    daemon.wait_state("big", "ready", limit);
    let again = faults.body_bytes() - before;
    let (expected, home) = (place.join(&format!("expected-{kind}")), place.join(&format!("home-{kind}")));
    client(&service.url(""), &["hub", kind, uri, expected.to_str().unwrap()], &home);
    assert_mounted(&expected, &daemon.attach("job", "big"));
    assert_kept_nowhere(&daemon, &["kaggle_secret"]);
    (sealed, again)
}

#[test]
fn a_bundle_that_was_killed_half_way_goes_on_where_it_was() {
    let place = Place::new();
    for (kind, uri) in [("dataset", "acme/big"), ("competition", "big")] {
        let (sealed, again) = killed_half_way(&place, kind, uri);
        assert!(
            // The range that the first missing file begins in may begin before it.
            again < (6 - sealed) * 6 * MIB + (2 + 4) * MIB,
            "{kind}: {again} bytes were fetched again, {sealed} of six files were here"
        );
    }
    // That of a kernel is no zip: it comes again, and only what is missing is written.
    let (_, again) = killed_half_way(&place, "kernel", "acme/big");
    assert!(again < 2 * 36 * MIB, "{again} bytes were fetched again");
}

#[test]
fn a_job_that_would_read_a_bundle_while_it_comes_is_told_that_it_waits() {
    let (service, place) = (Standin::of("kaggle.py"), Place::new());
    let expected = place.join("expected");
    client(&service.url(""), &["hub", "dataset", "acme/tables", expected.to_str().unwrap()], &place.join("home"));
    for (kind, uri) in [("dataset", "acme/tables"), ("kernel", "acme/notebook")] {
        let daemon = Daemon::start_with(&[LOCALHOST]);
        let faults = Faults::before(service.port);
        faults.slow_down(2 * MIB);
        let options = [format!("endpoint={}", faults.url("")), format!("type={kind}")];
        let given = options.iter().flat_map(|option| ["--option", option]);
        daemon
            .ctl(&["create", "k", "--type", "kaggle", "--uri", uri].into_iter().chain(given).collect::<Vec<_>>())
            .ok();
        let target = daemon.place().dir("at");
        let ran = run(daemon.ctl_command().args(["attach", "job", "k", "--lazy", "--at"]).arg(&target)).ok();
        assert!(ran.stderr.contains("waited until all bytes were here"), "{kind}: {ran}");
        assert_eq!(daemon.json(&["get", "k"])["state"], "ready");
        assert_mounted(&expected, &target);
    }
}

#[test]
fn a_redirect_to_where_sources_may_not_go_is_refused() {
    let (daemon, service) = (Daemon::start_with(&[LOCALHOST]), Standin::of("kaggle.py"));
    let faults = Faults::before(service.port);
    let metadata = Fault::Status(302, "Location: http://169.254.169.254/x");
    for (number, words) in ["/datasets/view/", "/datasets/download/", "/storage/"].into_iter().enumerate() {
        faults.spoil(words, metadata.clone(), 9);
        let name = format!("n{number}");
        create(&daemon, &faults.url(""), &name, "dataset", "acme/tables", &[])
            .refused(&[2], &["169.254.169.254", "which sources may not reach"]);
        assert_eq!(reason(&daemon, &name), "EGRESS_REFUSED", "{words}");
        faults.spare();
    }
}

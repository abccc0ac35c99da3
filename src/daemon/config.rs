//! Configuration: defaults, then the file, then `CKPTD_*` variables, then flags; each key checked where it is read.
//!
//! The keys are one table ([`KEYS`]): name, what it means, default, how it is read; and one for each datastore ([`DATASTORE_KEYS`]), whose
//! names are the operator's. Everything else follows from the table: unknown keys are
//! errors, `check-config` reports every problem at once with its line, and the packaged file is tested against it. A value in the
//! environment is written as in TOML: `CKPTD_SOURCES__ALLOW_NETWORKS='["10.0.0.0/8"]'`.

mod values;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::{Table, Value};

use crate::certificates::CertificateFiles;
use crate::control::caller::Roles;
use crate::error::{Error, Result};
use crate::ingest::quota::Quotas;
use crate::limits;
use crate::retain::scrub::Pacing;
use crate::source::egress::Cidr;
use crate::source::{Datastore, Datastores};
use crate::store::room::Bounds;
use values::{
    absolute_path, at_least, attempts, auto_or_never, base_url, bytes, bytes_of_owners, days, file_or_none, fraction,
    listen_address, listen_addresses, networks, owners, path_or_empty, peers, seconds, set, tenants,
};

/// Where the packaged service keeps its configuration.
pub const DEFAULT_FILE: &str = "/etc/ckptd/config.toml";

/// Prefix of variables that are keys.
const PREFIX: &str = "CKPTD_";

/// Variables with our prefix that are no keys: they belong to `ckptctl`.
const NOT_KEYS: &[&str] = &["CKPTD_ENDPOINT", "CKPTD_OWNER", "CKPTD_TLS_CERTIFICATE", "CKPTD_TLS_KEY", "CKPTD_TLS_CA"];

/// Seconds of a day.
const DAY_SECONDS: u64 = 86_400;

/// Where systemd puts the credentials of a service that has some; our default where it is set.
const SYSTEMD_CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// Everything that can be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// State directory.
    pub state_dir: PathBuf,
    /// Runtime directory.
    pub runtime_dir: PathBuf,
    /// Physical bytes the store may occupy; 0: the whole filesystem.
    pub capacity_bytes: u64,
    /// Above so many thousandths of what the store may occupy, checkpoints that can be fetched again are evicted.
    pub high_watermark: u64,
    /// Down to so many.
    pub low_watermark: u64,
    /// Logical bytes one checkpoint may have.
    pub checkpoint_bytes: u64,
    /// Bytes that the store's disk is to read ahead at least; 0: as it is.
    pub read_ahead_bytes: u64,
    /// Whether the kernel reads whole blobs itself where it can.
    pub passthrough: bool,
    /// Whether a kernel that can is asked again for what a dead daemon had taken.
    pub resend: bool,
    /// How what is at rest is read again.
    pub scrub: Pacing,
    /// How long rights that are over at a start, or when the clock was set, may still be renewed.
    pub lease_grace: Duration,
    /// Networks that sources may reach besides public addresses.
    pub allow_networks: Vec<Cidr>,
    /// Attempts without progress before a fetch is given up.
    pub attempts: u32,
    /// Longest silence of a source in the middle of a body.
    pub inactivity_timeout: Duration,
    /// Where the operator keeps named credentials.
    pub credentials_dir: PathBuf,
    /// The operator's own catalogue of public checkpoints; `None`: the one that is built in.
    pub catalogue_file: Option<PathBuf>,
    /// Bytes that fetchers may hold in memory.
    pub memory_budget_bytes: u64,
    /// Where HTTP is listened for, if at all.
    pub http_listen: Option<SocketAddr>,
    /// Base URL by which others reach that listener; empty: its address.
    pub http_url: String,
    /// Silence after which an upload is dropped.
    pub upload_idle: Duration,
    /// Where gRPC by TCP is listened for, if at all.
    pub tls_listen: Vec<SocketAddr>,
    /// Certificates of that listener.
    pub certificates: CertificateFiles,
    /// Who may do what.
    pub roles: Roles,
    /// How much owners may keep.
    pub quotas: Quotas,
    /// Directories that are mounted on this host and served from.
    pub datastores: Datastores,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::from("/var/lib/ckptd"),
            runtime_dir: PathBuf::from("/run/ckptd"),
            capacity_bytes: 0,
            high_watermark: Bounds::default().high_thousandths,
            low_watermark: Bounds::default().low_thousandths,
            checkpoint_bytes: limits::CHECKPOINT_BYTES_DEFAULT,
            read_ahead_bytes: limits::READ_AHEAD_DEFAULT,
            passthrough: true,
            resend: true,
            scrub: Pacing { bytes_per_s: limits::SCRUB_RATE_DEFAULT, every: Duration::from_secs(30 * DAY_SECONDS) },
            lease_grace: Duration::from_secs(60),
            allow_networks: Vec::new(),
            attempts: crate::ingest::retry::ATTEMPTS_DEFAULT,
            inactivity_timeout: Duration::from_secs(30),
            credentials_dir: PathBuf::from("/etc/ckptd/credentials"),
            catalogue_file: None,
            memory_budget_bytes: limits::MEMORY_BUDGET_DEFAULT,
            http_listen: None,
            http_url: String::new(),
            upload_idle: Duration::from_secs(3600),
            tls_listen: Vec::new(),
            certificates: CertificateFiles::default(),
            roles: Roles::default(),
            quotas: Quotas::default(),
            datastores: Datastores::default(),
        }
    }
}

type Read = fn(&mut Config, &Value) -> std::result::Result<(), String>;

/// A key: its name, and how its value is read.
struct Key {
    name: &'static str,
    read: Read,
}

/// Every key there is.
const KEYS: &[Key] = &[
    Key { name: "store.state_dir", read: |config, value| set(&mut config.state_dir, absolute_path(value)) },
    Key { name: "store.runtime_dir", read: |config, value| set(&mut config.runtime_dir, absolute_path(value)) },
    Key { name: "store.capacity", read: |config, value| set(&mut config.capacity_bytes, bytes(value)) },
    Key { name: "store.high_watermark", read: |config, value| set(&mut config.high_watermark, fraction(value)) },
    Key { name: "store.low_watermark", read: |config, value| set(&mut config.low_watermark, fraction(value)) },
    Key { name: "store.checkpoint_limit", read: |config, value| set(&mut config.checkpoint_bytes, at_least(value, 1)) },
    Key { name: "store.read_ahead", read: |config, value| set(&mut config.read_ahead_bytes, bytes(value)) },
    Key { name: "serve.passthrough", read: |config, value| set(&mut config.passthrough, auto_or_never(value)) },
    Key { name: "serve.resend", read: |config, value| set(&mut config.resend, auto_or_never(value)) },
    Key { name: "scrub.rate", read: |config, value| set(&mut config.scrub.bytes_per_s, bytes(value)) },
    Key { name: "scrub.every_days", read: |config, value| set(&mut config.scrub.every, days(value)) },
    Key { name: "leases.grace_s", read: |config, value| set(&mut config.lease_grace, seconds(value)) },
    Key { name: "sources.allow_networks", read: |config, value| set(&mut config.allow_networks, networks(value)) },
    Key { name: "sources.attempts", read: |config, value| set(&mut config.attempts, attempts(value)) },
    Key {
        name: "sources.inactivity_timeout_s",
        read: |config, value| set(&mut config.inactivity_timeout, seconds(value)),
    },
    Key {
        name: "sources.credentials_dir",
        read: |config, value| set(&mut config.credentials_dir, absolute_path(value)),
    },
    Key { name: "catalogue.file", read: |config, value| set(&mut config.catalogue_file, file_or_none(value)) },
    Key {
        name: "memory.budget",
        read: |config, value| set(&mut config.memory_budget_bytes, at_least(value, 16 << 20)),
    },
    Key { name: "http.listen", read: |config, value| set(&mut config.http_listen, listen_address(value)) },
    Key { name: "http.url", read: |config, value| set(&mut config.http_url, base_url(value)) },
    Key { name: "http.upload_idle_s", read: |config, value| set(&mut config.upload_idle, seconds(value)) },
    Key { name: "tls.listen", read: |config, value| set(&mut config.tls_listen, listen_addresses(value)) },
    Key {
        name: "tls.certificate",
        read: |config, value| set(&mut config.certificates.certificate, path_or_empty(value)),
    },
    Key { name: "tls.key", read: |config, value| set(&mut config.certificates.key, path_or_empty(value)) },
    Key {
        name: "tls.client_ca",
        read: |config, value| set(&mut config.certificates.authorities, path_or_empty(value)),
    },
    Key { name: "access.operators", read: |config, value| set(&mut config.roles.operators, peers(value)) },
    Key { name: "access.schedulers", read: |config, value| set(&mut config.roles.schedulers, peers(value)) },
    Key { name: "access.tenants", read: |config, value| set(&mut config.roles.tenants, tenants(value)) },
    Key { name: "access.readers", read: |config, value| set(&mut config.roles.readers, peers(value)) },
    Key { name: "quotas.default", read: |config, value| set(&mut config.quotas.default_bytes, bytes(value)) },
    Key { name: "quotas.owners", read: |config, value| set(&mut config.quotas.owners, bytes_of_owners(value)) },
];

type ReadOf<T> = fn(&mut T, &Value) -> std::result::Result<(), String>;

/// A key of every datastore, `datastores.NAME.<this>`.
struct DatastoreKey {
    name: &'static str,
    read: ReadOf<Datastore>,
}

/// The table whose tables have free names.
const DATASTORES: &str = "datastores";

/// Every key there is of a datastore.
const DATASTORE_KEYS: &[DatastoreKey] = &[
    DatastoreKey { name: "path", read: |datastore, value| set(&mut datastore.path, absolute_path(value)) },
    DatastoreKey { name: "owners", read: |datastore, value| set(&mut datastore.owners, owners(value)) },
];

/// A problem of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// File and line, or the variable.
    pub place: String,
    /// What is wrong and what is expected.
    pub what: String,
}

/// Reads the file (`None`: the default one, if it is there) and the environment.
///
/// # Errors
/// `BAD_CONFIG` with every problem.
pub fn load(file: Option<&Path>, environment: impl Iterator<Item = (String, String)>) -> Result<Config> {
    let (config, problems) = examine(file, environment)?;
    if problems.is_empty() {
        return Ok(config);
    }
    let all: Vec<_> = problems.iter().map(|problem| format!("{}: {}", problem.place, problem.what)).collect();
    Err(Error::invalid("BAD_CONFIG", format!("the configuration is wrong: {}", all.join("; ")))
        .remedy("mend it; `ckptd check-config` lists every problem"))
}

/// Reads everything and collects the problems instead of stopping at the first.
///
/// # Errors
/// A file that was named and cannot be read.
pub fn examine(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
) -> Result<(Config, Vec<Problem>)> {
    let environment: Vec<_> = environment.collect();
    let mut config = Config::default();
    if let Some((_, directory)) = environment.iter().find(|(variable, _)| variable == SYSTEMD_CREDENTIALS) {
        config.credentials_dir = PathBuf::from(directory);
    }
    let mut problems = Vec::new();
    let path = file.unwrap_or(Path::new(DEFAULT_FILE));
    match std::fs::read_to_string(path) {
        Ok(text) => read_file(&text, path, &mut config, &mut problems),
        Err(error) if file.is_none() && error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(Error::io("reading the configuration", path, error).remedy("give another --config"));
        }
    }
    for (variable, text) in environment {
        let Some(name) = variable.strip_prefix(PREFIX).filter(|_| !NOT_KEYS.contains(&variable.as_str())) else {
            continue;
        };
        let name = key_of_variable(name, &config.datastores);
        let value = text.parse::<Value>().unwrap_or(Value::String(text));
        if let Err(what) = apply(&mut config, &name, &value) {
            problems.push(Problem { place: variable, what });
        }
    }
    for (name, datastore) in &config.datastores.0 {
        let place = format!("{DATASTORES}.{name}.path");
        let is_wrong = |problem: &Problem| problem.what.contains(&format!("`{place}`"));
        if datastore.path.as_os_str().is_empty() && !problems.iter().any(is_wrong) {
            problems.push(Problem { place, what: "must be given: where the datastore is mounted".to_owned() });
        }
    }
    if config.low_watermark > config.high_watermark {
        let what = "must not be above `store.high_watermark`".to_owned();
        problems.push(Problem { place: "store.low_watermark".to_owned(), what });
    }
    let files = [
        ("tls.certificate", &config.certificates.certificate),
        ("tls.key", &config.certificates.key),
        ("tls.client_ca", &config.certificates.authorities),
    ];
    for (key, path) in files {
        if !config.tls_listen.is_empty() && path.as_os_str().is_empty() {
            problems.push(Problem { place: key.to_owned(), what: "must be given where `tls.listen` is".to_owned() });
        }
    }
    Ok((config, problems))
}

/// What is not as it should be on this host just now: it may be put right while the daemon runs, and does not keep it from starting.
pub fn examine_host(config: &Config) -> Vec<Problem> {
    let absent = config
        .datastores
        .0
        .iter()
        .filter(|(_, datastore)| !datastore.path.as_os_str().is_empty() && !datastore.path.is_dir());
    let problem = |(name, datastore): (&String, &Datastore)| Problem {
        place: format!("{DATASTORES}.{name}.path"),
        what: format!("there is no directory {}; mount the datastore there", datastore.path.display()),
    };
    absent.map(problem).collect()
}

/// The key that a variable means, less its prefix. The name of a datastore is taken as one of the file's that differs in case only; else, if
/// it is in capitals throughout, as variables are, in lower case; else as it is written.
fn key_of_variable(name: &str, known: &Datastores) -> String {
    let datastore = name
        .split_once("__")
        .filter(|(table, _)| table.eq_ignore_ascii_case(DATASTORES))
        .and_then(|(_, rest)| rest.rsplit_once("__"));
    let Some((datastore, key)) = datastore else { return name.to_ascii_lowercase().replace("__", ".") };
    let same = known.0.keys().find(|other| other.eq_ignore_ascii_case(datastore));
    let in_capitals = !datastore.bytes().any(|byte| byte.is_ascii_lowercase());
    let datastore = match same {
        Some(same) => same.clone(),
        None if in_capitals => datastore.to_ascii_lowercase(),
        None => datastore.to_owned(),
    };
    format!("{DATASTORES}.{datastore}.{}", key.to_ascii_lowercase())
}

fn read_file(text: &str, path: &Path, config: &mut Config, problems: &mut Vec<Problem>) {
    let table: Table = match toml::from_str(text) {
        Ok(table) => table,
        Err(error) => {
            let line = error.span().map_or(1, |span| line_at(text, span.start));
            problems.push(Problem { place: format!("{}:{line}", path.display()), what: error.message().to_owned() });
            return;
        }
    };
    let mut leaves = Vec::new();
    flatten("", &table, &mut leaves);
    let mut found = Vec::new();
    if let Some(Value::Table(datastores)) = table.get(DATASTORES) {
        // Also one without a key, which is missed below.
        let tables = datastores.iter().filter(|(name, value)| value.is_table() && is_datastore_name(name));
        config.datastores.0.extend(tables.map(|(name, _)| (name.clone(), Datastore::default())));
    }
    for (name, value) in leaves {
        if let Err(what) = apply(config, &name, value) {
            found.push((line_of(text, &name), what));
        }
    }
    found.sort();
    problems
        .extend(found.into_iter().map(|(line, what)| Problem { place: format!("{}:{line}", path.display()), what }));
}

fn flatten<'a>(prefix: &str, table: &'a Table, leaves: &mut Vec<(String, &'a Value)>) {
    for (key, value) in table {
        let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            // A key whose value is a table.
            Value::Table(_) if KEYS.iter().any(|key| key.name == name) => leaves.push((name, value)),
            // An empty one has no key that could be unknown.
            Value::Table(inner) if inner.is_empty() && !is_section(&name) => leaves.push((name, value)),
            Value::Table(inner) => flatten(&name, inner, leaves),
            _ => leaves.push((name, value)),
        }
    }
}

/// Whether keys stand below `name`.
fn is_section(name: &str) -> bool {
    let below = |whole: &str| whole.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
    let datastore = name.strip_prefix(DATASTORES).and_then(|rest| rest.strip_prefix('.'));
    name == DATASTORES || datastore.is_some_and(is_datastore_name) || KEYS.iter().any(|key| below(key.name))
}

fn apply(config: &mut Config, name: &str, value: &Value) -> std::result::Result<(), String> {
    let wrong = |what| format!("`{name}` {what}");
    if let Some(key) = KEYS.iter().find(|key| key.name == name) {
        return (key.read)(config, value).map_err(wrong);
    }
    let parts = name.strip_prefix(DATASTORES).and_then(|rest| rest.strip_prefix('.')?.rsplit_once('.'));
    if let Some((datastore, last)) = parts
        && let Some(key) = DATASTORE_KEYS.iter().find(|key| key.name == last)
    {
        if !is_datastore_name(datastore) {
            return Err(format!(
                "`{datastore}` cannot be the name of a datastore: use letters, digits, `-`, `_` and `.`"
            ));
        }
        return (key.read)(config.datastores.0.entry(datastore.to_owned()).or_default(), value).map_err(wrong);
    }
    let datastore_keys = DATASTORE_KEYS.iter().map(|key| format!("{DATASTORES}.NAME.{}", key.name));
    let known: Vec<_> = KEYS.iter().map(|key| key.name.to_owned()).chain(datastore_keys).collect();
    Err(format!("there is no key `{name}`; the keys are {}", known.join(", ")))
}

/// Whether requests can name it: it is the URI of a source.
fn is_datastore_name(name: &str) -> bool {
    (1..=limits::ID_BYTES).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

fn line_at(text: &str, byte: usize) -> usize {
    text.bytes().take(byte).filter(|byte| *byte == b'\n').count() + 1
}

/// The line that sets a key: the last component, below its table's heading.
fn line_of(text: &str, name: &str) -> usize {
    let (table, key) = name.rsplit_once('.').unwrap_or(("", name));
    let mut present = String::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(heading) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            present = heading.trim().replace(['"', '\''], "");
            if present == name {
                return number + 1;
            }
        }
        let sets = line.split('=').next().map(str::trim);
        if (present == table && sets == Some(key)) || sets == Some(name) {
            return number + 1;
        }
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems_of(text: &str, environment: &[(&str, &str)]) -> (Config, Vec<Problem>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let (config, mut problems) = examine(Some(&path), environment).unwrap();
        for problem in &mut problems {
            problem.place = problem.place.replace(&format!("{}", path.display()), "file");
        }
        (config, problems)
    }

    #[test]
    fn every_problem_is_reported_at_once_with_its_line() {
        let text = "[store]\ncapacity = -5\ncolour = 'red'\n\n[serve]\npassthrough = true\n";
        let (_, problems) = problems_of(text, &[("CKPTD_MEMORY__BUDGET", "1"), ("CKPTD_NOPE", "1"), ("OTHER", "x")]);
        let places: Vec<_> = problems.iter().map(|problem| problem.place.as_str()).collect();
        assert_eq!(places, ["file:2", "file:3", "file:6", "CKPTD_MEMORY__BUDGET", "CKPTD_NOPE"]);
        assert!(problems[1].what.contains("there is no key `store.colour`"));
    }

    #[test]
    fn the_environment_wins_over_the_file_and_is_written_as_toml() {
        let environment = [
            ("CKPTD_SERVE__PASSTHROUGH", "\"never\""),
            ("CKPTD_SOURCES__ALLOW_NETWORKS", "[\"127.0.0.0/8\"]"),
            ("CKPTD_ENDPOINT", "unix:/x"),
        ];
        let (config, problems) = problems_of("[serve]\npassthrough = 'auto'\n[store]\ncapacity = 7\n", &environment);
        assert_eq!(problems, []);
        assert_eq!((config.passthrough, config.capacity_bytes, config.allow_networks.len()), (false, 7, 1));
    }

    #[test]
    fn credentials_are_where_systemd_puts_them_unless_the_operator_says_otherwise() {
        let systemd = [("CREDENTIALS_DIRECTORY", "/run/credentials/ckptd.service")];
        let (config, _) = problems_of("", &systemd);
        assert_eq!(config.credentials_dir, Path::new("/run/credentials/ckptd.service"));
        let (config, _) = problems_of("[sources]\ncredentials_dir = '/keys'\n", &systemd);
        assert_eq!(config.credentials_dir, Path::new("/keys"));
    }

    #[test]
    fn the_packaged_file_equals_the_defaults() {
        let packaged = include_str!("../../systemd/config.toml");
        let uncommented: String = packaged
            .lines()
            .map(|line| line.strip_prefix("#").filter(|rest| !rest.starts_with(' ')).unwrap_or(line))
            .fold(String::new(), |text, line| text + line + "\n");
        let (config, problems) = problems_of(&uncommented, &[]);
        assert_eq!(problems, []);
        assert_eq!(config, Config::default());
        for key in KEYS {
            let (_, last) = key.name.rsplit_once('.').unwrap();
            assert!(packaged.contains(&format!("\n#{last} = ")), "{} is missing", key.name);
        }
    }

    #[test]
    fn a_port_alone_is_one_of_loopback() {
        for (text, expected) in [
            ("8080", Some("127.0.0.1:8080")),
            ("'8080'", Some("127.0.0.1:8080")),
            ("'0.0.0.0:80'", Some("0.0.0.0:80")),
            ("'[::1]:80'", Some("[::1]:80")),
            ("''", None),
        ] {
            let (config, problems) = problems_of(&format!("[http]\nlisten = {text}\n"), &[]);
            assert_eq!(problems, [], "{text}");
            assert_eq!(config.http_listen.map(|address| address.to_string()).as_deref(), expected, "{text}");
        }
        for text in ["65536", "-1", "'localhost:80'", "true"] {
            assert_eq!(problems_of(&format!("[http]\nlisten = {text}\n"), &[]).1.len(), 1, "{text}");
        }
        assert_eq!(problems_of("[http]\nurl = 'h:1'\n", &[]).1.len(), 1);
    }

    #[test]
    fn quotas_are_of_all_owners_and_of_some_by_name() {
        let owners = |config: &Config| config.quotas.owners.clone().into_iter().collect::<Vec<_>>();
        let expected = vec![("b c".to_owned(), 0), ("team-a".to_owned(), 2_000_000_000_000)];
        for text in [
            "[quotas]\ndefault = 5\n[quotas.owners]\n\"team-a\" = 2_000_000_000_000\n\"b c\" = 0\n",
            "[quotas]\ndefault = 5\nowners = { \"team-a\" = 2_000_000_000_000, \"b c\" = 0 }\n",
        ] {
            let (config, problems) = problems_of(text, &[]);
            assert_eq!(problems, []);
            assert_eq!((config.quotas.default_bytes, owners(&config)), (5, expected.clone()));
        }
        let environment = [
            ("CKPTD_QUOTAS__DEFAULT", "6"),
            ("CKPTD_QUOTAS__OWNERS", "{ \"team-a\" = 2_000_000_000_000, \"b c\" = 0 }"),
        ];
        let (config, problems) = problems_of("[quotas.owners]\nx = 1\n", &environment);
        assert_eq!(problems, []);
        assert_eq!((config.quotas.default_bytes, owners(&config)), (6, expected));
    }

    #[test]
    fn quotas_that_cannot_be_are_reported() {
        let text = "[quotas]\ndefault = 'much'\npublic = 1\n\n[quotas.owners]\na = 1\n\"b\" = -1\n";
        let (_, problems) = problems_of(text, &[("CKPTD_QUOTAS__OWNERS", "7")]);
        let found: Vec<_> = problems.iter().map(|problem| (problem.place.as_str(), problem.what.as_str())).collect();
        for ((at, what), (place, words)) in found.iter().zip([
            ("file:2", "`quotas.default` must be a number of bytes"),
            ("file:3", "there is no key `quotas.public`"),
            ("file:5", "`quotas.owners` is wrong: `b` must be a number of bytes"),
            ("CKPTD_QUOTAS__OWNERS", "must be a table of owners"),
        ]) {
            assert!(*at == place && what.contains(words), "{found:#?}");
        }
        assert_eq!(problems.len(), 4, "{found:#?}");
        let (_, problems) = problems_of("[quotas.owners]\n\" a\" = 1\n", &[]);
        assert!(problems[0].what.contains("owner"), "{problems:?}");
    }

    #[test]
    fn datastores_have_names_of_their_own() {
        let text =
            "[datastores.Weights]\npath = '/mnt/w'\nowners = ['a', 'b']\n[datastores.\"x.y\"]\npath = '/mnt/xy'\n";
        let environment = [
            ("CKPTD_DATASTORES__WEIGHTS__PATH", "/mnt/elsewhere"),
            ("CKPTD_DATASTORES__A_B__PATH", "\"/mnt/ab\""),
            ("CKPTD_DATASTORES__Mixed__OWNERS", "[]"),
            ("CKPTD_DATASTORES__Mixed__path", "/mnt/m"),
        ];
        let (config, problems) = problems_of(text, &environment);
        assert_eq!(problems, []);
        let shown = |(name, datastore): (&String, &Datastore)| {
            format!("{name}={}:{}", datastore.path.display(), datastore.owners.join("+"))
        };
        let all: Vec<_> = config.datastores.0.iter().map(shown).collect();
        assert_eq!(all, ["Mixed=/mnt/m:", "Weights=/mnt/elsewhere:a+b", "a_b=/mnt/ab:", "x.y=/mnt/xy:"]);
    }

    #[test]
    fn datastores_that_cannot_be_are_reported() {
        let text = "[datastores.a]\npath = 'mnt'\n[datastores.b]\n[datastores.c]\nowners = 'me'\nport = 1\n[datastores.'d/']\npath = '/x'\n";
        let (_, problems) = problems_of(text, &[("CKPTD_DATASTORES__E", "/x")]);
        let shown: Vec<_> = problems.iter().map(|problem| format!("{}: {}", problem.place, problem.what)).collect();
        for (at, words) in [
            ("file:2", "must be an absolute path"),
            ("file:5", "must be a list of owners"),
            ("file:6", "the keys are"),
            ("file:8", "cannot be the name"),
            ("CKPTD_DATASTORES__E", "there is no key `datastores.e`"),
            ("datastores.b.path", "must be given"),
            ("datastores.c.path", "must be given"),
        ] {
            assert!(shown.iter().any(|line| line.starts_with(at) && line.contains(words)), "{at} {words}: {shown:#?}");
        }
        assert_eq!(problems.len(), 7, "{shown:#?}");
    }

    #[test]
    fn a_datastore_that_is_not_mounted_is_a_word_and_no_error() {
        let (config, problems) =
            problems_of("[datastores.a]\npath = '/nowhere/at/all'\n[datastores.b]\npath = '/'\n", &[]);
        assert_eq!(problems, []);
        let found = examine_host(&config);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].place, "datastores.a.path");
    }

    #[test]
    fn a_section_that_nobody_knows_is_a_problem_even_when_it_is_empty() {
        let (_, problems) = problems_of("[store]\n\n[nonsense]\n[store.deeper]\n[datastores]\n", &[]);
        let found: Vec<_> = problems.iter().map(|problem| (problem.place.as_str(), problem.what.as_str())).collect();
        assert_eq!((found.len(), found[0].0, found[1].0), (2, "file:3", "file:4"), "{found:?}");
        assert!(found[0].1.contains("no key `nonsense`") && found[1].1.contains("no key `store.deeper`"), "{found:?}");
    }

    #[test]
    fn damaged_toml_names_its_line() {
        let (_, problems) = problems_of("[store]\ncapacity = = 3\n", &[]);
        assert_eq!(problems[0].place, "file:2");
    }
}

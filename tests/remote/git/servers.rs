//! Repositories, and the servers they are behind: git's own over nginx, sshd, and giftless for large files.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::Digest as _;

use crate::support::place::Place;
use crate::support::ran::{run, shell};
use crate::support::server::{Server, free_port, tool};

/// User and password of repositories below `private/`.
pub(crate) const USER: (&str, &str) = ("reader", "s3cret-passw0rd");

/// A place with repositories, served over smart HTTP.
#[derive(Debug)]
pub(crate) struct GitSite {
    place: Place,
    nginx: Server,
    /// What addresses begin with.
    origin: String,
    _fcgi: Server,
    _lfs: Option<Server>,
}

impl GitSite {
    /// Serves what is published by git's own backend.
    pub(crate) fn start() -> Self {
        Self::start_with(None, None)
    }

    /// The same by https, with the certificate and its key in one file.
    pub(crate) fn start_tls(certificate: &Path) -> Self {
        Self::start_with(None, Some(certificate))
    }

    /// The same, with LFS.
    pub(crate) fn start_with_lfs() -> Self {
        Self::start_with(Some(free_port()), None)
    }

    fn start_with(lfs: Option<u16>, certificate: Option<&Path>) -> Self {
        let place = Place::new();
        place.dir("site");
        place.dir("lfs");
        let port = free_port();
        let tls = certificate.map_or_else(String::new, |file| {
            let file = file.display();
            format!(" ssl; ssl_certificate {file}; ssl_certificate_key {file}")
        });
        let backend = format!("{}/git-http-backend", git(place.path(), &["--exec-path"]));
        for (from, to) in [("git-nginx.conf", "nginx.conf"), ("git-backend.conf", "backend.conf")] {
            let text = fs::read_to_string(fixture(from)).unwrap();
            let text = text
                .replace("@DIR@", place.path().to_str().unwrap())
                .replace("@PORT@", &port.to_string())
                .replace("@TLS@", &tls)
                .replace("@LFS@", &lfs.unwrap_or(1).to_string())
                .replace("@BACKEND@", &backend);
            fs::write(place.join(to), text).unwrap();
        }
        // It refuses a port that was used a moment ago. The workers of nginx are root, as the socket's owner is.
        let socket = place.join("fcgi.sock");
        let mut command = Command::new("fcgiwrap");
        let fcgi =
            Server::start_on(command.arg("-s").arg(format!("unix:{}", socket.display())).args(["-c", "4"]), &socket);
        let nginx = Server::start(Command::new("nginx").arg("-c").arg(place.join("nginx.conf")), port);
        let lfs = lfs.map(|port| start_giftless(&place, port));
        let origin = match certificate {
            // A name that the certificate has, as far as it is for this host.
            Some(_) => format!("https://localhost:{port}"),
            None => nginx.url(""),
        };
        let site = Self { place, nginx, origin, _fcgi: fcgi, _lfs: lfs };
        site.set_password(USER.1);
        site
    }

    /// From now on the user of what is below `private/` has this password.
    pub(crate) fn set_password(&self, word: &str) {
        fs::write(self.place.join("passwords"), format!("{}:{{PLAIN}}{word}\n", USER.0)).unwrap();
    }

    /// Where nginx listens.
    pub(crate) fn port(&self) -> u16 {
        self.nginx.port
    }

    /// The address of a published repository.
    pub(crate) fn url(&self, name: &str) -> String {
        format!("{}/{name}", self.origin)
    }

    /// Where a published repository is on this host.
    pub(crate) fn published(&self, name: &str) -> PathBuf {
        self.place.join("site").join(format!("{name}.git"))
    }

    /// A new working tree, published as `name` from its first commit on.
    pub(crate) fn work(&self, name: &str) -> Work {
        let tree = self.place.dir(&format!("work/{name}"));
        let bare = self.published(name);
        fs::create_dir_all(&bare).unwrap();
        git(&bare, &["init", "--quiet", "--bare", "--initial-branch=main", "."]);
        git(&tree, &["init", "--quiet", "--initial-branch=main", "."]);
        git(&tree, &["remote", "add", "origin", bare.to_str().unwrap()]);
        Work { tree, lfs: self.place.join("lfs").join(name) }
    }
}

/// A working tree of the test's own.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) tree: PathBuf,
    lfs: PathBuf,
}

impl Work {
    pub(crate) fn write(&self, path: &str, bytes: impl AsRef<[u8]>) -> &Self {
        let path = self.tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        self
    }

    pub(crate) fn executable(&self, path: &str) -> &Self {
        fs::set_permissions(self.tree.join(path), fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    pub(crate) fn link(&self, path: &str, target: &str) -> &Self {
        symlink(target, self.tree.join(path)).unwrap();
        self
    }

    /// A pointer at `path`, its bytes with the LFS server; returns where they are.
    pub(crate) fn large(&self, path: &str, bytes: &[u8]) -> PathBuf {
        let oid: String = sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {}\n", bytes.len());
        self.write(path, pointer);
        fs::create_dir_all(&self.lfs).unwrap();
        let object = self.lfs.join(oid);
        fs::write(&object, bytes).unwrap();
        object
    }

    /// Commits everything, publishes it, and gives the commit's id.
    pub(crate) fn publish(&self) -> String {
        git(&self.tree, &["add", "--all"]);
        self.publish_index()
    }

    /// Commits what was added.
    pub(crate) fn publish_index(&self) -> String {
        git(&self.tree, &["commit", "--quiet", "--message=x"]);
        git(&self.tree, &["push", "--quiet", "--force", "origin", "HEAD:main"]);
        git(&self.tree, &["rev-parse", "HEAD"])
    }

    /// What a checkpoint of it must be: a copy without `.git`.
    pub(crate) fn expected(&self, name: &str) -> PathBuf {
        let copy = self.tree.with_file_name(name);
        shell("cp -a \"$1\" \"$2\" && find \"$2\" -name .git -prune -exec rm -rf {} +", &[&self.tree, &copy]).ok();
        copy
    }
}

/// Runs git in `directory` as nobody in particular; what it prints.
pub(crate) fn git(directory: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new("git");
    command.args(["-c", "protocol.file.allow=always", "-c", "gc.auto=0"]).args(arguments).current_dir(directory);
    for (key, value) in [
        ("GIT_CONFIG_GLOBAL", "/dev/null"),
        ("GIT_CONFIG_NOSYSTEM", "1"),
        ("GIT_AUTHOR_NAME", "a"),
        ("GIT_AUTHOR_EMAIL", "a@example.org"),
        ("GIT_COMMITTER_NAME", "a"),
        ("GIT_COMMITTER_EMAIL", "a@example.org"),
    ] {
        command.env(key, value);
    }
    run(&mut command).ok().stdout.trim().to_owned()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn start_giftless(place: &Place, port: u16) -> Server {
    let configuration = place.join("giftless.yaml");
    let text = format!(
        "LEGACY_ENDPOINTS: false\nAUTH_PROVIDERS:\n  - giftless.auth.allow_anon:read_write\nTRANSFER_ADAPTERS:\n  basic:\n    \
         factory: giftless.transfer.basic_streaming:factory\n    options:\n      \
         storage_class: giftless.storage.local_storage:LocalStorage\n      storage_options: {{path: {}}}\n",
        place.join("lfs").display()
    );
    fs::write(&configuration, text).unwrap();
    let mut command = Command::new(tool("giftless/bin/flask"));
    command
        .env("GIFTLESS_CONFIG_FILE", configuration)
        .current_dir(place.path())
        .args(["--app", "giftless.wsgi_entrypoint:app", "run", "--host", "127.0.0.1", "--port"])
        .arg(port.to_string());
    Server::start(&mut command, port)
}

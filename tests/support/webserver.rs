//! Servers of files that nobody here wrote, configured for one directory: nginx, Apache, Python's, Caddy, pyftpdlib, vsftpd; a proxy; and certificates.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::place::Place;
use super::ran::run;
use super::server::{Server, free_port, free_ports, tool};

/// nginx with index pages of `root`; `locations` are further lines of the server's block.
pub(crate) fn nginx(place: &Place, root: &Path, locations: &str) -> Server {
    nginx_with(place, root, "", locations)
}

/// The same by TLS, with the certificate and key in one file.
pub(crate) fn nginx_tls(place: &Place, root: &Path, certificate: &Path) -> Server {
    let file = certificate.display();
    nginx_with(place, root, " ssl", &format!("ssl_certificate {file}; ssl_certificate_key {file};"))
}

fn nginx_with(place: &Place, root: &Path, listen: &str, locations: &str) -> Server {
    let port = free_port();
    let own = place.dir(&format!("nginx-{port}"));
    let (dir, root) = (own.display(), root.display());
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|what| format!("{what}_temp_path {dir}/{what};\n"))
        .collect();
    let text = format!(
        "daemon off; worker_processes 1; pid {dir}/pid; error_log stderr; user root;\n\
         events {{ worker_connections 512; }}\n\
         http {{\n access_log off; types {{ text/html html; }} default_type application/octet-stream; sendfile on;\n {temporary}\
         server {{\n listen 127.0.0.1:{port}{listen}; root {root}; autoindex on; absolute_redirect off;\n {locations}\n }}\n}}\n"
    );
    let config = own.join("nginx.conf");
    fs::write(&config, text).unwrap();
    Server::start(Command::new("nginx").arg("-e").arg("stderr").arg("-p").arg(&own).arg("-c").arg(&config), port)
}

/// TLS at nginx before the plain HTTP server at `port`, which is asked for the very paths that clients write.
pub(crate) fn nginx_tls_before(place: &Place, port: u16, certificate: &Path) -> Server {
    let file = certificate.display();
    let locations = format!(
        "ssl_certificate {file}; ssl_certificate_key {file};\n\
         location / {{ proxy_pass http://127.0.0.1:{port}; proxy_set_header Host $http_host; proxy_buffering off; }}"
    );
    nginx_with(place, place.path(), " ssl", &locations)
}

/// A proxy of Debian's that does both plain requests and `CONNECT`, and keeps a log; for whoever has the login if there is one.
pub(crate) fn tinyproxy(place: &Place, log: &Path, login: Option<(&str, &str)>) -> Server {
    let port = free_port();
    let config = place.join(&format!("tinyproxy-{port}.conf"));
    let login = login.map_or_else(String::new, |(name, word)| format!("BasicAuth {name} {word}\n"));
    let text = format!(
        "Port {port}\nListen 127.0.0.1\nTimeout 60\nLogFile \"{}\"\nLogLevel Connect\nMaxClients 50\nAllow 127.0.0.1\n{login}",
        log.display()
    );
    fs::write(&config, text).unwrap();
    Server::start(Command::new("tinyproxy").arg("-d").arg("-c").arg(&config), port)
}

/// Apache with plain index pages of `root`, and fancy ones as a table below `/fancy/`.
pub(crate) fn apache(place: &Place, root: &Path) -> Server {
    let port = free_port();
    let own = place.dir(&format!("apache-{port}"));
    let (dir, root) = (own.display(), root.display());
    let modules: String = ["mpm_event", "authz_core", "alias", "autoindex", "dir"]
        .iter()
        .map(|name| format!("LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n"))
        .collect();
    let text = format!(
        "ServerRoot {dir}\nDefaultRuntimeDir {dir}\nServerName localhost\nListen 127.0.0.1:{port}\nPidFile {dir}/pid\n\
         ErrorLog /dev/null\n{modules}User www-data\nGroup www-data\nDocumentRoot {root}\nAlias /fancy/ {root}/\n\
         <Directory {root}>\n Require all granted\n Options Indexes FollowSymLinks\n AllowOverride None\n</Directory>\n\
         <Location /fancy/>\n IndexOptions FancyIndexing HTMLTable Charset=UTF-8\n</Location>\n"
    );
    let config = own.join("apache.conf");
    fs::write(&config, text).unwrap();
    Server::start(Command::new("apache2").arg("-DFOREGROUND").arg("-f").arg(&config), port)
}

/// The server of Python's standard library.
pub(crate) fn python(root: &Path) -> Server {
    let port = free_port();
    let mut command = Command::new("python3");
    command.args(["-m", "http.server", "--bind", "127.0.0.1"]).arg(port.to_string()).current_dir(root);
    Server::start(&mut command, port)
}

/// Caddy; below `/html/` it never gives JSON.
pub(crate) fn caddy(place: &Place, root: &Path) -> Server {
    let port = free_port();
    let own = place.dir(&format!("caddy-{port}"));
    let (dir, root) = (own.display(), root.display());
    let text = format!(
        "{{\n admin off\n auto_https off\n storage file_system {dir}\n}}\n\
         http://127.0.0.1:{port} {{\n bind 127.0.0.1\n root * {root}\n\
         handle_path /html/* {{\n request_header Accept text/html\n file_server browse\n }}\n\
         handle {{\n file_server browse\n }}\n}}\n"
    );
    let config = own.join("Caddyfile");
    fs::write(&config, text).unwrap();
    let mut command = Command::new(tool("venv/bin/caddy"));
    command.env("HOME", &own).arg("run").arg("--adapter").arg("caddyfile").arg("--config").arg(&config);
    Server::start(&mut command, port)
}

/// pyftpdlib, with TLS if there is a certificate; see `tests/fixtures/ftpd.py` for who may log in.
pub(crate) fn pyftpdlib(root: &Path, certificate: Option<&Path>) -> Server {
    let port = free_port();
    let mut command = Command::new(tool("venv/bin/python"));
    command.arg(fixture("ftpd.py")).arg(port.to_string()).arg(root).args(certificate);
    Server::start(&mut command, port)
}

/// Ports of vsftpd's data connections. It tries nine of them at random, and only those that somebody listens on fail; by itself it takes
/// them from all there are, also where another server is about to listen.
const PASSIVE_PORTS: u16 = 200;

/// vsftpd for anybody, with TLS if there is a certificate; `lines` are added to its configuration, also where it listens if that matters.
pub(crate) fn vsftpd(place: &Place, root: &Path, certificate: Option<&Path>, lines: &str) -> Server {
    let given = |key: &str| lines.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let host = given("listen_address").map_or(Ipv4Addr::LOCALHOST, |host| host.parse().unwrap());
    let port = given("listen_port").map_or_else(free_port, |port| port.parse().unwrap());
    let passive = match given("pasv_min_port") {
        Some(_) => String::new(),
        None => {
            let range = free_ports(PASSIVE_PORTS);
            format!("pasv_min_port={}\npasv_max_port={}\n", range.start, range.end - 1)
        }
    };
    let empty = place.dir("vsftpd-empty");
    let tls = certificate.map_or_else(String::new, |file| {
        let file = file.display();
        format!(
            "ssl_enable=YES\nallow_anon_ssl=YES\nforce_anon_logins_ssl=YES\nforce_anon_data_ssl=YES\n\
             require_ssl_reuse=YES\nssl_ciphers=HIGH\nrsa_cert_file={file}\nrsa_private_key_file={file}\n"
        )
    });
    let text = format!(
        "listen=YES\nlisten_address={host}\nlisten_port={port}\nbackground=NO\nanonymous_enable=YES\nlocal_enable=NO\n\
         anon_root={}\nno_anon_password=NO\nsecure_chroot_dir={}\nseccomp_sandbox=NO\nisolate_network=NO\nisolate=NO\n\
         {passive}{tls}{lines}\n",
        root.display(),
        empty.display()
    );
    let config = place.join(&format!("vsftpd-{port}.conf"));
    fs::write(&config, text).unwrap();
    Server::start_at(Command::new("vsftpd").arg(&config), host, port)
}

/// Makes `ca.pem` and the certificates `good`, `expired`, `elsewhere`, `foreign` (`.pem`), and one of each name, in a new directory.
pub(crate) fn certificates(place: &Place, names: &[&str]) -> PathBuf {
    let directory = place.dir("certificates");
    let mut making = Command::new(tool("venv/bin/python"));
    run(making.arg(fixture("certificates.py")).arg(&directory).args(names)).ok();
    directory
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

//! Certificates of the TCP listener: ours, and whose we believe.
//!
//! They are read at start, and again when one of the files has changed, which is looked at when somebody connects: a renewed certificate needs no
//! restart. Files that cannot be read or do not fit together are reported and leave what was there in use, so a half-written renewal locks
//! nobody out. Connections that stand go on with the certificate they began with.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;

use crate::error::{Error, Result};

/// The files are looked at this often at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Where the certificates are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CertificateFiles {
    /// Our chain, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
    /// Authorities whose certificates the other side may show, PEM.
    pub authorities: PathBuf,
}

impl CertificateFiles {
    fn all(&self) -> [&Path; 3] {
        [&self.certificate, &self.key, &self.authorities]
    }

    fn stamps(&self) -> [Option<(SystemTime, u64)>; 3] {
        self.all()
            .map(|path| std::fs::metadata(path).ok().and_then(|found| Some((found.modified().ok()?, found.len()))))
    }

    fn read(&self) -> Result<Arc<rustls::ServerConfig>> {
        let wrong = |what: &str, error: rustls::Error| {
            Error::invalid("BAD_CERTIFICATE", format!("{what} of the TCP listener")).because(error)
        };
        let roots = roots(&self.authorities)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|error| bad(&self.authorities).because(error))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong("the versions of TLS", error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain(&self.certificate)?, key(&self.key)?)
            .map_err(|error| wrong("the certificate and its key", error))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

/// Certificates that follow their files.
pub struct Certificates {
    files: CertificateFiles,
    present: Mutex<Present>,
}

struct Present {
    config: Arc<rustls::ServerConfig>,
    stamps: [Option<(SystemTime, u64)>; 3],
    looked: Instant,
}

impl Certificates {
    /// Reads them.
    ///
    /// # Errors
    /// `BAD_CERTIFICATE`, the I/O error.
    pub fn open(files: CertificateFiles) -> Result<Self> {
        let stamps = files.stamps();
        let config = files.read()?;
        Ok(Self { files, present: Mutex::new(Present { config, stamps, looked: Instant::now() }) })
    }

    /// What the next handshake is to be made with.
    pub(super) fn present(&self) -> Arc<rustls::ServerConfig> {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        if present.looked.elapsed() >= LOOK_EVERY {
            present.looked = Instant::now();
            let stamps = self.files.stamps();
            if stamps != present.stamps {
                match self.files.read() {
                    Ok(config) => {
                        tracing::info!("the certificates of the TCP listener were read again");
                        (present.config, present.stamps) = (config, stamps);
                    }
                    Err(error) => {
                        tracing::warn!(error = %error.report(), "changed certificates cannot be used; those before stay in use");
                    }
                }
            }
        }
        Arc::clone(&present.config)
    }
}

/// What a client shows and believes.
///
/// # Errors
/// `BAD_CERTIFICATE`, the I/O error.
pub(crate) fn client(files: &CertificateFiles) -> Result<Arc<rustls::ClientConfig>> {
    let wrong = |error: rustls::Error| Error::invalid("BAD_CERTIFICATE", "the certificate and its key").because(error);
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(wrong)?
        .with_root_certificates(roots(&files.authorities)?)
        .with_client_auth_cert(chain(&files.certificate)?, key(&files.key)?)
        .map_err(wrong)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// The DNS and URI names of a certificate that was verified.
pub(super) fn names_of(certificate: &CertificateDer<'_>) -> io::Result<Vec<String>> {
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(io::Error::other)?;
    Ok(parsed.valid_dns_names().chain(parsed.valid_uri_names()).map(str::to_owned).collect())
}

fn roots(path: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for authority in chain(path)? {
        roots.add(authority).map_err(|error| bad(path).because(error))?;
    }
    Ok(roots)
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let text = read(path)?;
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(bad(path)),
        Err(error) => Err(bad(path).because(error)),
    }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| bad(path).because(error))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    if path.as_os_str().is_empty() {
        return Err(Error::invalid(
            "NO_CERTIFICATE",
            "TCP needs certificates on both sides, and a file of them is not named",
        )
        .remedy("name three: the chain to show, its key, and the authority of the other side"));
    }
    std::fs::read(path).map_err(|error| Error::io("reading the certificate", path, error))
}

fn bad(path: &Path) -> Error {
    Error::invalid("BAD_CERTIFICATE", format!("{} holds no certificate or key in PEM that can be used", path.display()))
        .remedy("give files in PEM: the chain, its key, and the authority of the other side")
}

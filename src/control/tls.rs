//! Certificates of the TCP listener: ours, and whose we believe.
//!
//! They are read at start, and again when one of the files has changed, which is looked at when somebody connects: a renewed certificate needs no
//! restart. Files that cannot be read or do not fit together are reported and leave what was there in use, so a half-written renewal locks
//! nobody out. Connections that stand go on with the certificate they began with.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustls::pki_types::CertificateDer;
use rustls::server::WebPkiClientVerifier;

use crate::certificates::{self, CertificateFiles};
use crate::error::{Error, Result};

/// The files are looked at this often at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);

type Stamps = [Option<(SystemTime, u64)>; 3];

fn stamps(files: &CertificateFiles) -> Stamps {
    [&files.certificate, &files.key, &files.authorities].map(|path| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.modified().ok()?, found.len()))
    })
}

fn read(files: &CertificateFiles) -> Result<Arc<rustls::ServerConfig>> {
    let credentials = files
        .credentials(|path| std::fs::read(path).map_err(|error| Error::io("reading the certificate", path, error)))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(credentials.authorities), Arc::clone(&provider))
            .build()
            .map_err(|error| certificates::bad(&files.authorities).because(error))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::internal("choosing the versions of TLS").because(error))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(credentials.chain, credentials.key)
        .map_err(|error| certificates::bad(&files.certificate).because(error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Certificates that follow their files.
pub struct Certificates {
    files: CertificateFiles,
    present: Mutex<Present>,
}

struct Present {
    config: Arc<rustls::ServerConfig>,
    stamps: Stamps,
    looked: Instant,
}

impl Certificates {
    /// Reads them.
    ///
    /// # Errors
    /// `BAD_CERTIFICATE`, the I/O error.
    pub fn open(files: CertificateFiles) -> Result<Self> {
        let stamps = stamps(&files);
        let config = read(&files)?;
        Ok(Self { files, present: Mutex::new(Present { config, stamps, looked: Instant::now() }) })
    }

    /// What the next handshake is to be made with.
    pub(super) fn present(&self) -> Arc<rustls::ServerConfig> {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        if present.looked.elapsed() >= LOOK_EVERY {
            present.looked = Instant::now();
            let stamps = stamps(&self.files);
            if stamps != present.stamps {
                match read(&self.files) {
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

/// The DNS and URI names of a certificate that was verified.
pub(super) fn names_of(certificate: &CertificateDer<'_>) -> io::Result<Vec<String>> {
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(io::Error::other)?;
    Ok(parsed.valid_dns_names().chain(parsed.valid_uri_names()).map(str::to_owned).collect())
}

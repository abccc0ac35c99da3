//! Certificates by which two sides know each other: the files of one side, and what is in them. Both the daemon and its client speak of them so.

use std::path::{Path, PathBuf};

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::error::{Error, Result};

/// Where the certificates of one side are, in PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The chain to show.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Authorities whose certificates the other side may show.
    pub authorities: PathBuf,
}

/// What is in the files of one side.
pub struct Credentials {
    /// The chain to show, one's own certificate first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    /// Whom to believe.
    pub authorities: RootCertStore,
}

impl CertificateFiles {
    /// What is in the files, as `read` gives them.
    ///
    /// # Errors
    /// `NO_CERTIFICATE` where a file is not named, `BAD_CERTIFICATE` where one holds nothing of use; those of `read`.
    pub fn credentials(&self, read: impl Fn(&Path) -> Result<Vec<u8>>) -> Result<Credentials> {
        if [&self.certificate, &self.key, &self.authorities].iter().any(|path| path.as_os_str().is_empty()) {
            let message = "TCP needs certificates on both sides, and a file of them is not named";
            return Err(Error::invalid("NO_CERTIFICATE", message)
                .remedy("name three: the chain to show, its key, and the authority of the other side"));
        }
        let mut authorities = RootCertStore::empty();
        for authority in chain(&read(&self.authorities)?, &self.authorities)? {
            authorities.add(authority).map_err(|error| bad(&self.authorities).because(error))?;
        }
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key)?);
        Ok(Credentials {
            chain: chain(&read(&self.certificate)?, &self.certificate)?,
            key: key.map_err(|error| bad(&self.key).because(error))?,
            authorities,
        })
    }
}

fn chain(pem: &[u8], of: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(bad(of)),
        Err(error) => Err(bad(of).because(error)),
    }
}

/// The error of a file that is no use.
pub fn bad(path: &Path) -> Error {
    let message = format!("{} holds no certificate or key in PEM that can be used", path.display());
    Error::invalid("BAD_CERTIFICATE", message)
        .remedy("give files in PEM: the chain, its key, and the authority of the other side")
}

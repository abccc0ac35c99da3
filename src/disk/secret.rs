//! A secret of this state directory: random bytes in a file that only its owner reads, made when first asked for.
//!
//! It is durable before it is given out, so that what was derived from it means the same after a power failure. A file of another
//! length is never mended: what was handed out would silently stop to hold.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;

use super::Disk;
use crate::error::{Error, Result};

/// Length of a secret: 256 bits.
pub const SECRET_BYTES: usize = 32;

impl Disk {
    /// The secret in the file `name`.
    ///
    /// # Errors
    /// `SECRET_DAMAGED` for a file of another length, the I/O error, a poisoned disk.
    pub fn secret(&self, name: &str) -> Result<[u8; SECRET_BYTES]> {
        let path = self.root.join(name);
        match fs::read(&path) {
            Ok(bytes) => bytes.try_into().map_err(|_| {
                Error::corrupt(
                    "SECRET_DAMAGED",
                    format!("the secret {} has not the length it was made with", path.display()),
                )
                .remedy("remove it: what was handed out from it then no longer holds")
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.make_secret(name),
            Err(error) => Err(Error::io("reading", &path, error)),
        }
    }

    fn make_secret(&self, name: &str) -> Result<[u8; SECRET_BYTES]> {
        self.check_healthy()?;
        let (path, new) = (self.root.join(name), self.root.join(format!("{name}.new")));
        let mut secret = [0; SECRET_BYTES];
        File::open("/dev/urandom")
            .and_then(|mut random| random.read_exact(&mut secret))
            .map_err(|error| Error::io("reading", "/dev/urandom", error))?;
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| file.write_all(&secret).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&new, &path))
            .and_then(|()| self.root_handle.sync_all())
            .map_err(|error| Error::io("making the secret", &path, error))?;
        Ok(secret)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_secret_is_made_once_and_is_nobody_elses() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path().join("state");
        let disk = Disk::open(&root).unwrap();
        let secret = disk.secret("a.key").unwrap();
        assert_ne!(secret, disk.secret("b.key").unwrap());
        drop(disk);
        assert_eq!(Disk::open(&root).unwrap().secret("a.key").unwrap(), secret);
        assert_eq!(fs::metadata(root.join("a.key")).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(root.join("b.key"), b"short").unwrap();
        assert_eq!(Disk::open(&root).unwrap().secret("b.key").unwrap_err().reason(), "SECRET_DAMAGED");
    }
}

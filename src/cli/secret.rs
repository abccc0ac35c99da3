//! `--credential NAME=VALUE`: secrets for one request.
//!
//! A secret is never repeated in an error, not even the part that could not be understood.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;

use crate::error::{Error, Result};

/// Longest secret taken from a file; keys of service accounts have 2 to 3 KiB.
const SECRET_BYTES: u64 = 64 << 10;

/// The `--credential` options of a verb.
#[derive(clap::Args)]
pub(super) struct Secrets {
    /// Secret for the source, repeatable: NAME=VALUE, NAME=@FILE, or NAME=env:VARIABLE. Other users of this
    /// host can see the first form. Never stored
    #[arg(long = "credential", value_name = "NAME=SECRET")]
    given: Vec<String>,
}

impl Secrets {
    /// The secrets by name, read from where they are.
    ///
    /// # Errors
    /// Invalid where one has no name, is given twice, or cannot be read.
    pub(super) fn read(&self) -> Result<HashMap<String, String>> {
        let mut secrets = HashMap::with_capacity(self.given.len());
        for text in &self.given {
            let (name, value) = split(text)?;
            if secrets.insert(name.to_owned(), read(name, value)?).is_some() {
                return Err(Error::invalid("BAD_CREDENTIAL", format!("the credential `{name}` is given twice")));
            }
        }
        Ok(secrets)
    }
}

fn split(text: &str) -> Result<(&str, &str)> {
    text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(|| {
        Error::invalid("BAD_CREDENTIAL", "a --credential has no name")
            .remedy("write NAME=VALUE, NAME=@FILE, or NAME=env:VARIABLE")
    })
}

fn read(name: &str, value: &str) -> Result<String> {
    let secret = if let Some(path) = value.strip_prefix('@') {
        read_file(path).map_err(|error| error.during(format!("reading the credential `{name}`")))?
    } else if let Some(variable) = value.strip_prefix("env:") {
        std::env::var(variable).map_err(|_| {
            let fault = format!("reading the credential `{name}`: the variable `{variable}` is not set to text");
            Error::invalid("BAD_CREDENTIAL", fault)
        })?
    } else {
        value.to_owned()
    };
    if secret.is_empty() {
        return Err(Error::invalid("BAD_CREDENTIAL", format!("the credential `{name}` is empty")));
    }
    Ok(secret)
}

/// A file's text less the line end that editors leave.
fn read_file(path: &str) -> Result<String> {
    let fault = |error| Error::io("reading", path, error);
    let mut bytes = Vec::new();
    File::open(path).map_err(fault)?.take(SECRET_BYTES + 1).read_to_end(&mut bytes).map_err(fault)?;
    if bytes.len() as u64 > SECRET_BYTES {
        return Err(Error::invalid("BAD_CREDENTIAL", format!("{path} is longer than {SECRET_BYTES} bytes")));
    }
    let text = String::from_utf8(bytes).map_err(|_| Error::invalid("BAD_CREDENTIAL", format!("{path} is not text")))?;
    Ok(text.strip_suffix('\n').map_or(text.as_str(), |line| line.strip_suffix('\r').unwrap_or(line)).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets(given: &[&str]) -> Result<HashMap<String, String>> {
        Secrets { given: given.iter().map(|text| (*text).to_owned()).collect() }.read()
    }

    #[test]
    fn secrets_come_from_the_line_a_file_or_the_environment() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "from file\n").unwrap();
        let in_file = format!("password=@{}", file.path().display());
        let read = secrets(&["token=a=b", &in_file, "path=env:PATH"]).unwrap();
        assert_eq!(read["token"], "a=b");
        assert_eq!(read["password"], "from file");
        assert_eq!(read["path"], std::env::var("PATH").unwrap());
    }

    #[test]
    fn a_secret_that_is_refused_is_not_repeated() {
        for bad in [&["hunter2"][..], &["=hunter2"], &["t=hunter2", "t=hunter2"]] {
            let report = secrets(bad).unwrap_err().report();
            assert!(!report.contains("hunter2"), "{report}");
        }
    }

    #[test]
    fn what_is_not_there_is_refused() {
        for bad in ["t=", "t=@/nonexistent/file", "t=env:CKPTD_NO_SUCH_VARIABLE", "t=@/dev/zero"] {
            assert!(secrets(&[bad]).is_err(), "{bad}");
        }
    }
}

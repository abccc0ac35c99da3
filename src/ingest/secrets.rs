//! Secrets of requests, for as long as what they are for is filled: where a successor of this process finds them.

use std::fmt;

use crate::catalog::checkpoints::Record;
use crate::source::Credentials;

/// Holds secrets beyond the process, in memory. Its calls block.
pub trait SecretsHolder: Send + Sync {
    /// Holds what filling `record` needs, in the place of what it held for it. Where it cannot, a restart has that filling fail for want
    /// of them.
    fn hold(&self, record: &Record, secrets: &Credentials);

    /// Lets go of what it holds for `checkpoint`.
    fn let_go(&self, checkpoint: &str);
}

impl fmt::Debug for dyn SecretsHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretsHolder")
    }
}

/// Where nobody outlives the process.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHolder;

impl SecretsHolder for NoHolder {
    fn hold(&self, _: &Record, _: &Credentials) {}

    fn let_go(&self, _: &str) {}
}

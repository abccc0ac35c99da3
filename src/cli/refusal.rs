//! The daemon's statuses as our errors.
//!
//! A status of the daemon carries `google.rpc.ErrorInfo`: its reason and figures become the error's, and the metadata key `remedy`
//! what to do. A status that has a cause was made on this side of the connection: the connection broke.

use std::error::Error as StdError;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::error::{Error, Kind};

/// Reason of errors where the connection broke under a call.
pub(super) const LOST: &str = "LOST_CONNECTION";

/// Reason of errors that say none: not of ckptd itself, but of what speaks gRPC for it.
pub(super) const NO_REASON: &str = "NO_REASON";

/// The error behind a status from the daemon at `endpoint`.
pub(super) fn error(status: &Status, endpoint: &str) -> Error {
    if let Some(cause) = StdError::source(status) {
        return lost(endpoint, cause);
    }
    let kind = Kind::from_grpc_code(i32::from(status.code()));
    let message = match status.message() {
        "" => format!("ckptd at {endpoint} refused without a word (status {:?})", status.code()),
        message => message.to_owned(),
    };
    match status.get_details_error_info() {
        Some(info) => {
            let error = Error::new(kind, info.reason, message);
            let mut facts: Vec<_> = info.metadata.into_iter().collect();
            facts.sort();
            facts.into_iter().fold(error, |error, (key, value)| match key.as_str() {
                "remedy" if value.is_empty() => error,
                "remedy" => error.remedy(value),
                _ => error.fact(key, value),
            })
        }
        None if status.code() == Code::Unimplemented => Error::new(kind, "NOT_SERVED", message)
            .remedy("use the ckptctl that came with this ckptd; `ckptctl status` tells its version"),
        None => Error::new(kind, NO_REASON, message),
    }
}

fn lost(endpoint: &str, cause: &(dyn StdError + 'static)) -> Error {
    let mut root = cause;
    while let Some(deeper) = root.source() {
        root = deeper;
    }
    Error::unavailable(LOST, format!("the connection to ckptd at {endpoint} broke: {root}"))
        .remedy("see whether it runs with `ckptctl status`, and try again")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn refused(code: Code, message: &str, metadata: &[(&str, &str)]) -> Status {
        let metadata: HashMap<String, String> =
            metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Status::with_error_details(code, message, ErrorDetails::with_error_info("SOME_REASON", "ckptd", metadata))
    }

    #[test]
    fn reason_figures_and_remedy_survive_the_wire() {
        let status = refused(Code::FailedPrecondition, "m is in use by j", &[("remedy", "detach it"), ("job", "j")]);
        let error = error(&status, "unix:/x");
        assert_eq!((error.kind(), error.reason()), (Kind::WrongState, "SOME_REASON"));
        assert_eq!(error.report(), "m is in use by j; detach it");
        assert_eq!(error.facts(), [("job".to_owned(), "j".to_owned())]);
    }

    #[test]
    fn every_kind_keeps_its_exit_code() {
        for (code, exit) in [
            (Code::InvalidArgument, 2),
            (Code::PermissionDenied, 2),
            (Code::Unauthenticated, 2),
            (Code::Unimplemented, 2),
            (Code::NotFound, 3),
            (Code::AlreadyExists, 4),
            (Code::FailedPrecondition, 4),
            (Code::ResourceExhausted, 5),
            (Code::DataLoss, 6),
            (Code::Unavailable, 7),
            (Code::DeadlineExceeded, 7),
            (Code::Internal, 1),
        ] {
            assert_eq!(error(&refused(code, "x", &[]), "unix:/x").kind().exit_code(), exit, "{code:?}");
            assert_eq!(error(&Status::new(code, "x"), "unix:/x").kind().exit_code(), exit, "{code:?}");
        }
    }

    #[test]
    fn a_status_made_on_our_side_is_a_broken_connection() {
        let broken = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        let error = error(&Status::from_error(Box::new(broken)), "unix:/x");
        assert_eq!((error.kind(), error.reason()), (Kind::Unavailable, LOST));
        assert!(error.report().contains("unix:/x broke: broken pipe"), "{}", error.report());
    }
}

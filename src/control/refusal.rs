//! Our errors as gRPC statuses.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::error::{Error, Kind};
use crate::limits;
use crate::names::shorten;

/// Domain of `google.rpc.ErrorInfo`.
const DOMAIN: &str = "ckptd";

/// The status of an error: code from its kind, message without the remedy, `ErrorInfo` with reason, facts and remedy; what is too long for a
/// header is cut.
pub(super) fn status(error: Error) -> Status {
    if error.kind() == Kind::Internal {
        tracing::error!(error = %error.report(), "a call failed by our own fault");
    }
    let fact = |(key, value): &(String, String)| (key.clone(), shorten(value, limits::STATUS_FACT_BYTES));
    let mut metadata: HashMap<String, String> = error.facts().iter().map(fact).collect();
    if let Some(remedy) = error.remedy_text() {
        metadata.insert("remedy".to_owned(), remedy.to_owned());
    }
    let details = ErrorDetails::with_error_info(error.reason(), DOMAIN, metadata);
    Status::with_error_details(
        Code::from_i32(error.kind().grpc_code()),
        shorten(&error.chain(), limits::STATUS_MESSAGE_BYTES),
        details,
    )
}

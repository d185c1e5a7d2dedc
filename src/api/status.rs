//! Errors as gRPC statuses with google.rpc details. The one table from [`Kind`] to code.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::error::{Error, Kind};

/// Domain of every `google.rpc.ErrorInfo`.
pub const ERROR_DOMAIN: &str = "cloudletd";
/// When a retryable call may be tried again.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// The gRPC code of an error kind.
pub fn code_of(kind: Kind) -> Code {
    match kind {
        Kind::InvalidRequest => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::Conflict | Kind::Unsupported => Code::FailedPrecondition,
        Kind::PermissionDenied => Code::PermissionDenied,
        Kind::NoSpace | Kind::Busy => Code::ResourceExhausted,
        Kind::Corrupt => Code::DataLoss,
        Kind::Unavailable => Code::Unavailable,
        Kind::Timeout => Code::DeadlineExceeded,
        Kind::Cancelled => Code::Cancelled,
        Kind::Internal => Code::Internal,
    }
}

/// The status of an error: the whole chain as message, ErrorInfo with the stable reason always, field violations, precondition failure, retry info and help
/// where they apply.
pub fn status_of(error: &Error) -> Status {
    let mut details = ErrorDetails::new();
    let metadata = [("stage", error.stage().name().to_owned()), ("object", error.object().chars().take(200).collect())];
    details.set_error_info(error.reason(), ERROR_DOMAIN, metadata.map(|(key, value)| (key.to_owned(), value)));
    for violation in error.violations() {
        details.add_bad_request_violation(&violation.field, &violation.description);
    }
    if matches!(error.kind(), Kind::Conflict | Kind::Unsupported | Kind::NoSpace) {
        details.add_precondition_failure_violation(error.reason(), error.object(), error.message());
    }
    if error.reason().starts_with("QUOTA_") {
        details.add_quota_failure_violation(error.object(), error.message());
    }
    if error.is_retryable() {
        details.set_retry_info(Some(RETRY_AFTER));
    }
    let mut message = error.chain();
    if let Some(hint) = error.hint() {
        message.push_str(&format!(" ({hint})"));
    }
    Status::with_error_details(code_of(error.kind()), message, details)
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        status_of(&error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Stage;

    #[test]
    fn details_carry_reason_fields_and_retry() {
        let error = Error::field(Stage::Request, "spec.size_bytes", "is 5, at least 4096").with_reason("BAD_SIZE").with_hint("ask for more");
        let status = status_of(&error);
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().ends_with("(ask for more)"), "{}", status.message());
        let details = status.get_error_details();
        assert_eq!(details.error_info().map(|info| info.reason.as_str()), Some("BAD_SIZE"));
        assert_eq!(details.bad_request().map(|bad| bad.field_violations[0].field.as_str()), Some("spec.size_bytes"));
        assert!(details.retry_info().is_none());
        let busy = status_of(&Error::new(Kind::Busy, Stage::Request, "queue", "is full"));
        assert!(busy.get_error_details().retry_info().is_some());
    }
}

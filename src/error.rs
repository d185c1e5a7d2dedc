//! The one error type of the daemon.
//!
//! Every failure names its [`Kind`] (what a program decides on), the [`Stage`] it happened in and the object it happened to. `Display` gives
//! this level only, lower case and without a final dot; [`Error::chain`] adds the sources. An errno is classified once, where it happens, by
//! [`Error::io`]. What an operator can do about it goes in the hint. The first cause wins: failing undo steps are attached to it as cleanup
//! failures and never replace it.

use std::{error::Error as StdError, fmt, io};

/// Shorthand used throughout the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can decide on. Small and closed; the table to gRPC codes is in `api::status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request or a document in it is wrong and will stay wrong.
    InvalidRequest,
    /// The named object does not exist.
    NotFound,
    /// The name or key is taken by something else.
    AlreadyExists,
    /// The state of the host or of an object forbids it now (device mounted, image in use).
    Conflict,
    /// The caller may not do this.
    PermissionDenied,
    /// Right, but not supported by this build, host or image.
    Unsupported,
    /// No room: pool, store, device, filesystem or a configured limit.
    NoSpace,
    /// Too much is going on; the same call may succeed later.
    Busy,
    /// Stored or received bytes are not what they should be.
    Corrupt,
    /// Something outside did not answer or went away; retry may help.
    Unavailable,
    /// A budget of time ran out.
    Timeout,
    /// The caller asked to stop.
    Cancelled,
    /// A broken invariant or an unexpected answer of the system.
    Internal,
}

impl Kind {
    /// Every kind, for those who are told one by its name.
    pub const ALL: [Kind; 13] = [
        Kind::InvalidRequest,
        Kind::NotFound,
        Kind::AlreadyExists,
        Kind::Conflict,
        Kind::PermissionDenied,
        Kind::Unsupported,
        Kind::NoSpace,
        Kind::Busy,
        Kind::Corrupt,
        Kind::Unavailable,
        Kind::Timeout,
        Kind::Cancelled,
        Kind::Internal,
    ];

    /// The kind that another process told by its name; `Internal` when there is none of that name.
    pub fn told(name: &str) -> Kind {
        Kind::ALL.into_iter().find(|kind| format!("{kind:?}") == name).unwrap_or(Kind::Internal)
    }
}

/// Where it happened; the same names are used by spans, metrics and the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Reading and checking the configuration.
    Config,
    /// Decoding a call.
    Request,
    /// Reading a manifest.
    Manifest,
    /// Finding image, pool, platform.
    Resolve,
    /// Getting the root filesystem's bytes.
    Fetch,
    /// Building the golden disk.
    Golden,
    /// Computing the edits.
    Inject,
    /// Turning edits into a block patch.
    Edit,
    /// Writing the volume.
    Target,
    /// Describing what exists.
    Report,
    /// The catalogue and the content store.
    Store,
    /// Kernel objects and commands of the host.
    Host,
}

impl Stage {
    /// The lower-case name used in logs and in the protocol.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Config => "config",
            Stage::Request => "request",
            Stage::Manifest => "manifest",
            Stage::Resolve => "resolve",
            Stage::Fetch => "fetch",
            Stage::Golden => "golden",
            Stage::Inject => "inject",
            Stage::Edit => "edit",
            Stage::Target => "target",
            Stage::Report => "report",
            Stage::Store => "store",
            Stage::Host => "host",
        }
    }
}

/// One offending field of a request or document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Dotted path of the field, e.g. `manifest.rootfs.digest`.
    pub field: String,
    /// What is wrong with it, with value and limit.
    pub description: String,
}

struct Inner {
    kind: Kind,
    stage: Stage,
    object: String,
    message: String,
    reason: Option<&'static str>,
    hint: Option<String>,
    violations: Vec<Violation>,
    source: Option<Box<dyn StdError + Send + Sync>>,
    cleanup: Vec<Error>,
}

/// A failure: kind, stage, object, message, and what goes with it. One pointer wide.
pub struct Error(Box<Inner>);

impl Error {
    /// `object` is what it happened to (a path, an id, a field); `message` says what was tried and why it failed, with value and limit.
    pub fn new(kind: Kind, stage: Stage, object: impl Into<String>, message: impl Into<String>) -> Self {
        Error(Box::new(Inner {
            kind,
            stage,
            object: object.into(),
            message: message.into(),
            reason: None,
            hint: None,
            violations: Vec::new(),
            source: None,
            cleanup: Vec::new(),
        }))
    }

    /// An operating-system error, classified by its errno and kept as the source.
    pub fn io(stage: Stage, object: impl Into<String>, doing: impl Into<String>, error: io::Error) -> Self {
        Error::new(kind_of_io(&error), stage, object, doing).with_source(error)
    }

    /// The same for an errno as `nix` returns it.
    pub fn errno(stage: Stage, object: impl Into<String>, doing: impl Into<String>, errno: nix::errno::Errno) -> Self {
        Error::io(stage, object, doing, io::Error::from_raw_os_error(errno as i32))
    }

    /// A wrong field of a request or document.
    pub fn field(stage: Stage, field: impl Into<String>, description: impl Into<String>) -> Self {
        let (field, description) = (field.into(), description.into());
        let mut error = Error::new(Kind::InvalidRequest, stage, field.clone(), description.clone());
        error.0.violations.push(Violation { field, description });
        error
    }

    /// A broken invariant or an answer nobody expected.
    pub fn internal(stage: Stage, object: impl Into<String>, message: impl Into<String>) -> Self {
        Error::new(Kind::Internal, stage, object, message)
    }

    /// Attaches the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Attaches what an operator can do about it.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Attaches a stable UPPER_SNAKE reason that programs may branch on (google.rpc.ErrorInfo.reason).
    #[must_use]
    pub fn with_reason(mut self, reason: &'static str) -> Self {
        self.0.reason = Some(reason);
        self
    }

    /// Adds a field violation.
    #[must_use]
    pub fn with_violation(mut self, field: impl Into<String>, description: impl Into<String>) -> Self {
        self.0.violations.push(Violation { field: field.into(), description: description.into() });
        self
    }

    /// Adds a failure of the undo that followed; it never replaces the first cause.
    #[must_use]
    pub fn with_cleanup_failure(mut self, failure: Error) -> Self {
        self.0.cleanup.push(failure);
        self
    }

    /// Puts `prefix.` before the field names, as a document's error passes through the request that holds the document.
    #[must_use]
    pub fn under_field(mut self, prefix: &str) -> Self {
        for violation in &mut self.0.violations {
            violation.field = if violation.field.is_empty() { prefix.to_owned() } else { format!("{prefix}.{}", violation.field) };
        }
        self
    }

    /// The reason that another process told, when it is one of those that may come from there.
    #[must_use]
    pub fn with_told_reason(self, known: &[&'static str], told: &str) -> Self {
        match known.iter().find(|reason| **reason == told) {
            Some(reason) => self.with_reason(reason),
            None => self,
        }
    }

    /// What to decide on.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// Where it happened.
    pub fn stage(&self) -> Stage {
        self.0.stage
    }

    /// What it happened to.
    pub fn object(&self) -> &str {
        &self.0.object
    }

    /// The message of this level, without object and sources.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The stable reason, or one derived from the kind.
    pub fn reason(&self) -> &'static str {
        self.0.reason.unwrap_or(match self.0.kind {
            Kind::InvalidRequest => "INVALID_REQUEST",
            Kind::NotFound => "NOT_FOUND",
            Kind::AlreadyExists => "ALREADY_EXISTS",
            Kind::Conflict => "CONFLICT",
            Kind::PermissionDenied => "PERMISSION_DENIED",
            Kind::Unsupported => "UNSUPPORTED",
            Kind::NoSpace => "NO_SPACE",
            Kind::Busy => "BUSY",
            Kind::Corrupt => "CORRUPT",
            Kind::Unavailable => "UNAVAILABLE",
            Kind::Timeout => "TIMEOUT",
            Kind::Cancelled => "CANCELLED",
            Kind::Internal => "INTERNAL",
        })
    }

    /// What an operator can do about it.
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The offending fields.
    pub fn violations(&self) -> &[Violation] {
        &self.0.violations
    }

    /// Undo steps that failed too.
    pub fn cleanup_failures(&self) -> &[Error] {
        &self.0.cleanup
    }

    /// Whether the same call may succeed later without anybody changing it.
    pub fn is_retryable(&self) -> bool {
        matches!(self.0.kind, Kind::Busy | Kind::Unavailable | Kind::Timeout)
    }

    /// This level, its sources and failed undo steps in one line, for logs and for `job.error`.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        for failure in &self.0.cleanup {
            text.push_str("; cleaning up also failed: ");
            text.push_str(&failure.chain());
        }
        text
    }
}

/// The kind of an operating-system error, by errno where there is one.
pub fn kind_of_io(error: &io::Error) -> Kind {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Kind::NoSpace,
        Some(libc::EBUSY | libc::ETXTBSY) => Kind::Conflict,
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Kind::NotFound,
        Some(libc::EEXIST | libc::ENOTEMPTY) => Kind::AlreadyExists,
        Some(libc::EACCES | libc::EPERM) => Kind::PermissionDenied,
        Some(libc::EROFS) => Kind::Conflict,
        Some(libc::EAGAIN | libc::EMFILE | libc::ENFILE | libc::ENOMEM) => Kind::Busy,
        Some(libc::EOPNOTSUPP) => Kind::Unsupported,
        Some(libc::ETIMEDOUT) => Kind::Timeout,
        Some(libc::ECONNREFUSED | libc::ECONNRESET | libc::EHOSTUNREACH | libc::ENETUNREACH) => Kind::Unavailable,
        Some(_) => Kind::Internal,
        None => match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => Kind::Corrupt,
            io::ErrorKind::TimedOut => Kind::Timeout,
            io::ErrorKind::InvalidInput => Kind::InvalidRequest,
            _ => Kind::Internal,
        },
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.object.is_empty() { f.write_str(&self.0.message) } else { write!(f, "{}: {}", self.0.object, self.0.message) }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:?} in {}] {}", self.0.kind, self.0.stage.name(), self.chain())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_is_classified_and_kept() {
        let error = Error::io(Stage::Target, "vol0", "write at 4096", io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(error.kind(), Kind::NoSpace);
        assert_eq!(error.to_string(), "vol0: write at 4096");
        assert!(error.chain().contains("No space left on device"), "{}", error.chain());
    }

    #[test]
    fn first_cause_wins_and_failed_undo_is_listed() {
        let error = Error::new(Kind::Corrupt, Stage::Fetch, "blob", "digest differs").with_cleanup_failure(Error::internal(
            Stage::Host,
            "/dev/loop0",
            "still attached",
        ));
        assert_eq!(error.kind(), Kind::Corrupt);
        assert_eq!(error.chain(), "blob: digest differs; cleaning up also failed: /dev/loop0: still attached");
    }

    #[test]
    fn field_paths_are_prefixed_once_per_level() {
        let error = Error::field(Stage::Manifest, "rootfs.digest", "is not hex").under_field("manifest");
        assert_eq!(error.violations()[0].field, "manifest.rootfs.digest");
    }
}

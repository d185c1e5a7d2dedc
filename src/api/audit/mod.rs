//! The audit log: one JSON line per call that changes something, and per call that was denied.
//!
//! ```text
//! {"time":"2026-11-22T08:00:00.123Z","event":"call","method":"cloudlet.v1.VolumeService/DeleteVolume","owner":"team",
//!  "caller":{"kind":"unix","uid":1000,"gid":1000,"pid":4711},"object":{"volume":"default/web1"},"outcome":"OK","ms":12}
//! ```
//!
//! `event` is `begin` (only with `audit.required`: before the call), `call` (it has ended), `denied`, or `lost` (so many lines could not be written). What a
//! service notes is names and digests, never content; of a failure the code and the stable reason are logged, not the message, which may quote the request.
//! `outcome` is the gRPC code, or `DROPPED` when the client went away before the answer: what it asked for may be done all the same.
//!
//! A thread writes. Nobody waits for it, unless lines are required: then a call begins when its line is written, and is refused when it can't be.

mod line;
mod writer;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use serde_json::{Map, Value, json};
use tonic::{Code, Status, codegen::http::HeaderMap};
use tonic_types::StatusExt;

use crate::{
    api::authorise::Identity,
    config::AuditConfig,
    error::{Error, Kind, Result, Stage},
    render::now_ms,
};
use line::utc;
use writer::{Sink, Writer};

/// Denied calls that are logged a second; strangers must not fill the disk. The rest is counted.
const DENIED_PER_SECOND: std::num::NonZeroU32 = std::num::NonZeroU32::new(50).expect("not zero");

/// The log.
pub struct Audit {
    writer: Writer,
    required: bool,
    denied: DefaultDirectRateLimiter,
    suppressed: AtomicU64,
}

/// A call that is logged when it ends, or when it is dropped.
pub struct Entry {
    audit: Arc<Audit>,
    fields: Map<String, Value>,
    begun: Instant,
    notes: super::authorise::Notes,
    ended: bool,
}

impl Audit {
    /// Opens the log; nothing when the configuration wants none. Fails when it can't be opened and is required.
    pub fn open(config: &AuditConfig) -> Result<Option<Arc<Audit>>> {
        let sink = match (&config.file, config.stderr) {
            (Some(path), _) => Sink::File(path.clone()),
            (None, true) => Sink::Stderr,
            (None, false) => return Ok(None),
        };
        Ok(Some(Arc::new(Audit {
            writer: Writer::start(sink, config.required)?,
            required: config.required,
            denied: RateLimiter::direct(Quota::per_second(DENIED_PER_SECOND)),
            suppressed: AtomicU64::new(0),
        })))
    }

    /// Opens the file anew before the next line, after it was moved away.
    pub fn reopen(&self) {
        self.writer.reopen();
    }

    /// Logs a call that was denied.
    pub fn deny(&self, method: &str, identity: Option<&Identity>, status: &Status) {
        if self.denied.check().is_err() {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut fields = head("denied", method, identity, None);
        outcome(&mut fields, status.code(), status.get_error_details().error_info().map(|info| info.reason.as_str()));
        let suppressed = self.suppressed.swap(0, Ordering::Relaxed);
        if suppressed > 0 {
            fields.insert("suppressed".into(), suppressed.into());
        }
        self.writer.send(bytes(fields));
    }

    /// Begins to log a call. When lines are required, it is written that it begins, or `Kind::Unavailable` (`AUDIT_UNWRITABLE`).
    pub async fn begin(self: &Arc<Self>, method: &str, identity: &Identity, owner: &str, notes: super::authorise::Notes) -> Result<Entry> {
        if self.required {
            self.writer.write(bytes(head("begin", method, Some(identity), Some(owner)))).await.map_err(|error| {
                Error::new(Kind::Unavailable, Stage::Request, "audit log", "what changes something is refused: it can't be logged")
                    .with_reason("AUDIT_UNWRITABLE")
                    .with_source(error)
            })?;
        }
        let fields = head("call", method, Some(identity), Some(owner));
        Ok(Entry { audit: Arc::clone(self), fields, begun: Instant::now(), notes, ended: false })
    }
}

impl Entry {
    /// Logs how the call has ended; `headers` are those of the answer.
    pub fn end(mut self, headers: &HeaderMap) {
        let status = Status::from_header_map(headers);
        let details = status.as_ref().map(|status| status.get_error_details());
        let reason = details.as_ref().and_then(|details| details.error_info()).map(|info| info.reason.as_str());
        // An answer without a code in its headers has one behind its message, and that is OK: nothing that changes something streams.
        outcome(&mut self.fields, status.as_ref().map_or(Code::Ok, Status::code), reason);
        self.finish();
    }

    fn finish(&mut self) {
        self.ended = true;
        let mut fields = std::mem::take(&mut self.fields);
        let notes = self.notes.take();
        if !notes.is_empty() {
            fields.insert("object".into(), Value::Object(notes.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect()));
        }
        fields.insert("ms".into(), u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX).into());
        self.audit.writer.send(bytes(fields));
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if !self.ended {
            self.fields.insert("outcome".into(), "DROPPED".into());
            self.finish();
        }
    }
}

fn head(event: &str, method: &str, identity: Option<&Identity>, owner: Option<&str>) -> Map<String, Value> {
    let mut fields = Map::new();
    fields.insert("time".into(), utc(now_ms()).into());
    fields.insert("event".into(), event.into());
    // A stranger's path may be anything.
    fields.insert("method".into(), method.trim_start_matches('/').chars().take(200).collect::<String>().into());
    if let Some(owner) = owner {
        fields.insert("owner".into(), owner.into());
    }
    fields.insert("caller".into(), identity.map_or(Value::Null, caller));
    fields
}

fn caller(identity: &Identity) -> Value {
    match identity {
        Identity::Unix { uid, gid, pid, .. } => json!({"kind": "unix", "uid": uid, "gid": gid, "pid": pid}),
        Identity::Certificate(certificate) => json!({
            "kind": "certificate",
            "subject": certificate.subject,
            "sha256": certificate.fingerprint.hex(),
            "dns_names": certificate.dns_names,
            "uris": certificate.uris,
            "address": certificate.address,
        }),
        Identity::Tcp { address } => json!({"kind": "tcp", "address": address}),
    }
}

fn outcome(fields: &mut Map<String, Value>, code: Code, reason: Option<&str>) {
    fields.insert("outcome".into(), line::code_name(code).into());
    if let Some(reason) = reason {
        fields.insert("reason".into(), reason.into());
    }
}

fn bytes(fields: Map<String, Value>) -> Vec<u8> {
    // serde_json escapes line feeds and all other control characters, so that one call is one line.
    let mut line = Value::Object(fields).to_string().into_bytes();
    line.push(b'\n');
    line
}

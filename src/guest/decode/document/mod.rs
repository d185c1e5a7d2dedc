//! Network documents of others, as they are: netplan's YAML (version 2), and cloud-init's network-config in version 1 and 2, in YAML or JSON, with
//! or without the enclosing `network`.
//!
//! What they say becomes the typed model, and nothing is dropped in silence: a key that is not known is refused with its path, and so is a known
//! one that the model can't express. Exceptions, which change nothing in the result: `renderer` (the image decides what its network is configured
//! with), `wakeonlan: false`, and names of interfaces that are only labels.

mod v1;
mod v2;
mod yaml;

use serde_json::Value;
pub(crate) use yaml::value as yaml_value;

use super::cursor::Cursor;
use crate::{
    error::{Error, Result, Stage},
    guest::config::{Cidr, Network},
};

/// A document is at most this long, bytes; 64 interfaces with everything they may have need a tenth of it.
pub const DOCUMENT_LEN_MAX: usize = 256 * 1024;

/// Decodes the text of a document. Not validated; paths of errors start inside of the document.
pub fn from_text(text: &str) -> Result<Network> {
    if text.len() > DOCUMENT_LEN_MAX {
        return Err(Error::field(Stage::Request, "", format!("has {} bytes, the limit is {DOCUMENT_LEN_MAX}", text.len())));
    }
    from_value(&yaml::value(text).map_err(|why| Error::field(Stage::Request, "", why))?)
}

fn from_value(value: &Value) -> Result<Network> {
    let root = Cursor::root(value);
    if !root.is_object() {
        return Err(root.error("must be an object with version and interfaces"));
    }
    if !root.has("network") {
        return versioned(root);
    }
    let mut fields = root.fields()?;
    let network = fields.required("network", versioned)?;
    fields.finish()?;
    Ok(network)
}

/// A document inside of the configuration: text, or the document itself as JSON.
pub(super) fn decode(cursor: Cursor<'_>) -> Result<Network> {
    let place = cursor.path().to_owned();
    let decoded = if cursor.is_text() { from_text(cursor.text()?) } else { from_value(cursor.value()) };
    decoded.map_err(|error| error.under_field(&place))
}

fn versioned(cursor: Cursor<'_>) -> Result<Network> {
    let mut fields = cursor.fields()?;
    match fields.required("version", |cursor| cursor.loose_number::<u32>())? {
        1 => v1::decode(fields),
        2 => v2::decode(fields),
        other => Err(cursor.error(format!("has version {other}; 1 and 2 are understood"))),
    }
}

/// `default`, or a network with prefix; host bits are cleared, as every tool that reads such documents does.
fn destination(cursor: &Cursor<'_>, v6: bool) -> Result<Cidr> {
    let text = cursor.text()?;
    if text == "default" {
        return super::parse_cidr(if v6 { "::/0" } else { "0.0.0.0/0" }).map_err(|why| cursor.error(why));
    }
    let whole = if text.contains('/') { text.to_owned() } else { format!("{text}/{}", if text.contains(':') { 128 } else { 32 }) };
    Ok(super::parse_cidr(&whole).map_err(|why| cursor.error(why))?.network())
}

#[cfg(test)]
mod tests;

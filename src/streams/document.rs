//! `index:1.0` and `products:1.0`: what a tree says about itself.
//!
//! A document is read in one pass into four levels (tree, product, version, item), each with its own fields; [`ItemRef`] looks a field up from the inside
//! out, so that nothing is copied down a tree of a hundred thousand items. `_aliases` are resolved while reading. Fields are scalars, or lists of scalars
//! (which new publishers use for `supported_platforms` and which read as comma strings); anything else that is nested is not a field.

use std::{borrow::Cow, collections::BTreeMap};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{date, path::StreamPath};
use crate::{
    error::{Error, Kind, Result, Stage},
    manifest::json,
    names::Digest,
    units::MIB,
};

/// What a document may be at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes; also the bytes that resolving aliases may add.
    pub bytes_max: u64,
    /// Nesting; the format needs eight.
    pub depth_max: usize,
    /// Products of a document, or entries of an index.
    pub products_max: usize,
    /// Versions of all products.
    pub versions_max: usize,
    /// Items of all versions.
    pub items_max: usize,
}

impl Default for Limits {
    /// Room for the largest document there is (Ubuntu's of EC2, with daily images some 20 MB).
    fn default() -> Self {
        Limits { bytes_max: 64 * MIB, depth_max: 16, products_max: 20_000, versions_max: 200_000, items_max: 1_000_000 }
    }
}

/// A field's value; as JSON what it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Field {
    /// Text.
    Text(String),
    /// A number as it is written.
    Number(serde_json::Number),
    /// A truth value.
    Bool(bool),
    /// A list of scalars, as text.
    List(Vec<String>),
}

/// Fields of one level.
pub type Fields = BTreeMap<String, Field>;

impl Field {
    /// As text, the way simplestreams' tools compare it: Python's `True`, lists with commas.
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Field::Text(text) => Cow::Borrowed(text),
            Field::Number(number) => Cow::Owned(number.to_string()),
            Field::Bool(true) => Cow::Borrowed("True"),
            Field::Bool(false) => Cow::Borrowed("False"),
            Field::List(list) => Cow::Owned(list.join(",")),
        }
    }

    /// As a list: a comma string of an old publisher is one too.
    pub fn list(&self) -> Vec<String> {
        match self {
            Field::List(list) => list.clone(),
            other => other.text().split(',').map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect(),
        }
    }

    fn of(value: &Value) -> Option<Field> {
        Some(match value {
            Value::String(text) => Field::Text(text.clone()),
            Value::Number(number) => Field::Number(number.clone()),
            Value::Bool(value) => Field::Bool(*value),
            Value::Array(list) if list.iter().all(|value| value.is_string() || value.is_number()) => {
                Field::List(list.iter().map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned)).collect())
            }
            Value::Array(_) | Value::Object(_) | Value::Null => return None,
        })
    }

    fn len(&self) -> u64 {
        match self {
            Field::Text(text) => text.len() as u64 + 32,
            Field::Number(_) | Field::Bool(_) => 32,
            Field::List(list) => list.iter().map(|text| text.len() as u64 + 32).sum(),
        }
    }
}

/// One of the two.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Document {
    /// An `index:1.0`.
    Index(Index),
    /// A `products:1.0`.
    Products(Products),
}

/// An `index:1.0`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Index {
    /// Seconds since 1970, when it says.
    pub updated: Option<i64>,
    /// By content id.
    pub entries: BTreeMap<String, IndexEntry>,
}

/// A document that an index names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IndexEntry {
    /// What is in it, e.g. `image-downloads`, `image-ids`.
    pub datatype: String,
    /// Its format, e.g. `products:1.0`.
    pub format: String,
    /// Where it is.
    pub path: StreamPath,
    /// When it was changed, seconds since 1970, if the index says.
    pub updated: Option<i64>,
    /// The products in it, if the index says.
    pub products: Vec<String>,
    /// The clouds it is about: region and endpoint.
    pub clouds: Vec<(String, String)>,
}

/// A `products:1.0`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Products {
    /// What it is about, e.g. `com.ubuntu.cloud:released:download`.
    pub content_id: String,
    /// What is in it, e.g. `image-downloads`; empty when it does not say.
    pub datatype: String,
    /// Seconds since 1970, when it says.
    pub updated: Option<i64>,
    /// Fields of the whole tree.
    pub fields: Fields,
    /// By name.
    pub products: BTreeMap<String, Product>,
}

/// A product: one thing that has versions.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Product {
    /// Its own fields.
    pub fields: Fields,
    /// By name; names order as bytes, the last one is the newest.
    pub versions: BTreeMap<String, Version>,
}

/// A version of a product.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Version {
    /// Its own fields.
    pub fields: Fields,
    /// By name: each item's own fields.
    pub items: BTreeMap<String, Fields>,
}

/// An item with everything it inherits.
#[derive(Debug, Clone, Copy)]
pub struct ItemRef<'a> {
    /// The document.
    pub tree: &'a Products,
    /// Name of its product.
    pub product: &'a str,
    /// Name of its version.
    pub version: &'a str,
    /// Its name.
    pub item: &'a str,
    levels: [&'a Fields; 3],
}

/// Where an item's bytes are and what they must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Download {
    /// Relative to the mirror's root.
    pub path: StreamPath,
    /// SHA-256, if the tree says.
    pub digest: Option<Digest>,
    /// Bytes, if the tree says.
    pub size: Option<u64>,
}

impl<'a> ItemRef<'a> {
    /// A field, own or inherited. The names of product, version and item are fields too.
    pub fn get(&self, key: &str) -> Option<Cow<'a, Field>> {
        let [product, version, item] = self.levels;
        let name = |name: &'a str| Cow::Owned(Field::Text(name.to_owned()));
        // From the inside out, a level's name after its fields: as simplestreams' products_exdata does it.
        match key {
            "item_name" => return Some(name(self.item)),
            _ => {
                if let Some(field) = item.get(key) {
                    return Some(Cow::Borrowed(field));
                }
            }
        }
        match key {
            "version_name" => Some(name(self.version)),
            "product_name" => version.get(key).map(Cow::Borrowed).or_else(|| Some(name(self.product))),
            _ => [version, product, &self.tree.fields].into_iter().find_map(|fields| fields.get(key)).map(Cow::Borrowed),
        }
    }

    /// A field as text.
    pub fn text(&self, key: &str) -> Option<Cow<'a, str>> {
        self.get(key).map(|field| match field {
            Cow::Borrowed(field) => field.text(),
            Cow::Owned(field) => Cow::Owned(field.text().into_owned()),
        })
    }

    /// A field as a list; empty when it is not there.
    pub fn list(&self, key: &str) -> Vec<String> {
        self.get(key).map(|field| field.list()).unwrap_or_default()
    }

    /// Product, version and item, for messages.
    pub fn pedigree(&self) -> String {
        format!("{}/{}/{}", self.product, self.version, self.item)
    }

    /// Where its bytes are; nothing for an item without a path. `Kind::Corrupt` (`STREAM_INVALID`) when path, digest or size are none.
    pub fn download(&self) -> Result<Option<Download>> {
        let wrong = |field: &str, why: String| Err(invalid(format!("{}.{field}: {why}", self.pedigree())));
        let Some(path) = self.text("path") else { return Ok(None) };
        let path = match StreamPath::new(&path) {
            Ok(path) => path,
            Err(why) => return wrong("path", why),
        };
        let digest = match self.text("sha256") {
            None => None,
            Some(hex) => match format!("sha256:{}", hex.to_ascii_lowercase()).parse::<Digest>() {
                Ok(digest) => Some(digest),
                Err(why) => return wrong("sha256", why),
            },
        };
        let size = match self.text("size") {
            None => None,
            Some(text) => match text.parse::<u64>() {
                Ok(size) => Some(size),
                Err(_) => return wrong("size", format!("{:?} is not a number of bytes", text.chars().take(40).collect::<String>())),
            },
        };
        Ok(Some(Download { path, digest, size }))
    }
}

impl Products {
    /// Reads a `products:1.0`. `Kind::Corrupt` (`STREAM_INVALID`) when it is none, `Kind::NoSpace` (`STREAM_TOO_LARGE`) past a limit.
    pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Products> {
        Products::of(&read(bytes, limits)?, limits)
    }

    fn of(document: &Value, limits: &Limits) -> Result<Products> {
        let top = object(document, "")?;
        expect_format(top, "products:1.0")?;
        let mut reader = Reader::new(top, limits)?;
        let fields = reader.fields(top, "")?;
        let mut products = BTreeMap::new();
        let members = member(top, "products", "")?.ok_or_else(|| invalid("there are no products"))?;
        counted(members.len(), limits.products_max, "products")?;
        for (name, value) in members {
            let product = reader.product(object(value, name)?, name)?;
            products.insert(name.clone(), product);
        }
        let text = |key: &str| fields.get(key).map(|field| field.text().into_owned()).unwrap_or_default();
        Ok(Products { content_id: text("content_id"), datatype: text("datatype"), updated: updated(top, "")?, products, fields })
    }

    /// All items: products and versions in the order of their names.
    pub fn items(&self) -> impl Iterator<Item = ItemRef<'_>> {
        self.products.iter().flat_map(move |(product, of_product)| {
            of_product.versions.iter().flat_map(move |(version, of_version)| {
                of_version.items.iter().map(move |(item, fields)| ItemRef {
                    tree: self,
                    product,
                    version,
                    item,
                    levels: [&of_product.fields, &of_version.fields, fields],
                })
            })
        })
    }

    /// The items of one version.
    pub fn items_of<'a>(&'a self, product: &'a str, version: &'a str) -> impl Iterator<Item = ItemRef<'a>> {
        let of_product = self.products.get_key_value(product);
        let found = of_product.and_then(|(product, of_product)| Some((product, of_product, of_product.versions.get_key_value(version)?)));
        found.into_iter().flat_map(move |(product, of_product, (version, of_version))| {
            of_version.items.iter().map(move |(item, fields)| ItemRef {
                tree: self,
                product,
                version,
                item,
                levels: [&of_product.fields, &of_version.fields, fields],
            })
        })
    }
}

impl Index {
    /// Reads an `index:1.0`. Fails as [`Products::parse`] does.
    pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Index> {
        Index::of(&read(bytes, limits)?, limits)
    }

    fn of(document: &Value, limits: &Limits) -> Result<Index> {
        let top = object(document, "")?;
        expect_format(top, "index:1.0")?;
        let members = member(top, "index", "")?.ok_or_else(|| invalid("there is no index"))?;
        counted(members.len(), limits.products_max, "documents")?;
        let mut entries = BTreeMap::new();
        for (name, value) in members {
            let entry = object(value, name)?;
            let text = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            let path = StreamPath::new(&text("path")).map_err(|why| invalid(format!("index[{name:?}].path: {why}")))?;
            let list = |key: &str| entry.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            counted(list("products").len(), limits.products_max, "products")?;
            let clouds = list("clouds").iter().filter_map(|cloud| {
                let text = |key: &str| cloud.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
                cloud.is_object().then(|| (text("region"), text("endpoint")))
            });
            let entry = IndexEntry {
                datatype: text("datatype"),
                format: text("format"),
                path,
                updated: updated(entry, name)?,
                products: list("products").iter().filter_map(Value::as_str).map(str::to_owned).collect(),
                clouds: clouds.collect(),
            };
            entries.insert(name.clone(), entry);
        }
        Ok(Index { updated: updated(top, "")?, entries })
    }
}

/// Reads whichever of the two a document says it is, for a URL that may name either. Fails as [`Products::parse`] does.
pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Document> {
    let document = read(bytes, limits)?;
    match document.get("format").and_then(Value::as_str) {
        Some("index:1.0") => Index::of(&document, limits).map(Document::Index),
        _ => Products::of(&document, limits).map(Document::Products),
    }
}

/// A failure of a document's content.
pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, Stage::Fetch, "simplestreams document", message).with_reason("STREAM_INVALID")
}

fn too_large(message: String) -> Error {
    Error::new(Kind::NoSpace, Stage::Fetch, "simplestreams document", message).with_reason("STREAM_TOO_LARGE")
}

fn read(bytes: &[u8], limits: &Limits) -> Result<Value> {
    if bytes.len() as u64 > limits.bytes_max {
        return Err(too_large(format!("has {} bytes, the limit is {}", bytes.len(), limits.bytes_max)));
    }
    let document = json::Document::parse(bytes, bytes.len(), limits.depth_max)
        .map_err(|error| invalid(format!("{} {}: {}", error.position, error.field, error.message)))?;
    Ok(document.value)
}

fn object<'a>(value: &'a Value, at: &str) -> Result<&'a Map<String, Value>> {
    value.as_object().ok_or_else(|| invalid(format!("{at:?} is not an object")))
}

fn member<'a>(of: &'a Map<String, Value>, key: &str, at: &str) -> Result<Option<&'a Map<String, Value>>> {
    of.get(key).map(|value| object(value, &format!("{at}.{key}"))).transpose()
}

fn expect_format(top: &Map<String, Value>, want: &str) -> Result<()> {
    match top.get("format").and_then(Value::as_str) {
        Some(format) if format == want => Ok(()),
        Some(format) => Err(invalid(format!("has format {:?}, not {want}", format.chars().take(40).collect::<String>()))),
        None => Err(invalid(format!("says no format; {want} was expected"))),
    }
}

fn updated(of: &Map<String, Value>, at: &str) -> Result<Option<i64>> {
    match of.get("updated") {
        None => Ok(None),
        Some(Value::String(text)) => match date::parse(text) {
            Some(secs) => Ok(Some(secs)),
            None => Err(invalid(format!("{at}.updated: {:?} is not a date", text.chars().take(60).collect::<String>()))),
        },
        Some(_) => Err(invalid(format!("{at}.updated is not a date"))),
    }
}

fn counted(count: usize, max: usize, what: &str) -> Result<()> {
    if count > max {
        return Err(too_large(format!("has {count} {what}, the limit is {max}")));
    }
    Ok(())
}

/// What `_aliases` say: field → value → the fields that it stands for.
type Aliases = BTreeMap<String, BTreeMap<String, Fields>>;

struct Reader<'l> {
    aliases: Aliases,
    limits: &'l Limits,
    versions: usize,
    items: usize,
    /// Bytes that aliases may still add: a hundred short references to one long alias are not what the limit on bytes had in mind.
    alias_bytes_left: u64,
}

impl<'l> Reader<'l> {
    fn new(top: &Map<String, Value>, limits: &'l Limits) -> Result<Reader<'l>> {
        let mut aliases = Aliases::new();
        for (key, values) in member(top, "_aliases", "")?.into_iter().flatten() {
            let mut of_key = BTreeMap::new();
            for (value, stands_for) in object(values, &format!("_aliases.{key}"))? {
                let at = format!("_aliases.{key}.{value}");
                let fields = object(stands_for, &at)?.iter().map(|(name, value)| match Field::of(value) {
                    Some(field) => Ok((name.clone(), field)),
                    // An alias that stands for a subtree could stand for itself.
                    None => Err(invalid(format!("{at}.{name} is neither text, number nor list"))),
                });
                of_key.insert(value.clone(), fields.collect::<Result<Fields>>()?);
            }
            aliases.insert(key.clone(), of_key);
        }
        Ok(Reader { aliases, limits, versions: 0, items: 0, alias_bytes_left: limits.bytes_max })
    }

    fn product(&mut self, of: &Map<String, Value>, at: &str) -> Result<Product> {
        let mut product = Product { fields: self.fields(of, at)?, versions: BTreeMap::new() };
        let versions = member(of, "versions", at)?;
        self.versions += versions.map_or(0, Map::len);
        counted(self.versions, self.limits.versions_max, "versions")?;
        for (name, value) in versions.into_iter().flatten() {
            let at = format!("{at}/{name}");
            let of = object(value, &at)?;
            let mut version = Version { fields: self.fields(of, &at)?, items: BTreeMap::new() };
            let items = member(of, "items", &at)?;
            self.items += items.map_or(0, Map::len);
            counted(self.items, self.limits.items_max, "items")?;
            for (name, value) in items.into_iter().flatten() {
                version.items.insert(name.clone(), self.fields(object(value, &format!("{at}/{name}"))?, &at)?);
            }
            product.versions.insert(name.clone(), version);
        }
        Ok(product)
    }

    /// The fields of one level, with what its aliases stand for: which wins over the level's own, as in simplestreams' expand_data.
    fn fields(&mut self, of: &Map<String, Value>, at: &str) -> Result<Fields> {
        let mut fields: Fields = of.iter().filter_map(|(key, value)| Some((key.clone(), Field::of(value)?))).collect();
        if self.aliases.is_empty() {
            return Ok(fields);
        }
        for (key, value) in of {
            let (Some(of_key), Some(value)) = (self.aliases.get(key), value.as_str().filter(|value| !value.is_empty())) else { continue };
            let Some(stands_for) = of_key.get(value) else {
                return Err(invalid(format!("{at}.{key}: there is no alias {:?}", value.chars().take(60).collect::<String>())));
            };
            let cost: u64 = stands_for.iter().map(|(name, field)| name.len() as u64 + field.len()).sum();
            self.alias_bytes_left = self
                .alias_bytes_left
                .checked_sub(cost)
                .ok_or_else(|| too_large(format!("its aliases stand for more than {} bytes", self.limits.bytes_max)))?;
            fields.extend(stands_for.iter().map(|(name, field)| (name.clone(), field.clone())));
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests;

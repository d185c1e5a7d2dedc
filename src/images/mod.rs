//! What images are called: names with versions and channels, aliases, labels, deprecation; and why one can't be deleted.
//!
//! ```text
//! img-0123456789abcdef0123   an image, for ever
//! debian/12@20261101         a version: pinned, never becomes another image
//! debian/12:edge             a channel: follows the version that it points at
//! debian/12                  the channel `stable`, or where there is none the newest version that is not deprecated
//! debian/bookworm            an alias of debian/12; takes @VERSION and :CHANNEL as well
//! ```
//!
//! Versions order as bytes (`LANG=C`), as those of simplestreams do.

use std::collections::BTreeMap;

use crate::{
    error::{Error, Kind, Result, Stage},
    manifest::Manifest,
    render::{Engine, now_secs},
    store::{
        catalog::names::{Deprecation, VersionRow},
        records::ImageRecord,
    },
    streams::Filters,
};

/// The channel that a bare name follows.
pub const CHANNEL_DEFAULT: &str = "stable";
/// Characters of a name.
const NAME_LEN_MAX: usize = 128;
/// Characters of a version, channel, or key of a label.
const WORD_LEN_MAX: usize = 64;
/// Characters of a label's value, and of the reason of a deprecation.
const TEXT_LEN_MAX: usize = 512;

/// How a request names an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// By id.
    Id(String),
    /// A version of a name.
    Pinned {
        /// The name or an alias.
        name: String,
        /// The version.
        version: String,
    },
    /// Whatever a channel of a name points at.
    Following {
        /// The name or an alias.
        name: String,
        /// The channel; none for the default.
        channel: Option<String>,
    },
}

impl Reference {
    /// Reads a reference.
    pub fn parse(text: &str) -> Result<Reference, String> {
        if text.starts_with("img-") {
            return text.parse::<crate::manifest::ImageId>().map(|id| Reference::Id(id.to_string()));
        }
        if let Some((name, version)) = text.split_once('@') {
            check_name(name)?;
            check_version(version)?;
            return Ok(Reference::Pinned { name: name.to_owned(), version: version.to_owned() });
        }
        let (name, channel) = text.split_once(':').map_or((text, None), |(name, channel)| (name, Some(channel)));
        check_name(name)?;
        channel.map(check_channel).transpose()?;
        Ok(Reference::Following { name: name.to_owned(), channel: channel.map(str::to_owned) })
    }
}

/// What a reference means now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The image.
    pub image_id: String,
    /// Its name and version, when the reference was not an id.
    pub version: Option<(String, String)>,
    /// Why it should not be used, if somebody said so.
    pub deprecation: Option<Deprecation>,
}

/// Checks a name: parts of `a-z 0-9 . _ -` that start with a letter or digit, separated by single slashes.
pub fn check_name(text: &str) -> Result<(), String> {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c))
    };
    if text.len() > NAME_LEN_MAX || !text.split('/').all(part) || text.starts_with("img-") {
        let shown: String = text.chars().take(NAME_LEN_MAX).collect();
        return Err(format!(
            "{shown:?} is not a name of an image: 1 to {NAME_LEN_MAX} of a-z 0-9 . _ - in parts separated by /, not beginning with img-"
        ));
    }
    Ok(())
}

/// Checks a version: 1 to 64 of `A-Z a-z 0-9 . _ - : +`, starting with a letter or digit.
pub fn check_version(text: &str) -> Result<(), String> {
    word(text, "a version", "._-:+")
}

/// Checks a channel: 1 to 64 of `A-Z a-z 0-9 . _ -`, starting with a letter or digit.
pub fn check_channel(text: &str) -> Result<(), String> {
    word(text, "a channel", "._-")
}

fn word(text: &str, what: &str, extra: &str) -> Result<(), String> {
    let fits = text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(|c| c.is_ascii_alphanumeric() || extra.contains(c));
    if fits && text.len() <= WORD_LEN_MAX {
        return Ok(());
    }
    let shown: String = text.chars().take(WORD_LEN_MAX).collect();
    Err(format!("{shown:?} is not {what}: 1 to {WORD_LEN_MAX} letters, digits and {extra}, starting with a letter or digit"))
}

/// Makes a name of text that somebody else chose (`Debian`, `CentOS Stream`); nothing when nothing is left of it.
pub fn name_from(parts: &[&str]) -> Option<String> {
    let clean = |part: &&str| {
        let lower: String =
            part.trim().to_ascii_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' }).collect();
        let trimmed = lower.trim_matches(|c| "._-".contains(c)).to_owned();
        (!trimmed.is_empty()).then_some(trimmed)
    };
    let name = parts.iter().filter_map(clean).collect::<Vec<_>>().join("/");
    check_name(&name).ok().map(|()| name)
}

/// An image with everything it is called.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedImage {
    /// The row.
    pub record: ImageRecord,
    /// Its names and versions.
    pub versions: Vec<VersionRow>,
    /// The channels that point at it, as `NAME:CHANNEL`.
    pub channels: Vec<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether it should no longer be used.
    pub deprecation: Option<Deprecation>,
}

impl Engine {
    /// Finds the image that a reference means. `Kind::NotFound` (`IMAGE_NOT_FOUND`, `NAME_NOT_FOUND`, `VERSION_NOT_FOUND`, `CHANNEL_NOT_FOUND`) naming what
    /// there is instead.
    pub fn find_image(&self, reference: &str) -> Result<Found> {
        let catalog = &self.store.catalog;
        let missing = |reason: &'static str, why: String| {
            Error::new(Kind::NotFound, Stage::Resolve, reference, why).with_reason(reason).with_violation("image_id", "is not catalogued")
        };
        let parsed = Reference::parse(reference).map_err(|why| Error::field(Stage::Request, "image_id", why).with_reason("BAD_REFERENCE"))?;
        let (name, version, channel) = match parsed {
            Reference::Id(id) => {
                catalog.image(&id)?.ok_or_else(|| missing("IMAGE_NOT_FOUND", "there is no such image".into()))?;
                return Ok(Found { deprecation: catalog.deprecation(&id)?, image_id: id, version: None });
            }
            Reference::Pinned { name, version } => (name, Some(version), None),
            Reference::Following { name, channel } => (name, None, channel),
        };
        let name = catalog.alias(&name)?.unwrap_or(name);
        let versions = catalog.versions(Some(&name))?;
        if versions.is_empty() {
            return Err(missing("NAME_NOT_FOUND", format!("no image is called {name}")));
        }
        let of_version = |wanted: &str| versions.iter().find(|row| row.version == wanted);
        let row = match (version, channel) {
            (Some(version), _) => of_version(&version).ok_or_else(|| {
                let known: Vec<&str> = versions.iter().take(5).map(|row| row.version.as_str()).collect();
                missing("VERSION_NOT_FOUND", format!("{name} has no version {version}; the newest are {}", known.join(", ")))
            })?,
            (None, channel) => {
                let channels = catalog.channels(Some(&name))?;
                let wanted = channel.as_deref().unwrap_or(CHANNEL_DEFAULT);
                let points_at = channels.iter().find(|row| row.channel == wanted).and_then(|row| of_version(&row.version));
                match (points_at, &channel) {
                    (Some(row), _) => row,
                    (None, None) => versions.iter().find(|row| !row.deprecated).unwrap_or(&versions[0]),
                    (None, Some(channel)) => {
                        let known: Vec<&str> = channels.iter().map(|row| row.channel.as_str()).collect();
                        return Err(missing("CHANNEL_NOT_FOUND", format!("{name} has no channel {channel}; there are: {}", known.join(", "))));
                    }
                }
            }
        };
        Ok(Found {
            image_id: row.image_id.clone(),
            version: Some((row.name.clone(), row.version.clone())),
            deprecation: catalog.deprecation(&row.image_id)?,
        })
    }

    /// The image that a request for a render means: a retry under the same idempotency key means the image that it meant the first time, wherever the
    /// channel points by now. Ids are left as they are; whether there is such an image is found out later.
    pub fn image_of_request(&self, reference: &str, key: Option<&str>) -> Result<String> {
        if reference.is_empty() || reference.starts_with("img-") {
            return Ok(reference.to_owned());
        }
        let before = key.map(|key| self.store.catalog.render_by_key(key)).transpose()?.flatten();
        if let (Some(before), Ok(Reference::Pinned { name, .. } | Reference::Following { name, .. })) = (before, Reference::parse(reference)) {
            let name = self.store.catalog.alias(&name)?.unwrap_or(name);
            if self.store.catalog.versions_of_image(&before.image_id)?.iter().any(|row| row.name == name) {
                return Ok(before.image_id);
            }
        }
        Ok(self.find_image(reference).map_err(|error| error.under_field("spec"))?.image_id)
    }

    /// Gives an image a name and version, and points channels at it; whether the version is new.
    pub fn name_image(&self, name: &str, version: &str, image_id: &str, channels: &[String], now: i64) -> Result<bool> {
        let wrong = |field: &str, why: String| Error::field(Stage::Request, field, why);
        check_name(name).map_err(|why| wrong("name", why))?;
        check_version(version).map_err(|why| wrong("version", why))?;
        for channel in channels {
            check_channel(channel).map_err(|why| wrong("channels", why))?;
        }
        let created = self.store.catalog.put_version(name, version, image_id, now)?;
        for channel in channels {
            self.store.catalog.set_channel(name, channel, version, now)?;
        }
        Ok(created)
    }

    /// Makes an alias of a name; without a name the alias is taken away, if it was there.
    pub fn alias_image(&self, alias: &str, name: &str) -> Result<()> {
        check_name(alias).map_err(|why| Error::field(Stage::Request, "alias", why))?;
        if name.is_empty() {
            return self.store.catalog.delete_alias(alias).map(|_| ());
        }
        check_name(name).map_err(|why| Error::field(Stage::Request, "name", why))?;
        self.store.catalog.set_alias(alias, name)
    }

    /// Sets labels of an image; one without value is taken away.
    pub fn label_image(&self, image_id: &str, labels: &BTreeMap<String, String>) -> Result<()> {
        self.image(image_id)?;
        for (key, value) in labels {
            word(key, "the key of a label", "._-/").map_err(|why| Error::field(Stage::Request, "labels", why))?;
            if value.len() > TEXT_LEN_MAX || value.contains(char::is_control) {
                return Err(Error::field(Stage::Request, "labels", format!("the value of {key} is longer than {TEXT_LEN_MAX} or not printable")));
            }
        }
        for (key, value) in labels {
            self.store.catalog.set_label(image_id, key, Some(value.as_str()).filter(|value| !value.is_empty()))?;
        }
        Ok(())
    }

    /// Says that an image should no longer be used and what instead, or takes that back.
    pub fn deprecate_image(&self, image_id: &str, deprecation: Option<Deprecation>) -> Result<()> {
        self.image(image_id)?;
        if let Some(of) = &deprecation {
            if of.reason.len() > TEXT_LEN_MAX || of.reason.contains(char::is_control) {
                return Err(Error::field(Stage::Request, "reason", format!("is longer than {TEXT_LEN_MAX} or not printable")));
            }
            if !of.replacement.is_empty() {
                Reference::parse(&of.replacement).map_err(|why| Error::field(Stage::Request, "replacement", why))?;
            }
        }
        self.store.catalog.set_deprecation(image_id, deprecation)
    }

    /// Why an image can't be deleted now; empty when it can.
    pub fn why_not_delete(&self, image_id: &str) -> Result<Vec<String>> {
        self.image(image_id)?;
        let uses = self.store.catalog.uses_of_image(image_id, now_secs())?;
        let mut reasons: Vec<String> = uses
            .into_iter()
            .map(|of| match of.kind {
                "channel" => format!("channel {} points at it", of.object),
                "lease" => format!("lease {} holds it", of.object),
                kind => format!("{kind} {} was made from it", of.object),
            })
            .collect();
        if self.is_wanted(Some(image_id), None) {
            reasons.push("a render of it waits or runs".into());
        }
        Ok(reasons)
    }

    /// Removes an image with its names, labels and golden images. `Kind::Conflict` while a volume, a render or a channel needs it.
    pub fn delete_image(&self, image_id: &str) -> Result<()> {
        if self.is_wanted(Some(image_id), None) {
            return Err(Error::new(Kind::Conflict, Stage::Store, image_id, "a render of it waits or runs").with_reason("IMAGE_IN_USE"));
        }
        if !self.store.catalog.delete_image(image_id, now_secs())? {
            return Err(Error::new(Kind::NotFound, Stage::Resolve, image_id, "there is no such image")
                .with_reason("IMAGE_NOT_FOUND")
                .with_violation("image_id", "is not catalogued"));
        }
        for (golden, _) in self.store.catalog.goldens(Some(image_id))? {
            // One that is still wanted stays until nobody does.
            match self.remove_golden(golden.key) {
                Err(error) if error.kind() == Kind::Conflict => tracing::info!(golden = %golden.key.hex(), why = error.message(), "stays"),
                other => other?,
            }
        }
        Ok(())
    }

    /// An image with everything it is called.
    pub fn named_image(&self, record: ImageRecord) -> Result<NamedImage> {
        let catalog = &self.store.catalog;
        let uses = catalog.uses_of_image(&record.id, now_secs())?;
        Ok(NamedImage {
            versions: catalog.versions_of_image(&record.id)?,
            channels: uses.into_iter().filter(|of| of.kind == "channel").map(|of| of.object).collect(),
            labels: catalog.labels(&record.id)?.into_iter().collect(),
            deprecation: catalog.deprecation(&record.id)?,
            record,
        })
    }

    /// Images for which all filters hold, newest first. Fields are `id`, `name`, `version`, `channel`, `arch`, `manifest_name`, `author`, `digest`,
    /// `deprecated` (`True` or `False`), and any other word the label of that key; several names or channels are joined by commas.
    pub fn search_images(&self, filters: &Filters, limit: u32, offset: u64) -> Result<Vec<NamedImage>> {
        const PAGE: u32 = 500;
        let (mut found, mut skip, mut at) = (Vec::new(), offset, 0u64);
        loop {
            let records = self.store.catalog.images(PAGE, at)?;
            let last = records.len() < PAGE as usize;
            at += u64::from(PAGE);
            for record in records {
                let image = self.named_image(record)?;
                let manifest = self.manifest_of(&image.record)?;
                if !filters.accept_with(|key| image.field(key, &manifest))? {
                    continue;
                }
                if skip > 0 {
                    skip -= 1;
                    continue;
                }
                found.push(image);
                if found.len() >= limit as usize {
                    return Ok(found);
                }
            }
            if last {
                return Ok(found);
            }
        }
    }
}

impl NamedImage {
    fn field(&self, key: &str, manifest: &Manifest) -> Option<String> {
        let joined = |list: Vec<&str>| list.join(",");
        Some(match key {
            "id" => self.record.id.clone(),
            "name" => joined(self.versions.iter().map(|row| row.name.as_str()).collect()),
            "version" => joined(self.versions.iter().map(|row| row.version.as_str()).collect()),
            "channel" => joined(self.channels.iter().filter_map(|channel| channel.rsplit_once(':')).map(|(_, channel)| channel).collect()),
            "arch" => manifest.arch()?.to_owned(),
            "manifest_name" => manifest.name().to_owned(),
            "author" => manifest.author().to_owned(),
            "digest" => self.record.rootfs_digest?.to_string(),
            "deprecated" => if self.deprecation.is_some() { "True" } else { "False" }.to_owned(),
            label => self.labels.get(label)?.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_pin_or_follow() {
        let pinned = |name: &str, version: &str| Ok(Reference::Pinned { name: name.into(), version: version.into() });
        let following = |name: &str, channel: Option<&str>| Ok(Reference::Following { name: name.into(), channel: channel.map(str::to_owned) });
        assert_eq!(Reference::parse("debian/12@20261101"), pinned("debian/12", "20261101"));
        assert_eq!(Reference::parse("debian/12@20261101_05:24"), pinned("debian/12", "20261101_05:24"));
        assert_eq!(Reference::parse("debian/12:edge"), following("debian/12", Some("edge")));
        assert_eq!(Reference::parse("debian/12"), following("debian/12", None));
        assert_eq!(Reference::parse("img-0123456789abcdef0123"), Ok(Reference::Id("img-0123456789abcdef0123".into())));
        for bad in
            ["", "Debian", "debian//12", "/debian", "debian/", "../x", "img-12", "debian@", "debian:", "debian:a/b", "debian@a b", &"a".repeat(129)]
        {
            assert!(Reference::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_are_made_of_what_publishers_say() {
        assert_eq!(name_from(&["Debian", "bookworm", ""]).as_deref(), Some("debian/bookworm"));
        assert_eq!(name_from(&["CentOS", "9-Stream", "cloud"]).as_deref(), Some("centos/9-stream/cloud"));
        assert_eq!(name_from(&["ubuntu", "24.04 LTS"]).as_deref(), Some("ubuntu/24.04-lts"));
        assert_eq!(name_from(&["", "///"]), None);
    }
}

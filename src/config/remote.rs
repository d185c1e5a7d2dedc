//! `[[share.registry]]` and `[[share.bucket]]`: where golden images and tarballs are put for other hosts, and taken from.

use std::{net::IpAddr, path::PathBuf};

use serde::Deserialize;

use crate::{
    error::{Error, Result, Stage},
    source,
};

/// Remotes at most; each is asked for every golden image that is not here.
const REMOTES_MAX: usize = 32;
/// Longest name, as requests have it.
const NAME_LEN_MAX: usize = 64;

/// A registry of OCI artifacts (OCI distribution specification 1.1).
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    /// What requests call it: 1 to 64 of `a-z 0-9 . _ -`.
    pub name: String,
    /// `https://HOST[:PORT]`, or `http://` without credentials or on this host. The operator names it, so it may be at any address.
    pub url: String,
    /// Repository in it, such as `cloudlets/images`.
    pub repository: String,
    /// User whose password is in `password_file`.
    pub username: Option<String>,
    /// File with the password; read whenever it is needed, so that it can be changed.
    pub password_file: Option<PathBuf>,
    /// File with a token that is sent as it is (`Authorization: Bearer`). Exclusive with `username`.
    pub token_file: Option<PathBuf>,
    /// Where else than to the registry itself user and password may be sent for a token: `https://HOST[:PORT]`.
    pub token_server: Option<String>,
    /// PEM file with the authorities of the registry's certificate. Default: the host's.
    pub ca: Option<PathBuf>,
    /// Whether it is asked for golden images that are not here, with `golden.prefer = "pull"`. Default: it is.
    #[serde(default = "yes")]
    pub goldens: bool,
}

/// A bucket of an object storage that speaks S3.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// What requests call it: 1 to 64 of `a-z 0-9 . _ -`.
    pub name: String,
    /// `https://HOST[:PORT]` of the service, or `http://` on this host. Default: that of Amazon in `region`.
    pub endpoint: Option<String>,
    /// The bucket.
    pub bucket: String,
    /// What its keys begin with.
    #[serde(default)]
    pub prefix: String,
    /// Region that requests are signed for.
    #[serde(default = "default_region")]
    pub region: String,
    /// File with `aws_access_key_id`, `aws_secret_access_key` and perhaps `aws_session_token`, in the format of `~/.aws/credentials`; its `[default]`.
    /// Default: requests are not signed.
    pub credentials_file: Option<PathBuf>,
    /// Whether the bucket is in the host's name (`BUCKET.HOST`) rather than in the path. Default: in the path.
    #[serde(default)]
    pub virtual_hosted: bool,
    /// PEM file with the authorities of the service's certificate. Default: the host's.
    pub ca: Option<PathBuf>,
    /// Whether it is asked for golden images that are not here, with `golden.prefer = "pull"`. Default: it is.
    #[serde(default = "yes")]
    pub goldens: bool,
}

fn yes() -> bool {
    true
}

fn default_region() -> String {
    "us-east-1".into()
}

/// What is the matter with a field, by its name in the configuration.
fn wrong(field: &str, why: impl std::fmt::Display) -> Error {
    Error::field(Stage::Config, field, format!("{field}: {why}"))
}

/// Checks both lists.
pub(super) fn check(registries: &[Registry], buckets: &[Bucket]) -> Result<()> {
    if registries.len() + buckets.len() > REMOTES_MAX {
        return Err(wrong(
            "share.registry",
            format!("there are {} registries and buckets, the limit is {REMOTES_MAX}", registries.len() + buckets.len()),
        ));
    }
    let mut names = std::collections::BTreeSet::new();
    for (index, registry) in registries.iter().enumerate() {
        let at = |key: &str| format!("share.registry[{index}].{key}");
        check_name(&registry.name, &at("name"), &mut names)?;
        registry.check(&at)?;
    }
    for (index, bucket) in buckets.iter().enumerate() {
        let at = |key: &str| format!("share.bucket[{index}].{key}");
        check_name(&bucket.name, &at("name"), &mut names)?;
        bucket.check(&at)?;
    }
    Ok(())
}

fn check_name<'n>(name: &'n str, field: &str, names: &mut std::collections::BTreeSet<&'n str>) -> Result<()> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > NAME_LEN_MAX || !name.bytes().all(fits) {
        return Err(wrong(field, format!("{name:?} is not 1 to {NAME_LEN_MAX} of a-z 0-9 . _ -")));
    }
    if !names.insert(name) {
        return Err(wrong(field, format!("{name:?} is there twice")));
    }
    Ok(())
}

/// `https://HOST[:PORT]`; http only on this host when secrets go there.
fn check_origin(url: &str, field: &str, has_secrets: bool) -> Result<()> {
    let parsed = source::parse_url(url).map_err(|error| wrong(field, error.message()))?;
    let is_plain = parsed.query().is_none() && parsed.fragment().is_none() && parsed.username().is_empty() && parsed.password().is_none();
    if !matches!(parsed.scheme(), "http" | "https") || parsed.path() != "/" || !is_plain {
        return Err(wrong(field, format!("{url:?} is not https://HOST[:PORT]")));
    }
    let host = parsed.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let is_here = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    if parsed.scheme() == "http" && has_secrets && !is_here {
        return Err(wrong(field, "credentials go over https only, but to this host itself"));
    }
    Ok(())
}

fn check_files(files: &[(&str, &Option<PathBuf>)], at: &impl Fn(&str) -> String) -> Result<()> {
    for (key, path) in files {
        if let Some(path) = path
            && !path.is_absolute()
        {
            return Err(wrong(&at(key), format!("{path:?} is not an absolute path")));
        }
    }
    Ok(())
}

impl Registry {
    fn check(&self, at: &impl Fn(&str) -> String) -> Result<()> {
        check_origin(&self.url, &at("url"), self.username.is_some() || self.token_file.is_some())?;
        if let Some(server) = &self.token_server {
            check_origin(server, &at("token_server"), self.username.is_some())?;
        }
        check_repository(&self.repository).map_err(|why| wrong(&at("repository"), why))?;
        if self.username.is_some() != self.password_file.is_some() {
            return Err(wrong(&at("username"), "goes with password_file"));
        }
        if self.username.as_ref().is_some_and(|name| name.is_empty() || name.contains(':') || name.chars().any(char::is_control)) {
            return Err(wrong(&at("username"), "is empty or has a colon or a control character"));
        }
        if self.token_file.is_some() && self.username.is_some() {
            return Err(wrong(&at("token_file"), "does not go with username"));
        }
        check_files(&[("password_file", &self.password_file), ("token_file", &self.token_file), ("ca", &self.ca)], at)
    }
}

/// The grammar of the distribution specification: `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*`.
fn check_repository(text: &str) -> Result<(), String> {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_part = |part: &str| {
        let separators = part.split(|letter: char| letter.is_ascii() && is_letter(letter as u8)).filter(|between| !between.is_empty());
        let ends_fit = part.bytes().next().is_some_and(is_letter) && part.bytes().last().is_some_and(is_letter);
        ends_fit && separators.into_iter().all(|between| matches!(between, "." | "_" | "__") || between.bytes().all(|byte| byte == b'-'))
    };
    match text.len() <= 255 && text.split('/').all(is_part) {
        true => Ok(()),
        false => Err(format!("{text:?} is not a repository such as cloudlets/images")),
    }
}

impl Bucket {
    fn check(&self, at: &impl Fn(&str) -> String) -> Result<()> {
        if let Some(endpoint) = &self.endpoint {
            check_origin(endpoint, &at("endpoint"), self.credentials_file.is_some())?;
        }
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if !(3..=63).contains(&self.bucket.len()) || !self.bucket.bytes().all(fits) || self.bucket.starts_with('.') {
            return Err(wrong(&at("bucket"), format!("{:?} is not the name of a bucket", self.bucket)));
        }
        let is_part = |part: &str| !part.is_empty() && part.bytes().all(fits) && !matches!(part, "." | "..");
        if !self.prefix.is_empty() && (self.prefix.len() > 512 || !self.prefix.split('/').all(is_part)) {
            return Err(wrong(&at("prefix"), format!("{:?} is not made of A-Z a-z 0-9 . _ - between slashes", self.prefix)));
        }
        if self.region.is_empty() || self.region.len() > 64 || !self.region.bytes().all(fits) {
            return Err(wrong(&at("region"), format!("{:?} is no region", self.region)));
        }
        check_files(&[("credentials_file", &self.credentials_file), ("ca", &self.ca)], at)
    }
}

#[cfg(test)]
mod tests {
    use super::check_repository;
    use crate::config::Config;

    #[test]
    fn registries_and_buckets_are_checked_before_anything_is_asked() {
        let registry = "[[share.registry]]\nname='r'\nurl='https://r.example:5000'\nrepository='a/b'\n";
        let bucket = "[[share.bucket]]\nname='b'\nbucket='images'\n";
        let config = Config::parse(&format!("[golden]\nprefer='pull'\n{registry}{bucket}")).expect("valid");
        assert!(config.share.registries[0].goldens && config.share.buckets[0].region == "us-east-1");
        Config::parse(&format!("{}username='u'\npassword_file='/p'", registry.replace("https://r.example", "http://127.0.0.1"))).expect("valid");
        for (text, want) in [
            (format!("{registry}{registry}"), "share.registry[1].name"),
            (format!("{registry}{}", bucket.replace("'b'", "'r'")), "share.bucket[0].name"),
            (registry.replace("'r'", "'R'"), "share.registry[0].name"),
            (registry.replace("a/b", "a//b"), "share.registry[0].repository"),
            (registry.replace("https", "ftp"), "share.registry[0].url"),
            (registry.replace("5000", "5000/v2"), "share.registry[0].url"),
            (registry.replace("r.example", "u:p@r.example"), "share.registry[0].url"),
            (format!("{registry}username='u'"), "share.registry[0].username"),
            (format!("{registry}username='u:v'\npassword_file='/p'"), "share.registry[0].username"),
            (format!("{registry}username='u'\npassword_file='p'"), "share.registry[0].password_file"),
            (format!("{registry}username='u'\npassword_file='/p'\ntoken_file='/t'"), "share.registry[0].token_file"),
            (format!("{}token_file='/t'", registry.replace("https", "http")), "share.registry[0].url"),
            (format!("{registry}username='u'\npassword_file='/p'\ntoken_server='http://t.example'"), "share.registry[0].token_server"),
            (bucket.replace("images", "a/b"), "share.bucket[0].bucket"),
            (format!("{bucket}prefix='a/../b'"), "share.bucket[0].prefix"),
            (format!("{bucket}prefix='/a'"), "share.bucket[0].prefix"),
            (format!("{bucket}endpoint='http://s.example'\ncredentials_file='/c'"), "share.bucket[0].endpoint"),
            (format!("{bucket}credentials_file='c'"), "share.bucket[0].credentials_file"),
        ] {
            let error = Config::parse(&text).expect_err(&text);
            assert!(error.chain().contains(want), "{text}: {}", error.chain());
        }
    }

    #[test]
    fn repositories_have_the_grammar_of_the_specification() {
        for good in ["a", "library/debian", "a-b/c.d/e__f", "a--b", "0"] {
            assert!(check_repository(good).is_ok(), "{good}");
        }
        for bad in ["", "/", "a/", "A", "a..b", "a___b", "-a", "a-", "a b", "ä", "a/../b", "a_-b"] {
            assert!(check_repository(bad).is_err(), "{bad}");
        }
    }
}

//! Who this host is to a registry: user and password, a token of a file, or a token that a token server gives for user and password (distribution's "token authentication
//! specification", and RFC 9110, 11.6).

use std::path::{Path, PathBuf};

use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use serde::Deserialize;

use crate::{
    config::remote,
    error::{Error, Kind, Result, Stage},
};

/// Longest secret in a file, bytes: tokens of cloud providers have some thousands.
const SECRET_LEN_MAX: u64 = 64 * 1024;

/// What the configuration says. The secrets stay in their files.
#[derive(Debug)]
pub(super) enum Credentials {
    None,
    Password { username: String, file: PathBuf },
    Token { file: PathBuf },
}

impl Credentials {
    pub fn new(config: &remote::Registry) -> Credentials {
        match (&config.username, &config.password_file, &config.token_file) {
            (Some(username), Some(file), _) => Credentials::Password { username: username.clone(), file: file.clone() },
            (_, _, Some(file)) => Credentials::Token { file: file.clone() },
            _ => Credentials::None,
        }
    }

    /// User and password.
    pub async fn password(&self) -> Result<Option<(String, String)>> {
        match self {
            Credentials::Password { username, file } => Ok(Some((username.clone(), read_secret(file).await?))),
            _ => Ok(None),
        }
    }

    /// The token of a file, as a header.
    pub async fn token(&self) -> Result<Option<HeaderValue>> {
        match self {
            Credentials::Token { file } => bearer(&read_secret(file).await?).map(Some),
            _ => Ok(None),
        }
    }
}

/// The first line of a file.
async fn read_secret(path: &Path) -> Result<String> {
    use tokio::io::AsyncReadExt;
    let object = || path.display().to_string();
    let failed = |error| Error::io(Stage::Golden, object(), "read the secret", error);
    let mut text = String::new();
    let file = tokio::fs::File::open(path).await.map_err(failed)?;
    file.take(SECRET_LEN_MAX).read_to_string(&mut text).await.map_err(failed)?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// `Authorization: Bearer`. Its value is never logged.
pub(super) fn bearer(token: &str) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| Error::new(Kind::InvalidRequest, Stage::Golden, "token", "has characters that no header takes").with_reason("REMOTE_AUTH"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// `Authorization: Basic`.
pub(super) fn basic(username: &str, password: &str) -> Result<HeaderValue> {
    use base64::Engine as _;
    let encoded = base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"));
    let mut value =
        HeaderValue::from_str(&format!("Basic {encoded}")).map_err(|_| Error::internal(Stage::Golden, "credentials", "base64 is no header"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// What a registry wants to see.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    /// A token of `realm` for `service`.
    Bearer {
        realm: String,
        service: Option<String>,
    },
}

/// The challenge of an answer that this client can meet; a token is preferred.
pub(super) fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let all = || headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    let scheme = |text: &str, name: &str| text.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name));
    if let Some(text) = all().find(|text| scheme(text, "bearer ")) {
        let parameters = parameters(&text["bearer ".len()..]);
        let get = |name: &str| parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.clone());
        return Some(Challenge::Bearer { realm: get("realm")?, service: get("service") });
    }
    all().find(|text| scheme(text, "basic")).map(|_| Challenge::Basic)
}

/// `key="quoted \" value", key=token` (RFC 9110, 11.2).
fn parameters(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut letters = text.chars().peekable();
    loop {
        while letters.next_if(|letter| *letter == ',' || letter.is_whitespace()).is_some() {}
        let mut key = String::new();
        while let Some(letter) = letters.next_if(|letter| !matches!(letter, '=' | ',') && !letter.is_whitespace()) {
            key.push(letter);
        }
        if key.is_empty() || letters.next_if_eq(&'=').is_none() {
            return found;
        }
        let mut value = String::new();
        if letters.next_if_eq(&'"').is_some() {
            while let Some(letter) = letters.next().filter(|letter| *letter != '"') {
                // A backslash takes the next letter as it is.
                value.extend(if letter == '\\' { letters.next() } else { Some(letter) });
            }
        } else {
            while let Some(letter) = letters.next_if(|letter| *letter != ',' && !letter.is_whitespace()) {
                value.push(letter);
            }
        }
        found.push((key, value));
    }
}

/// What a token server answers.
#[derive(Deserialize)]
pub(super) struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl TokenAnswer {
    pub fn token(self) -> Option<String> {
        self.token.or(self.access_token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[&'static str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_static(value));
        }
        challenge(&headers)
    }

    #[test]
    fn challenges_of_registries_in_the_field_are_understood() {
        let bearer = |realm: &str, service: Option<&str>| Some(Challenge::Bearer { realm: realm.into(), service: service.map(str::to_owned) });
        assert_eq!(
            of(&["Bearer realm=\"https://auth.docker.io/token\",service=\"registry.docker.io\",scope=\"repository:a/b:pull,push\""]),
            bearer("https://auth.docker.io/token", Some("registry.docker.io"))
        );
        assert_eq!(of(&["bearer scope=x , Realm=\"a\\\"b,c\""]), bearer("a\"b,c", None));
        assert_eq!(of(&["Basic realm=\"r\"", "Bearer realm=t"]), bearer("t", None));
        assert_eq!(of(&["BASIC realm=\"r\""]), Some(Challenge::Basic));
        for none in [&["Negotiate"][..], &["Bearer service=\"s\""], &["Bearer realm"], &["Bearer =\"x\""], &[]] {
            assert_eq!(of(none), None, "{none:?}");
        }
        assert_eq!(parameters("a=\"unterminated"), [("a".to_owned(), "unterminated".to_owned())]);
    }

    #[test]
    fn secrets_do_not_show_in_headers_that_are_printed() {
        let shown = format!("{:?} {:?}", basic("user", "pass").expect("a header"), bearer("secret").expect("a header"));
        assert!(!shown.contains("secret") && !shown.contains("dXNlcjpwYXNz"), "{shown}");
        assert!(bearer("a\nb").is_err());
    }
}

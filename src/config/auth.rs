//! Settings of authentication and authorization. The module `auth` gives them their meaning.

use std::{fmt, path::PathBuf, time::Duration};

use serde::{Deserialize, Deserializer, de};

use super::{ConfigError, duration, duration_or_zero, positive, rule};
use crate::subject::Filter;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Auth {
    pub mode: AuthMode,
    pub cookie: String,
    pub query_token: bool,
    #[serde(deserialize_with = "positive")]
    pub token_bytes: usize,
    #[serde(deserialize_with = "positive")]
    pub filters: usize,
    pub keys: Vec<ApiKey>,
    pub anonymous: Rights,
    pub policy: Policy,
    pub jwt: Jwt,
}

/// Whether every client may do everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AuthMode {
    /// As long as nothing else is configured, and on this machine only.
    Auto,
    /// Yes, on this machine only.
    Local,
    /// Yes, everywhere.
    Open,
}

/// What a principal may do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rights {
    #[serde(deserialize_with = "filters")]
    pub subscribe: Vec<Filter>,
    #[serde(deserialize_with = "filters")]
    pub publish: Vec<Filter>,
}

/// A backend's key. Of the key itself only the hash is known.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiKey {
    pub name: String,
    pub hash: String,
    #[serde(default, deserialize_with = "filters")]
    pub subscribe: Vec<Filter>,
    #[serde(default, deserialize_with = "filters")]
    pub publish: Vec<Filter>,
}

/// Filters with claims in braces.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    pub subscribe: Vec<String>,
    pub publish: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jwt {
    pub secret: Secret,
    /// Empty: none. So are the next two.
    pub key_file: PathBuf,
    pub jwks_file: PathBuf,
    pub jwks_url: String,
    #[serde(deserialize_with = "duration")]
    pub jwks_refresh: Duration,
    #[serde(deserialize_with = "duration")]
    pub jwks_refresh_min: Duration,
    #[serde(deserialize_with = "duration")]
    pub jwks_timeout: Duration,
    #[serde(deserialize_with = "positive")]
    pub jwks_bytes: usize,
    #[serde(deserialize_with = "positive")]
    pub jwks_keys: usize,
    pub issuer: Vec<String>,
    pub audience: Vec<String>,
    #[serde(deserialize_with = "duration_or_zero")]
    pub leeway: Duration,
    #[serde(deserialize_with = "duration")]
    pub lifetime: Duration,
    #[serde(deserialize_with = "duration_or_zero")]
    pub expiry_warning: Duration,
}

/// A text that is never shown.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

/// More than any clocks should differ.
const LEEWAY_MAX: Duration = Duration::from_secs(600);

impl Auth {
    /// Whether authentication is configured.
    pub fn is_configured(&self) -> bool {
        self.jwt.is_configured() || !self.keys.is_empty() || self.anonymous != Rights::default()
    }

    /// Whether neither authentication nor a mode is configured.
    pub(super) fn is_silent(&self) -> bool {
        self.mode == AuthMode::Auto && !self.is_configured()
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let mode = match self.mode {
            AuthMode::Auto => None,
            AuthMode::Local => Some("\"local\", which lets everybody on this machine do everything"),
            AuthMode::Open => Some("\"open\", which lets everybody do everything"),
        };
        if let (Some(mode), true) = (mode, self.is_configured()) {
            return rule(format!("auth.mode is {mode}, but more of auth is set"));
        }
        let has_policy = !self.policy.subscribe.is_empty() || !self.policy.publish.is_empty();
        if has_policy && !self.jwt.is_configured() {
            return rule("auth.policy is for tokens, but auth.jwt has no key".into());
        }
        let url = &self.jwt.jwks_url;
        if !url.is_empty() && !url.starts_with("https://") && !url.starts_with("http://") {
            // It may hold a password.
            return rule("auth.jwt.jwks_url does not begin with https:// or http://".into());
        }
        if self.jwt.leeway > LEEWAY_MAX {
            return rule(format!("auth.jwt.leeway is more than {LEEWAY_MAX:?}"));
        }
        let in_name = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        if self.cookie.is_empty() || !self.cookie.chars().all(in_name) {
            return rule(format!("auth.cookie is {:?}, which is no cookie's name", self.cookie));
        }
        Ok(())
    }
}

impl Jwt {
    pub fn is_configured(&self) -> bool {
        let files = [&self.key_file, &self.jwks_file];
        !self.secret.is_empty() || !self.jwks_url.is_empty() || files.iter().any(|file| !file.as_os_str().is_empty())
    }
}

impl Secret {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn expose(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

fn filters<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Filter>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    let parse = |text: &String| Filter::parse(text).map_err(|error| de::Error::custom(format!("{text:?}: {error}")));
    texts.iter().map(parse).collect()
}

//! Settings: defaults, file, environment and flags, in rising order of strength, turned once into the values that the
//! rest uses. After [`Config::load`] nothing is checked again.

mod auth;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use figment::{
    Figment,
    providers::{Env, Format, Serialized, Toml},
};
use serde::{Deserialize, Deserializer, de};

pub use self::auth::{ApiKey, Auth, AuthMode, Jwt, Policy, Rights, Secret};

const SECRET_VARIABLE: &str = "TIDEGATE_AUTH__JWT__SECRET";

/// Every key with its default, its unit and a line of why; also the documentation of the configuration file.
pub const DEFAULTS: &str = include_str!("config.default.toml");

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub listen: SocketAddr,
    pub admin_listen: SocketAddr,
    pub log: Log,
    pub auth: Auth,
    pub sse: Sse,
    pub feed: Feed,
    pub history: History,
    pub audit: Audit,
    pub limits: Limits,
    pub drain: Drain,
    pub embedded: Embedded,
    pub nats: Nats,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    pub filter: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sse {
    #[serde(deserialize_with = "duration")]
    pub heartbeat: Duration,
    #[serde(deserialize_with = "duration")]
    pub retry: Duration,
    #[serde(deserialize_with = "positive")]
    pub write_bytes: usize,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Feed {
    #[serde(deserialize_with = "positive")]
    pub events: usize,
    #[serde(deserialize_with = "positive")]
    pub bytes: usize,
    #[serde(deserialize_with = "duration")]
    pub linger: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct History {
    #[serde(deserialize_with = "positive")]
    pub page_events: usize,
    #[serde(deserialize_with = "positive")]
    pub page_bytes: usize,
    #[serde(deserialize_with = "positive")]
    pub concurrency: usize,
    #[serde(deserialize_with = "positive")]
    pub shared_pages: usize,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    #[serde(deserialize_with = "duration")]
    pub interval: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    #[serde(deserialize_with = "positive")]
    pub streams: usize,
    #[serde(deserialize_with = "positive")]
    pub filters: usize,
    #[serde(deserialize_with = "positive")]
    pub event_bytes: usize,
    #[serde(deserialize_with = "positive")]
    pub line_bytes: usize,
    #[serde(deserialize_with = "positive")]
    pub batch_window: usize,
    #[serde(deserialize_with = "duration")]
    pub stall: Duration,
    #[serde(deserialize_with = "duration")]
    pub request_head: Duration,
    #[serde(deserialize_with = "duration")]
    pub keep_alive: Duration,
    #[serde(deserialize_with = "duration")]
    pub body_pause: Duration,
    #[serde(deserialize_with = "positive")]
    pub connections: usize,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    #[serde(deserialize_with = "duration")]
    pub spread: Duration,
    #[serde(deserialize_with = "duration")]
    pub limit: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Embedded {
    #[serde(deserialize_with = "positive")]
    pub events: usize,
    #[serde(deserialize_with = "positive")]
    pub bytes: usize,
    #[serde(deserialize_with = "duration")]
    pub age: Duration,
    #[serde(deserialize_with = "duration")]
    pub duplicate_window: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nats {
    /// Empty: the embedded broker.
    pub url: String,
    pub credentials: PathBuf,
    #[serde(deserialize_with = "duration")]
    pub publish_timeout: Duration,
    #[serde(deserialize_with = "duration")]
    pub request_timeout: Duration,
    #[serde(deserialize_with = "positive")]
    pub subscription_messages: usize,
    pub stream: NatsStream,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatsStream {
    pub name: String,
    /// Ends with a dot, as does `live_prefix`.
    pub prefix: String,
    pub live_prefix: String,
    pub replicas: usize,
    pub manage: bool,
    pub compacted: bool,
}

/// Settings that can't be used, in words for the operator.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("configuration: {0}")]
    Values(#[from] Box<figment::Error>),
    #[error("configuration: there is no file {}", .0.display())]
    NoFile(PathBuf),
    #[error("configuration: {0}")]
    Rule(String),
}

impl Config {
    /// Layers `flags` (dotted keys) over the environment over `file` over the defaults.
    ///
    /// # Errors
    /// On unknown keys, values of the wrong type or out of range, and a file that is not there.
    pub fn load(file: Option<PathBuf>, flags: Vec<(&'static str, String)>) -> Result<Config, ConfigError> {
        let mut layers = Figment::from(Toml::string(DEFAULTS));
        if let Some(file) = file {
            if !file.is_file() {
                return Err(ConfigError::NoFile(file));
            }
            layers = layers.merge(Toml::file_exact(file));
        }
        let secret = std::env::var(SECRET_VARIABLE).ok();
        layers = layers.merge(Env::prefixed("TIDEGATE_").ignore(&["config", "auth__jwt__secret"]).split("__"));
        if let Some(secret) = secret {
            // Taken as it is: read as a value, one of digits would be a number, and then stand in an error.
            layers = layers.merge(Serialized::default("auth.jwt.secret", secret));
        }
        for (key, value) in flags {
            layers = layers.merge(Serialized::default(key, value));
        }
        let config: Config = layers.extract().map_err(Box::new)?;
        config.check()
    }

    fn check(self) -> Result<Config, ConfigError> {
        let stream = &self.nats.stream;
        for (key, prefix) in [("prefix", &stream.prefix), ("live_prefix", &stream.live_prefix)] {
            let tokens = prefix.strip_suffix('.').map(crate::subject::Subject::parse);
            if !matches!(tokens, Some(Ok(_))) {
                return rule(format!("nats.stream.{key} is {prefix:?}, but must be tokens that end with a dot"));
            }
        }
        if stream.live_prefix.starts_with(&stream.prefix) {
            return rule("nats.stream.live_prefix may not be below nats.stream.prefix: that would be a cycle".into());
        }
        let name_fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if stream.name.is_empty() || !stream.name.chars().all(name_fits) {
            return rule(format!("nats.stream.name is {:?}, but is made of A-Z a-z 0-9 - _", stream.name));
        }
        self.auth.check()?;
        if self.limits.line_bytes < self.limits.event_bytes {
            return rule("limits.line_bytes is less than limits.event_bytes: a line holds a whole event".into());
        }
        Ok(self)
    }
}

fn rule<T>(text: String) -> Result<T, ConfigError> {
    Err(ConfigError::Rule(text))
}

/// A positive time such as `"15s"`, `"10m"` or `"7d"`.
fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_duration(&text)
        .ok_or_else(|| de::Error::custom(format!("{text:?} is no time such as \"15s\", \"10m\" or \"7d\"")))
}

/// The same, or `"0s"`: not at all.
fn duration_or_zero<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    match &*text {
        "0s" => Ok(Duration::ZERO),
        text => parse_duration(text)
            .ok_or_else(|| de::Error::custom(format!("{text:?} is no time such as \"0s\", \"15s\" or \"10m\""))),
    }
}

/// Parses a whole positive number with a unit: `ms`, `s`, `m`, `h` or `d`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let number: u64 = number.parse().ok().filter(|n| *n > 0)?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    Some(Duration::from_millis(number.checked_mul(millis)?))
}

fn positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    match usize::deserialize(deserializer)? {
        0 => Err(de::Error::custom("must be at least 1")),
        number => Ok(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_complete() {
        let config = Config::load(None, vec![]).unwrap();
        assert_eq!(config.sse.heartbeat, Duration::from_secs(15));
    }

    #[test]
    fn flags_win() {
        let config = Config::load(None, vec![("listen", "127.0.0.1:1234".into())]).unwrap();
        assert_eq!(config.listen.port(), 1234);
    }

    #[test]
    fn a_secret_is_never_shown() {
        let config = Config::load(None, vec![("auth.jwt.secret", "correct horse battery staple".into())]).unwrap();
        assert_eq!(config.auth.jwt.secret.expose(), b"correct horse battery staple");
        assert!(!format!("{config:?}").contains("horse"));
    }

    #[test]
    fn what_cannot_be_used_is_refused_and_named() {
        for (key, value, said) in [
            ("sse.heartbeat", "15", "no time such as"),
            ("sse.heartbeat", "0s", "no time such as"),
            ("nats.stream.prefix", "events", "must be tokens that end with a dot"),
            ("nats.stream.live_prefix", "events.live.", "would be a cycle"),
            ("nats.stream.name", "a.b", "is made of"),
            ("nats.strem.name", "a", "unknown field"),
            ("auth.cookie", "a=b", "no cookie's name"),
            ("auth.jwt.jwks_url", "id.example.com/jwks", "begins with https://"),
            ("auth.jwt.leeway", "1h", "more than"),
        ] {
            let error = Config::load(None, vec![(key, value.into())]).unwrap_err().to_string();
            assert!(error.contains(said), "{key} = {value}: {error}");
        }
    }
}

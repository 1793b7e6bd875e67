//! Settings: defaults, file, environment and flags, in rising order of strength, turned once into the values that the
//! rest uses. After [`Config::load`] nothing is checked again.

mod advice;
mod auth;
mod sources;

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de};

pub use self::{
    advice::advice,
    auth::{ApiKey, Auth, AuthMode, Jwt, Policy, Rights, Secret},
    sources::Sources,
};

/// Every key with its default, its unit and a line of why; also the documentation of the configuration file.
pub const DEFAULTS: &str = include_str!("config.default.toml");

/// The longest target, and the largest head, that the HTTP server reads, in bytes.
pub const TARGET_BYTES_MAX: usize = 65_534;
pub const HEAD_BYTES_MAX: usize = 131_072;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub listen: SocketAddr,
    pub admin_listen: SocketAddr,
    #[serde(deserialize_with = "networks")]
    pub trusted_proxies: Vec<IpNet>,
    pub address_header: AddressHeader,
    pub admin: Admin,
    pub cors: Cors,
    pub console: Console,
    pub log: Log,
    pub debug: Debug,
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
pub struct Admin {
    pub hosts: Vec<String>,
    #[serde(deserialize_with = "positive")]
    pub connections: usize,
}

/// The header in which trusted proxies name the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AddressHeader {
    XForwardedFor,
    Forwarded,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cors {
    pub origins: Vec<String>,
    pub credentials: bool,
    #[serde(deserialize_with = "duration")]
    pub max_age: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    pub enabled: bool,
    pub images: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    pub filter: String,
    pub format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    Auto,
    Text,
    Json,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Debug {
    #[serde(deserialize_with = "positive")]
    pub page: usize,
    #[serde(deserialize_with = "positive")]
    pub ended: usize,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sse {
    #[serde(deserialize_with = "duration")]
    pub heartbeat: Duration,
    #[serde(deserialize_with = "duration")]
    pub retry: Duration,
    /// Zero: for ever.
    #[serde(deserialize_with = "duration_or_zero")]
    pub max_life: Duration,
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
    pub sieves: usize,
    #[serde(deserialize_with = "positive")]
    pub event_bytes: usize,
    #[serde(deserialize_with = "positive")]
    pub line_bytes: usize,
    #[serde(deserialize_with = "positive")]
    pub batch_window: usize,
    #[serde(deserialize_with = "duration")]
    pub stall: Duration,
    #[serde(deserialize_with = "positive")]
    pub target_bytes: usize,
    #[serde(deserialize_with = "positive")]
    pub head_bytes: usize,
    #[serde(deserialize_with = "duration")]
    pub request_head: Duration,
    #[serde(deserialize_with = "duration")]
    pub keep_alive: Duration,
    #[serde(deserialize_with = "duration")]
    pub body_pause: Duration,
    #[serde(deserialize_with = "duration")]
    pub body: Duration,
    #[serde(deserialize_with = "positive")]
    pub connections: usize,
    #[serde(deserialize_with = "positive")]
    pub backlog: usize,
    #[serde(deserialize_with = "positive")]
    pub batches: usize,
    // 0 is a quarter of the machine's.
    pub memory: usize,
    // What one address or principal may have. 0 is without limit.
    pub address_connections: usize,
    pub address_batches: usize,
    pub principal_batches: usize,
    pub address_streams: usize,
    pub principal_streams: usize,
    pub address_filters: usize,
    pub principal_filters: usize,
    pub address_attempts: u32,
    pub address_attempts_burst: u32,
    pub publishes: u32,
    pub publishes_burst: u32,
    pub publish_bytes: u32,
    pub publish_bytes_burst: u32,
    #[serde(deserialize_with = "positive")]
    pub tracked: usize,
}

impl Limits {
    /// How many connections beyond `connections` may wait for room, or to be refused.
    pub fn waiting_connections(&self) -> usize {
        (self.connections / 8).clamp(8, 512)
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    #[serde(deserialize_with = "duration_or_zero")]
    pub notice: Duration,
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
    #[serde(deserialize_with = "duration_or_zero")]
    pub away_after: Duration,
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
    #[error("configuration: {} can't be read: {source}", .file.display())]
    Unreadable { file: PathBuf, source: io::Error },
    #[error("configuration: {place}: {what}")]
    Wrong { place: String, what: String },
    #[error("configuration: {0}")]
    Rule(String),
}

impl Config {
    /// Layers `flags` (dotted keys) over the environment over `file` over the defaults.
    ///
    /// # Errors
    /// On unknown keys, values of the wrong type or out of range, and a file that can't be read.
    pub fn load(file: Option<PathBuf>, flags: Vec<(&str, String)>) -> Result<Config, ConfigError> {
        Sources::read(file, flags)?.config()
    }

    /// Whether a setting can change under a gateway that runs; all others are of its start.
    pub fn changes_while_it_runs(key: &str) -> bool {
        let of_servers = ["event_bytes", "connections", "backlog", "request_head", "keep_alive"];
        match key.split_once('.') {
            Some(("auth", "jwt.expiry_warning")) => false,
            Some(("auth" | "cors", _) | ("log", "filter")) => true,
            Some(("limits", limit)) => !of_servers.contains(&limit),
            _ => false,
        }
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
        let limits = &self.limits;
        for (key, bytes, most) in
            [("target_bytes", limits.target_bytes, TARGET_BYTES_MAX), ("head_bytes", limits.head_bytes, HEAD_BYTES_MAX)]
        {
            if bytes > most {
                return rule(format!("limits.{key} is {bytes}, but no more than {most} are ever read"));
            }
        }
        for (key, rate, burst) in [
            ("address_attempts", limits.address_attempts, limits.address_attempts_burst),
            ("publishes", limits.publishes, limits.publishes_burst),
            ("publish_bytes", limits.publish_bytes, limits.publish_bytes_burst),
        ] {
            if rate > 0 && burst == 0 {
                return rule(format!("limits.{key}_burst is 0, which lets nothing pass: limits.{key} = 0 is no limit"));
            }
        }
        let in_name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if let Some(name) = self.admin.hosts.iter().find(|name| name.is_empty() || !name.chars().all(in_name)) {
            return rule(format!("admin.hosts has {name:?}, but holds names such as \"gateway-1\", without a port"));
        }
        if let Some(origin) = self.cors.origins.iter().find(|origin| !is_origin(origin)) {
            return rule(format!(
                "cors.origins has {origin:?}, but holds origins such as \"https://app.example.com\", or \"*\""
            ));
        }
        let is_https = |origin: &&String| origin.starts_with("https://") && is_origin(origin);
        if let Some(origin) = self.console.images.iter().find(|origin| !is_https(origin)) {
            return rule(format!(
                "console.images has {origin:?}, but holds origins such as \"https://images.example.com\""
            ));
        }
        Ok(self)
    }
}

/// Whether a text is what browsers send as an `Origin` (RFC 6454, section 6.2), or stands for all of them.
fn is_origin(text: &str) -> bool {
    let host = ["https://", "http://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._:[]".contains(c);
    text == "*" || host.is_some_and(|host| !host.is_empty() && host.chars().all(allowed))
}

fn rule<T>(text: String) -> Result<T, ConfigError> {
    Err(ConfigError::Rule(text))
}

/// A positive time such as `"15s"`, `"10m"` or `"7d"`.
fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    deserializer.deserialize_str(Time { or_zero: false })
}

/// The same, or `"0s"`: not at all.
fn duration_or_zero<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    deserializer.deserialize_str(Time { or_zero: true })
}

struct Time {
    or_zero: bool,
}

impl de::Visitor<'_> for Time {
    type Value = Duration;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.or_zero { "a time such as 0s, 15s or 10m" } else { "a time such as 15s, 10m or 7d" })
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Duration, E> {
        let zero = (self.or_zero && text == "0s").then_some(Duration::ZERO);
        zero.or_else(|| parse_duration(text)).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
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

/// Networks such as `"10.0.0.0/8"` or `"2001:db8::/32"`, or single addresses.
fn networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    let parse = |text: String| {
        let network = text.parse().ok().or_else(|| text.parse().ok().map(|address: IpAddr| address.into()));
        network.ok_or_else(|| de::Error::custom(format!("{text:?} is no address or network such as \"10.0.0.0/8\"")))
    };
    texts.into_iter().map(parse).collect()
}

fn positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    match usize::deserialize(deserializer)? {
        0 => Err(de::Error::custom("must be at least 1")),
        number => Ok(number),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{cases, nearly, text};

    /// Lines of a file, of which many are right: the defaults, each under its whole name.
    fn file() -> impl Strategy<Value = String> {
        let mut section = String::new();
        let mut settings = vec![];
        for line in DEFAULTS.lines() {
            if let Some(name) = line.strip_prefix('[') {
                section = format!("{}.", name.trim_end_matches(']'));
            } else if line.contains(" = ") && !line.starts_with('#') {
                settings.push(format!("{section}{line}"));
            }
        }
        let line = prop::sample::select(settings);
        let line = prop_oneof![3 => line.clone(), 3 => nearly(line), 1 => text()];
        prop::collection::vec(line, 0..5).prop_map(|lines| lines.join("\n"))
    }

    proptest! {
        #![proptest_config(cases())]

        #[test]
        fn fuzz_a_file_can_be_used_or_says_why_not(text in file()) {
            match Sources::of_file("a.toml".into(), text).and_then(|sources| sources.config()) {
                Err(error) => prop_assert!(error.to_string().starts_with("configuration: ")),
                Ok(config) => {
                    let limits = &config.limits;
                    prop_assert!(limits.line_bytes >= limits.event_bytes && limits.event_bytes > 0);
                    prop_assert!(limits.publishes == 0 || limits.publishes_burst > 0);
                    prop_assert!(!config.sse.heartbeat.is_zero());
                }
            }
        }

        #[test]
        fn fuzz_a_network_is_what_it_says(text in prop_oneof![text(), nearly("[0-9]{1,3}(\\.[0-9]{1,3}){3}(/[0-9]{1,2})?")]) {
            if let Ok(parsed) = networks(serde_json::json!([text])) {
                prop_assert_eq!(parsed.len(), 1);
                prop_assert!(text.parse::<IpAddr>().is_ok() || text.parse::<IpNet>().is_ok());
            }
        }
    }

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
            ("sse.heartbeat", "15", "expected a time such as"),
            ("sse.heartbeat", "0s", "expected a time such as"),
            ("nats.stream.prefix", "events", "must be tokens that end with a dot"),
            ("nats.stream.live_prefix", "events.live.", "would be a cycle"),
            ("nats.stream.name", "a.b", "is made of"),
            ("nats.strem.name", "a", "did you mean nats.stream.name?"),
            ("auth.cookie", "a=b", "no cookie's name"),
            ("auth.jwt.jwks_url", "id.example.com/jwks", "does not begin with https://"),
            ("auth.jwt.leeway", "1h", "more than"),
            ("address_header", "x-real-ip", "unknown variant"),
            ("limits.head_bytes", "200000", "no more than 131072 are ever read"),
            ("limits.target_bytes", "0", "must be at least 1"),
        ] {
            let error = Config::load(None, vec![(key, value.into())]).unwrap_err().to_string();
            assert!(error.contains(said), "{key} = {value}: {error}");
        }
    }

    #[test]
    fn a_rate_needs_a_burst() {
        let mut config = Config::load(None, vec![]).unwrap();
        config.limits.publishes_burst = 0;
        assert!(config.clone().check().unwrap_err().to_string().contains("lets nothing pass"));
        config.limits.publishes = 0;
        assert!(config.check().is_ok());
    }

    #[test]
    fn a_network_is_an_address_or_many() {
        let parse = |texts: &[&str]| networks(serde_json::to_value(texts).unwrap()).map_err(|error| error.to_string());
        let parsed = parse(&["10.0.0.0/8", "::1", "192.0.2.1"]).unwrap();
        assert_eq!(
            parsed.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.0.0.0/8", "::1/128", "192.0.2.1/32"]
        );
        assert!(parse(&["10.0.0.0/33"]).unwrap_err().contains("no address or network"));
        assert!(parse(&["example.com"]).unwrap_err().contains("no address or network"));
    }

    #[test]
    fn an_origin_is_what_browsers_send() {
        for good in ["*", "https://app.example.com", "http://localhost:5173", "http://[::1]:8080"] {
            assert!(is_origin(good), "{good}");
        }
        for bad in ["", "null", "app.example.com", "https://", "https://a/", "https://A", "https://*.a", "ftp://a"] {
            assert!(!is_origin(bad), "{bad}");
        }
    }
}

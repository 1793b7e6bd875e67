//! Where settings come from: defaults, file, environment and flags, in rising order of strength. Knows of each where it
//! stands, so that a mistake is told with its place; and which are secret, so that none is ever shown.

use std::{
    fmt, fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use figment::{
    Figment, Metadata, Profile, Provider,
    error::Kind,
    providers::{Env, Format, Serialized, Toml},
    value::{Dict, Map, Value},
};
use serde::Serialize;
use toml_edit::{ImDocument, ser::ValueSerializer};

use super::{Config, ConfigError, DEFAULTS, rule};

const PREFIX: &str = "TIDEGATE_";
static DEFAULT_SETTINGS: LazyLock<Dict> = LazyLock::new(|| Toml::from_str(DEFAULTS).expect("the defaults are tested"));
/// Names the file, and is no setting.
const FILE_VARIABLE: &str = "config";
const SECRET: &str = "auth.jwt.secret";
/// These may carry a password.
const NATS_URL: &str = "nats.url";
const JWKS_URL: &str = "auth.jwt.jwks_url";
/// A key itself may stand here by mistake, where its hash should.
const API_KEYS: &str = "auth.keys";
const HIDDEN: &str = "(hidden)";

/// Every source of settings, the strongest last.
pub struct Sources(Vec<Source>);

struct Source {
    origin: Origin,
    settings: Dict,
}

enum Origin {
    Defaults,
    File { name: String, document: Box<ImDocument<String>> },
    Environment,
    Flags,
}

impl Sources {
    /// Reads all of them. Flags are named by dotted keys, as everything is.
    ///
    /// # Errors
    /// On a file that can't be read or is no TOML, and on unknown keys.
    pub fn read(file: Option<PathBuf>, flags: Vec<(&str, String)>) -> Result<Sources, ConfigError> {
        let file = file.map(Source::file).transpose()?;
        Sources::layered(file.into_iter().chain([Source::environment(), Source::flags(flags)]))
    }

    /// Of the text of a file alone.
    #[cfg(test)]
    pub(super) fn of_file(name: String, text: String) -> Result<Sources, ConfigError> {
        Sources::layered([Source::parse(name, text)?])
    }

    fn layered(sources: impl IntoIterator<Item = Source>) -> Result<Sources, ConfigError> {
        let defaults = Source { origin: Origin::Defaults, settings: DEFAULT_SETTINGS.clone() };
        let known = keys(&defaults.settings);
        let mut layers = vec![defaults];
        for source in sources {
            source.check_keys(&known)?;
            layers.push(source);
        }
        Ok(Sources(layers))
    }

    /// The settings that are in force.
    ///
    /// # Errors
    /// On values of the wrong type or out of range.
    pub fn config(&self) -> Result<Config, ConfigError> {
        let merged = self.0.iter().fold(Figment::new(), |merged, source| merged.merge(source));
        let config: Config = merged.extract().map_err(|error| self.wrong_value(&error))?;
        config.check()
    }

    /// The settings that are in force, to serve with. A file is not left out by mistake where it is named, but what it
    /// says of `auth` may be: an empty file must not open what was closed.
    ///
    /// # Errors
    /// As [`Sources::config`], and when there is a file and authentication is not configured.
    pub fn config_to_serve(&self) -> Result<Config, ConfigError> {
        let config = self.config()?;
        match self.file() {
            Some(file) if config.auth.is_silent() => rule(format!(
                "{} does not configure authentication (auth): set auth.mode = \"local\" to admit every client on this machine, or \
                 \"open\" to admit every client",
                file.display()
            )),
            Some(_) | None => Ok(config),
        }
    }

    /// The file, if one was named.
    pub(super) fn file(&self) -> Option<&Path> {
        self.0.iter().find_map(|source| match &source.origin {
            Origin::File { name, .. } => Some(Path::new(name)),
            Origin::Defaults | Origin::Environment | Origin::Flags => None,
        })
    }

    /// Whether the file has secrets.
    pub(super) fn file_has_secrets(&self) -> bool {
        let of_file = self.0.iter().filter(|source| matches!(source.origin, Origin::File { .. }));
        let mut values = of_file.flat_map(|source| {
            [SECRET, NATS_URL, JWKS_URL].into_iter().filter_map(|key| Some((key, source.value(key)?)))
        });
        values.any(|(key, value)| hidden(key, value).is_some_and(|hidden| hidden != *value))
    }

    /// The settings that are other ones in `other`.
    pub fn differences(&self, other: &Sources) -> Vec<String> {
        let value = |sources: &Sources, key: &str| sources.source_of(key).value(key).cloned();
        keys(&self.0[0].settings).into_iter().filter(|key| value(self, key) != value(other, key)).collect()
    }

    fn wrong_value(&self, error: &figment::Error) -> ConfigError {
        let key = error.path.join(".");
        let may_be_secret = [SECRET, NATS_URL, JWKS_URL, API_KEYS].iter().any(|secret| is_within(&key, secret));
        let what = match &error.kind {
            Kind::InvalidType(..) | Kind::InvalidValue(..) if key == SECRET => "must be a text".into(),
            // What was found may be a secret.
            Kind::InvalidType(_, wanted) | Kind::InvalidValue(_, wanted) if may_be_secret => {
                format!("expected {wanted}")
            }
            kind => kind.to_string(),
        };
        let source = self.source_of(&key);
        ConfigError::Wrong { place: source.origin.place(&key), what: format!("{key}: {what}") }
    }

    /// The strongest source that says anything of a key, or of what is around it.
    fn source_of(&self, key: &str) -> &Source {
        let says = |source: &&Source| keys(&source.settings).iter().any(|own| is_within(key, own));
        self.0.iter().rev().find(says).unwrap_or(&self.0[0])
    }
}

/// What is in force, as a file of settings, with where each comes from that is not the default. Secrets are hidden.
impl fmt::Display for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for key in keys(&self.0[0].settings) {
            let source = self.source_of(&key);
            let value = source.value(&key).expect("the source says something of it");
            write!(f, "{key} = {}", shown(&key, value))?;
            match &source.origin {
                Origin::Defaults => writeln!(f)?,
                origin => writeln!(f, "  # {}", origin.place(&key))?,
            }
        }
        Ok(())
    }
}

impl Source {
    fn file(path: PathBuf) -> Result<Source, ConfigError> {
        let name = path.display().to_string();
        let text = fs::read_to_string(&path).map_err(|source| ConfigError::Unreadable { file: path, source })?;
        Source::parse(name, text)
    }

    fn parse(name: String, text: String) -> Result<Source, ConfigError> {
        let document = ImDocument::parse(text.clone()).map_err(|error| ConfigError::Wrong {
            place: at_line(&name, &text, error.span()),
            what: error.message().trim_end().replace('\n', ", "),
        })?;
        let settings = Toml::from_str(&text)
            .map_err(|error| ConfigError::Wrong { place: name.clone(), what: error.message().replace('\n', ", ") })?;
        Ok(Source { origin: Origin::File { name, document: Box::new(document) }, settings })
    }

    fn environment() -> Source {
        let variables = Env::prefixed(PREFIX).ignore(&[FILE_VARIABLE]);
        let setting = |(name, value): (_, String)| (format!("{name}").replace("__", "."), value);
        Source { origin: Origin::Environment, settings: nested(variables.iter().map(setting)) }
    }

    fn flags(flags: Vec<(&str, String)>) -> Source {
        let flags = flags.into_iter().map(|(key, value)| (key.to_owned(), value));
        Source { origin: Origin::Flags, settings: nested(flags) }
    }

    fn check_keys(&self, known: &[String]) -> Result<(), ConfigError> {
        let Some(unknown) = keys(&self.settings).into_iter().find(|key| !known.contains(key)) else { return Ok(()) };
        let nearest = self.origin.name(nearest(&unknown, known));
        let what = format!("there is no setting {}; did you mean {nearest}?", self.origin.name(&unknown));
        Err(ConfigError::Wrong { place: self.origin.place(&unknown), what })
    }

    fn value(&self, key: &str) -> Option<&Value> {
        let (parents, last) = key.rsplit_once('.').map_or((None, key), |(parents, last)| (Some(parents), last));
        let mut dict = &self.settings;
        for parent in parents.into_iter().flat_map(|parents| parents.split('.')) {
            dict = dict.get(parent)?.as_dict()?;
        }
        dict.get(last)
    }
}

impl Provider for Source {
    fn metadata(&self) -> Metadata {
        Metadata::default()
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.settings.clone()))
    }
}

impl Origin {
    /// Where a key stands, for people.
    fn place(&self, key: &str) -> String {
        match self {
            Origin::Defaults => "the defaults".into(),
            Origin::File { name, document } => at_line(name, document.raw(), span_of(document, key)),
            Origin::Environment => "the environment".into(),
            Origin::Flags => "the flags".into(),
        }
    }

    /// What a key is called there.
    fn name(&self, key: &str) -> String {
        match self {
            Origin::Defaults | Origin::File { .. } | Origin::Flags => key.to_owned(),
            Origin::Environment => format!("{PREFIX}{}", key.to_uppercase().replace('.', "__")),
        }
    }
}

/// Settings that came as text: each is read as a value if it is one, and else is the text that it is.
fn nested(settings: impl Iterator<Item = (String, String)>) -> Dict {
    let merged = settings.fold(Figment::new(), |merged, (key, text)| {
        // A secret of digits is no number.
        let value = if key == SECRET { Value::from(text) } else { text.parse().unwrap_or_else(|never| match never {}) };
        merged.merge(Serialized::default(&key, value))
    });
    merged.data().ok().and_then(|mut data| data.remove(&Profile::Default)).unwrap_or_default()
}

/// The dotted keys of everything that is no table.
fn keys(dict: &Dict) -> Vec<String> {
    let under = |(key, value): (&String, &Value)| match value.as_dict() {
        Some(dict) => keys(dict).into_iter().map(|rest| format!("{key}.{rest}")).collect(),
        None => vec![key.clone()],
    };
    dict.iter().flat_map(under).collect()
}

fn is_within(key: &str, own: &str) -> bool {
    key.strip_prefix(own).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The key that was meant, whether its section was named or not.
fn nearest<'a>(unknown: &str, known: &'a [String]) -> &'a str {
    let likeness = |key: &&String| {
        let last = key.rsplit('.').next().unwrap_or(key);
        strsim::jaro_winkler(unknown, key).max(strsim::jaro_winkler(unknown, last))
    };
    known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b))).expect("there are settings")
}

/// The place of a key in a file, or of the last of its parts that can be found there.
fn span_of(document: &ImDocument<String>, key: &str) -> Option<Range<usize>> {
    let mut item = document.as_item();
    let mut span = None;
    for part in key.split('.') {
        if let Some((key, inner)) = item.as_table_like().and_then(|table| table.get_key_value(part)) {
            (span, item) = (key.span().or(span), inner);
        } else if let Some(inner) = part.parse::<usize>().ok().and_then(|at| item.get(at)) {
            (span, item) = (inner.span().or(span), inner);
        }
    }
    span
}

fn at_line(name: &str, text: &str, span: Option<Range<usize>>) -> String {
    match span {
        Some(span) => format!("{name}:{}", text[..span.start].matches('\n').count() + 1),
        None => name.to_owned(),
    }
}

/// A value as it stands in a file, without what is secret in it.
fn shown(key: &str, value: &Value) -> String {
    let toml = hidden(key, value).as_ref().unwrap_or(value).serialize(ValueSerializer::new());
    toml.map_or_else(|error| format!("({error})"), |toml| toml.to_string())
}

/// What is shown in place of a value that may be secret.
fn hidden(key: &str, value: &Value) -> Option<Value> {
    match (key, value) {
        (SECRET, Value::String(_, text)) if text.is_empty() => None,
        (SECRET, _) => Some(HIDDEN.into()),
        (NATS_URL, Value::String(_, urls)) => Some(without_passwords(urls).into()),
        (JWKS_URL, Value::String(_, url)) => Some(without_query(&without_passwords(url)).into()),
        (API_KEYS, Value::Array(tag, keys)) => Some(Value::Array(*tag, keys.iter().map(without_keys).collect())),
        (NATS_URL | JWKS_URL | API_KEYS, _) => Some(HIDDEN.into()),
        _ => None,
    }
}

/// An entry of `auth.keys`, in which only hashes stand where hashes are, and no text looks like a key.
fn without_keys(entry: &Value) -> Value {
    let Value::Dict(tag, entry) = entry else { return HIDDEN.into() };
    let hide = |(name, value): (&String, &Value)| {
        let is_shown = match (&**name, value.as_str()) {
            ("name" | "subscribe" | "publish", Some(text)) => !text.contains("tgk_"),
            ("name" | "subscribe" | "publish", None) => !format!("{value:?}").contains("tgk_"),
            ("hash", Some(text)) => text.starts_with("sha256:"),
            _ => false,
        };
        (name.clone(), if is_shown { value.clone() } else { HIDDEN.into() })
    };
    Value::Dict(*tag, entry.iter().map(hide).collect())
}

/// A URL without its query and fragment, which may contain a secret.
fn without_query(url: &str) -> String {
    match url.find(['?', '#']) {
        Some(at) => format!("{}{HIDDEN}", &url[..=at]),
        None => url.to_owned(),
    }
}

/// URLs, separated by commas, with what stands between a scheme and a host reduced to the user's name. A name alone is a
/// token, and hidden, too.
fn without_passwords(urls: &str) -> String {
    let hide = |url: &str| {
        let Some((user, host)) = url.rsplit_once('@') else { return url.to_owned() };
        let (scheme, user) = user.split_once("://").unwrap_or(("", user));
        let name = user.split_once(':').map_or(String::new(), |(name, _)| format!("{name}:"));
        let scheme = if scheme.is_empty() { String::new() } else { format!("{scheme}://") };
        format!("{scheme}{name}(hidden)@{host}")
    };
    urls.split(',').map(hide).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_hidden_and_names_are_not() {
        for (url, shown) in [
            ("nats://one:4222", "nats://one:4222"),
            ("nats://gate:p@ss@one, tls://token@two", "nats://gate:(hidden)@one, tls://(hidden)@two"),
            ("gate:pass@one", "gate:(hidden)@one"),
        ] {
            assert_eq!(without_passwords(url), shown);
        }
    }

    #[test]
    fn what_may_be_a_key_is_hidden() {
        assert_eq!(without_query("https://id.example.com/jwks"), "https://id.example.com/jwks");
        assert_eq!(without_query("https://id.example.com/jwks?key=abc#d"), "https://id.example.com/jwks?(hidden)");
        let entry = Value::from(Dict::from([
            ("name".into(), "billing".into()),
            ("hash".into(), "tgk_abc".into()),
            ("publish".into(), vec!["a.>"].into()),
            ("subscribe".into(), vec!["tgk_abc"].into()),
            ("kay".into(), "abc".into()),
        ]));
        let shown = format!("{:?}", without_keys(&entry));
        assert!(shown.contains("billing") && shown.contains("a.>") && !shown.contains("abc"), "{shown}");
    }

    #[test]
    fn the_nearest_setting_is_found_with_and_without_its_section() {
        let known = keys(&DEFAULT_SETTINGS);
        for (meant, is) in [
            ("sse.hartbeat", "sse.heartbeat"),
            ("heartbeat", "sse.heartbeat"),
            ("nats", "nats.url"),
            ("nats.strem.name", "nats.stream.name"),
            ("limits.stream", "limits.streams"),
            ("admin-listen", "admin_listen"),
        ] {
            assert_eq!(nearest(meant, &known), is, "{meant}");
        }
    }
}

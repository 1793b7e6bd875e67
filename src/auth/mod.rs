//! Authentication and authorization. Knows nothing of HTTP: callers pass the credential of a request.
//!
//! A credential either authenticates the request or rejects it; an invalid credential is never treated as anonymous.
//! What a [`Principal`] may do is decided from filters alone, before anything is looked up: a refusal can't tell
//! whether what was asked for exists.

mod api_key;
mod jwks;
mod key;
pub mod local;
mod policy;
mod principal;
mod token;

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock, Weak},
};

use self::{api_key::ApiKeys, key::Key, token::Tokens};
pub use self::{
    api_key::NewKey,
    principal::Principal,
    token::{Grant, MintError, mint},
};
use crate::{
    config::{self, AuthMode},
    metrics::Metrics,
    shutdown::Tasks,
    subject::Filter,
};

/// The keys, policies and rights in force. Clones are replaced together.
#[derive(Clone)]
pub struct Auth(Arc<RwLock<Arc<Shared>>>);

struct Shared {
    openness: Openness,
    keys: ApiKeys,
    /// Where there are keys for them.
    tokens: Option<Tokens>,
    anonymous: Principal,
    cookie: String,
    query_token: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Openness {
    /// The clients that are admitted.
    Closed,
    /// To all clients on this machine.
    Local,
    /// To all clients.
    Open,
}

/// The keys, policies and rights in force at one moment, fetched keys included. Equal as long as nothing of it was
/// replaced.
#[derive(Clone)]
pub struct Version {
    rules: Weak<Shared>,
    published: Option<Weak<[Key]>>,
}

impl PartialEq for Version {
    fn eq(&self, other: &Version) -> bool {
        let same = match (&self.published, &other.published) {
            (None, None) => true,
            (Some(ours), Some(theirs)) => ours.ptr_eq(theirs),
            _ => false,
        };
        same && self.rules.ptr_eq(&other.rules)
    }
}

/// Why a gateway can't start with these settings, in words for the operator.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "authentication (auth) is not configured, so only local clients are admitted; but listen is {0}. Set auth \
         (docs/src/authentication.md), or auth.mode = \"open\" to give every client all rights"
    )]
    OpenToAll(SocketAddr),
    #[error(
        "authentication (auth) is not configured any more, and a reload does not open a gateway that required credentials: \
             set auth.mode = \"open\" or \"local\", or start it anew"
    )]
    WouldOpen,
    #[error("auth.keys: {0:?}: {1}")]
    ApiKey(String, &'static str),
    #[error("auth.policy: {0:?}: {1}")]
    Policy(String, String),
    #[error("{0}: {1}")]
    Key(&'static str, String),
    #[error("{key}: {} can't be read: {source}", .file.display())]
    Unreadable { key: &'static str, file: PathBuf, source: io::Error },
}

/// Why a credential was rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// What they brought is no good; why, in words for them.
    Invalid(String),
    /// The keys to tell are not at hand now.
    KeysAway,
}

impl Auth {
    /// Reads keys, and waits for the first answer of a JWKS URL, good or bad; from then on a task keeps it fresh.
    ///
    /// # Errors
    /// When a setting can't be used, or the gateway would be open to more than this machine without having been told so.
    pub async fn start(
        config: &config::Auth,
        listen: SocketAddr,
        metrics: Arc<Metrics>,
        tasks: &Tasks,
    ) -> Result<Auth, StartError> {
        let openness = match config.mode {
            AuthMode::Open => Openness::Open,
            AuthMode::Auto if config.is_configured() => Openness::Closed,
            AuthMode::Auto | AuthMode::Local if listen.ip().to_canonical().is_loopback() => Openness::Local,
            AuthMode::Auto | AuthMode::Local => return Err(StartError::OpenToAll(listen)),
        };
        let anonymous = match openness {
            Openness::Closed => Principal::anonymous(config.anonymous.clone()),
            Openness::Local | Openness::Open => Principal::anybody(),
        };
        let tokens = match config.jwt.is_configured() {
            true => Some(Tokens::start(config, metrics, tasks).await?),
            false => None,
        };
        Ok(Auth(Arc::new(RwLock::new(Arc::new(Shared {
            openness,
            keys: ApiKeys::read(&config.keys)?,
            tokens,
            anonymous,
            cookie: config.cookie.clone(),
            query_token: config.query_token,
        })))))
    }

    /// From now on says what `other` says, which was started with `config`. What is being looked at now goes by the old
    /// word, to its end.
    ///
    /// # Errors
    /// When that would open a gateway without saying so. It stays as it is.
    pub fn replace(&self, other: &Auth, config: &config::Auth) -> Result<(), StartError> {
        if !self.is_open() && other.is_open() && config.mode == AuthMode::Auto {
            return Err(StartError::WouldOpen);
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = other.now();
        Ok(())
    }

    fn now(&self) -> Arc<Shared> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is in force now.
    pub fn version(&self) -> Version {
        let auth = self.now();
        Version { rules: Arc::downgrade(&auth), published: auth.tokens.as_ref().and_then(Tokens::published) }
    }

    /// The principal of this credential.
    ///
    /// # Errors
    /// When the credential is invalid, or can't be checked now. Only a request without a credential is anonymous.
    pub async fn authenticate(&self, credential: Option<&str>) -> Result<Principal, Refusal> {
        let auth = self.now();
        match (credential, auth.openness) {
            (None, _) | (Some(_), Openness::Local | Openness::Open) => Ok(auth.anonymous.clone()),
            (Some(text), Openness::Closed) => {
                if ApiKeys::is_key(text) {
                    return auth.keys.find(text);
                }
                match &auth.tokens {
                    Some(tokens) => tokens.verify(text).await,
                    None => Err(Refusal::Invalid("no tokens are taken here".into())),
                }
            }
        }
    }

    /// Whether only this machine may be served; see [`local`].
    pub fn is_local_only(&self) -> bool {
        self.now().openness == Openness::Local
    }

    /// Whether every client may do everything.
    pub fn is_open(&self) -> bool {
        self.now().openness != Openness::Closed
    }

    /// The name of the cookie that carries tokens.
    pub fn cookie(&self) -> String {
        self.now().cookie.clone()
    }

    /// Whether `?token=` is taken.
    pub fn takes_query_token(&self) -> bool {
        self.now().query_token
    }

    /// One line for people that says which clients are admitted.
    pub fn describe(&self) -> String {
        let auth = self.now();
        match auth.openness {
            Openness::Local => "open, to this machine only (docs/src/authentication.md is the way on)".into(),
            Openness::Open => "open to every client (auth.mode = \"open\")".into(),
            Openness::Closed => {
                let tokens = if auth.tokens.is_some() { "tokens" } else { "no tokens" };
                let list = |filters: &[Filter]| match filters {
                    [] => "nothing".to_owned(),
                    some => some.iter().map(Filter::as_str).collect::<Vec<_>>().join(", "),
                };
                let config::Rights { subscribe, publish } = auth.anonymous.rights();
                let (keys, reads, publishes) = (auth.keys.len(), list(subscribe), list(publish));
                format!("{tokens}, {keys} API keys; everybody may read {reads} and publish to {publishes}")
            }
        }
    }
}

//! Which servers there are, and how they let this gateway in: the same for connections of async-nats, and for the line.

use std::{path::Path, sync::Arc, time::Duration};

use async_nats::{AuthError, Client, ConnectErrorKind, ConnectOptions, ServerAddr};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use nkeys::KeyPair;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use super::start::StartError;
use crate::config;

/// Every reply subject begins so; a user needs the permission to subscribe to no other inbox.
const INBOX: &str = "_INBOX_tidegate";
/// A server that does not answer two of these is given up for another: a frozen one is noticed within 15 seconds.
pub(super) const PING: Duration = Duration::from_secs(5);

pub(super) struct Entrance {
    pub servers: Vec<ServerAddr>,
    user: Option<(String, String)>,
    token: Option<String>,
    credentials: Option<Credentials>,
    /// How long a server may take to let somebody in.
    pub timeout: Duration,
    subscription_messages: usize,
    /// The servers without user and password.
    pub at: String,
}

/// Who a user is, and the key that proves it.
#[derive(Clone)]
struct Credentials {
    jwt: String,
    key: Arc<KeyPair>,
}

impl Entrance {
    pub fn parse(settings: &config::Nats) -> Result<Entrance, StartError> {
        let mut servers = vec![];
        let (mut user, mut token) = (None, None);
        for text in settings.url.split(',').map(str::trim) {
            let server: ServerAddr = text.parse().map_err(|_| StartError::Address(without_user(text)))?;
            if server.host().is_empty() || !matches!(server.scheme(), "nats" | "tls") {
                return Err(StartError::Address(without_user(text)));
            }
            let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
            match (server.username(), server.password()) {
                (Some(name), Some(password)) => user = user.or(Some((decoded(name), decoded(password)))),
                (Some(name), None) => token = token.or(Some(decoded(name))),
                (None, _) => {}
            }
            servers.push(server);
        }
        let at = servers.iter().map(|server| format!("{}:{}", server.host(), server.port())).collect::<Vec<_>>();
        let path = &settings.credentials;
        let credentials = (!path.as_os_str().is_empty()).then(|| Credentials::read(path)).transpose();
        Ok(Entrance {
            servers,
            user,
            token,
            credentials: credentials.map_err(|why| StartError::Credentials { path: path.clone(), why })?,
            timeout: settings.request_timeout,
            subscription_messages: settings.subscription_messages,
            at: at.join(","),
        })
    }

    /// Opens one connection, named for what it is used for, which then reconnects by itself for ever.
    pub async fn open(&self, purpose: &str, subscription_messages: Option<usize>) -> Result<Client, StartError> {
        let mut options = ConnectOptions::new()
            .name(name(purpose))
            .custom_inbox_prefix(INBOX)
            .connection_timeout(self.timeout)
            .ping_interval(PING)
            // A subject of ours is a valid one, and names and prefixes have been checked: once is enough.
            .skip_subject_validation(true)
            .subscription_capacity(subscription_messages.unwrap_or(self.subscription_messages));
        if let Some((user, password)) = &self.user {
            options = options.user_and_password(user.clone(), password.clone());
        }
        if let Some(token) = &self.token {
            options = options.token(token.clone());
        }
        if let Some(Credentials { jwt, key }) = self.credentials.clone() {
            options = options.jwt(jwt, move |nonce| std::future::ready(key.sign(&nonce).map_err(AuthError::new)));
        }
        options.connect(self.servers.as_slice()).await.map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
                StartError::Denied { at: self.at.clone() }
            }
            kind => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                StartError::Unreachable { at: self.at.clone(), why: cause.unwrap_or_else(|| kind.to_string()) }
            }
        })
    }

    /// How to introduce oneself to a server that gave this to be signed, on a connection that async-nats knows nothing
    /// of.
    pub fn introduction(&self, purpose: &str, nonce: &str) -> Value {
        let signature = |credentials: &Credentials| credentials.key.sign(nonce.as_bytes()).ok();
        json!({
            "name": name(purpose),
            "lang": "rust",
            "version": env!("CARGO_PKG_VERSION"),
            "verbose": false,
            "pedantic": false,
            // Tells of the cluster's servers while it lasts.
            "protocol": 1,
            "headers": true,
            "user": self.user.as_ref().map(|(user, _)| user),
            "pass": self.user.as_ref().map(|(_, password)| password),
            "auth_token": self.token,
            "jwt": self.credentials.as_ref().map(|credentials| &credentials.jwt),
            "sig": self.credentials.as_ref().and_then(signature).map(|bytes| URL_SAFE_NO_PAD.encode(bytes)),
        })
    }
}

impl Credentials {
    fn read(path: &Path) -> Result<Credentials, String> {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        Credentials::parse(&text).ok_or_else(|| "it has no JWT and seed of a user".to_owned())
    }

    /// Each of the two stands after a line of its own.
    fn parse(text: &str) -> Option<Credentials> {
        let mut lines = text.lines().map(str::trim);
        let mut next = || {
            lines.find(|line| line.starts_with("---") && line.contains("BEGIN"))?;
            lines.next()
        };
        let (jwt, seed) = (next()?, next()?);
        Some(Credentials { jwt: jwt.to_owned(), key: Arc::new(KeyPair::from_seed(seed).ok()?) })
    }
}

fn name(purpose: &str) -> String {
    format!("tidegate {purpose}")
}

/// An address for people, whatever is wrong with it: without what stands before the last `@`.
fn without_user(address: &str) -> String {
    address.rsplit_once('@').map_or(address, |(_, rest)| rest).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entrance(url: &str) -> Result<Entrance, StartError> {
        let settings = config::Config::load(None, vec![("nats.url", url.into())]).unwrap().nats;
        Entrance::parse(&settings)
    }

    #[test]
    fn passwords_are_used_and_never_shown() {
        let entrance = entrance("nats://gate%40way:p%3As%2Fs@one:4222, tls://two").unwrap();
        assert_eq!(entrance.user, Some(("gate@way".into(), "p:s/s".into())));
        assert_eq!(entrance.at, "one:4222,two:4222");
    }

    #[test]
    fn what_is_no_address_is_named_without_its_password() {
        for url in
            ["nats://user:secret@", "http://user:secret@host", "nats://user:secret@host:99999", "user:secret@ho st"]
        {
            let error = entrance(url).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("is no address") && !error.contains("secret"), "{url}: {error}");
        }
    }
}

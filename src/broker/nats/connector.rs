//! The servers of the settings, and how they let this gateway in: the same for connections of async-nats, and for those
//! of [`crate::nats`].

use std::time::Duration;

use async_nats::{AuthError, Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use percent_encoding::percent_decode_str;
use tokio::sync::mpsc;

use super::provision::StartError;
use crate::{
    config,
    nats::{self, Credentials, ServerAddress},
};

/// A server that leaves three of these unanswered is given up for another: a frozen one is noticed within five seconds.
const PING: Duration = Duration::from_millis(1500);
/// Every reply subject begins so; a user needs the permission to subscribe to no other inbox.
pub(super) const INBOX: &str = "_INBOX_tidegate";

pub(super) struct Connector {
    servers: Vec<ServerAddr>,
    user: Option<(String, String)>,
    token: Option<String>,
    credentials: Option<Credentials>,
    /// How long a server may take to let a connection in.
    pub timeout: Duration,
    subscription_messages: usize,
    /// The servers without user and password.
    pub at: String,
}

impl Connector {
    pub fn parse(settings: &config::Nats) -> Result<Connector, StartError> {
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
        Ok(Connector {
            servers,
            user,
            token,
            credentials: credentials.map_err(|why| StartError::Credentials { path: path.clone(), why })?,
            timeout: settings.request_timeout,
            subscription_messages: settings.subscription_messages,
            at: at.join(","),
        })
    }

    /// Opens a connection of async-nats, named for what it is used for, which then reconnects by itself. What happens to
    /// it is sent to `events`, as long as there is room.
    pub async fn open(&self, purpose: &str, events: mpsc::Sender<Event>) -> Result<Client, StartError> {
        let mut options = ConnectOptions::new()
            .name(name(purpose))
            .custom_inbox_prefix(INBOX)
            .connection_timeout(self.timeout)
            .ping_interval(PING)
            // A subject of ours is a valid one, and names and prefixes have been checked: once is enough.
            .skip_subject_validation(true)
            .subscription_capacity(self.subscription_messages)
            .event_callback(move |event| {
                // Where there is no room, a check of the connection is due anyway.
                let _ = events.try_send(event);
                std::future::ready(())
            });
        if let Some((user, password)) = &self.user {
            options = options.user_and_password(user.clone(), password.clone());
        }
        if let Some(token) = &self.token {
            options = options.token(token.clone());
        }
        if let Some(credentials) = self.credentials.clone() {
            options = options.jwt(credentials.jwt.clone(), move |nonce| {
                std::future::ready(credentials.sign(&nonce).ok_or_else(|| AuthError::new("the key can't sign")))
            });
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

    /// The same for connections of our own client.
    pub fn options(&self, purpose: &str) -> nats::ConnectOptions {
        let address = |server: &ServerAddr| ServerAddress {
            host: server.host().trim_matches(['[', ']']).to_owned(),
            port: server.port(),
            tls: server.tls_required(),
        };
        nats::ConnectOptions {
            servers: self.servers.iter().map(address).collect(),
            name: name(purpose),
            user: self.user.clone(),
            token: self.token.clone(),
            credentials: self.credentials.clone(),
            timeout: self.timeout,
        }
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

    fn connector(url: &str) -> Result<Connector, StartError> {
        let settings = config::Config::load(None, vec![("nats.url", url.into())]).unwrap().nats;
        Connector::parse(&settings)
    }

    #[test]
    fn passwords_are_used_and_never_shown() {
        let connector = connector("nats://gate%40way:p%3As%2Fs@one:4222, tls://two, nats://[::1]:4223").unwrap();
        assert_eq!(connector.user, Some(("gate@way".into(), "p:s/s".into())));
        assert_eq!(connector.at, "one:4222,two:4222,::1:4223");
        let servers = connector.options("test").servers;
        assert_eq!((&*servers[1].host, servers[1].tls, &*servers[2].host), ("two", true, "::1"));
    }

    #[test]
    fn what_is_no_address_is_named_without_its_password() {
        for url in
            ["nats://user:secret@", "http://user:secret@host", "nats://user:secret@host:99999", "user:secret@ho st"]
        {
            let error = connector(url).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("is no address") && !error.contains("secret"), "{url}: {error}");
        }
    }
}

//! The way to a stream that keeps our promises, or one line that says what is in the way and how to clear it.

use std::{path::PathBuf, time::Duration};

use async_nats::Client;
use serde_json::json;

use super::{
    api::{Api, RequestError, code},
    connector::Connector,
    leader::{self, Info},
    requirements::{self, Mismatch, Requirements},
};
use crate::config;

/// The oldest server that has all that is used here: batches, last messages of many subjects, a time to live.
pub const OLDEST: (u64, u64) = (2, 11);
/// The headers that a message may have besides its payload.
pub const HEADER_BYTES: usize = 4096;

/// Why the gateway can't begin.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("nats.url: {0:?} is no address of a NATS server: write nats://host:4222")]
    Address(String),
    #[error("nats.credentials: {} can't be used ({why}): name a file made by nsc or nats", .path.display())]
    Credentials { path: PathBuf, why: String },
    #[error("NATS at {at} can't be reached ({why}): start it, or mend nats.url")]
    Unreachable { at: String, why: String },
    #[error("NATS at {at} refused the user: mend user:password@ in nats.url, or nats.credentials")]
    Denied { at: String },
    #[error(
        "NATS at {at} is {version}, but {}.{} or later is needed: update nats-server", OLDEST.0, OLDEST.1
    )]
    TooOld { at: String, version: String },
    #[error("NATS at {at} takes {found} bytes a message, but limits.event_bytes needs {wanted}: raise its max_payload")]
    Payload { at: String, found: usize, wanted: usize },
    #[error("NATS at {at} has no JetStream (for this user's account): start it with `-js`, or enable it there")]
    NoJetStream { at: String },
    #[error(
        "there is no stream {stream}: make it (nats stream add --config nats/stream.json), or set nats.stream.manage"
    )]
    NoStream { stream: String },
    #[error("the stream {stream} does not fit: {mismatch}; {mend}")]
    Mismatch { stream: String, mismatch: Box<Mismatch>, mend: &'static str },
    #[error("the stream {stream} could not be {attempt}: {why}; {mend}")]
    Refused { stream: String, attempt: &'static str, why: String, mend: &'static str },
    #[error(
        "JetStream did not answer on {subject} ({why}): give the user that permission (nats/nats-server.conf has all)"
    )]
    Silent { subject: String, why: String },
}

const BY_HAND: &str = "nothing was changed: change it (nats stream edit), or name another stream in nats.stream.name";

const OTHER_SUBJECTS: &str = "another stream has these subjects: name it in nats.stream.name if it is the one, or use \
                              another nats.stream.prefix";
/// How long a list of streams is waited for. A user without the permission gets no answer.
const NAMES_WITHIN: Duration = Duration::from_secs(1);

/// What is missing before a stream can be used.
pub(super) enum Plan {
    Nothing(Box<Info>),
    Making,
    /// To this configuration; a mismatch that is mended by it.
    Mending {
        mismatch: Box<Mismatch>,
        config: serde_json::Value,
    },
}

impl Connector {
    /// Whether the server can do what is needed of it.
    pub fn check_server(&self, client: &Client, event_bytes: usize) -> Result<(), StartError> {
        let server = client.server_info();
        let at = self.at.clone();
        if version(&server.version).is_none_or(|version| version < OLDEST) {
            return Err(StartError::TooOld { at, version: server.version });
        }
        let wanted = event_bytes.saturating_add(HEADER_BYTES);
        if server.max_payload < wanted {
            return Err(StartError::Payload { at, found: server.max_payload, wanted });
        }
        Ok(())
    }

    /// The stream, made or mended if that is wanted and needed.
    pub async fn stream(
        &self,
        api: &Api,
        settings: &config::NatsStream,
        event_bytes: usize,
    ) -> Result<Info, StartError> {
        // Made by another gateway meanwhile, it may have to be mended.
        for _ in 0..2 {
            match self.plan(api, settings, event_bytes).await? {
                Plan::Nothing(info) => return Ok(*info),
                Plan::Making => self.change(api, settings, "made", requirements::definition(settings)).await?,
                Plan::Mending { config, .. } => self.change(api, settings, "mended", config).await?,
            }
        }
        let stream = settings.name.clone();
        match self.plan(api, settings, event_bytes).await? {
            Plan::Nothing(info) => Ok(*info),
            Plan::Making => Err(StartError::NoStream { stream }),
            Plan::Mending { mismatch, .. } => Err(StartError::Mismatch { stream, mismatch, mend: BY_HAND }),
        }
    }

    /// What has to be done before the stream can be used. Changes nothing.
    pub async fn plan(&self, api: &Api, settings: &config::NatsStream, event_bytes: usize) -> Result<Plan, StartError> {
        let name = &settings.name;
        let info = match leader::info_of(api, name).await {
            Ok(info) => info,
            Err(RequestError::Refused(refusal)) if refusal.err_code == code::STREAM_NOT_FOUND => {
                return if settings.manage {
                    Ok(Plan::Making)
                } else {
                    Err(StartError::NoStream { stream: name.clone() })
                };
            }
            Err(error) => return Err(self.unanswered(error, format!("$JS.API.STREAM.INFO.{name}"))),
        };
        let mismatches = Requirements::new(settings.clone(), event_bytes).mismatches(&info.config);
        let Some(first) = mismatches.first() else { return Ok(Plan::Nothing(Box::new(info))) };
        let mismatch =
            |mismatch, mend| StartError::Mismatch { stream: name.clone(), mismatch: Box::new(mismatch), mend };
        if !settings.manage {
            return Err(mismatch(first.clone(), "change it (nats stream edit), or set nats.stream.manage"));
        }
        let config = requirements::mended(info.config, &mismatches).map_err(|found| mismatch(found, BY_HAND))?;
        Ok(Plan::Mending { mismatch: Box::new(first.clone()), config })
    }

    /// Refuses to plan a stream whose subjects another one has: the server would not make it. Changes nothing. Where the
    /// user may not ask, nothing is said.
    pub async fn check_subjects(&self, api: &Api, settings: &config::NatsStream) -> Result<(), StartError> {
        let query = json!({ "subject": format!("{}>", settings.prefix) });
        let Ok(answer) = api.ask_within(NAMES_WITHIN, "$JS.API.STREAM.NAMES", &query).await else { return Ok(()) };
        match answer["streams"].as_array().and_then(|names| names.first()) {
            None => Ok(()),
            Some(other) => Err(StartError::Refused {
                stream: settings.name.clone(),
                attempt: "made",
                why: format!("subjects overlap with the existing stream {other}"),
                mend: OTHER_SUBJECTS,
            }),
        }
    }

    /// Makes or updates the stream.
    async fn change(
        &self,
        api: &Api,
        settings: &config::NatsStream,
        attempt: &'static str,
        config: serde_json::Value,
    ) -> Result<(), StartError> {
        let name = &settings.name;
        let verb = if attempt == "made" { "CREATE" } else { "UPDATE" };
        let subject = format!("$JS.API.STREAM.{verb}.{name}");
        match api.ask(&subject, &json!(config)).await {
            Ok(_) => tracing::info!(stream = %name, "the stream was {attempt}"),
            // Another gateway was faster; what it made is looked at next.
            Err(RequestError::Refused(refusal)) if refusal.err_code == code::STREAM_NAME_IN_USE => {}
            Err(RequestError::Refused(refusal)) => {
                let mend = match refusal.err_code {
                    code::INSUFFICIENT_STORAGE => {
                        "it reserves its max_bytes: give JetStream more storage (max_file_store), or make the stream \
                         yourself, smaller (nats stream add --config nats/stream.json --max-bytes 100MB)"
                    }
                    code::SUBJECTS_OVERLAP => OTHER_SUBJECTS,
                    _ => "make or change it yourself (nats/stream.json has what is needed)",
                };
                return Err(StartError::Refused { stream: name.clone(), attempt, why: refusal.description, mend });
            }
            Err(error) => return Err(self.unanswered(error, subject)),
        }
        Ok(())
    }

    fn unanswered(&self, error: RequestError, subject: String) -> StartError {
        match error {
            RequestError::NoResponders => StartError::NoJetStream { at: self.at.clone() },
            RequestError::Refused(refusal)
                if [code::NOT_ENABLED, code::NOT_ENABLED_FOR_ACCOUNT].contains(&refusal.err_code) =>
            {
                StartError::NoJetStream { at: self.at.clone() }
            }
            RequestError::NotConnected => {
                StartError::Unreachable { at: self.at.clone(), why: "the connection broke".into() }
            }
            other => StartError::Silent { subject, why: other.to_string() },
        }
    }
}

/// The first two numbers of a version such as `2.11.0-RC.1`.
fn version(text: &str) -> Option<(u64, u64)> {
    let mut numbers = text.trim_start_matches('v').split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        for (text, fits) in
            [("2.9.25", false), ("2.10.26", false), ("2.11.0-RC.1", true), ("3.0.0", true), ("x", false)]
        {
            assert_eq!(version(text).is_some_and(|version| version >= OLDEST), fits, "{text}");
        }
    }
}

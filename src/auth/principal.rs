//! An authenticated sender and its rights.

use std::sync::Arc;

use jiff::Timestamp;

use crate::{
    config::Rights,
    subject::{Filter, Subject},
};

/// The sender of a request. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Principal {
    kind: Kind,
    rights: Arc<Rights>,
    expires: Option<Timestamp>,
}

#[derive(Clone, Debug)]
enum Kind {
    Anonymous,
    ApiKey(Arc<str>),
    /// The bearer of a token, by `sub:` and its `sub`, or else `token:` and its hash.
    Bearer(Arc<str>),
}

impl Principal {
    pub(super) fn anonymous(rights: Rights) -> Principal {
        Principal { kind: Kind::Anonymous, rights: Arc::new(rights), expires: None }
    }

    /// The principal of every request to an open gateway, with all rights.
    pub(super) fn anybody() -> Principal {
        let everything = || vec![Filter::parse(">").expect("a filter")];
        Principal::anonymous(Rights { subscribe: everything(), publish: everything() })
    }

    pub(super) fn of_key(name: &Arc<str>, rights: &Arc<Rights>) -> Principal {
        let (kind, rights) = (Kind::ApiKey(name.clone()), rights.clone());
        Principal { kind, rights, expires: None }
    }

    pub(super) fn of_token(name: &str, rights: Rights, expires: Timestamp) -> Principal {
        let (kind, rights) = (Kind::Bearer(name.into()), Arc::new(rights));
        Principal { kind, rights, expires: Some(expires) }
    }

    /// Whether every event that `filter` matches may be read: one of the allowed filters covers all of it.
    pub fn may_subscribe(&self, filter: &Filter) -> bool {
        self.rights.subscribe.iter().any(|allowed| allowed.covers(filter))
    }

    pub fn may_publish(&self, subject: &Subject) -> bool {
        self.rights.publish.iter().any(|allowed| allowed.matches(subject))
    }

    pub fn may_publish_anything(&self) -> bool {
        !self.rights.publish.is_empty()
    }

    pub fn is_anonymous(&self) -> bool {
        matches!(self.kind, Kind::Anonymous)
    }

    /// Tells principals apart: `key:` and the key's name, `sub:` and the token's `sub`, `token:` and the hash of a token
    /// without one, or "" for everybody else. Partly written by others: for limits and logs, not for headers or metrics.
    pub fn name(&self) -> String {
        match &self.kind {
            Kind::Anonymous => String::new(),
            Kind::ApiKey(name) => format!("key:{name}"),
            Kind::Bearer(name) => name.to_string(),
        }
    }

    /// When the right to be here ends.
    pub fn expires(&self) -> Option<Timestamp> {
        self.expires
    }

    pub fn has_expired(&self) -> bool {
        self.expires.is_some_and(|at| at <= Timestamp::now())
    }

    pub(super) fn rights(&self) -> &Rights {
        &self.rights
    }
}

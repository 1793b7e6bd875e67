//! Somebody who has been let in, and what they may do.

use std::sync::Arc;

use jiff::Timestamp;

use crate::{
    config::Rights,
    subject::{Filter, Subject},
};

/// Somebody. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Principal {
    who: Who,
    rights: Arc<Rights>,
    expires: Option<Timestamp>,
}

#[derive(Clone, Debug)]
enum Who {
    Anonymous,
    ApiKey(Arc<str>),
    /// The bearer of a token, by `sub:` and its `sub`, or else `token:` and its hash.
    Bearer(Arc<str>),
}

impl Principal {
    pub(super) fn anonymous(rights: Rights) -> Principal {
        Principal { who: Who::Anonymous, rights: Arc::new(rights), expires: None }
    }

    /// Somebody on an open gateway, who may do everything.
    pub(super) fn anybody() -> Principal {
        let everything = || vec![Filter::parse(">").expect("a filter")];
        Principal::anonymous(Rights { subscribe: everything(), publish: everything() })
    }

    pub(super) fn of_key(name: &Arc<str>, rights: &Arc<Rights>) -> Principal {
        let (who, rights) = (Who::ApiKey(name.clone()), rights.clone());
        Principal { who, rights, expires: None }
    }

    pub(super) fn of_token(name: &str, rights: Rights, expires: Timestamp) -> Principal {
        let (who, rights) = (Who::Bearer(name.into()), Arc::new(rights));
        Principal { who, rights, expires: Some(expires) }
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
        matches!(self.who, Who::Anonymous)
    }

    /// Tells principals apart: `key:` and the key's name, `sub:` and the token's `sub`, `token:` and the hash of a token
    /// without one, or "" for everybody else. Partly written by others: for limits and logs, not for headers or metrics.
    pub fn name(&self) -> String {
        match &self.who {
            Who::Anonymous => String::new(),
            Who::ApiKey(name) => format!("key:{name}"),
            Who::Bearer(name) => name.to_string(),
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

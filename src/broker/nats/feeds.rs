//! Which feeds a live message is for.
//!
//! A feed has a subscription of its own, so that the server sends nothing that is not read. But the server sends an event
//! once for each subscription that matches it, and closes a connection on which 64 MB wait (its `max_pending`): some
//! dozens of overlapping wildcards would take the live connection from all feeds. So at most [`OVERLAPS_MAX`] feeds have
//! subscriptions of their own that match one subject. More of them share one that covers all of these: a wider one, of
//! whose messages each feed gets those that it asks for.

use std::{collections::HashMap, sync::Arc};

use crate::{
    broker::{Hint, mailbox::Mailbox},
    nats::Subscription,
    subject::Filter,
};

/// Feeds with wildcards that may each get a copy of one event.
pub(super) const OVERLAPS_MAX: usize = 8;

/// The feeds, by the number of the subscription that they have, or share.
#[derive(Default)]
pub(super) struct Feeds {
    by_subscription: HashMap<u64, Listeners>,
    /// The subscriptions with wildcards.
    wide: Vec<(u64, Filter)>,
}

/// Most are one, and there are thousands.
enum Listeners {
    One(Feed),
    Shared(Box<Shared>),
}

pub(super) struct Feed {
    pub filter: Filter,
    pub mailbox: Arc<Mailbox>,
}

struct Shared {
    filter: Filter,
    feeds: Vec<Feed>,
    /// Ends with the last of them.
    _subscription: Subscription,
}

/// How a new feed is to get its messages.
pub(super) enum Way {
    /// By a subscription of its own.
    Own,
    /// By this one, which others have already.
    Joined(u64),
    /// By a new one that others may share, on this filter.
    Wider(Filter),
}

impl Feeds {
    pub fn way_for(&self, filter: &Filter) -> Way {
        if filter.exact().is_some() {
            return Way::Own;
        }
        // A subject that all of these match, and what covers all of them.
        let (mut common, mut wider, mut count) = (filter.clone(), filter.clone(), 0);
        for (_, other) in &self.wide {
            if let Some(narrower) = common.intersection(other) {
                (common, wider, count) = (narrower, wider.union(other), count + 1);
            }
        }
        if count < OVERLAPS_MAX {
            return Way::Own;
        }
        let is_shared = |sid: &u64| matches!(self.by_subscription.get(sid), Some(Listeners::Shared(_)));
        match self.wide.iter().find(|(sid, other)| other.covers(filter) && is_shared(sid)) {
            Some((sid, _)) => Way::Joined(*sid),
            None => Way::Wider(wider),
        }
    }

    /// A feed with a subscription of its own.
    pub fn insert(&mut self, sid: u64, feed: Feed) {
        self.note(sid, &feed.filter);
        self.by_subscription.insert(sid, Listeners::One(feed));
    }

    /// The first feed of a subscription that others may share.
    pub fn share(&mut self, filter: Filter, feed: Feed, subscription: Subscription) {
        let sid = subscription.sid();
        self.note(sid, &filter);
        let shared = Shared { filter, feeds: vec![feed], _subscription: subscription };
        self.by_subscription.insert(sid, Listeners::Shared(Box::new(shared)));
    }

    /// One more feed of a subscription that is shared.
    pub fn join(&mut self, sid: u64, feed: Feed) {
        if let Some(Listeners::Shared(shared)) = self.by_subscription.get_mut(&sid) {
            shared.feeds.push(feed);
        }
    }

    fn note(&mut self, sid: u64, filter: &Filter) {
        if filter.exact().is_none() {
            self.wide.push((sid, filter.clone()));
        }
    }

    /// Takes out a feed, and returns a subscription that is not shared any more.
    pub fn remove(&mut self, sid: u64, mailbox: &Arc<Mailbox>) -> Option<impl Sized + use<>> {
        if let Some(Listeners::Shared(shared)) = self.by_subscription.get_mut(&sid) {
            shared.feeds.retain(|feed| !Arc::ptr_eq(&feed.mailbox, mailbox));
            if !shared.feeds.is_empty() {
                return None;
            }
        }
        self.wide.retain(|(wide, _)| *wide != sid);
        self.by_subscription.remove(&sid)
    }

    /// The filter of a subscription.
    pub fn filter(&self, sid: u64) -> Option<&Filter> {
        self.by_subscription.get(&sid).map(|listeners| match listeners {
            Listeners::One(feed) => &feed.filter,
            Listeners::Shared(shared) => &shared.filter,
        })
    }

    /// Hands a hint that came by a subscription to the feeds that it is for.
    pub fn hand_over(&self, sid: u64, hint: Hint) {
        match self.by_subscription.get(&sid) {
            Some(Listeners::One(feed)) => feed.mailbox.put(hint),
            Some(Listeners::Shared(shared)) => shared.feeds.iter().for_each(|feed| match &hint {
                Hint::Stored { event, .. } if !feed.filter.matches(&event.subject) => {}
                Hint::Stored { .. } | Hint::Lost => feed.mailbox.put(hint.clone()),
            }),
            None => {}
        }
    }

    /// Tells every feed that hints were lost.
    pub fn lose(&self) {
        for sid in self.by_subscription.keys() {
            self.hand_over(*sid, Hint::Lost);
        }
    }
}

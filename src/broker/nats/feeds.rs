//! Which feeds a live message is for.
//!
//! A feed has a subscription of its own, so that the server sends nothing that is not read. But the server sends an event
//! once for each subscription that matches it, and closes a connection on which 64 MB wait (its `max_pending`): some
//! dozens of overlapping wildcards would take the live connection from all feeds. So at most [`OVERLAPS_MAX`] feeds have
//! subscriptions of their own that match one subject. More of them share one that covers all of these: a wider one, of
//! whose messages each feed gets those that it asks for.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::Arc,
};

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
    wide: Wide,
}

/// The subscriptions with wildcards, by the tokens before the first wildcard: those of filters that overlap are equal, or one
/// begins with the other.
#[derive(Default)]
struct Wide(BTreeMap<String, Vec<(u64, Filter)>>);

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
        for (_, other) in self.wide.near(filter) {
            if let Some(narrower) = common.intersection(other) {
                (common, wider, count) = (narrower, wider.union(other), count + 1);
            }
        }
        if count < OVERLAPS_MAX {
            return Way::Own;
        }
        let is_shared = |sid: &u64| matches!(self.by_subscription.get(sid), Some(Listeners::Shared(_)));
        match self.wide.near(filter).find(|(sid, other)| other.covers(filter) && is_shared(sid)) {
            Some((sid, _)) => Way::Joined(*sid),
            None => Way::Wider(wider),
        }
    }

    /// A feed with a subscription of its own.
    pub fn insert(&mut self, sid: u64, feed: Feed) {
        self.wide.insert(sid, &feed.filter);
        self.by_subscription.insert(sid, Listeners::One(feed));
    }

    /// The first feed of a subscription that others may share.
    pub fn share(&mut self, filter: Filter, feed: Feed, subscription: Subscription) {
        let sid = subscription.sid();
        self.wide.insert(sid, &filter);
        let shared = Shared { filter, feeds: vec![feed], _subscription: subscription };
        self.by_subscription.insert(sid, Listeners::Shared(Box::new(shared)));
    }

    /// One more feed of a subscription that is shared.
    pub fn join(&mut self, sid: u64, feed: Feed) {
        if let Some(Listeners::Shared(shared)) = self.by_subscription.get_mut(&sid) {
            shared.feeds.push(feed);
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
        let removed = self.by_subscription.remove(&sid)?;
        self.wide.remove(sid, removed.filter());
        Some(removed)
    }

    /// The filter of a subscription.
    pub fn filter(&self, sid: u64) -> Option<&Filter> {
        self.by_subscription.get(&sid).map(Listeners::filter)
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

impl Listeners {
    fn filter(&self) -> &Filter {
        match self {
            Listeners::One(feed) => &feed.filter,
            Listeners::Shared(shared) => &shared.filter,
        }
    }
}

impl Wide {
    fn insert(&mut self, sid: u64, filter: &Filter) {
        if filter.exact().is_none() {
            self.0.entry(literal(filter).to_owned()).or_default().push((sid, filter.clone()));
        }
    }

    fn remove(&mut self, sid: u64, filter: &Filter) {
        if let Some(these) = self.0.get_mut(literal(filter)) {
            these.retain(|(other, _)| *other != sid);
            if these.is_empty() {
                self.0.remove(literal(filter));
            }
        }
    }

    /// Those that may overlap a filter, and few that do not.
    fn near(&self, filter: &Filter) -> impl Iterator<Item = &(u64, Filter)> {
        let literal = literal(filter);
        let ends = std::iter::once(0).chain(literal.match_indices('.').map(|(at, _)| at));
        let shorter = ends.filter(|end| *end < literal.len()).filter_map(|end| self.0.get(&literal[..end]));
        let longer = match literal {
            "" => self.0.range::<str, _>(..),
            // The next character after the dot is none of a subject's.
            _ => self
                .0
                .range::<str, _>((Bound::Excluded(&*format!("{literal}.")), Bound::Excluded(&*format!("{literal}/")))),
        };
        let equal = (!literal.is_empty()).then(|| self.0.get(literal)).flatten();
        shorter.chain(equal).chain(longer.map(|(_, these)| these)).flatten()
    }
}

/// The tokens of a filter before its first wildcard.
fn literal(filter: &Filter) -> &str {
    let text = filter.as_str();
    text.find(['*', '>']).map_or(text, |at| text[..at].trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::Memory;

    fn feeds(filters: &[Filter]) -> Feeds {
        let mut feeds = Feeds::default();
        for (sid, filter) in filters.iter().enumerate() {
            let mailbox = Arc::new(Mailbox::new(1, &Memory::new(0)));
            feeds.insert(sid as u64, Feed { filter: filter.clone(), mailbox });
        }
        feeds
    }

    fn filter() -> impl Strategy<Value = Filter> {
        let token = prop::sample::select(&["a", "b", "a-", "*"][..]);
        (prop::collection::vec(token, 1..5), any::<bool>()).prop_map(|(mut tokens, tail)| {
            if tail {
                tokens.push(">");
            }
            Filter::parse(&tokens.join(".")).unwrap()
        })
    }

    proptest! {
        #[test]
        fn no_filter_with_wildcards_that_overlaps_is_passed_over(filters in prop::collection::vec(filter(), 0..30), one in filter()) {
            let mut feeds = feeds(&filters);
            let near: Vec<u64> = feeds.wide.near(&one).map(|(sid, _)| *sid).collect();
            for (sid, other) in (0..).zip(&filters) {
                let is_near = near.iter().filter(|near| **near == sid).count();
                prop_assert!(is_near <= 1);
                prop_assert!(is_near == 1 || other.exact().is_some() || !other.overlaps(&one), "{} {}", one, other);
            }
            for (sid, other) in (0..).zip(&filters) {
                feeds.wide.remove(sid, other);
            }
            prop_assert!(feeds.wide.0.is_empty());
        }
    }

    #[test]
    fn wildcards_that_overlap_share_from_the_ninth_on_and_others_never() {
        let parse = |text: &str| Filter::parse(text).unwrap();
        let of_users: Vec<_> = (0..1000).map(|user| parse(&format!("users.{user}.*"))).collect();
        let all = feeds(&of_users);
        assert!(matches!(all.way_for(&parse("users.1000.*")), Way::Own));
        // It overlaps all of them, and each subject is matched by two.
        assert!(matches!(all.way_for(&parse("users.>")), Way::Own));
        assert!(matches!(all.way_for(&parse("users.7.a")), Way::Own));
        assert_eq!(all.wide.near(&parse("users.7.>")).count(), 1);

        let stars = ["*.b.c.d", "a.*.c.d", "a.b.*.d", "a.b.c.*", "*.*.c.d", "*.b.*.d", "*.b.c.*", "a.*.*.d"].map(parse);
        let eight = feeds(&stars);
        assert!(matches!(feeds(&stars[..7]).way_for(&parse("a.*.c.*")), Way::Own));
        assert!(matches!(eight.way_for(&parse("a.*.c.*")), Way::Wider(wider) if wider.as_str() == "*.*.*.*"));
        assert!(matches!(eight.way_for(&parse("x.y.z.*")), Way::Own));
    }
}

//! How much one address or principal may ask for: rates, and streams that are open at the same time.
//!
//! Knows nothing of requests and answers. What a node as a whole can bear is limited where it is borne (`delivery`, the
//! HTTP server); here is only what keeps one of its clients from taking all of it.
//!
//! # A flood of addresses
//! Each key (address or principal) needs a bucket. Buckets that have refilled are
//! evicted; at most `limits.tracked` exist, and all keys beyond that share
//! one bucket. So a flood from ever new addresses gets what one address gets, and known addresses keep their buckets.

mod rate;

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use smallvec::{SmallVec, smallvec};

use self::rate::Rate;
use crate::config;

/// The limits of one gateway.
#[derive(Clone)]
pub struct Limits(Arc<Shared>);

struct Shared {
    rules: RwLock<Arc<Rules>>,
    streams: Counts,
    /// Of open streams.
    filters: Counts,
    connections: Counts,
    batches: Counts,
}

/// What may change while places are taken.
struct Rules {
    attempts: Option<Rate>,
    bad_credentials: Option<Rate>,
    publishes: Option<Rate>,
    publish_bytes: Option<Rate>,
    address_streams: usize,
    principal_streams: usize,
    address_filters: usize,
    principal_filters: usize,
    address_connections: usize,
    batches: usize,
    address_batches: usize,
    principal_batches: usize,
}

/// The address and principal that a request counts for. A request without an address, as from a trusted proxy's own machine, and without a principal
/// is not counted at all.
#[derive(Clone, Debug)]
pub struct Caller {
    network: Option<Network>,
    principal: Option<Digest>,
}

/// What is counted as one client address: an IPv4 address, or the /64 that one IPv6 subscriber has at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Network(IpAddr);

/// Stands for a principal's name, which may be as long as a token.
type Digest = [u8; 16];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    /// All clients together.
    Node,
    Network(Network),
    Principal(Digest),
}

/// A limit that was met, and when it is worth while to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryAfter(pub Duration);

/// The limit of open streams, or of their filters, that was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exhausted {
    OfAddress,
    OfPrincipal,
    FiltersOfAddress,
    FiltersOfPrincipal,
}

/// Why there is no room for another batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooManyBatches {
    OfNode,
    OfAddress,
    OfPrincipal,
}

/// A permit for one stream, connection or batch of an address and a principal. Returned when it is dropped.
///
/// One pointer, because every open stream keeps one; `None` where nothing is counted.
pub struct ClientPermit(Option<Box<Taken>>);

struct Taken {
    limits: Limits,
    what: What,
    keys: [Option<Key>; 2],
}

/// The side whose limit was reached.
#[derive(Clone, Copy)]
enum Side {
    Address,
    Principal,
}

/// What a place is for.
#[derive(Clone, Copy)]
enum What {
    Connection,
    Batch,
    Stream { filters: usize },
}

impl Limits {
    pub fn new(config: &config::Limits) -> Limits {
        Limits(Arc::new(Shared {
            rules: RwLock::new(Rules::new(config)),
            streams: Counts::default(),
            filters: Counts::default(),
            connections: Counts::default(),
            batches: Counts::default(),
        }))
    }

    /// From now on other limits hold. Rates begin anew; what is open stays, and counts.
    pub fn replace(&self, config: &config::Limits) {
        *self.0.rules.write().unwrap_or_else(PoisonError::into_inner) = Rules::new(config);
    }

    fn rules(&self) -> Arc<Rules> {
        self.0.rules.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts a request for a stream, whatever becomes of it.
    ///
    /// # Errors
    /// When the address has made too many of late.
    pub fn attempt(&self, address: Option<IpAddr>) -> Result<(), RetryAfter> {
        check(self.rules().attempts.as_ref(), address.map(|address| Key::Network(Network::of(address))), 1)
    }

    /// Whether a credential from this address is worth looking at. Counts nothing.
    ///
    /// # Errors
    /// When too many bad ones have come from there of late.
    pub fn credential(&self, address: Option<IpAddr>) -> Result<(), RetryAfter> {
        match (&self.rules().bad_credentials, address) {
            (Some(rate), Some(address)) => rate.allows(&Key::Network(Network::of(address))),
            _ => Ok(()),
        }
    }

    /// Counts a bad credential. It is an attempt, too.
    pub fn bad_credential(&self, address: Option<IpAddr>) {
        let key = address.map(|address| Key::Network(Network::of(address)));
        let rules = self.rules();
        for rate in [&rules.attempts, &rules.bad_credentials] {
            // Whether it is one too many is for the next request to find.
            let _ = check(rate.as_ref(), key, 1);
        }
    }

    /// Counts an event that is to be published.
    ///
    /// # Errors
    /// When the caller has published too many of late. The event is not counted then.
    pub fn publish(&self, caller: &Caller) -> Result<(), RetryAfter> {
        check(self.rules().publishes.as_ref(), caller.key(), 1)
    }

    /// Counts the bytes of an event that is to be published.
    ///
    /// # Errors
    /// When the caller has published too many of late. They are not counted then.
    pub fn publish_bytes(&self, caller: &Caller, bytes: usize) -> Result<(), RetryAfter> {
        check(self.rules().publish_bytes.as_ref(), caller.key(), bytes)
    }

    /// Takes a place for one more stream with so many filters.
    ///
    /// # Errors
    /// When the caller's address or principal has as many open streams, or filters of them, as it may have.
    pub fn open_stream(&self, caller: &Caller, filters: usize) -> Result<ClientPermit, Exhausted> {
        let rules = self.rules();
        let address = [rules.address_streams, rules.address_filters];
        let principal = [rules.principal_streams, rules.principal_filters];
        self.open(What::Stream { filters }, caller, &address, &principal).map_err(|limit| match limit {
            (Side::Address, 0) => Exhausted::OfAddress,
            (Side::Address, _) => Exhausted::FiltersOfAddress,
            (Side::Principal, 0) => Exhausted::OfPrincipal,
            (Side::Principal, _) => Exhausted::FiltersOfPrincipal,
        })
    }

    /// Takes places for one more batch: of all that a node has, and of its caller's.
    ///
    /// # Errors
    /// When the node, or the caller's address or principal, has as many open batches as it may have.
    pub fn open_batch(&self, caller: &Caller) -> Result<[ClientPermit; 2], TooManyBatches> {
        let rules = self.rules();
        let own = self.open(What::Batch, caller, &[rules.address_batches], &[rules.principal_batches]);
        let own = own.map_err(|(side, _)| match side {
            Side::Address => TooManyBatches::OfAddress,
            Side::Principal => TooManyBatches::OfPrincipal,
        })?;
        let mut of_node = ClientPermit::of(self, What::Batch);
        of_node.take(Some(Key::Node), &[rules.batches]).map_err(|_| TooManyBatches::OfNode)?;
        Ok([own, of_node])
    }

    /// Takes a permit for a caller; an error says which of these limits was reached, and on which side.
    fn open(
        &self,
        what: What,
        caller: &Caller,
        address: &[usize],
        principal: &[usize],
    ) -> Result<ClientPermit, (Side, usize)> {
        let mut place = ClientPermit::of(self, what);
        place.take(caller.network.map(Key::Network), address).map_err(|number| (Side::Address, number))?;
        place.take(caller.principal.map(Key::Principal), principal).map_err(|number| (Side::Principal, number))?;
        Ok(place.unless_empty())
    }

    /// Takes a place for one more connection of `address`, if it may have one.
    pub fn open_connection(&self, address: IpAddr) -> Option<ClientPermit> {
        let mut place = ClientPermit::of(self, What::Connection);
        place.take(Some(Key::Network(Network::of(address))), &[self.rules().address_connections]).ok()?;
        Some(place.unless_empty())
    }
}

impl What {
    /// What it is counted among, and how much of each it takes.
    fn counts(self, shared: &Shared) -> SmallVec<[(&Counts, usize); 2]> {
        match self {
            What::Connection => smallvec![(&shared.connections, 1)],
            What::Batch => smallvec![(&shared.batches, 1)],
            What::Stream { filters } => smallvec![(&shared.streams, 1), (&shared.filters, filters)],
        }
    }
}

impl Rules {
    fn new(config: &config::Limits) -> Arc<Rules> {
        let rate = |rate, burst| Some(Rate::new(NonZeroU32::new(rate)?, NonZeroU32::new(burst)?, config.tracked));
        Arc::new(Rules {
            attempts: rate(config.address_attempts, config.address_attempts_burst),
            bad_credentials: rate(config.address_attempts, config.address_attempts_burst),
            publishes: rate(config.publishes, config.publishes_burst),
            publish_bytes: rate(config.publish_bytes, config.publish_bytes_burst),
            address_streams: config.address_streams,
            principal_streams: config.principal_streams,
            address_filters: config.address_filters,
            principal_filters: config.principal_filters,
            address_connections: config.address_connections,
            // The others of a node's connections are for everything else.
            batches: config.batches.min((config.connections / 2).max(1)),
            address_batches: config.address_batches,
            principal_batches: config.principal_batches,
        })
    }
}

fn check(rate: Option<&Rate>, key: Option<Key>, amount: usize) -> Result<(), RetryAfter> {
    match (rate, key) {
        (Some(rate), Some(key)) => rate.check(&key, amount),
        _ => Ok(()),
    }
}

impl Caller {
    /// A client at an address that counts, with the name of its principal, if it has one.
    pub fn new(address: Option<IpAddr>, name: Option<&str>) -> Caller {
        let digest = |name| *Sha256::digest(name).first_chunk().expect("a digest has 32 bytes");
        Caller { network: address.map(Network::of), principal: name.map(digest) }
    }

    /// The key that publishes count for: the principal, or else the address.
    fn key(&self) -> Option<Key> {
        self.principal.map(Key::Principal).or(self.network.map(Key::Network))
    }
}

impl Network {
    fn of(address: IpAddr) -> Network {
        match address.to_canonical() {
            IpAddr::V4(address) => Network(address.into()),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Network(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into())
            }
        }
    }
}

impl ClientPermit {
    /// A place where nothing is counted.
    pub fn uncounted() -> ClientPermit {
        ClientPermit(None)
    }

    fn of(limits: &Limits, what: What) -> ClientPermit {
        ClientPermit(Some(Box::new(Taken { limits: limits.clone(), what, keys: [None, None] })))
    }

    /// Counts what the place is for on `key`, if there is one, and if it has no more of each than these with it. 0 is without
    /// limit; where all are, nothing is counted.
    ///
    /// # Errors
    /// Which of these limits is in the way. Nothing is counted then.
    fn take(&mut self, key: Option<Key>, limits: &[usize]) -> Result<(), usize> {
        let key = key.filter(|_| limits.iter().any(|max| *max > 0));
        let (Some(key), Some(taken)) = (key, &mut self.0) else { return Ok(()) };
        let counts = taken.what.counts(&taken.limits.0);
        for (number, ((count, amount), max)) in counts.iter().zip(limits).enumerate() {
            if count.add(&key, *amount, *max).is_none() {
                counts[..number].iter().for_each(|(count, amount)| count.subtract(&key, *amount));
                return Err(number);
            }
        }
        *taken.keys.iter_mut().find(|slot| slot.is_none()).expect("an address and a principal are two") = Some(key);
        Ok(())
    }

    fn unless_empty(self) -> ClientPermit {
        let is_empty = self.0.as_ref().is_none_or(|taken| taken.keys.iter().all(Option::is_none));
        if is_empty { ClientPermit::uncounted() } else { self }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        for (count, amount) in self.what.counts(&self.limits.0) {
            self.keys.iter().flatten().for_each(|key| count.subtract(key, amount));
        }
    }
}

/// How many each has. As many entries as there are streams, or connections, at most: a node limits both.
#[derive(Default)]
struct Counts(Mutex<HashMap<Key, usize>>);

impl Counts {
    fn add(&self, key: &Key, amount: usize, max: usize) -> Option<()> {
        let mut counts = self.lock();
        let before = counts.get(key).copied().unwrap_or(0);
        if max > 0 && before + amount > max {
            return None;
        }
        counts.insert(*key, before + amount);
        Some(())
    }

    fn subtract(&self, key: &Key, amount: usize) {
        let mut counts = self.lock();
        match counts.get_mut(key) {
            Some(count) if *count > amount => *count -= amount,
            Some(_) | None => drop(counts.remove(key)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn limits(adjust: impl FnOnce(&mut config::Limits)) -> Limits {
        let mut limits = Config::load(None, vec![]).unwrap().limits;
        adjust(&mut limits);
        Limits::new(&limits)
    }

    fn at(address: &str) -> Caller {
        Caller::new(Some(address.parse().unwrap()), None)
    }

    fn named(principal: &str, address: &str) -> Caller {
        Caller::new(Some(address.parse().unwrap()), Some(principal))
    }

    #[test]
    fn an_ipv6_subscriber_is_one_address_and_a_mapped_ipv4_address_is_itself() {
        let network = |text: &str| Network::of(text.parse().unwrap());
        assert_eq!(network("2001:db8:1:2:3:4:5:6"), network("2001:db8:1:2::"));
        assert_ne!(network("2001:db8:1:2::"), network("2001:db8:1:3::"));
        assert_eq!(network("::ffff:192.0.2.1"), network("192.0.2.1"));
        assert_ne!(network("::ffff:192.0.2.1"), network("::ffff:192.0.2.2"));
    }

    #[test]
    fn filters_of_all_streams_are_counted_together() {
        let limits = limits(|limits| (limits.address_filters, limits.principal_filters) = (64, 10));
        let first = limits.open_stream(&named("ann", "192.0.2.1"), 7).ok().unwrap();
        assert_eq!(limits.open_stream(&named("ann", "192.0.2.2"), 4).err(), Some(Exhausted::FiltersOfPrincipal));
        let second = limits.open_stream(&named("ann", "192.0.2.2"), 3).ok().unwrap();
        assert_eq!(limits.open_stream(&at("192.0.2.1"), 58).err(), Some(Exhausted::FiltersOfAddress));
        assert_eq!(limits.open_stream(&at("192.0.2.3"), 65).err(), Some(Exhausted::FiltersOfAddress));
        drop((first, second));
        assert!(limits.0.filters.lock().is_empty() && limits.0.streams.lock().is_empty());
    }

    #[test]
    fn places_are_given_back_and_a_refusal_keeps_none() {
        let limits = limits(|limits| (limits.address_streams, limits.principal_streams) = (2, 1));
        let first = limits.open_stream(&named("ann", "192.0.2.1"), 1).ok().unwrap();
        assert_eq!(limits.open_stream(&named("ann", "192.0.2.1"), 1).err(), Some(Exhausted::OfPrincipal));
        let second = limits.open_stream(&at("192.0.2.1"), 1).ok().unwrap();
        assert_eq!(limits.open_stream(&at("192.0.2.1"), 1).err(), Some(Exhausted::OfAddress));
        assert_eq!(limits.open_stream(&named("ann", "192.0.2.2"), 1).err(), Some(Exhausted::OfPrincipal));
        drop((first, second));
        assert!(limits.0.streams.lock().is_empty());
    }

    #[test]
    fn whoever_is_not_counted_takes_no_place() {
        let nobody = limits(|_| ()).open_stream(&Caller::new(None, None), 1).ok().unwrap();
        assert!(nobody.0.is_none());
        let off = limits(|limits| {
            (limits.address_streams, limits.principal_streams) = (0, 0);
            (limits.address_filters, limits.principal_filters) = (0, 0);
        });
        assert!(off.open_stream(&named("ann", "192.0.2.1"), 1).ok().unwrap().0.is_none());
    }

    #[test]
    fn publishes_are_counted_for_the_principal_and_without_one_for_the_address() {
        let limits = limits(|limits| (limits.publishes, limits.publishes_burst) = (1, 1));
        assert_eq!(limits.publish(&named("ann", "192.0.2.1")), Ok(()));
        assert!(limits.publish(&named("ann", "192.0.2.2")).is_err());
        assert_eq!(limits.publish(&named("bob", "192.0.2.1")), Ok(()));
        assert_eq!(limits.publish(&at("192.0.2.1")), Ok(()));
        assert!(limits.publish(&at("192.0.2.1")).is_err());
    }

    #[test]
    fn a_rate_of_nothing_is_none() {
        let limits = limits(|limits| limits.address_attempts = 0);
        assert!((0..10_000).all(|_| limits.attempt("192.0.2.1".parse().ok()).is_ok()));
    }
}

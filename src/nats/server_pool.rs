//! The servers that a client may connect to: those that were configured, and those that the last server told of.

use std::fmt;

use rand::seq::SliceRandom;

use super::codec::ServerInfo;

/// More discovered servers are not needed to find one.
const DISCOVERED_MAX: usize = 100;

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerAddress {
    pub host: String,
    pub port: u16,
    /// TLS is wanted, whatever the server says.
    pub tls: bool,
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl ServerAddress {
    /// Parses `host:port`, as a server names others of its cluster.
    fn discovered(text: &str, tls: bool) -> Option<ServerAddress> {
        let (host, port) = text.rsplit_once(':')?;
        let host = host.strip_prefix('[').map_or(Some(host), |host| host.strip_suffix(']'))?;
        let is_host = !host.is_empty() && !host.chars().any(|c| c.is_whitespace() || c.is_control());
        is_host.then_some(ServerAddress { host: host.to_owned(), port: port.parse().ok()?, tls })
    }

    fn is_at(&self, other: &ServerAddress) -> bool {
        (&self.host, self.port) == (&other.host, other.port)
    }
}

pub(super) struct ServerPool {
    configured: Vec<ServerAddress>,
    discovered: Vec<ServerAddress>,
}

impl ServerPool {
    pub fn new(configured: &[ServerAddress]) -> ServerPool {
        ServerPool { configured: configured.to_vec(), discovered: vec![] }
    }

    /// Takes over what `server` tells of its cluster. Where TLS is wanted of it, it is wanted of the others.
    pub fn discover(&mut self, server: &ServerAddress, info: &ServerInfo) {
        let urls = info.connect_urls.iter().take(DISCOVERED_MAX);
        let told = urls.filter_map(|url| ServerAddress::discovered(url, server.tls));
        self.discovered = told.filter(|told| !self.configured.iter().any(|known| known.is_at(told))).collect();
    }

    /// All of them in random order, so that clients do not all connect to one; last the one that was `left`.
    pub fn in_turn(&self, left: Option<&ServerAddress>) -> Vec<ServerAddress> {
        let mut servers = [&*self.configured, &*self.discovered].concat();
        servers.shuffle(&mut rand::rng());
        servers.sort_by_key(|server| left.is_some_and(|left| left.is_at(server)));
        servers
    }

    pub fn has_other_than(&self, server: &ServerAddress) -> bool {
        self.configured.iter().chain(&self.discovered).any(|other| !other.is_at(server))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_servers_are_tried_and_last_the_one_that_was_left() {
        let [one, two] = [("one", 4222), ("two", 1)].map(|(host, port)| at(host, port));
        let mut pool = ServerPool::new(&[one.clone(), two.clone()]);
        let connect_urls =
            ["one:4222", "three:4222", "[::1]:4222", "no address", ":1", "a:b"].map(String::from).to_vec();
        pool.discover(&one, &ServerInfo { connect_urls, ..ServerInfo::default() });

        for _ in 0..20 {
            let mut order = pool.in_turn(Some(&two));
            assert_eq!(order.pop(), Some(two.clone()));
            assert!(
                order.contains(&at("three", 4222)) && order.contains(&at("::1", 4222)) && order.len() == 3,
                "{order:?}"
            );
        }
        assert!(pool.has_other_than(&one));
        assert!(!ServerPool::new(std::slice::from_ref(&one)).has_other_than(&one));
    }

    fn at(host: &str, port: u16) -> ServerAddress {
        ServerAddress { host: host.into(), port, tls: true }
    }
}

//! The servers that may be called: those of the settings, and those of the cluster that the last one told of.

use async_nats::ServerAddr;
use rand::seq::SliceRandom;

use super::wire::Info;

/// More servers of a cluster are not needed to find one.
const TOLD_MAX: usize = 100;

pub(super) struct Servers {
    named: Vec<ServerAddr>,
    told: Vec<ServerAddr>,
}

impl Servers {
    pub fn new(named: &[ServerAddr]) -> Servers {
        Servers { named: named.to_vec(), told: vec![] }
    }

    /// Takes over what `server` tells of its cluster. Where it is reached over TLS, so are the others.
    pub fn learn(&mut self, server: &ServerAddr, info: &Info) {
        let urls = info.connect_urls.iter().take(TOLD_MAX);
        let told = urls.filter_map(|url| format!("{}://{url}", server.scheme()).parse::<ServerAddr>().ok());
        self.told = told.filter(|told| !self.named.iter().any(|named| same(named, told))).collect();
    }

    /// All of them in any order, so that gateways do not all go to one; last the one that was `left`.
    pub fn in_turn(&self, left: Option<&ServerAddr>) -> Vec<ServerAddr> {
        let mut servers = [&*self.named, &*self.told].concat();
        servers.shuffle(&mut rand::rng());
        servers.sort_by_key(|server| left.is_some_and(|left| same(server, left)));
        servers
    }

    pub fn has_other_than(&self, server: &ServerAddr) -> bool {
        self.named.iter().chain(&self.told).any(|other| !same(other, server))
    }
}

/// Whether they are the same, whoever enters.
fn same(one: &ServerAddr, other: &ServerAddr) -> bool {
    (one.host(), one.port()) == (other.host(), other.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_servers_are_called_and_last_the_one_that_was_left() {
        let [one, two]: [ServerAddr; 2] = ["tls://u:p@one", "tls://two:1"].map(|url| url.parse().unwrap());
        let mut servers = Servers::new(&[one.clone(), two.clone()]);
        let connect_urls = ["one:4222", "three:4222", "[::1]:4222", "no address"].map(String::from).to_vec();
        servers.learn(&one, &Info { connect_urls, ..Info::default() });

        for _ in 0..20 {
            let mut order = servers.in_turn(Some(&two));
            assert_eq!(order.pop(), Some(two.clone()));
            assert!(order.contains(&"tls://three:4222".parse().unwrap()) && order.len() == 3, "{order:?}");
        }
        assert!(servers.has_other_than(&one));
        assert!(!Servers::new(std::slice::from_ref(&one)).has_other_than(&one));
    }
}

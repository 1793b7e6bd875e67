//! Open files: each connection is one, and the operating system allows so many. Asks for as many as the limits need, and
//! where it gets fewer lowers the limits, so that a node that is full says so, and never finds out by failing.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::{Config, Limits};

/// Files besides connections: the broker's, listeners, what the runtime and the threads poll with; and the first few
/// connections that wait.
const OWN: u64 = 64;
const FIRST_FEW: usize = 32;

/// Why limits were lowered, in words for the operator.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this process may have {hard} open files, but limits.streams, limits.connections and admin.connections need {needed}: \
     only {streams} streams and {connections} other connections are taken (raise `ulimit -Hn`, or LimitNOFILE)"
)]
pub struct TooFew {
    hard: u64,
    needed: u64,
    streams: usize,
    connections: usize,
}

/// Raises this process's soft limit to what the limits of `config` need, or lowers them to what its hard limit allows.
pub fn raise(config: &mut Config) -> Option<TooFew> {
    let needed = needed_for(config);
    // Where it can't be asked, it can't be helped either.
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    let wanted = needed.min(hard);
    let allowed = match setrlimit(Resource::RLIMIT_NOFILE, wanted.max(soft), hard) {
        Ok(()) => hard,
        Err(_) => soft,
    };
    lower(config, allowed)
}

fn needed_for(Config { limits, admin, .. }: &Config) -> u64 {
    let connections = [limits.streams, limits.connections, waiting(limits), admin.connections];
    connections.iter().fold(OWN, |needed, more| needed.saturating_add(*more as u64))
}

fn waiting(limits: &Limits) -> usize {
    limits.waiting_connections().saturating_sub(FIRST_FEW)
}

/// Streams are what a gateway is for: operators get a sixteenth at most, other connections a quarter of the rest.
fn lower(config: &mut Config, hard: u64) -> Option<TooFew> {
    let needed = needed_for(config);
    if needed <= hard {
        return None;
    }
    let Config { limits, admin, .. } = config;
    let room = usize::try_from(hard.saturating_sub(OWN)).unwrap_or(usize::MAX);
    admin.connections = admin.connections.min((room / 16).max(1));
    let room = room - room.min(admin.connections);
    limits.connections = limits.connections.min((room / 4).max(1));
    let others = limits.connections + waiting(limits);
    limits.streams = limits.streams.min(room.saturating_sub(others).max(1));
    Some(TooFew { hard, needed, streams: limits.streams, connections: limits.connections })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn limits_are_lowered_only_as_far_as_they_must() {
        for (hard, streams, connections) in
            [(100_000, 10_000, 4096), (14_672, 10_000, 4096), (1024, 696, 232), (64, 1, 1), (0, 1, 1)]
        {
            let mut config = Config::load(None, vec![]).unwrap();
            let lowered = lower(&mut config, hard);
            assert_eq!((config.limits.streams, config.limits.connections), (streams, connections), "{hard}");
            assert_eq!(lowered.is_some(), hard < 14_672, "{hard}");
        }
    }
}

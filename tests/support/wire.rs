//! A wire to a host of its own that can be pulled: a network namespace with a virtual cable, so that what is on it
//! vanishes without a word. Needs root and iproute2.

use std::process::{Child, Command, Output, Stdio};

/// Ends with its owner, with the connections on it.
pub struct Wire {
    name: String,
    /// The cable's end on this side.
    near: String,
    address: String,
    clients: Vec<Child>,
}

impl Wire {
    /// `None`, with the reason on stderr, where this user may not; under CI that is a failure.
    pub fn lay() -> Option<Wire> {
        let number = std::process::id();
        let (name, near) = (format!("tg{number}"), format!("tgw{number}"));
        // Of the network that is meant for tests (RFC 2544), four addresses of each process.
        let address = |host: u32| format!("198.18.{}.{}", number / 64 % 256, number % 64 * 4 + host);
        let made = ip(&["netns", "add", &name]);
        if !made.status.success() {
            let why = String::from_utf8_lossy(&made.stderr).into_owned();
            assert!(std::env::var_os("CI").is_none(), "no network namespace: {why}");
            eprintln!("skipped, because it takes root and iproute2 to make a network namespace: {why}");
            return None;
        }
        let wire = Wire { name: name.clone(), near: near.clone(), address: address(1), clients: vec![] };
        let [here, there] = [1, 2].map(|host| format!("{}/30", address(host)));
        for arguments in [
            &["link", "add", &near, "type", "veth", "peer", "name", "far", "netns", &name][..],
            &["addr", "add", &here, "dev", &near],
            &["link", "set", &near, "up"],
            &["-n", &name, "addr", "add", &there, "dev", "far"],
            &["-n", &name, "link", "set", "far", "up"],
        ] {
            let done = ip(arguments);
            assert!(done.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        }
        Some(wire)
    }

    /// The address of this end.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Has a client at the other end read a URL for as long as it lasts.
    pub fn read(&mut self, url: &str) {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, "curl", "--silent", "--no-buffer", "--max-time", "60", url]);
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.clients.push(quiet.spawn().expect("ip can be run"));
    }

    /// From now on nothing gets through, either way.
    pub fn pull(&self) {
        assert!(ip(&["-n", &self.name, "link", "set", "far", "down"]).status.success());
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for client in &mut self.clients {
            let _ = client.kill();
            let _ = client.wait();
        }
        // Both, because the kernel takes its time with what is inside a namespace.
        ip(&["link", "del", &self.near]);
        ip(&["netns", "del", &self.name]);
    }
}

/// Runs `ip`, bounded.
fn ip(arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["10", "ip"]).args(arguments).stdin(Stdio::null()).output().expect("coreutils are there")
}

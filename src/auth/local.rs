//! What an open gateway on a loopback address serves: programs and pages of the same machine, and no others through
//! them.
//!
//! A page can send requests to addresses of the machine that shows it, also under a name of the page's own
//! that has come to mean 127.0.0.1 (DNS rebinding); a proxy passes on requests from anywhere. Each of them shows in a
//! header. (A proxy that adds none and calls the gateway `localhost` does not.)

use std::net::IpAddr;

/// Headers that only a proxy adds.
pub const PROXY_HEADERS: [&str; 4] = ["Forwarded", "X-Forwarded-For", "X-Real-IP", "Via"];

/// The name or address in the value of a `Host` header, which may have a port: `host`, `host:80`, `[::1]:80`.
pub fn host_name(host: &str) -> Option<&str> {
    match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => is_port(port).then_some(address),
        None => match host.split_once(':') {
            Some((name, port)) => is_port(&format!(":{port}")).then_some(name),
            None => Some(host),
        },
    }
}

/// Whether the value of a `Host` header names this machine.
pub fn is_local_host(host: &str) -> bool {
    let is_loopback = |address: IpAddr| address.to_canonical().is_loopback();
    let is_local = |name: &str| name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(is_loopback);
    host_name(host).is_some_and(is_local)
}

/// Whether the value of an `Origin` header is that of a page which this machine serves. `null` could be any page's.
pub fn is_local_origin(origin: &str) -> bool {
    let host = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    host.is_some_and(is_local_host)
}

/// Nothing, or a colon and a number.
fn is_port(text: &str) -> bool {
    text.is_empty() || text.strip_prefix(':').is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_local() {
        for host in
            ["localhost", "LOCALHOST:8080", "127.0.0.1", "127.9.8.7:1", "[::1]", "[::1]:8080", "[::ffff:127.0.0.1]"]
        {
            assert!(is_local_host(host), "{host}");
            assert!(is_local_origin(&format!("http://{host}")), "{host}");
        }
        for host in [
            "",
            ":8080",
            "example.com",
            "localhost.example.com",
            "localhost.",
            "127.0.0.1.nip.io",
            "127.1",
            "2130706433",
            "0.0.0.0",
            "[::]",
            "::1",
            "[::1]x",
            "[::1",
            "localhost:80:80",
            "localhost:x",
            "a@localhost",
            "localhost/",
            "192.168.0.1",
        ] {
            assert!(!is_local_host(host), "{host}");
            assert!(!is_local_origin(&format!("https://{host}")), "{host}");
        }
        assert!(!is_local_origin("null") && !is_local_origin("file://") && !is_local_origin("localhost"));
    }
}

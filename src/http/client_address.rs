//! Where a request comes from, as far as it can be believed: what the proxies in front say of it, if they are trusted.
//!
//! Only one header is read, the one that the trusted proxies set. A proxy passes on what it does not set, so a client that
//! sends the other one could say anything.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Once},
};

use actix_web::http::header::{self, HeaderMap, HeaderName};
use ipnet::IpNet;

use crate::config::AddressHeader;

/// The proxies that are believed, and what they are believed by.
#[derive(Clone, Debug)]
pub struct Proxies {
    trusted: Vec<IpNet>,
    header: AddressHeader,
    /// Whether a warning was logged that an untrusted peer acts like a proxy.
    warned: Arc<Once>,
}

impl Proxies {
    pub fn new(trusted: Vec<IpNet>, header: AddressHeader) -> Proxies {
        Proxies { trusted, header, warned: Arc::new(Once::new()) }
    }

    pub fn trust(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.trusted.iter().any(|network| network.contains(&address))
    }

    /// The client's address: the last hop that is no trusted proxy, read from the right. What stands left of it was
    /// written by an unknown hop. Where a hop can't be read, the one that told of it.
    ///
    /// `None` where trusted proxies are all that is named: the request is one's own, or that of a program beside it.
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> Option<IpAddr> {
        let mut client = peer.to_canonical();
        let hops = self.hops(headers);
        if !hops.is_empty() && !self.trust(client) {
            self.warned.call_once(|| {
                tracing::warn!(%peer, "ignored the client address header of a peer that is not in trusted_proxies; if the peer is a proxy, all its clients share one address");
            });
        }
        let mut hops = hops.into_iter().rev();
        while self.trust(client) {
            match hops.next()? {
                Some(hop) => client = hop,
                None => break,
            }
        }
        Some(client)
    }

    /// Whether a trusted proxy says that its client speaks TLS with it: in `X-Forwarded-Proto`, or as `proto` in `Forwarded`.
    pub fn say_https(&self, peer: IpAddr, headers: &HeaderMap) -> bool {
        let name = match self.header {
            AddressHeader::XForwardedFor => HeaderName::from_static("x-forwarded-proto"),
            AddressHeader::Forwarded => header::FORWARDED,
        };
        // What stands right was added last.
        let last = headers.get_all(name).last().map(|field| String::from_utf8_lossy(field.as_bytes()).into_owned());
        let last = last.as_deref().and_then(|field| field.rsplit(',').next()).unwrap_or_default();
        let proto = match self.header {
            AddressHeader::XForwardedFor => Some(last),
            AddressHeader::Forwarded => last.split(';').find_map(|pair| {
                let (name, value) = pair.trim().split_once('=')?;
                name.eq_ignore_ascii_case("proto").then(|| value.trim_matches('"'))
            }),
        };
        self.trust(peer) && proto.is_some_and(|proto| proto.trim().eq_ignore_ascii_case("https"))
    }

    /// What the header's fields, taken together, say of each hop, the first one's first.
    fn hops(&self, headers: &HeaderMap) -> Vec<Option<IpAddr>> {
        let (name, parse): (HeaderName, fn(&str) -> Option<IpAddr>) = match self.header {
            AddressHeader::XForwardedFor => (header::X_FORWARDED_FOR, parse_address),
            AddressHeader::Forwarded => (header::FORWARDED, parse_forwarded),
        };
        let mut hops = vec![];
        for field in headers.get_all(name) {
            // Not text as a whole or nothing: what a client put in front of it says nothing of what a proxy added.
            let field = String::from_utf8_lossy(field.as_bytes());
            hops.extend(field.split(',').map(str::trim).filter(|hop| !hop.is_empty()).map(parse));
        }
        hops
    }
}

/// The address in one element of a `Forwarded` header (RFC 7239, section 4): `for=192.0.2.1;proto=https`.
///
/// A proxy may quote what a client wrote, as in `host="x, for=1.1.1.1;y"`. What comes of cutting that at its commas has a
/// quote without its other half, or an escape, and is not read.
fn parse_forwarded(element: &str) -> Option<IpAddr> {
    if element.contains('\\') || element.matches('"').count() % 2 == 1 {
        return None;
    }
    let mut nodes = element.split(';').filter_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        name.eq_ignore_ascii_case("for").then_some(value)
    });
    let node = nodes.next()?;
    if nodes.next().is_some() {
        return None;
    }
    parse_address(node.strip_prefix('"').and_then(|node| node.strip_suffix('"')).unwrap_or(node))
}

/// An address, with or without a port: `192.0.2.1`, `192.0.2.1:8000`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:8000`.
fn parse_address(text: &str) -> Option<IpAddr> {
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse().ok().map(IpAddr::V6);
    let with_port = || text.parse().ok().map(|address: SocketAddr| address.ip());
    text.parse().ok().or_else(bracketed).or_else(with_port).map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::HeaderValue;

    use super::*;

    fn proxies(header: AddressHeader) -> Proxies {
        Proxies::new(vec!["127.0.0.0/8".parse().unwrap(), "10.0.0.0/8".parse().unwrap()], header)
    }

    fn client(header: AddressHeader, peer: &str, fields: &[(&'static str, &str)]) -> Option<String> {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(HeaderName::from_static(name), HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        proxies(header).client(peer.parse().unwrap(), &headers).map(|address| address.to_string())
    }

    #[test]
    fn the_last_hop_that_is_no_trusted_proxy_is_the_client() {
        for (peer, field, expected) in [
            ("127.0.0.1", "192.0.2.1", "192.0.2.1"),
            ("::ffff:127.0.0.1", "192.0.2.1", "192.0.2.1"),
            ("127.0.0.1", "1.1.1.1, 192.0.2.1", "192.0.2.1"),
            ("127.0.0.1", "1.1.1.1, 192.0.2.1, 10.1.1.1,, 10.2.2.2", "192.0.2.1"),
            ("127.0.0.1", "192.0.2.1:4711", "192.0.2.1"),
            ("127.0.0.1", "2001:db8::1", "2001:db8::1"),
            ("127.0.0.1", "[2001:db8::1]", "2001:db8::1"),
            ("127.0.0.1", "[2001:db8::1]:4711", "2001:db8::1"),
            ("127.0.0.1", "::ffff:192.0.2.1", "192.0.2.1"),
            // What can't be read ends the chain at the hop that told of it.
            ("127.0.0.1", "192.0.2.1, unknown", "127.0.0.1"),
            ("127.0.0.1", "192.0.2.1, 999.1.1.1, 10.1.1.1", "10.1.1.1"),
            ("127.0.0.1", "localhost", "127.0.0.1"),
            ("127.0.0.1", "192.0.2.1 10.1.1.1", "127.0.0.1"),
            ("127.0.0.1", "é, 192.0.2.1", "192.0.2.1"),
            // What a peer that is no trusted proxy says is ignored.
            ("192.0.2.9", "1.1.1.1", "192.0.2.9"),
            ("192.0.2.9", "127.0.0.1", "192.0.2.9"),
        ] {
            let said = client(AddressHeader::XForwardedFor, peer, &[("x-forwarded-for", field)]);
            assert_eq!(said.as_deref(), Some(expected), "{peer} says {field:?}");
        }
    }

    #[test]
    fn only_a_trusted_proxy_says_that_its_client_speaks_tls() {
        for (header, peer, name, field, says) in [
            (AddressHeader::XForwardedFor, "127.0.0.1", "x-forwarded-proto", "https", true),
            (AddressHeader::XForwardedFor, "127.0.0.1", "x-forwarded-proto", "http, HTTPS", true),
            (AddressHeader::XForwardedFor, "127.0.0.1", "x-forwarded-proto", "https, http", false),
            (AddressHeader::XForwardedFor, "192.0.2.9", "x-forwarded-proto", "https", false),
            (AddressHeader::XForwardedFor, "127.0.0.1", "forwarded", "proto=https", false),
            (AddressHeader::Forwarded, "127.0.0.1", "forwarded", "for=192.0.2.1;proto=https", true),
            (AddressHeader::Forwarded, "127.0.0.1", "forwarded", "proto=https, for=192.0.2.1;Proto=\"http\"", false),
            (AddressHeader::Forwarded, "127.0.0.1", "x-forwarded-proto", "https", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(field));
            assert_eq!(proxies(header).say_https(peer.parse().unwrap(), &headers), says, "{peer} {name}: {field}");
        }
    }

    #[test]
    fn forwarded_is_read_by_its_own_rules() {
        for (field, expected) in [
            ("for=192.0.2.1", "192.0.2.1"),
            ("For=\"[2001:db8::1]:4711\";proto=https;by=10.0.0.1", "2001:db8::1"),
            ("for=1.1.1.1, proto=http;for=192.0.2.1;host=a", "192.0.2.1"),
            ("for=192.0.2.1, for=10.1.1.1", "192.0.2.1"),
            ("for=192.0.2.1, for=unknown", "127.0.0.1"),
            ("for=192.0.2.1, for=_hidden", "127.0.0.1"),
            ("for=192.0.2.1, proto=https", "127.0.0.1"),
            ("for=192.0.2.1;for=192.0.2.2", "127.0.0.1"),
            ("for=\"192.0.2.1", "127.0.0.1"),
            (r#"for=192.0.2.1;host="x, a=b;for=1.1.1.1;y""#, "127.0.0.1"),
            (r#"for=192.0.2.1;host="x, for=1.1.1.1;y=\"";proto=https"#, "127.0.0.1"),
            ("192.0.2.1", "127.0.0.1"),
        ] {
            let said = client(AddressHeader::Forwarded, "127.0.0.1", &[("forwarded", field)]);
            assert_eq!(said.as_deref(), Some(expected), "{field:?}");
        }
    }

    #[test]
    fn only_the_header_that_proxies_set_is_read() {
        let both = [("forwarded", "for=1.1.1.1"), ("x-forwarded-for", "192.0.2.1")];
        assert_eq!(client(AddressHeader::XForwardedFor, "127.0.0.1", &both).as_deref(), Some("192.0.2.1"));
        assert_eq!(client(AddressHeader::Forwarded, "127.0.0.1", &both).as_deref(), Some("1.1.1.1"));
        assert_eq!(client(AddressHeader::Forwarded, "127.0.0.1", &both[1..]), None);
    }

    #[test]
    fn fields_are_one_list() {
        let fields =
            [("x-forwarded-for", "1.1.1.1"), ("x-forwarded-for", "192.0.2.1"), ("x-forwarded-for", "10.1.1.1")];
        assert_eq!(client(AddressHeader::XForwardedFor, "127.0.0.1", &fields).as_deref(), Some("192.0.2.1"));
    }

    #[test]
    fn proxies_that_name_nobody_else_speak_for_themselves() {
        assert_eq!(client(AddressHeader::XForwardedFor, "127.0.0.1", &[]), None);
        for only_proxies in [" , ", "127.0.0.1", "10.3.3.3, 10.1.1.1"] {
            assert_eq!(client(AddressHeader::XForwardedFor, "127.0.0.1", &[("x-forwarded-for", only_proxies)]), None);
        }
        assert_eq!(client(AddressHeader::XForwardedFor, "192.0.2.9", &[]).as_deref(), Some("192.0.2.9"));
    }
}

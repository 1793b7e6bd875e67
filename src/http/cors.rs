//! Which pages of other origins may read and publish (WHATWG Fetch, section 3.2).
//!
//! Own code, because the rule depends on what a gateway protects: listed origins may send credentials,
//! origins admitted by "*" may not, and a gateway without authentication admits pages of this machine. A
//! page that reads (a GET) can be kept from its answer, so browsers enforce that. A page that publishes can't be kept
//! from sending: see [`Cors::authorize_publish`].

use actix_web::{
    HttpRequest, HttpResponse,
    dev::RequestHead,
    http::{
        Method,
        header::{self, HeaderMap, HeaderName, HeaderValue},
    },
    web,
};

use super::{
    App,
    error::{ApiError, Code},
};
use crate::{auth::local::is_local_origin, config};

/// What a page may send, beside what every page may.
const METHODS: &str = "GET, POST";
const HEADERS: &str =
    "Last-Event-ID, Content-Type, Cache-Control, Idempotency-Key, If-Match, If-None-Match, Tidegate-Events";
const HEADERS_OF_LISTED: &str = "Last-Event-ID, Content-Type, Cache-Control, Idempotency-Key, If-Match, If-None-Match, Tidegate-Events, Authorization";

/// The origins that a gateway admits though they are not listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unlisted {
    /// Pages of the loopback addresses: being on this machine is all that an open gateway there asks for.
    Loopback,
    /// Every page, without credentials: what it can do then, everyone can.
    Anyone,
}

#[derive(Clone)]
pub struct Cors {
    listed: Vec<HeaderValue>,
    unlisted: Unlisted,
    anyone: bool,
    credentials: bool,
    max_age: HeaderValue,
}

/// What the page that a request is from may do.
enum Grant {
    Nothing,
    WithoutCredentials,
    All,
}

impl Cors {
    pub fn new(config: &config::Cors, unlisted: Unlisted) -> Cors {
        let listed = config.origins.iter().filter(|origin| *origin != "*");
        let listed = listed.map(|origin| HeaderValue::from_str(origin).expect("checked in Config::load")).collect();
        Cors {
            listed,
            unlisted,
            anyone: unlisted == Unlisted::Anyone || config.origins.iter().any(|origin| origin == "*"),
            credentials: config.credentials,
            max_age: config.max_age.as_secs().into(),
        }
    }

    /// Whether pages of this origin may do anything at all here.
    pub fn lets_in(&self, origin: &HeaderValue) -> bool {
        match self.grant(origin) {
            Grant::Nothing => false,
            Grant::WithoutCredentials | Grant::All => true,
        }
    }

    fn grant(&self, origin: &HeaderValue) -> Grant {
        let is_near = || self.unlisted == Unlisted::Loopback && origin.to_str().is_ok_and(is_local_origin);
        if self.listed.contains(origin) || is_near() {
            Grant::All
        } else if self.anyone {
            Grant::WithoutCredentials
        } else {
            Grant::Nothing
        }
    }

    /// Tells the browser, in the headers of an answer of whatever kind, whether the page that asked may read it.
    pub fn mark(&self, origin: Option<&HeaderValue>, answer: &mut HeaderMap) {
        answer.append(header::VARY, HeaderValue::from_static("Origin"));
        let Some(origin) = origin else { return };
        let allowed = match self.grant(origin) {
            Grant::Nothing => return,
            Grant::WithoutCredentials => HeaderValue::from_static("*"),
            Grant::All => origin.clone(),
        };
        if self.credentials && allowed != "*" {
            answer.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
        answer.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
    }

    /// Refuses to publish for a page of another origin that is not listed. Browsers let any page send a plain POST, with
    /// the user's cookies, and only keep its answer from it. So this holds for clients that are authenticated by a cookie, and where
    /// being on this machine is all that is asked for.
    ///
    /// A request without an `Origin` of which the browser says that another site is behind it (`Sec-Fetch-Site`) is one of
    /// a page of nobody's.
    ///
    /// # Errors
    /// When there is an `Origin`, and it is neither the gateway's own nor allowed. `is_https` is whether a trusted proxy
    /// says that clients speak TLS with it.
    pub fn authorize_publish(&self, request: &HeaderMap, is_https: bool) -> Result<(), ApiError> {
        const NOBODYS: HeaderValue = HeaderValue::from_static("null");
        let origin = match request.get(header::ORIGIN) {
            Some(origin) => origin,
            None if is_of_another_site(request) => &NOBODYS,
            None => return Ok(()),
        };
        let by_cookie = request.contains_key(header::COOKIE);
        let may = match self.grant(origin) {
            Grant::All => true,
            Grant::WithoutCredentials => !by_cookie,
            Grant::Nothing => !by_cookie && self.unlisted == Unlisted::Anyone,
        };
        if may || is_own(origin, request.get(header::HOST), is_https) { Ok(()) } else { Err(not_allowed(origin)) }
    }
}

/// What pages may read of an answer's head.
const EXPOSED: &str = "Retry-After, X-Request-Id";

/// Whether a request only asks what another one may do.
pub fn is_preflight(head: &RequestHead) -> bool {
    let has = |name: HeaderName| head.headers().contains_key(name);
    head.method == Method::OPTIONS && has(header::ORIGIN) && has(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Answers it.
pub async fn preflight(app: web::Data<App>, request: HttpRequest) -> HttpResponse {
    let origin = request.headers().get(header::ORIGIN).expect("asked for in is_preflight");
    let cors = app.cors.borrow().clone();
    let headers = match cors.grant(origin) {
        Grant::Nothing => return app.refuse(&request, &not_allowed(origin)),
        Grant::WithoutCredentials => HEADERS,
        Grant::All => HEADERS_OF_LISTED,
    };
    HttpResponse::NoContent()
        .insert_header((header::ACCESS_CONTROL_ALLOW_METHODS, METHODS))
        .insert_header((header::ACCESS_CONTROL_ALLOW_HEADERS, headers))
        .insert_header((header::ACCESS_CONTROL_MAX_AGE, cors.max_age))
        .finish()
}

/// Whether a browser says that a page of another site, or of another host of this one, has it send the request (W3C Fetch
/// Metadata).
pub fn is_of_another_site(request: &HeaderMap) -> bool {
    request.get_all("Sec-Fetch-Site").any(|site| [&b"cross-site"[..], b"same-site"].contains(&site.as_bytes()))
}

fn not_allowed(origin: &HeaderValue) -> ApiError {
    let origin = String::from_utf8_lossy(origin.as_bytes());
    ApiError::new(Code::OriginNotAllowed, format!("add {origin:?} to cors.origins to admit its pages"))
}

/// Whether a page was served under the name and port that the request was sent to, and as safely: behind a proxy with TLS
/// a page without it may come from any machine on the network.
fn is_own(origin: &HeaderValue, host: Option<&HeaderValue>, is_https: bool) -> bool {
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    match (origin, host.and_then(|host| host.to_str().ok())) {
        (Some(("https", origin)), Some(host)) => origin.eq_ignore_ascii_case(host),
        (Some(("http", origin)), Some(host)) => !is_https && origin.eq_ignore_ascii_case(host),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    fn cors(origins: &[&str], unlisted: Unlisted) -> Cors {
        let origins = origins.iter().map(ToString::to_string).collect();
        let max_age = std::time::Duration::from_secs(1);
        Cors::new(&config::Cors { origins, credentials: true, max_age }, unlisted)
    }

    /// The origin that an answer allows, and whether credentials are too.
    fn marked(cors: &Cors, origin: &str) -> (Option<String>, bool) {
        let mut answer = HeaderMap::new();
        cors.mark(Some(&HeaderValue::from_str(origin).unwrap()), &mut answer);
        assert_eq!(answer.get(header::VARY).unwrap(), "Origin");
        let allowed = answer.get(header::ACCESS_CONTROL_ALLOW_ORIGIN).map(|value| value.to_str().unwrap().to_owned());
        (allowed, answer.contains_key(header::ACCESS_CONTROL_ALLOW_CREDENTIALS))
    }

    fn publishes(cors: &Cors, headers: &[(HeaderName, &str)]) -> bool {
        let headers = headers.iter().map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap()));
        cors.authorize_publish(&headers.collect(), false).is_ok()
    }

    #[test]
    fn a_page_without_tls_is_not_of_the_origin_that_has_it() {
        let headers = |scheme: &str| {
            let own = format!("{scheme}://events.example.com");
            let headers = [(header::ORIGIN, &*own), (header::HOST, "events.example.com"), (header::COOKIE, "a=b")];
            headers.map(|(name, value)| (name, HeaderValue::from_str(value).unwrap())).into_iter().collect()
        };
        let cors = cors(&[], Unlisted::Anyone);
        assert!(
            cors.authorize_publish(&headers("http"), true).is_err(),
            "an attacker on the network could have written it"
        );
        for (scheme, is_https) in [("http", false), ("https", false), ("https", true)] {
            assert!(cors.authorize_publish(&headers(scheme), is_https).is_ok(), "{scheme} {is_https}");
        }
    }

    #[test]
    fn a_page_of_another_site_publishes_nothing_for_want_of_an_origin() {
        let (site, mode) = (HeaderName::from_static("sec-fetch-site"), HeaderName::from_static("sec-fetch-mode"));
        let cookie = (header::COOKIE, "a=b");
        let cors = cors(&["https://app.example.com"], Unlisted::Anyone);
        for (said, may) in [("cross-site", false), ("same-site", false), ("same-origin", true), ("none", true)] {
            assert_eq!(publishes(&cors, &[(site.clone(), said), cookie.clone()]), may, "{said}");
            assert!(publishes(&cors, &[(site.clone(), said)]), "what everybody may, without a cookie");
        }
        let posted_form = [(site.clone(), "cross-site"), (mode, "navigate"), cookie.clone()];
        assert!(!publishes(&cors, &posted_form), "a form that posts is no link");
        let open = self::cors(&[], Unlisted::Loopback);
        assert!(!publishes(&open, &[(site, "cross-site")]));
    }

    #[test]
    fn credentials_are_for_those_that_are_let_in_by_name() {
        let guarded = cors(&["https://app.example.com"], Unlisted::Anyone);
        assert_eq!(marked(&guarded, "https://app.example.com"), (Some("https://app.example.com".into()), true));
        assert_eq!(marked(&guarded, "https://evil.example.com"), (Some("*".into()), false));
        assert_eq!(marked(&guarded, "http://localhost:5173"), (Some("*".into()), false));
        assert_eq!(marked(&guarded, "null"), (Some("*".into()), false));
    }

    #[test]
    fn an_open_gateway_is_for_pages_of_this_machine() {
        let open = cors(&[], Unlisted::Loopback);
        assert_eq!(marked(&open, "http://localhost:5173"), (Some("http://localhost:5173".into()), true));
        assert_eq!(marked(&open, "https://evil.example.com"), (None, false));
        assert_eq!(marked(&open, "null"), (None, false));
        assert_eq!(marked(&cors(&["*"], Unlisted::Loopback), "https://a.example.com"), (Some("*".into()), false));
    }

    #[test]
    fn a_foreign_page_publishes_nothing_with_somebodys_cookie_or_nearness() {
        let (origin, host, cookie) = (header::ORIGIN, header::HOST, header::COOKIE);
        let evil = (origin.clone(), "https://evil.example.com");
        let own =
            [(origin.clone(), "https://Events.example.com"), (host, "events.example.com"), (cookie.clone(), "a=b")];
        for unlisted in [Unlisted::Anyone, Unlisted::Loopback] {
            let cors = cors(&["https://app.example.com"], unlisted);
            assert!(publishes(&cors, &[(cookie.clone(), "a=b")]), "no page");
            assert!(publishes(&cors, &own), "a page of its own");
            assert!(publishes(&cors, &[(origin.clone(), "https://app.example.com"), (cookie.clone(), "a=b")]));
            assert!(!publishes(&cors, &[evil.clone(), (cookie.clone(), "a=b")]));
            assert!(!publishes(&cors, &[(origin.clone(), "null"), (cookie.clone(), "a=b")]));
            assert_eq!(publishes(&cors, from_ref(&evil)), unlisted == Unlisted::Anyone);
        }
        let anyone = cors(&["*"], Unlisted::Loopback);
        assert!(publishes(&anyone, from_ref(&evil)));
        assert!(!publishes(&anyone, &[evil, (cookie, "a=b")]));
    }
}

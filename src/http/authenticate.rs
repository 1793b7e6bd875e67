//! Authenticates the sender of a request, and authorizes what the request asks for.
//!
//! Header, cookie and, where it is switched on, query are looked at in this order. Different ones at once are refused
//! rather than one of them believed.

use std::borrow::Cow;

use actix_web::{
    HttpRequest,
    http::Method,
    http::header::{self, HeaderName, HeaderValue},
};

use super::{
    App,
    cors::is_of_another_site,
    error::{ApiError, Code},
    middleware,
    query::Query,
};
use crate::{
    auth::{Principal, Refusal, Version, local},
    delivery::Client,
    subject::{Filter, Subject},
};

/// The query parameter that carries a token, where that is switched on.
pub const TOKEN: &str = "token";

/// What is said of tokens in the query where they are not taken.
pub const ADVICE: (&[&str], &str) = (
    &[TOKEN, "access_token", "auth", "authorization", "jwt"],
    "a token comes as Authorization: Bearer, or in the cookie; in the query only where auth.query_token is on, as token",
);

/// Authenticates the sender of a request.
pub async fn authenticate(app: &App, request: &HttpRequest, query: &Query) -> Result<Principal, ApiError> {
    let Some(credential) = credential_of(app, request, query)? else { return Ok(app.auth.authenticate(None).await?) };
    if request.method() != Method::POST {
        // An attempt that is counted already, good or bad.
        return Ok(app.auth.authenticate(Some(&credential)).await?);
    }
    let address = middleware::address(request);
    app.shares.credential(address).map_err(|wait| ApiError::over_rate(Code::TooManyAttempts, wait))?;
    let authenticated = app.auth.authenticate(Some(&credential)).await;
    if let Err(Refusal::Invalid(_)) = authenticated {
        app.shares.bad_credential(address);
    }
    Ok(authenticated?)
}

/// The sender of a request that lasts: authenticated again whenever keys, policies or settings have changed.
pub struct Sender {
    request: HttpRequest,
    query: Query,
    as_of: Version,
    principal: Result<Principal, ApiError>,
}

impl Sender {
    /// Authenticates the sender of `request`.
    pub async fn authenticate(app: &App, request: &HttpRequest, query: Query) -> Result<Sender, ApiError> {
        // Looked at before, so that what changes meanwhile is looked at again.
        let as_of = app.auth.version();
        let principal = Ok(authenticate(app, request, &query).await?);
        Ok(Sender { request: request.clone(), query, as_of, principal })
    }

    /// The principal by the rules in force now. An error if its page may not publish any more.
    pub async fn now(&mut self, app: &App) -> Result<&Principal, ApiError> {
        let now = app.auth.version();
        if now != self.as_of {
            match Box::pin(self.authenticate_again(app)).await {
                // The next call may find the keys.
                Err(error) if error.code == Code::KeysUnavailable => return Err(error),
                principal => (self.as_of, self.principal) = (now, principal),
            }
        }
        authorize_page(app, &self.request)?;
        self.principal.as_ref().map_err(ApiError::clone)
    }

    async fn authenticate_again(&self, app: &App) -> Result<Principal, ApiError> {
        let credential = credential_of(app, &self.request, &self.query)?;
        Ok(app.auth.authenticate(credential.as_deref()).await?)
    }
}

/// The credential that a request brings, if any.
fn credential_of<'a>(app: &App, request: &'a HttpRequest, query: &'a Query) -> Result<Option<Cow<'a, str>>, ApiError> {
    if app.auth.is_local_only() {
        check_local(app, request)?;
    }
    let from_header = authorization(request)?.map(|text| (text, false));
    let cookie = app.auth.cookie();
    let from_cookie = cookies(request, &cookie).map(|text| (Cow::Owned(text), true));
    let from_query = query.all(TOKEN).filter(|token| !token.is_empty()).map(|token| (token.into(), false));
    let mut brought = from_header.into_iter().chain(from_cookie).chain(from_query);
    let Some((text, is_cookie)) = brought.next() else { return Ok(None) };
    let mut others = brought.filter(|(other, _)| *other != text).map(|(_, is_cookie)| is_cookie).peekable();
    if others.peek().is_some() {
        let detail = match is_cookie && others.all(|is_cookie| is_cookie) {
            true => format!(
                "several cookies are named {cookie}, with different values: a browser keeps one for each path and \
                 domain that set it; delete all but one"
            ),
            false => "the request brings different tokens (Authorization, cookie, ?token=): bring one".into(),
        };
        return Err(ApiError::new(Code::AmbiguousToken, detail));
    }
    Ok(Some(text))
}

/// The client as `/debug/streams` and the log show it.
pub fn client(request: &HttpRequest, principal: &Principal) -> Client {
    let peer = || request.peer_addr().map(|peer| peer.ip().to_canonical());
    Client {
        address: middleware::address(request).or_else(peer),
        principal: principal.name().into(),
        request_id: middleware::request_id(request),
    }
}

/// Refuses a stream unless all of it is allowed. Decided from names alone: what is forbidden is not looked up.
pub fn authorize_subscribe(principal: &Principal, filters: &[Filter]) -> Result<(), ApiError> {
    match filters.iter().find(|filter| !principal.may_subscribe(filter)) {
        None => Ok(()),
        Some(filter) => Err(forbidden(principal, format!("reading {filter}"))),
    }
}

/// Refuses to publish for a page that may not.
pub fn authorize_page(app: &App, request: &HttpRequest) -> Result<(), ApiError> {
    let headers = request.headers();
    let is_https = request.peer_addr().is_some_and(|peer| app.proxies.say_https(peer.ip(), headers));
    app.cors.borrow().authorize_publish(headers, is_https)
}

/// Refuses an event on a subject that is not allowed, or that comes when its sender's token has expired.
pub fn authorize_publish(principal: &Principal, subject: &Subject) -> Result<(), ApiError> {
    if principal.has_expired() {
        return Err(ApiError::new(Code::InvalidToken, "the token has expired"));
    }
    if principal.may_publish(subject) { Ok(()) } else { Err(forbidden(principal, format!("publishing to {subject}"))) }
}

/// Refuses a batch of which no line could be allowed.
pub fn check_publish_anything(principal: &Principal) -> Result<(), ApiError> {
    if principal.may_publish_anything() { Ok(()) } else { Err(forbidden(principal, "publishing".into())) }
}

fn forbidden(principal: &Principal, what: String) -> ApiError {
    match principal.is_anonymous() {
        true => {
            let detail = format!("{what} is not for everybody: bring a token (Authorization: Bearer, or the cookie)");
            ApiError::new(Code::Unauthenticated, detail)
        }
        false => ApiError::new(Code::Forbidden, format!("{what} is not allowed with this token or key")),
    }
}

/// The token of `Authorization: Bearer`. Credentials of another scheme are not for the gateway: a browser sends the
/// password of a whole site (`Basic`) with every request. A token without a scheme is refused, as a bad one is.
fn authorization(request: &HttpRequest) -> Result<Option<Cow<'_, str>>, ApiError> {
    let mut values = request.headers().get_all(header::AUTHORIZATION);
    let (Some(value), second) = (values.next(), values.next()) else { return Ok(None) };
    if second.is_some() {
        return Err(ApiError::new(Code::AmbiguousToken, "Authorization may be given only once"));
    }
    let text = value.to_str().unwrap_or_default();
    match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("Bearer") => Ok(Some(token.trim().into())),
        Some((scheme, _)) if is_scheme(scheme) => Ok(None),
        _ => Err(ApiError::new(Code::InvalidToken, "Authorization is Bearer, a blank, and a token")),
    }
}

/// Whether a text can be the name of a scheme (RFC 9110, section 11.1), such as `Basic`, and is none of a token's parts.
fn is_scheme(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// The values of the cookies of this name, other than empty ones, whatever else is sent as cookies.
fn cookies<'a>(request: &'a HttpRequest, name: &'a str) -> impl Iterator<Item = String> {
    let lines = request.headers().get_all(header::COOKIE).map(|value| String::from_utf8_lossy(value.as_bytes()));
    let values = lines.flat_map(move |line| {
        let named = line.split(';').filter_map(|pair| pair.trim().split_once('='));
        let values = named.filter(|(other, _)| *other == name).map(|(_, value)| value.trim_matches('"').to_owned());
        values.collect::<Vec<_>>()
    });
    values.filter(|value| !value.is_empty())
}

/// Whether a user follows a link, which tells the page that has it nothing.
fn follows_link(request: &HttpRequest) -> bool {
    let navigates = |mode: &HeaderValue| mode.as_bytes() == b"navigate";
    request.method() == Method::GET && request.headers().get_all("Sec-Fetch-Mode").all(navigates)
}

/// Refuses what comes, or may come, from beyond this machine.
pub(super) fn check_local(app: &App, request: &HttpRequest) -> Result<(), ApiError> {
    let headers = request.headers();
    let by_proxy =
        |name: &HeaderName| local::PROXY_HEADERS.into_iter().find(|other| name.as_str().eq_ignore_ascii_case(other));
    let proxied = headers.keys().find_map(by_proxy);
    let is_local_host = |host: &HeaderValue| host.to_str().is_ok_and(local::is_local_host);
    let what = if let Some(name) = proxied {
        format!("this request came through a proxy ({name})")
    } else if !headers.get_all(header::HOST).all(is_local_host)
        || !request.uri().host().is_none_or(local::is_local_host)
    {
        "this request's Host is not this machine".into()
    } else if !headers.get_all(header::ORIGIN).all(|origin| app.cors.borrow().lets_in(origin)) {
        "this request is from a page of another site (Origin)".into()
    } else if !headers.contains_key(header::ORIGIN) && is_of_another_site(headers) && !follows_link(request) {
        "this request is from a page of another site (Sec-Fetch-Site)".into()
    } else {
        return Ok(());
    };
    let mend = "this gateway is open, and therefore only for its own machine: set auth.jwt, auth.keys or auth.anonymous \
                to configure authentication, or auth.mode = \"open\" to give every client all rights";
    Err(ApiError::new(Code::OpenOnlyLocally, format!("{what}; {mend}")))
}

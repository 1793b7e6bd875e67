//! What every request gets on its way in, and every answer on its way out: an id, the client's address, and what the
//! browser is told of other origins (CORS). Streams too: the head of a stream is written by the HTTP server.

use std::{
    net::IpAddr,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use actix_web::{
    Error, HttpMessage, HttpRequest,
    body::{BodySize, BoxBody, MessageBody},
    dev::{Payload, RequestHead, ServiceRequest, ServiceResponse},
    http::{
        ConnectionType, Method,
        header::{self, HeaderName, HeaderValue},
    },
    middleware::Next,
    web,
};
use bytes::Bytes;

use super::{
    App, LINGER,
    connection::{Body, Serving, SharedSocket},
    error::{ApiError, Code},
};
use crate::{
    auth::{Principal, local::host_name},
    config,
    limits::Caller,
};

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// No answer is anything but what it says: an event might look like a page.
const NOSNIFF: HeaderValue = HeaderValue::from_static("nosniff");
/// Longest request id that is taken over from a proxy, in bytes.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// What is known of a request, whatever it asks for.
#[derive(Clone)]
struct RequestContext {
    id: Arc<str>,
    address: Option<IpAddr>,
}

/// Middleware of the public listener: assigns the request id, calls the handler, adds CORS headers and `X-Request-Id`.
pub async fn public(
    app: web::Data<App>,
    mut request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let serving = begin(&mut request);
    let context = RequestContext::read(&app, request.request());
    let id = HeaderValue::from_str(&context.id).expect("a request id is letters, digits and -_.");
    let origin = request.headers().get(header::ORIGIN).cloned();
    request.extensions_mut().insert(context);
    let refusal = request.request().conn_data::<Rc<SharedSocket>>().and_then(|socket_share| socket_share.refusal());
    let checked = match refusal {
        Some(why) => Err(ApiError::new(Code::TooManyConnections, why)),
        None => check_head(request.head(), &app.limits.borrow()),
    };
    let mut response = match checked {
        Ok(()) => next.call(request).await?,
        Err(refusal) => {
            let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
            let refuse = if is_read { App::refuse_stream } else { App::refuse };
            let mut refused = refuse(&app, request.request(), &refusal);
            refused.head_mut().set_connection_type(ConnectionType::Close);
            request.into_response(refused)
        }
    };
    app.cors.borrow().mark(origin.as_ref(), response.headers_mut());
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, NOSNIFF);
    response.headers_mut().insert(REQUEST_ID, id);
    Ok(finish(response, serving).await)
}

/// Middleware of the admin listener: refuses a `Host` that is not an address, `localhost` or in `admin.hosts`. Otherwise a page
/// could have its own name resolve to this listener (DNS rebinding), and read what is here.
pub async fn admin(
    app: web::Data<App>,
    mut request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let serving = begin(&mut request);
    let of_headers = request.headers().get_all(header::HOST).map(|host| host.to_str().unwrap_or_default());
    let refused = of_headers.chain(request.uri().host()).find(|host| !names_admin(host, &app.admin_hosts));
    let mut response = match refused.map(ToOwned::to_owned) {
        None => next.call(request).await?,
        Some(host) => {
            tracing::warn!(host, "refused a request to the admin listener: its Host is not in admin.hosts");
            let detail = "operators ask by an IP address, localhost, or a name in admin.hosts";
            let refusal = ApiError::new(Code::HostNotAllowed, detail);
            app.count_refusal(&refusal);
            let response = refusal.response(request.request());
            request.into_response(response)
        }
    };
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, NOSNIFF);
    Ok(finish(response, serving).await)
}

/// Whether a `Host` is an address, `localhost`, or one of these names. No page can be served under an address that is
/// not its own.
fn names_admin(host: &str, names: &[String]) -> bool {
    let is_name = |name: &str| {
        let is_address = name.parse::<IpAddr>().is_ok();
        is_address || name.eq_ignore_ascii_case("localhost") || names.iter().any(|own| own.eq_ignore_ascii_case(name))
    };
    host_name(host).is_some_and(is_name)
}

/// Notes that a request is being answered, for as long as what comes back is kept.
fn begin(request: &mut ServiceRequest) -> Serving {
    let socket_share = socket_share(request.request());
    match request.take_payload() {
        Payload::None => socket_share.serve(false),
        payload => {
            request.set_payload(Payload::Stream {
                payload: Box::pin(Body { payload, socket_share: socket_share.clone() }),
            });
            socket_share.serve(true)
        }
    }
}

fn socket_share(request: &HttpRequest) -> Rc<SharedSocket> {
    request.conn_data::<Rc<SharedSocket>>().expect("every connection carries its shared socket").clone()
}

/// Hands an answer to the HTTP server, which may have to read on before, or to write on after it.
async fn finish(mut response: ServiceResponse<BoxBody>, serving: Serving) -> ServiceResponse<BoxBody> {
    if has_endless_rest(&response) {
        socket_share(response.request()).end_after(LINGER).await;
        response.response_mut().head_mut().set_connection_type(ConnectionType::Close);
    }
    match response.response().body().size() {
        BodySize::Stream => response.map_body(|_, body| BoxBody::new(Streaming { body, _serving: serving })),
        BodySize::None | BodySize::Sized(_) => response,
    }
}

/// A body that is not ready when its head is: its request is answered when it has ended.
struct Streaming {
    body: BoxBody,
    _serving: Serving,
}

impl MessageBody for Streaming {
    type Error = <BoxBody as MessageBody>::Error;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        Pin::new(&mut self.body).poll_next(cx)
    }
}

/// Whether everything behind this request's head is taken for its body, whatever length it says. A proxy that goes by the
/// length would have other people's requests published.
fn leaves_http(request: &RequestHead) -> bool {
    let mut upgrades = request.headers.get_all(header::UPGRADE);
    request.method == Method::CONNECT
        || upgrades.any(|to| to.as_bytes().trim_ascii().eq_ignore_ascii_case(b"websocket"))
}

/// Refuses heads that are of another protocol, or larger than they may be.
fn check_head(request: &RequestHead, limits: &config::Limits) -> Result<(), ApiError> {
    if leaves_http(request) {
        let detail = "this connection is not upgraded: streams are plain GETs";
        return Err(ApiError::new(Code::InvalidHeader, detail));
    }
    let target = request.uri.path_and_query().map_or(0, |target| target.as_str().len());
    if target > limits.target_bytes {
        return Err(ApiError::target_too_long(limits.target_bytes));
    }
    // With a colon, a blank and the end of its line.
    let headers: usize = request.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if target + headers > limits.head_bytes {
        let detail = format!("a request's line and headers have at most {} bytes", limits.head_bytes);
        return Err(ApiError::new(Code::HeadTooLarge, detail));
    }
    Ok(())
}

/// Whether what still arrives of the request's body is not wanted, and may never end: actix passes over the chunks
/// of a body that was not read for as long as they come.
fn has_endless_rest(response: &ServiceResponse) -> bool {
    let request = response.request();
    let was_read = request.method() == Method::POST && response.status().is_success();
    request.headers().contains_key(header::TRANSFER_ENCODING) && !was_read
}

/// The id of a request, if it is one of the public listener.
pub fn request_id(request: &HttpRequest) -> Option<Arc<str>> {
    request.extensions().get::<RequestContext>().map(|context| context.id.clone())
}

/// The address that a request is counted for, if any.
pub fn address(request: &HttpRequest) -> Option<IpAddr> {
    request.extensions().get::<RequestContext>().and_then(|context| context.address)
}

/// The address and principal that a request counts for in rate limits.
pub fn caller(request: &HttpRequest, principal: &Principal) -> Caller {
    let name = (!principal.is_anonymous()).then(|| principal.name());
    Caller::new(address(request), name.as_deref())
}

impl RequestContext {
    fn read(app: &App, request: &HttpRequest) -> RequestContext {
        let peer = request.peer_addr().map(|peer| peer.ip());
        let given = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(|id| is_request_id(id));
        let given = given.filter(|_| peer.is_some_and(|peer| app.proxies.trust(peer)));
        let id = given.map_or_else(new_request_id, Arc::from);
        RequestContext { id, address: peer.and_then(|peer| app.proxies.client(peer, request.headers())) }
    }
}

pub fn new_request_id() -> Arc<str> {
    format!("{:032x}", rand::random::<u128>()).into()
}

fn is_request_id(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !text.is_empty() && text.len() <= REQUEST_ID_BYTES_MAX && text.bytes().all(allowed)
}

//! The public listener: the whole URL space, from bytes on a socket to calls of the hub and the broker.

mod api;
mod authenticate;
mod batch;
pub mod client_address;
mod connection;
mod connection_limit;
pub mod cors;
mod debug;
pub mod error;
#[cfg(test)]
mod fuzz;
mod health;
mod middleware;
mod pages;
mod publication;
mod publish;
mod query;
mod subscribe;

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, TcpListener},
    sync::Arc,
    time::{Duration, Instant},
};

use actix_http::{HttpService, KeepAlive, error::DispatchError};
use actix_server::{Server, ServerBuilder};
use actix_service::{IntoServiceFactory, ServiceFactoryExt, fn_service, map_config};
use actix_web::{
    FromRequest, Handler, HttpRequest, HttpResponse, Resource, Responder, dev::AppConfig, http::Method,
    middleware::from_fn, web,
};
use futures_util::future::BoxFuture;
use tokio::{
    net::TcpStream,
    runtime::Handle,
    sync::{Semaphore, watch},
};
use tokio_util::sync::CancellationToken;

use self::{
    client_address::Proxies,
    connection::Connection,
    connection_limit::{Entry, REFUSAL_WITHIN},
    cors::Cors,
    error::{ApiError, Code},
    query::{Parameters, Query},
};
pub use self::{connection_limit::ConnectionLimit, health::Absence};
use crate::{
    auth::{Auth, Principal},
    broker::{Condition, Publication, Publish, PublishError, Published, SharedBroker},
    config::{self, Debug},
    delivery::Deliveries,
    event::EventId,
    hub::Hub,
    limits::{ClientPermit, Limits},
    memory::Memory,
    metrics::{Counted, Metrics},
    subject::Subject,
};

/// How long a connection is kept for the rest of a body that is not wanted, and for its own orderly end.
const LINGER: Duration = Duration::from_secs(2);

/// What the handlers share.
#[derive(Clone)]
pub struct App {
    pub auth: Auth,
    pub hub: Hub,
    pub broker: SharedBroker,
    /// Where events go in: the broker, or a worker's own way there.
    pub publisher: Arc<dyn Publish>,
    pub deliveries: Deliveries,
    pub metrics: Arc<Metrics>,
    /// Where streams and feeds run.
    pub runtime: Handle,
    /// Those that are in force now; they may change.
    pub limits: watch::Receiver<config::Limits>,
    /// What one address or principal may have of it.
    pub shares: Limits,
    /// What all clients together may have.
    pub memory: Memory,
    pub proxies: Proxies,
    pub debug: Debug,
    /// Under which the admin listener is asked, beside addresses.
    pub admin_hosts: Arc<[String]>,
    pub cors: watch::Receiver<Cors>,
    /// Permits for connections that are not streams.
    pub room: ConnectionLimit,
    /// The right to read a large line of a batch: one at a time, so that requests have all other threads.
    pub large_lines: Arc<Semaphore>,
    /// Cancelled when the node wants no more requests. It still serves those that come.
    pub leaving: CancellationToken,
    /// Cancelled when the node begins to drain.
    pub draining: CancellationToken,
    pub absence: Arc<Absence>,
    pub console: config::Console,
}

/// The URL space of the public listener. Matched by hand: actix's patterns are regular expressions, and one that finds
/// the subject costs as much as a tenth of a publish.
async fn route(app: web::Data<App>, request: HttpRequest, payload: web::Payload) -> HttpResponse {
    let names_subject = match request.path().strip_prefix("/events") {
        Some("") => false,
        Some(rest) if rest.starts_with('/') => true,
        _ => return pages::serve(&app, &request).unwrap_or_else(|error| app.refuse(&request, &error)),
    };
    // Streams and batches know much while they run; a publish need not pay for their room.
    match (request.method(), names_subject) {
        (&Method::POST, true) => publish::publish(app, request, payload).await,
        (&Method::POST, false) => Box::pin(batch::publish(app, request, payload)).await,
        (&Method::GET | &Method::HEAD, true) => Box::pin(subscribe::filter_in_path(app, request)).await,
        (&Method::GET | &Method::HEAD, false) => Box::pin(subscribe::filters_in_query(app, request)).await,
        _ if cors::is_preflight(request.head()) => cors::preflight(app, request).await,
        _ => app.refuse(&request, &ApiError::method_not_allowed("GET, HEAD, POST")),
    }
}

/// The URL space of the admin listener.
fn admin_routes(config: &mut web::ServiceConfig) {
    config
        .service(readable("/metrics", health::metrics))
        .service(readable("/health/live", async || HttpResponse::Ok().finish()))
        .service(readable("/health/ready", health::ready))
        .service(readable("/debug/streams", debug::streams))
        .service(readable("/debug/feeds", debug::feeds))
        .default_service(web::to(not_found));
}

/// A resource for GET and HEAD. The HTTP server leaves the body of the answer to a HEAD out.
fn readable<F, Arguments>(path: &str, handler: F) -> Resource
where
    F: Handler<Arguments>,
    Arguments: FromRequest + 'static,
    F::Output: Responder + 'static,
{
    const ALLOW: &str = "GET, HEAD";
    let refuse = async |request: HttpRequest| ApiError::method_not_allowed(ALLOW).response(&request);
    web::resource(path)
        .route(web::get().to(handler.clone()))
        .route(web::head().to(handler))
        .default_service(web::to(refuse))
}

/// Serves the public listener until the server is stopped.
///
/// # Errors
/// When the listener can't be used.
pub fn serve_public(app: App, listener: TcpListener) -> io::Result<Server> {
    let (most, request_head) = {
        let limits = app.limits.borrow();
        (limits.connections.saturating_add(limits.waiting_connections()), limits.request_head)
    };
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let builder = ServerBuilder::new()
        .workers(workers)
        // With those that wait for room, or to be refused. The others wait in the kernel's queue until some of these have
        // gone, which takes seconds at most.
        .max_concurrent_connections((most / workers).max(1))
        .disable_signals()
        .shutdown_timeout(5);
    let stopping = builder.graceful_shutdown_signal();
    let service = move || {
        let shared = Arc::new(app.clone());
        let data = {
            let app = app.clone();
            move || app.clone().of_worker()
        };
        let service =
            actix_web::App::new().data_factory(data).default_service(web::to(route)).wrap(from_fn(middleware::public));
        let stopping = stopping.clone();
        let stopped = move || {
            let stopping = stopping.clone();
            async move { stopping.notified().await }
        };
        let http = HttpService::build()
            // For how long is the connection's to say: actix knows no bound once a byte of a head has come.
            .keep_alive(KeepAlive::Os)
            .client_request_timeout(request_head)
            // After an early refusal, what still arrives is read for so long: a reset would overtake the answer.
            .client_disconnect_timeout(LINGER)
            .graceful_shutdown_signal(stopped)
            .on_connect_ext(|connection: &Connection, data| {
                data.insert(connection.socket_share());
            })
            .h1(map_config(service.into_factory().map_err(|error| error.error_response()), |_| AppConfig::default()));
        fn_service(move |socket: TcpStream| {
            let app = shared.clone();
            async move {
                let peer = socket.peer_addr().map_err(DispatchError::Io)?;
                let connection = app.clone().let_in(socket, peer.ip()).await;
                let connection = connection.ok_or(DispatchError::Io(io::ErrorKind::ConnectionRefused.into()));
                connection.map(|connection| (connection, Some(peer)))
            }
        })
        .and_then(http)
    };
    Ok(builder.listen("public", listener, service)?.run())
}

/// Serves the admin listener until the server is stopped.
///
/// # Errors
/// When the listener can't be used.
pub fn serve_admin(app: App, listener: TcpListener, connections: usize) -> io::Result<Server> {
    Code::ALL.iter().for_each(|code| drop(app.metrics.refusals.with_label_values(&[code.as_str()])));
    let room = Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS)));
    let service = move || {
        let service = actix_web::App::new()
            .app_data(web::Data::new(app.clone()))
            .configure(admin_routes)
            .wrap(from_fn(middleware::admin));
        let http = HttpService::build()
            .keep_alive(KeepAlive::Os)
            .client_request_timeout(app.limits.borrow().request_head)
            .client_disconnect_timeout(LINGER)
            .on_connect_ext(|connection: &Connection, data| {
                data.insert(connection.socket_share());
            })
            .h1(map_config(service.into_factory().map_err(|error| error.error_response()), |_| AppConfig::default()));
        let (app, room) = (Arc::new(app.clone()), room.clone());
        fn_service(move |socket: TcpStream| {
            // One that waited would keep a file open: what is too much is closed.
            let permit = room.clone().try_acquire_owned();
            let connection = socket.peer_addr().and_then(|peer| {
                let permit = permit.map_err(|_| io::ErrorKind::ConnectionRefused)?;
                Ok((Connection::new(socket, permit, app.clone()), Some(peer)))
            });
            async { connection.map_err(DispatchError::Io) }
        })
        .and_then(http)
    };
    Ok(ServerBuilder::new().workers(1).disable_signals().listen("admin", listener, service)?.run())
}

async fn not_found(app: web::Data<App>, request: HttpRequest) -> HttpResponse {
    app.refuse(&request, &ApiError::new(Code::NotFound, "events are read and published at /events/{subject}"))
}

/// What became of an event that was handed to the broker.
type Receipt = BoxFuture<'static, Result<Published, ApiError>>;

/// An event that is stored only if something holds.
struct Conditional {
    condition: Condition,
    /// Its subject, if the publisher may read that.
    readable: Option<Subject>,
    broker: SharedBroker,
}

/// How long a publisher waits at most to be told of the event on which a condition failed.
const LOOK_WITHIN: Duration = Duration::from_secs(1);

async fn explain(error: PublishError, conditional: Option<Conditional>) -> ApiError {
    let (PublishError::ConditionFailed, Some(Conditional { condition, readable, broker })) = (&error, conditional)
    else {
        return error.into();
    };
    let last = async {
        let known = broker.last(&[readable?]).await.ok()??;
        let sequence = known.sequences.first().copied().filter(|sequence| *sequence > 0)?;
        Some(EventId { epoch: known.epoch, sequence })
    };
    // Boxed: few publishes need it, and all would make room for it.
    let last = tokio::time::timeout(LOOK_WITHIN, Box::pin(last)).await.ok().flatten();
    ApiError::condition_failed(condition, last)
}

fn count_publish(metrics: &Metrics, outcome: Result<&Published, &PublishError>) {
    let label = match outcome {
        Ok(_) => "stored",
        Err(PublishError::Unavailable) => "unavailable",
        Err(PublishError::OutcomeUnknown) => "unknown",
        Err(PublishError::ConditionFailed) => "condition",
        Err(PublishError::KeyReused) => "key",
        Err(PublishError::Refused(_)) => "refused",
    };
    metrics.publishes.with_label_values(&[label]).inc();
}

impl App {
    /// With a publisher of the current thread's own, where that makes a difference.
    async fn of_worker(mut self) -> Result<App, Infallible> {
        match self.broker.publisher().await {
            Ok(Some(own)) => self.publisher = own.into(),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "could not open a publish connection for this worker; using the shared one")
            }
        }
        Ok(self)
    }

    /// The query of `request`, in which these parameters may occur, and the token where it is taken from there.
    fn query(&self, request: &HttpRequest, parameters: &Parameters) -> Result<Query, ApiError> {
        Query::parse(request, parameters, self.auth.takes_query_token().then_some(authenticate::TOKEN))
    }

    fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Resolves when the node begins to drain.
    async fn drained(&self) {
        self.draining.cancelled().await;
    }

    /// Lets one more connection of this peer in, if only to be refused. `None` if it is to be closed at once.
    async fn let_in(self: Arc<App>, socket: TcpStream, peer: IpAddr) -> Option<Connection> {
        let place = self.place_for(peer);
        let (entry, why) = match place.is_some() {
            true => (self.room.enter().await, "the node has as many connections as it takes (limits.connections)"),
            false => {
                (self.room.refuse(), "this address has as many connections as it may (limits.address_connections)")
            }
        };
        if let Some(Entry::Served(permit)) = entry {
            let counted = Counted::in_gauge(&self.metrics.connections);
            return Some(Connection::new(socket, (place, permit, counted), self));
        }
        self.metrics.connections_refused.inc();
        let Some(Entry::Refused(permit)) = entry else { return None };
        let connection = Connection::new(socket, (place, permit), self);
        connection.socket_share().refuse_within(REFUSAL_WITHIN, why).await;
        Some(connection)
    }

    /// A place for one more connection of this peer, if it may have one. A proxy's are those of all its clients.
    fn place_for(&self, peer: IpAddr) -> Option<ClientPermit> {
        if self.proxies.trust(peer) { Some(ClientPermit::uncounted()) } else { self.shares.open_connection(peer) }
    }

    /// Hands an event of this principal's to the broker. What comes back resolves once it is stored, or is not.
    async fn publish(&self, principal: &Principal, publication: Publication) -> Result<Receipt, ApiError> {
        let (began, metrics, bytes) = (Instant::now(), self.metrics.clone(), publication.payload.len());
        let conditional = publication.condition.map(|condition| Conditional {
            condition,
            readable: principal.may_subscribe(&publication.subject.filter()).then(|| publication.subject.clone()),
            broker: self.broker.clone(),
        });
        let acknowledgement = match self.publisher.publish(publication).await {
            Ok(acknowledgement) => acknowledgement,
            Err(error) => {
                count_publish(&metrics, Err(&error));
                return Err(explain(error, conditional).await);
            }
        };
        Ok(Box::pin(async move {
            let outcome = acknowledgement.await;
            metrics.publish_seconds.observe(began.elapsed().as_secs_f64());
            count_publish(&metrics, outcome.as_ref());
            let published = match outcome {
                Ok(published) => published,
                Err(error) => return Err(explain(error, conditional).await),
            };
            if !published.duplicate {
                metrics.publish_bytes.inc_by(bytes as u64);
            }
            Ok(published)
        }))
    }

    fn count_refusal(&self, error: &ApiError) {
        self.metrics.refusals.with_label_values(&[error.code.as_str()]).inc();
    }

    /// Counts a refusal and logs it with its request id: at `info` where the client is not the cause.
    fn note_refusal(&self, request: &HttpRequest, error: &ApiError) {
        self.count_refusal(error);
        let (code, request_id) = (error.code.as_str(), middleware::request_id(request));
        let request_id = request_id.as_deref();
        match error.code.status().is_server_error() {
            true => tracing::info!(code, request_id, "request refused"),
            false => tracing::debug!(code, request_id, "request refused"),
        }
    }

    fn refuse(&self, request: &HttpRequest, error: &ApiError) -> HttpResponse {
        self.note_refusal(request, error);
        error.response(request)
    }

    fn refuse_stream(&self, request: &HttpRequest, error: &ApiError) -> HttpResponse {
        self.note_refusal(request, error);
        error.stream_response(request, self.deliveries.retry())
    }
}

/// Parses a request's path and query as the handlers do. For `fuzz/`.
#[cfg(fuzzing)]
pub fn fuzzing_target(text: &str) {
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    if let Ok(subject) = query::decode(path) {
        let _ = (crate::subject::Subject::parse(&subject), crate::subject::Filter::parse(&subject));
    }
    let parameters = query::Parameters { known: &["subject", "from", "format", "lastEventId"], advice: &[] };
    if let Ok(query) = query::Query::read(query, &parameters, None) {
        query.all("subject").for_each(|subject| drop(crate::subject::Filter::parse(subject)));
        query.all("from").for_each(|from| drop(subscribe::parse_start(from)));
    }
}

/// Parses a line of a batch. For `fuzz/`.
#[cfg(fuzzing)]
pub fn fuzzing_line(line: &[u8]) {
    let _ = publication::of_line(line, 1000);
}

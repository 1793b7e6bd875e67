//! Puts a gateway together, and takes it apart in order. Two of them can live in one process.

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
};

use actix_server::ServerHandle;
use tokio::{
    net::TcpSocket,
    runtime::Handle,
    sync::{Semaphore, oneshot, watch},
};
use tokio_util::sync::CancellationToken;

use crate::{
    auth::{self, Auth},
    broker::{
        Broker, SharedBroker,
        embedded::Embedded,
        nats::{self, Nats},
    },
    config::{self, Config},
    delivery::Deliveries,
    http::{
        self,
        client_address::Proxies,
        cors::{Cors, Unlisted},
    },
    hub::{self, Hub},
    limits::Limits,
    memory::Memory,
    metrics::Metrics,
    panics,
    shutdown::Tasks,
};

/// A log directive without which actix would log an error for every socket that leaves it for a stream.
pub const NOISE_OFF: &str = "actix_http::h1=off";

/// A gateway that serves.
pub struct Gateway {
    pub listen: SocketAddr,
    pub admin_listen: SocketAddr,
    /// One line for people about the broker.
    pub broker: String,
    /// One line for people that says which clients are admitted, and whether that is every client.
    pub access: String,
    pub is_open: bool,
    auth: Auth,
    auth_tasks: Tasks,
    config: Config,
    metrics: Arc<Metrics>,
    leaving: CancellationToken,
    limits: watch::Sender<config::Limits>,
    shares: Limits,
    memory: Memory,
    cors: watch::Sender<Cors>,
    deliveries: Deliveries,
    draining: CancellationToken,
    tasks: Tasks,
    servers: Servers,
}

/// Why a gateway can't start, in words for the operator.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("can't listen on {address} ({key}): {source}")]
    Listen { key: &'static str, address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Auth(#[from] auth::StartError),
    #[error(transparent)]
    Nats(#[from] nats::StartError),
    #[error("the HTTP server did not start: {0}")]
    Server(io::Error),
}

/// What a gateway that can't start needs, as far as exit codes tell it apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Other settings.
    Settings,
    /// A file that it can read.
    File,
    /// A broker that can be reached.
    Broker,
    /// More of this machine: a free address, another thread.
    Machine,
    /// Another server or stream than the one that is there.
    Fitness,
    /// A user that the broker lets in.
    Permission,
}

impl StartError {
    pub fn need(&self) -> Need {
        match self {
            StartError::Listen { .. } | StartError::Server(_) => Need::Machine,
            StartError::Auth(auth::StartError::Unreadable { .. }) => Need::File,
            StartError::Auth(_) => Need::Settings,
            StartError::Nats(error) => match error {
                nats::StartError::Address(_) => Need::Settings,
                nats::StartError::Credentials { .. } => Need::File,
                nats::StartError::Unreachable { .. } | nats::StartError::NoJetStream { .. } => Need::Broker,
                nats::StartError::Denied { .. } | nats::StartError::Silent { .. } => Need::Permission,
                nats::StartError::TooOld { .. }
                | nats::StartError::Payload { .. }
                | nats::StartError::NoStream { .. }
                | nats::StartError::Mismatch { .. }
                | nats::StartError::Refused { .. } => Need::Fitness,
            },
        }
    }
}

impl Gateway {
    /// Starts a gateway, whose streams and feeds run on the current tokio runtime and whose HTTP server has threads of
    /// its own.
    ///
    /// # Errors
    /// When an address is taken, or the broker can't be used as it is.
    pub async fn start(config: Config) -> Result<Gateway, StartError> {
        panics::watch();
        let metrics = Arc::new(Metrics::new());
        let auth_tasks = Tasks::new(Handle::current());
        let auth = Auth::start(&config.auth, config.listen, metrics.clone(), &auth_tasks).await?;
        let public = bind("listen", config.listen, config.limits.backlog)?;
        let admin = bind("admin_listen", config.admin_listen, config.limits.backlog)?;
        check_backlog(config.limits.backlog);
        let memory = Memory::new(config.limits.memory);
        let broker: SharedBroker = if config.nats.url.is_empty() {
            Arc::new(Embedded::new(&config.embedded, &config.history, &memory))
        } else {
            Arc::new(Nats::connect(&config.nats, &config.history, config.limits.event_bytes, &memory).await?)
        };
        let tasks = Tasks::new(Handle::current());
        let settings = hub::Settings {
            feed: config.feed.clone(),
            history: config.history.clone(),
            audit: config.audit.clone(),
            write_bytes: config.sse.write_bytes,
            // As it arrives, and as it is kept. A page may be one event.
            read_bytes: 2 * config.history.page_bytes.max(config.limits.event_bytes),
            proof: hub::Proof::Required,
        };
        let hub = Hub::start(broker.clone(), settings, memory.clone(), metrics.clone(), tasks.clone());
        let (leaving, draining) = (CancellationToken::new(), CancellationToken::new());
        let limits = watch::Sender::new(config.limits.clone());
        let deliveries = Deliveries::new(&config, limits.subscribe(), memory.clone(), metrics.clone(), tasks.clone());
        let (listen, admin_listen) = (address_of("listen", &public)?, address_of("admin_listen", &admin)?);
        let (access, is_open) = (auth.describe(), auth.is_open());
        let shares = Limits::new(&config.limits);
        let cors = watch::Sender::new(cors(&config, &auth));
        let app = http::App {
            auth: auth.clone(),
            hub,
            broker: broker.clone(),
            publisher: broker.clone(),
            deliveries: deliveries.clone(),
            metrics: metrics.clone(),
            runtime: Handle::current(),
            limits: limits.subscribe(),
            shares: shares.clone(),
            memory: memory.clone(),
            proxies: Proxies::new(config.trusted_proxies.clone(), config.address_header),
            debug: config.debug.clone(),
            admin_hosts: config.admin.hosts.clone().into(),
            cors: cors.subscribe(),
            room: http::ConnectionLimit::new(&config.limits),
            large_lines: Arc::new(Semaphore::new(1)),
            leaving: leaving.clone(),
            draining: draining.clone(),
            absence: Arc::new(http::Absence::bearable_for(config.nats.away_after)),
            console: config.console.clone(),
        };
        let servers = Servers::start(app, public, (admin, config.admin.connections)).await?;
        Ok(Gateway {
            listen,
            admin_listen,
            broker: broker.describe(),
            access,
            is_open,
            auth,
            auth_tasks,
            config,
            metrics,
            leaving,
            limits,
            shares,
            memory,
            cors,
            deliveries,
            draining,
            tasks,
            servers,
        })
    }

    /// What [`Gateway::start`] would find: one line each for people: which clients are admitted, and the broker. Takes no
    /// address and changes nothing.
    ///
    /// # Errors
    /// The same, but for addresses.
    pub async fn check(config: &Config) -> Result<[String; 2], StartError> {
        let tasks = Tasks::new(Handle::current());
        let auth = Auth::start(&config.auth, config.listen, Arc::new(Metrics::new()), &tasks).await?;
        tasks.end().await;
        let broker = if config.nats.url.is_empty() {
            Embedded::new(&config.embedded, &config.history, &Memory::new(0)).describe()
        } else {
            Nats::look(&config.nats, config.limits.event_bytes).await?
        };
        Ok([format!("access: {}", auth.describe()), format!("broker: {broker}")])
    }

    /// Takes what [`Config::changes_while_it_runs`] out of another configuration, without a stream noticing.
    ///
    /// # Errors
    /// When it can't be used. Nothing has changed then.
    pub async fn reload(&self, config: &Config) -> Result<(), StartError> {
        let auth = Auth::start(&config.auth, self.config.listen, self.metrics.clone(), &self.auth_tasks).await?;
        self.auth.replace(&auth, &config.auth)?;
        self.cors.send_replace(cors(config, &auth));
        // How large an event may be was agreed with the broker; for how many connections there is room, with the system.
        let config::Limits { event_bytes, connections, .. } = *self.limits.borrow();
        let limits = config::Limits { event_bytes, connections, ..config.limits.clone() };
        self.shares.replace(&limits);
        self.limits.send_replace(limits);
        self.memory.set_limit(config.limits.memory);
        Ok(())
    }

    /// One line for people that says which clients are admitted now.
    pub fn access(&self) -> String {
        self.auth.describe()
    }

    /// Resolves if the HTTP servers end without being told to: what is left is no gateway.
    pub async fn failed(&mut self) {
        let Err(_ended) = (&mut self.servers.ended).await;
    }

    /// Says that it is not ready and waits for `drain.notice`. Then takes no more connections (so that a proxy tries the
    /// next node), ends every stream at its own moment, finishes publishes, and ends everything else; within
    /// `drain.limit`.
    pub async fn drain(self) {
        self.leaving.cancel();
        tokio::time::sleep(self.config.drain.notice).await;
        self.draining.cancel();
        let orderly = async {
            tokio::join!(self.servers.public.stop(true), self.deliveries.drain());
        };
        if tokio::time::timeout(self.config.drain.limit, orderly).await.is_err() {
            tracing::warn!("shutdown timed out; aborting the remaining connections");
            self.servers.public.stop(false).await;
        }
        self.servers.admin.stop(false).await;
        self.tasks.end().await;
        self.auth_tasks.end().await;
    }
}

/// The HTTP servers, on threads of their own: handlers there never wait for streams, nor streams for them.
struct Servers {
    public: ServerHandle,
    admin: ServerHandle,
    /// Resolves once their thread has ended, whatever the reason.
    ended: oneshot::Receiver<Infallible>,
}

impl Servers {
    async fn start(
        app: http::App,
        public: TcpListener,
        (admin, admin_connections): (TcpListener, usize),
    ) -> Result<Servers, StartError> {
        let (started, starting) = oneshot::channel();
        let (running, ended) = oneshot::channel();
        let serve = move || {
            let _running = running;
            actix_web::rt::System::new().block_on(async move {
                let servers = http::serve_admin(app.clone(), admin, admin_connections)
                    .and_then(|admin| Ok((http::serve_public(app, public)?, admin)));
                match servers {
                    Err(error) => drop(started.send(Err(error))),
                    Ok((public, admin)) => {
                        // If nobody waits any more, nobody stops them either: the process is ending.
                        let _ = started.send(Ok((public.handle(), admin.handle())));
                        let _ = tokio::join!(public, admin);
                    }
                }
            });
        };
        std::thread::Builder::new().name("http".into()).spawn(serve).map_err(StartError::Server)?;
        let handles = starting.await.unwrap_or_else(|_| Err(io::Error::other("its thread ended")));
        let (public, admin) = handles.map_err(StartError::Server)?;
        Ok(Servers { public, admin, ended })
    }
}

/// What pages of other origins may do.
fn cors(config: &Config, auth: &Auth) -> Cors {
    let unlisted = if auth.is_local_only() { Unlisted::Loopback } else { Unlisted::Anyone };
    Cors::new(&config.cors, unlisted)
}

/// A listener for whose connections the kernel keeps room until they are accepted.
fn bind(key: &'static str, address: SocketAddr, backlog: usize) -> Result<TcpListener, StartError> {
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(u32::try_from(backlog).unwrap_or(u32::MAX))?.into_std()
    };
    listen().map_err(|source| StartError::Listen { key, address, source })
}

/// Says so where the kernel keeps less room than that, without an error.
fn check_backlog(backlog: usize) {
    let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").ok().and_then(|text| text.trim().parse().ok());
    if let Some(most) = most.filter(|most: &usize| *most < backlog) {
        tracing::warn!(
            "limits.backlog is {backlog}, but this machine lets only {most} connections wait (net.core.somaxconn): in a storm \
             of more, clients wait for seconds"
        );
    }
}

fn address_of(key: &'static str, listener: &TcpListener) -> Result<SocketAddr, StartError> {
    let address = SocketAddr::from(([0, 0, 0, 0], 0));
    listener.local_addr().map_err(|source| StartError::Listen { key, address, source })
}

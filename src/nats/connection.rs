//! One connection to one server: TCP, TLS, INFO, CONNECT, and the first PONG.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::StreamExt;
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf},
    net::TcpStream,
    time::Instant,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{ClientConfig, RootCertStore, pki_types::ServerName},
};
use tokio_util::codec::FramedRead;

use super::{
    codec::{self, Codec, CodecError, READ_BYTES, ServerInfo, ServerOp},
    credentials::Credentials,
    server_pool::ServerAddress,
};

/// Server, TLS, credentials and name of a connection.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    pub servers: Vec<ServerAddress>,
    /// What the connection is called where a server lists its connections.
    pub name: String,
    pub user: Option<(String, String)>,
    pub token: Option<String>,
    pub credentials: Option<Credentials>,
    /// How long one server may take to let the client in.
    pub timeout: Duration,
}

/// Why there is no connection, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error("it said nothing for {0:?}")]
    Silent(Duration),
    #[error("it closed the connection")]
    Closed,
    #[error("it closed the connection: {0}")]
    Refused(String),
    #[error("it is about to stop")]
    LameDuck,
    #[error("what it said is not NATS: {0}")]
    Protocol(&'static str),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<CodecError> for ConnectionError {
    fn from(error: CodecError) -> ConnectionError {
        match error {
            CodecError::Protocol(what) => ConnectionError::Protocol(what),
            CodecError::Io(error) => ConnectionError::Io(error),
        }
    }
}

/// A connection that a server has accepted.
pub(super) struct Established {
    pub server: ServerAddress,
    pub info: Box<ServerInfo>,
    pub reader: Reader<ReadHalf<Box<dyn Socket>>>,
    pub writer: WriteHalf<Box<dyn Socket>>,
}

pub(super) type Reader<S> = FramedRead<Heard<S>, Codec>;

pub(super) trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Socket for S {}

/// Connects to `server`, with a bound.
pub(super) async fn connect(server: &ServerAddress, options: &ConnectOptions) -> Result<Established, ConnectionError> {
    let connected = tokio::time::timeout(options.timeout, enter(server, options)).await;
    connected.unwrap_or(Err(ConnectionError::Silent(options.timeout)))
}

async fn enter(server: &ServerAddress, options: &ConnectOptions) -> Result<Established, ConnectionError> {
    let socket = TcpStream::connect((&*server.host, server.port)).await?;
    socket.set_nodelay(true)?;
    let mut plain = reader(socket);
    let info = loop {
        match next(&mut plain).await? {
            ServerOp::Info(info) => break info,
            other => unasked(other)?,
        }
    };
    let (socket, read): (Box<dyn Socket>, _) = match info.tls_required || server.tls {
        // What came before the handshake came from anyone.
        true => (Box::new(secured(server, plain.into_inner().socket).await?), None),
        false => {
            let parts = plain.into_parts();
            (Box::new(parts.io.socket), Some(parts.read_buf))
        }
    };
    let (read_half, mut writer) = tokio::io::split(socket);
    let mut reader = reader(read_half);
    if let Some(read) = read {
        reader.read_buffer_mut().extend_from_slice(&read);
    }
    writer.write_all(&[&options.connect(&info.nonce)[..], codec::PING].concat()).await?;
    writer.flush().await?;
    loop {
        match next(&mut reader).await? {
            ServerOp::Pong => return Ok(Established { server: server.clone(), info, reader, writer }),
            other => unasked(other)?,
        }
    }
}

impl ConnectOptions {
    /// The CONNECT command for a server that gave this to be signed.
    fn connect(&self, nonce: &str) -> Vec<u8> {
        codec::connect(&json!({
            "name": self.name,
            "lang": "rust",
            "version": env!("CARGO_PKG_VERSION"),
            "verbose": false,
            "pedantic": false,
            // Tells of the cluster's servers while it lasts.
            "protocol": 1,
            "headers": true,
            "no_responders": true,
            "user": self.user.as_ref().map(|(user, _)| user),
            "pass": self.user.as_ref().map(|(_, password)| password),
            "auth_token": self.token,
            "jwt": self.credentials.as_ref().map(|credentials| &credentials.jwt),
            "sig": self.credentials.as_ref().and_then(|credentials| credentials.signature(nonce)),
        }))
    }
}

/// What a server says before it lets a client in, and was not asked for.
fn unasked(op: ServerOp) -> Result<(), ConnectionError> {
    match op {
        ServerOp::Err(why) => Err(ConnectionError::Refused(why)),
        ServerOp::Info(_) | ServerOp::Message(_) | ServerOp::Ping | ServerOp::Pong | ServerOp::Ok => Ok(()),
    }
}

/// TLS with the authorities that the system trusts, or `SSL_CERT_FILE` names: as async-nats does it.
async fn secured(server: &ServerAddress, socket: TcpStream) -> io::Result<TlsStream<TcpStream>> {
    let mut trusted = RootCertStore::empty();
    trusted.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let config = ClientConfig::builder().with_root_certificates(trusted).with_no_client_auth();
    let name = ServerName::try_from(server.host.clone()).map_err(io::Error::other)?;
    TlsConnector::from(std::sync::Arc::new(config)).connect(name, socket).await
}

pub(super) fn reader<S: AsyncRead>(socket: S) -> Reader<S> {
    FramedRead::with_capacity(Heard { socket, at: Instant::now() }, Codec, READ_BYTES)
}

/// The next thing that the server says. On cancellation nothing is lost.
pub(super) async fn next<S: AsyncRead + Unpin>(reader: &mut Reader<S>) -> Result<ServerOp, ConnectionError> {
    match reader.next().await {
        Some(op) => Ok(op?),
        None => Err(ConnectionError::Closed),
    }
}

/// Remembers when bytes came last: a large message may be long on its way.
pub(super) struct Heard<S> {
    socket: S,
    pub at: Instant,
}

impl<S: AsyncRead + Unpin> AsyncRead for Heard<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.at = Instant::now();
        }
        Poll::Ready(Ok(()))
    }
}

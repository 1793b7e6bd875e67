//! A call: one connection to one server that has let us in.

use std::{io, time::Duration};

use async_nats::ServerAddr;
use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{ClientConfig, RootCertStore, pki_types::ServerName},
};

use super::{
    entrance::{Entrance, PING},
    wire::{self, Garbled, Info, Operation},
};

/// Two pings must have been answered in this time.
const SILENCE: Duration = PING.saturating_mul(2).saturating_add(Duration::from_secs(1));
/// The most that is read at once.
const READ_BYTES: usize = 64 * 1024;

/// Why a call came to nothing, or ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error("it said nothing for {0:?}")]
    Silent(Duration),
    #[error("it hung up")]
    HungUp,
    #[error(transparent)]
    Broken(#[from] io::Error),
    #[error(transparent)]
    Garbled(#[from] Garbled),
    #[error("it refused: {0}")]
    Refused(String),
    #[error("it is about to stop")]
    LameDuck,
}

pub(super) struct Call {
    pub server: ServerAddr,
    pub info: Info,
    pub ear: Ear<Box<dyn Socket>>,
}

pub(super) trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Socket for S {}

impl Call {
    /// Connects and enters, for `purpose`.
    pub async fn place(server: &ServerAddr, entrance: &Entrance, purpose: &str) -> Result<Call, CallError> {
        let entered = tokio::time::timeout(entrance.timeout, Call::enter(server, entrance, purpose)).await;
        entered.unwrap_or(Err(CallError::Silent(entrance.timeout)))
    }

    async fn enter(server: &ServerAddr, entrance: &Entrance, purpose: &str) -> Result<Call, CallError> {
        let socket = TcpStream::connect((server.host(), server.port())).await?;
        socket.set_nodelay(true)?;
        let mut ear = Ear::new(socket);
        let info = loop {
            match ear.next().await? {
                Operation::Info(info) => break info,
                other => unasked(other)?,
            }
        };
        let mut ear: Ear<Box<dyn Socket>> = if info.tls_required || server.tls_required() {
            // What came before the handshake came from anyone.
            Ear::new(Box::new(secured(server, ear.socket).await?))
        } else {
            Ear { socket: Box::new(ear.socket), come: ear.come }
        };
        let introduction = entrance.introduction(purpose, &info.nonce);
        ear.socket.write_all(&[&wire::connect(&introduction), wire::PING].concat()).await?;
        ear.socket.flush().await?;
        loop {
            match ear.next().await? {
                Operation::Pong => return Ok(Call { server: server.clone(), info, ear }),
                other => unasked(other)?,
            }
        }
    }
}

/// What a server says before it lets somebody in, and was not asked for.
fn unasked(operation: Operation) -> Result<(), CallError> {
    match operation {
        Operation::Error(why) => Err(CallError::Refused(why)),
        Operation::Info(_) | Operation::Message(_) | Operation::Ping | Operation::Pong | Operation::Ok => Ok(()),
    }
}

/// TLS with whom the system trusts, or `SSL_CERT_FILE` names: as async-nats does it.
async fn secured(server: &ServerAddr, socket: TcpStream) -> io::Result<TlsStream<TcpStream>> {
    let mut trusted = RootCertStore::empty();
    trusted.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let config = ClientConfig::builder().with_root_certificates(trusted).with_no_client_auth();
    let name = ServerName::try_from(server.host().to_owned()).map_err(io::Error::other)?;
    TlsConnector::from(std::sync::Arc::new(config)).connect(name, socket).await
}

/// Hears what a server says.
pub(super) struct Ear<S> {
    socket: S,
    /// What has come and was not understood yet.
    come: BytesMut,
}

impl<S: AsyncRead + Unpin> Ear<S> {
    fn new(socket: S) -> Ear<S> {
        Ear { socket, come: BytesMut::new() }
    }

    /// The next operation. On cancellation nothing is lost.
    pub async fn next(&mut self) -> Result<Operation, CallError> {
        loop {
            if let Some(operation) = wire::next(&mut self.come)? {
                return Ok(operation);
            }
            self.come.reserve(READ_BYTES);
            let read = tokio::time::timeout(SILENCE, self.socket.read_buf(&mut self.come)).await;
            if read.map_err(|_| CallError::Silent(SILENCE))?? == 0 {
                return Err(CallError::HungUp);
            }
        }
    }
}

impl Ear<Box<dyn Socket>> {
    /// For whoever speaks while somebody else listens.
    pub fn split(self) -> (Ear<impl AsyncRead + Unpin>, impl AsyncWrite + Unpin) {
        let (hears, says) = tokio::io::split(self.socket);
        (Ear { socket: hears, come: self.come }, says)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_server_that_answers_no_pings_is_given_up() {
        let (here, mut there) = tokio::io::duplex(64);
        let mut ear = Ear::new(here);
        there.write_all(b"PING\r\nPI").await.unwrap();

        assert!(matches!(ear.next().await, Ok(Operation::Ping)));
        assert!(matches!(ear.next().await, Err(CallError::Silent(SILENCE))));
        there.write_all(b"NG\r\nNG\r\n").await.unwrap();
        assert!(matches!(ear.next().await, Ok(Operation::Ping)));
        assert!(matches!(ear.next().await, Err(CallError::Garbled(_))));
        drop(there);
        assert!(matches!(Ear::new(&b""[..]).next().await, Err(CallError::HungUp)));
    }
}

//! A client and its connection.
//!
//! [`Client`] is a handle that any number of tasks share. [`Connection`] is driven by one: [`Connection::next`] reads,
//! writes, asks whether the server is still there and connects again, and returns everything that happens in the order
//! in which it happened. There is no task behind them: the task that drives a connection sees its events and its end.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncWriteExt, ReadHalf, WriteHalf},
    sync::oneshot,
    time::{Instant, Interval, MissedTickBehavior},
};
use tokio_util::codec::Decoder;

use super::{
    codec::{Codec, Message, ServerOp},
    connection::{self, ConnectOptions, ConnectionError, Established, Reader, Socket},
    server_pool::{ServerAddress, ServerPool},
    subscriptions::{Confirmed, Subscriptions},
};
use crate::backoff::Backoff;

/// How often the server is asked whether it is still there.
pub const PING: Duration = Duration::from_secs(1);
/// A server from which nothing has come for so long is given up for another.
pub const SILENCE: Duration = Duration::from_secs(4);
/// A connection that lasted so long was a good one: if it ends, the next is made at once.
const STEADY: Duration = Duration::from_secs(5);
/// Frames that are taken from what was read before anything is written or read again.
const FRAMES_AT_ONCE: usize = 64;

/// Subscribes and publishes. Cheap to clone.
#[derive(Clone)]
pub struct Client(Arc<Shared>);

struct Shared {
    options: ConnectOptions,
    subscriptions: Subscriptions,
    began: Instant,
    /// When the connection was last driven, in milliseconds since `began`.
    driven: AtomicU64,
    connections: AtomicU64,
}

/// Ends a subscription when it is dropped.
pub struct Subscription {
    client: Client,
    sid: u64,
}

/// A subscription that resolves to whether the server has handled it.
pub type Subscribing = (Subscription, oneshot::Receiver<()>);

/// What happens on a connection.
#[derive(Debug)]
pub enum Event {
    /// A server has let the client in. It has not handled the subscriptions yet.
    Connected(ServerAddress),
    /// The server has handled all subscriptions.
    Ready,
    Message(Message),
    /// Subscriptions that had been refused are granted again: messages were missed.
    Restored,
    /// The server complains, as it says.
    ServerError(String),
    /// The connection has ended. Another one is made.
    Disconnected(ConnectionError),
    /// No server lets the client in, for this reason, which is the last one's. It is tried again.
    Unreachable(ConnectionError),
    /// Time has passed, and nothing has happened.
    Idle,
}

impl Client {
    /// `standing` subjects are subscribed to on each connection before all others, with numbers from 0.
    pub fn new(options: ConnectOptions, standing: Vec<String>) -> Client {
        let subscriptions = Subscriptions::new(standing);
        let (driven, connections) = (AtomicU64::new(0), AtomicU64::new(0));
        Client(Arc::new(Shared { options, subscriptions, began: Instant::now(), driven, connections }))
    }

    /// The connection, to be driven. One that was made before counts no more, whatever becomes of it.
    pub fn connection(&self) -> Connection {
        self.drive();
        let number = self.0.connections.fetch_add(1, Ordering::Relaxed) + 1;
        self.0.subscriptions.begin(number);
        Connection {
            number,
            client: self.clone(),
            pool: ServerPool::new(&self.0.options.servers),
            link: None,
            left: None,
            backoff: Backoff::default(),
            is_retry: false,
        }
    }

    /// A number for a subscription that is to be made.
    pub fn new_sid(&self) -> u64 {
        self.0.subscriptions.new_sid()
    }

    /// Subscribes under a number of [`Client::new_sid`]. `None` while there is no connection.
    pub fn subscribe(&self, sid: u64, subject: String) -> Option<Subscribing> {
        let confirmed = self.0.subscriptions.subscribe(sid, subject)?;
        Some((Subscription { client: self.clone(), sid }, confirmed))
    }

    /// Resolves once the server has handled everything that it was told before. `None` while there is no connection.
    pub fn confirm(&self) -> Option<oneshot::Receiver<()>> {
        self.0.subscriptions.confirm()
    }

    /// Publishes a request. `false` while there is no connection.
    pub fn publish(&self, subject: &str, reply: &str, payload: &[u8]) -> bool {
        self.0.subscriptions.publish(subject, reply, payload)
    }

    /// Whether a server has handled all subscriptions.
    pub fn is_ready(&self) -> bool {
        self.0.subscriptions.is_ready()
    }

    /// A subject that the server does not let the client subscribe to, if there is one.
    pub fn refused(&self) -> Option<String> {
        self.0.subscriptions.refused()
    }

    /// Whether the server lets the client subscribe to a standing subject.
    pub fn is_standing_granted(&self, sid: u64) -> bool {
        self.0.subscriptions.is_standing_granted(sid)
    }

    /// How long ago the connection was last driven: much longer than [`PING`] means that the driving task hangs.
    pub fn idle(&self) -> Duration {
        self.0.began.elapsed().saturating_sub(Duration::from_millis(self.0.driven.load(Ordering::Relaxed)))
    }

    fn drive(&self) {
        let millis = u64::try_from(self.0.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.driven.store(millis, Ordering::Relaxed);
    }
}

impl Subscription {
    pub fn sid(&self) -> u64 {
        self.sid
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.client.0.subscriptions.unsubscribe(self.sid);
    }
}

/// The connection of a client, whichever server it is to. Subscriptions outlive it.
pub struct Connection {
    number: u64,
    client: Client,
    pool: ServerPool,
    link: Option<Link>,
    /// The server that it was connected to before.
    left: Option<ServerAddress>,
    backoff: Backoff,
    is_retry: bool,
}

struct Link {
    server: ServerAddress,
    reader: Reader<ReadHalf<Box<dyn Socket>>>,
    writer: WriteHalf<Box<dyn Socket>>,
    outgoing: std::io::Cursor<Vec<u8>>,
    is_flushing: bool,
    pulse: Interval,
    since: Instant,
    /// Frames that were taken since anything else was looked at.
    frames: usize,
}

impl Connection {
    /// The next event. Never ends. On cancellation nothing is lost.
    pub async fn next(&mut self) -> Event {
        loop {
            let Some(link) = &mut self.link else { return self.connect().await };
            match link.step(&self.client).await {
                Ok(None) => {}
                Ok(Some(ServerOp::Message(message))) => return Event::Message(message),
                Ok(Some(op)) => {
                    if let Some(event) = self.handle(op) {
                        return event;
                    }
                }
                Err(error) => return self.disconnect(error),
            }
        }
    }

    fn handle(&mut self, op: ServerOp) -> Option<Event> {
        let subscriptions = &self.client.0.subscriptions;
        match op {
            ServerOp::Message(message) => Some(Event::Message(message)),
            ServerOp::Ping => {
                subscriptions.answer_ping();
                None
            }
            ServerOp::Pong => match subscriptions.ponged() {
                Confirmed { ready: true, .. } => Some(Event::Ready),
                Confirmed { restored: true, .. } => Some(Event::Restored),
                Confirmed { ready: false, restored: false } => Some(Event::Idle),
            },
            ServerOp::Info(info) => {
                let server = self.link.as_ref()?.server.clone();
                self.pool.discover(&server, &info);
                let leaves = info.lame_duck && self.pool.has_other_than(&server);
                leaves.then(|| self.disconnect(ConnectionError::LameDuck))
            }
            ServerOp::Err(text) => {
                subscriptions.error(&text);
                Some(Event::ServerError(text))
            }
            ServerOp::Ok => None,
        }
    }

    fn disconnect(&mut self, error: ConnectionError) -> Event {
        self.client.0.subscriptions.disconnected(self.number);
        if let Some(link) = self.link.take() {
            if link.since.elapsed() > STEADY {
                self.backoff = Backoff::default();
            }
            self.left = Some(link.server);
            self.is_retry = true;
        }
        Event::Disconnected(error)
    }

    /// Tries one server after the other, last the one that was left. Fails as the last of them did.
    async fn connect(&mut self) -> Event {
        if self.is_retry {
            self.backoff.wait().await;
        }
        self.is_retry = true;
        let mut failed = ConnectionError::Closed;
        for server in self.pool.in_turn(self.left.as_ref()) {
            self.client.drive();
            match connection::connect(&server, &self.client.0.options).await {
                Ok(established) => {
                    self.pool.discover(&established.server, &established.info);
                    self.link = Some(Link::new(established));
                    self.client.0.subscriptions.connected(self.number);
                    return Event::Connected(server);
                }
                Err(error) => failed = error,
            }
        }
        self.client.drive();
        Event::Unreachable(failed)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.client.0.subscriptions.disconnected(self.number);
    }
}

impl Link {
    fn new(established: Established) -> Link {
        let Established { server, info: _, reader, writer } = established;
        let mut pulse = tokio::time::interval(PING);
        pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Link {
            server,
            reader,
            writer,
            outgoing: std::io::Cursor::default(),
            is_flushing: false,
            pulse,
            since: Instant::now(),
            frames: 0,
        }
    }

    /// Does one thing; returns what the server said, if that was it.
    async fn step(&mut self, client: &Client) -> Result<Option<ServerOp>, ConnectionError> {
        // What has been read already is taken without asking the system for more.
        if self.frames < FRAMES_AT_ONCE && !self.reader.read_buffer().is_empty() {
            self.frames += 1;
            if let Some(op) = Codec.decode(self.reader.read_buffer_mut())? {
                return Ok(Some(op));
            }
        }
        self.frames = 0;
        client.drive();
        let subscriptions = &client.0.subscriptions;
        let has_outgoing = (self.outgoing.position() as usize) < self.outgoing.get_ref().len();
        // Cancellation: each of these waits without taking anything before it is ready.
        tokio::select! {
            // Reading comes last, so that a server that says much is answered.
            biased;
            _ = self.pulse.tick() => {
                if self.reader.get_ref().at.elapsed() > SILENCE {
                    return Err(ConnectionError::Silent(SILENCE));
                }
                subscriptions.ping();
                Ok(None)
            }
            written = write(&mut self.writer, &mut self.outgoing), if has_outgoing || self.is_flushing => {
                written?;
                self.is_flushing = has_outgoing;
                Ok(None)
            }
            () = subscriptions.work(), if !has_outgoing => {
                self.outgoing = std::io::Cursor::new(subscriptions.outgoing());
                Ok(None)
            }
            op = connection::next(&mut self.reader) => op.map(Some),
        }
    }
}

/// Writes a part of what is left, or has it sent.
async fn write(
    writer: &mut WriteHalf<Box<dyn Socket>>,
    outgoing: &mut std::io::Cursor<Vec<u8>>,
) -> Result<(), ConnectionError> {
    match (outgoing.position() as usize) < outgoing.get_ref().len() {
        true => writer.write_buf(outgoing).await.map(drop)?,
        false => writer.flush().await?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, BufReader},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    /// Lets a client in, answers so many pings, and says this.
    async fn serve(socket: TcpStream, pings: usize, says: &[u8]) {
        let mut socket = BufReader::new(socket);
        socket.write_all(b"INFO {}\r\n").await.unwrap();
        for _ in 0..pings {
            let mut heard = vec![];
            while !heard.ends_with(b"PING\r\n") {
                heard.push(socket.read_u8().await.unwrap());
            }
            socket.write_all(b"PONG\r\n").await.unwrap();
        }
        // A client that has heard enough hangs up.
        let _ = socket.write_all(says).await;
        while socket.read_u8().await.is_ok() {}
    }

    async fn client_of(listener: &TcpListener) -> Client {
        let port = listener.local_addr().unwrap().port();
        let servers = vec![ServerAddress { host: "127.0.0.1".into(), port, tls: false }];
        let timeout = Duration::from_secs(5);
        let options =
            ConnectOptions { servers, name: "test".into(), user: None, token: None, credentials: None, timeout };
        Client::new(options, vec!["s".into()])
    }

    #[tokio::test]
    async fn whatever_a_server_says_another_connection_is_made() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = client_of(&listener).await;
        tokio::spawn(async move {
            let nonsense: [&[u8]; 5] =
                [b"-ERR 'Stale Connection'\r\nnonsense\r\n", b"MSG a 1 -1\r\n", b"INFO {\r\n", &[b'x'; 300_000], b""];
            for says in nonsense {
                let (socket, _) = listener.accept().await.unwrap();
                tokio::spawn(async move { serve(socket, 2, says).await });
            }
        });

        let mut connection = client.connection();
        let (mut ready, mut ends) = (0, 0);
        let five_times = async {
            while ready < 5 {
                match connection.next().await {
                    Event::Ready => ready += 1,
                    Event::Disconnected(_) => ends += 1,
                    _ => {}
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), five_times).await.expect("in time");
        assert_eq!(ends, 4);
        assert!(client.is_ready());
        drop(connection);
        assert!(!client.is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_answers_no_pings_is_given_up() {
        let (socket, mut server_side) = tokio::io::duplex(1000);
        let (read_half, writer) = tokio::io::split(Box::new(socket) as Box<dyn Socket>);
        let server = ServerAddress { host: "s".into(), port: 1, tls: false };
        let reader = connection::reader(read_half);
        let mut link = Link::new(Established { server, info: Box::default(), reader, writer });
        let client = client_of(&TcpListener::bind("127.0.0.1:0").await.unwrap()).await;
        client.0.subscriptions.connected(0);

        // A part of a large message is as good as a pong.
        let mut ended = None;
        for piece in [&b"MSG s 0 10000\r\n"[..], b"part", b"part"] {
            server_side.write_all(piece).await.unwrap();
            let until = Instant::now() + SILENCE - PING;
            while Instant::now() < until && ended.is_none() {
                ended = link.step(&client).await.err();
            }
            assert!(ended.is_none(), "{ended:?}");
        }
        let said = Instant::now();
        while ended.is_none() {
            ended = link.step(&client).await.err();
        }

        assert!(matches!(ended, Some(ConnectionError::Silent(SILENCE))), "{ended:?}");
        assert!(said.elapsed() <= 2 * PING, "{:?}", said.elapsed());
    }
}

//! The line to NATS on which live hints come: one connection, which is made again whenever it breaks, for as long as
//! there is a gateway.
//!
//! async-nats keeps 6 kB for every subscription, and hints have one for every feed. This keeps a mailbox that is empty
//! while none is on its way, a subject and a number:
//!
//! ```text
//! socket -> call::Ear -> wire::next -> Switchboard::deliver -> message::hint -> Mailbox -> the feed that listens
//! feed that begins or ends to listen -> Switchboard -> Caller::say -> socket
//! ```
//!
//! Who listens is told nothing of a new connection but by a doubt (see `doubts`), once the server has taken in all
//! subscriptions again.

use std::{collections::HashSet, sync::Arc, time::Duration};

use async_nats::ServerAddr;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::watch,
    task::AbortHandle,
    time::{Instant, MissedTickBehavior},
};

use super::{
    call::{Call, CallError, Ear},
    entrance::{Entrance, PING},
    leader::Known,
    servers::Servers,
    start::StartError,
    switchboard::Switchboard,
    wire::{Info, Operation},
};
use crate::{
    backoff::Backoff,
    broker::{BrokerError, Hints},
    config,
    subject::Filter,
};

/// A call that lasted so long was a good one: if it ends, another one is placed at once.
const STEADY: Duration = Duration::from_secs(5);
/// What the connection is called where the server lists them.
const PURPOSE: &str = "live";
/// Different complaints of servers that are logged; more of them say nothing more.
const COMPLAINTS_MAX: usize = 100;

/// A handle to the line, which ends with it.
pub(super) struct Line {
    switchboard: Arc<Switchboard>,
    live_prefix: String,
    timeout: Duration,
    caller: AbortHandle,
}

impl Line {
    pub async fn open(entrance: Arc<Entrance>, settings: &config::Nats, known: Arc<Known>) -> Result<Line, StartError> {
        let names = &settings.stream;
        let switchboard = Arc::new(Switchboard::new(names.clone(), settings.subscription_messages, known));
        let mut caller = Caller {
            servers: Servers::new(&entrance.servers),
            entrance: entrance.clone(),
            switchboard: switchboard.clone(),
            backoff: Backoff::default(),
            complaints: HashSet::new(),
        };
        let away = |why: CallError| StartError::Unreachable { at: entrance.at.clone(), why: why.to_string() };
        let call = caller.call(None).await.map_err(away)?;
        let line = Line {
            switchboard,
            live_prefix: names.live_prefix.clone(),
            timeout: settings.request_timeout,
            caller: tokio::spawn(caller.run(call)).abort_handle(),
        };
        let mut connections = line.connections();
        let up = tokio::time::timeout(entrance.timeout, connections.wait_for(|count| *count > 0)).await;
        up.map_err(|_| away(CallError::Silent(entrance.timeout)))?.expect("the line keeps the switchboard");
        Ok(line)
    }

    /// Hints on `filter`. When this returns, the server knows of it.
    pub async fn listen(&self, filter: &Filter) -> Result<Hints, BrokerError> {
        let away = |why: &str| BrokerError::Unavailable(format!("live: {why}"));
        let begun = self.switchboard.listen(format!("{}{filter}", self.live_prefix));
        let (hints, taken_in) = begun.ok_or_else(|| away("not connected"))?;
        match tokio::time::timeout(self.timeout, taken_in).await {
            Ok(Ok(())) => Ok(Box::pin(hints)),
            Ok(Err(_)) => Err(away("the connection broke")),
            Err(_) => Err(away("no answer in time")),
        }
    }

    pub fn switchboard(&self) -> Arc<Switchboard> {
        self.switchboard.clone()
    }

    pub fn is_up(&self) -> bool {
        self.switchboard.is_up()
    }

    /// How often the server has taken in all subscriptions: with each connection, once.
    pub fn connections(&self) -> watch::Receiver<u64> {
        self.switchboard.connections()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.caller.abort();
    }
}

/// Keeps the line up.
struct Caller {
    entrance: Arc<Entrance>,
    servers: Servers,
    switchboard: Arc<Switchboard>,
    backoff: Backoff,
    /// Those that were logged.
    complaints: HashSet<String>,
}

impl Caller {
    async fn run(mut self, mut call: Call) {
        loop {
            let (server, began) = (call.server.clone(), Instant::now());
            let why = self.talk(call).await;
            self.switchboard.disconnected();
            if began.elapsed() > STEADY {
                self.backoff = Backoff::default();
            }
            tracing::warn!(server = %at(&server), %why, "the connection of live events ended");
            call = loop {
                self.backoff.wait().await;
                match self.call(Some(&server)).await {
                    Ok(call) => break call,
                    Err(why) => tracing::debug!(%why, "no server lets the connection of live events in"),
                }
            };
            tracing::info!(server = %at(&call.server), "live events have a connection again");
        }
    }

    /// Calls one server after the other, last the one that was `left`. Fails as the last of them did.
    async fn call(&mut self, left: Option<&ServerAddr>) -> Result<Call, CallError> {
        let mut failed = None;
        for server in self.servers.in_turn(left) {
            match Call::place(&server, &self.entrance, PURPOSE).await {
                Ok(call) => {
                    self.servers.learn(&server, &call.info);
                    return Ok(call);
                }
                Err(why) => failed = Some(why),
            }
        }
        Err(failed.expect("nats.url names a server"))
    }

    /// Says what is to be said and hears what is said, until the end of the call.
    async fn talk(&mut self, call: Call) -> CallError {
        let (ear, mouth) = call.ear.split();
        let switchboard = self.switchboard.clone();
        switchboard.connected();
        // Cancellation: whichever is dropped has nothing more to do on a call that has ended.
        tokio::select! {
            why = self.hear(ear, &call.server) => why,
            why = say(&switchboard, mouth) => why,
        }
    }

    async fn hear(&mut self, mut ear: Ear<impl AsyncRead + Unpin>, server: &ServerAddr) -> CallError {
        loop {
            match ear.next().await {
                Ok(Operation::Message(message)) => self.switchboard.deliver(message),
                Ok(Operation::Ping) => self.switchboard.answer_ping(),
                Ok(Operation::Pong) => self.switchboard.ponged(),
                Ok(Operation::Info(info)) => {
                    if self.is_to_leave(server, &info) {
                        return CallError::LameDuck;
                    }
                }
                Ok(Operation::Error(complaint)) => self.note(complaint),
                Ok(Operation::Ok) => {}
                Err(why) => return why,
            }
        }
    }

    fn is_to_leave(&mut self, server: &ServerAddr, info: &Info) -> bool {
        self.servers.learn(server, info);
        info.lame_duck && self.servers.has_other_than(server)
    }

    /// Logs what a server complains of, once.
    fn note(&mut self, complaint: String) {
        if self.complaints.len() == COMPLAINTS_MAX || !self.complaints.insert(complaint.clone()) {
            return;
        }
        if complaint.to_ascii_lowercase().contains("permissions violation") {
            tracing::warn!(
                %complaint,
                "NATS keeps live events back: let the gateway's user subscribe below nats.stream.live_prefix, and to \
                 the stream's advisories (nats/nats-server.conf has all that it needs)"
            );
        } else {
            tracing::warn!(%complaint, "NATS complains of the connection of live events");
        }
    }
}

/// Says all that is left to be said, and asks now and then whether the server is still there.
async fn say(switchboard: &Switchboard, mut mouth: impl AsyncWrite + Unpin) -> CallError {
    let mut pulse = tokio::time::interval(PING);
    pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let said = async {
            mouth.write_all(&switchboard.words()).await?;
            mouth.flush().await
        };
        if let Err(why) = said.await {
            return why.into();
        }
        tokio::select! {
            () = switchboard.word() => {}
            _ = pulse.tick() => switchboard.ping(),
        }
    }
}

fn at(server: &ServerAddr) -> String {
    format!("{}:{}", server.host(), server.port())
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, BufReader},
        net::{TcpListener, TcpStream},
    };

    use super::{super::leader, *};

    /// Lets somebody in, answers so many pings, and says this.
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
        // Whoever has heard enough hangs up.
        let _ = socket.write_all(says).await;
        while socket.read_u8().await.is_ok() {}
    }

    #[tokio::test]
    async fn whatever_a_server_says_it_is_called_again() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("nats://{}", listener.local_addr().unwrap());
        let settings = config::Config::load(None, vec![("nats.url", url)]).unwrap().nats;
        tokio::spawn(async move {
            let nonsense: [&[u8]; 5] =
                [b"-ERR 'Stale Connection'\r\nnonsense\r\n", b"MSG a 1 -1\r\n", b"INFO {\r\n", &[b'x'; 70_000], b""];
            for says in nonsense {
                let (socket, _) = listener.accept().await.unwrap();
                tokio::spawn(async move { serve(socket, 2, says).await });
            }
        });

        let known = Arc::new(Known::new(&leader::Info::made_at("2026-01-02T03:04:05Z")));
        let line = Line::open(Arc::new(Entrance::parse(&settings).unwrap()), &settings, known).await.unwrap();

        let mut connections = line.connections();
        let called_again = connections.wait_for(|count| *count == 5);
        tokio::time::timeout(Duration::from_secs(10), called_again).await.expect("in time").unwrap();
    }
}

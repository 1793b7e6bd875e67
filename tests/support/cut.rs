//! A TCP proxy between a gateway and its NATS servers that can be cut, or hold back what passes. Knows of NATS only how
//! a gateway's connections name themselves.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};

/// How long a server may take to accept.
const CONNECT: Duration = Duration::from_secs(2);

/// What becomes of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Everything passes.
    Whole,
    /// Nothing is connected, and nothing that tries stays so.
    Cut,
    /// Connections stay, and nothing passes on them until later.
    Held,
    /// The same for the connections that are for this purpose; the others go on.
    OneHeld(&'static str),
    /// Everything passes, this much later.
    Slow(Duration),
}

/// A proxy for each of some servers. Ends with its owner.
pub struct Cut {
    /// Where to reach the servers, in their order.
    pub addresses: Vec<SocketAddr>,
    flow: watch::Sender<Flow>,
    _accepting: JoinSet<()>,
}

impl Cut {
    pub async fn before(servers: &[SocketAddr]) -> Cut {
        let flow = watch::Sender::new(Flow::Whole);
        let (mut addresses, mut accepting) = (vec![], JoinSet::new());
        for server in servers.iter().copied() {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
            addresses.push(listener.local_addr().expect("it is bound"));
            let flow = flow.subscribe();
            accepting.spawn(async move {
                let mut carried = JoinSet::new();
                while let Ok((socket, _)) = listener.accept().await {
                    carried.spawn(carry(socket, server, flow.clone()));
                    while carried.try_join_next().is_some() {}
                }
            });
        }
        Cut { addresses, flow, _accepting: accepting }
    }

    pub fn set(&self, flow: Flow) {
        self.flow.send_replace(flow);
    }
}

async fn carry(gateway: TcpStream, server: SocketAddr, mut flow: watch::Receiver<Flow>) {
    if *flow.borrow() == Flow::Cut {
        return;
    }
    let Ok(Ok(server)) = tokio::time::timeout(CONNECT, TcpStream::connect(server)).await else { return };
    let _ = (gateway.set_nodelay(true), server.set_nodelay(true));
    let (from_gateway, to_gateway) = gateway.into_split();
    let (from_server, to_server) = server.into_split();
    let purpose = watch::Sender::default();
    tokio::select! {
        () = pass(from_gateway, to_server, flow.clone(), &purpose) => {}
        () = pass(from_server, to_gateway, flow.clone(), &purpose) => {}
        _ = flow.wait_for(|flow| *flow == Flow::Cut) => {}
    }
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut flow: watch::Receiver<Flow>,
    purpose: &watch::Sender<String>,
) {
    // Bounded by what a test sends.
    let (sender, mut pieces) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let now = flow.clone();
    let read = async move {
        let mut buffer = vec![0; 65536];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            let later = match *now.borrow() {
                Flow::Slow(later) => later,
                Flow::Whole | Flow::Cut | Flow::Held | Flow::OneHeld(_) => Duration::ZERO,
            };
            if sender.send((Instant::now() + later, buffer[..read].to_vec())).is_err() {
                return;
            }
        }
    };
    let write = async {
        while let Some((due, piece)) = pieces.recv().await {
            // A client introduces itself once, in one piece: CONNECT {..,"name":"tidegate history",..}.
            if piece.starts_with(b"CONNECT ") {
                let words = String::from_utf8_lossy(&piece);
                let name = words.split_once("\"tidegate ").and_then(|(_, rest)| rest.split('"').next());
                purpose.send_replace(name.unwrap_or_default().to_owned());
            }
            let passes = |flow: &Flow| match flow {
                Flow::Whole | Flow::Cut | Flow::Slow(_) => true,
                Flow::Held => false,
                Flow::OneHeld(held) => *purpose.borrow() != *held,
            };
            if flow.wait_for(passes).await.is_err() {
                return;
            }
            // Pacing: this is what a slow network does.
            tokio::time::sleep_until(due).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(read, write);
}

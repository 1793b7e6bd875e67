//! A TCP pipe between one client and a gateway: passes bytes as they are, breaks connections on demand, and unanswered the
//! connections that no gateway answered. It never changes what it passes, but for [`Ending::LastChunk`].

use std::{
    net::SocketAddr,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    runtime::Runtime,
    sync::watch,
    task::{AbortHandle, JoinSet},
};

/// All pipes of the test program run here.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(2).enable_all().build().expect("threads can be started")
});

/// A page of the pipe's own origin, for browsers.
const PAGE: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 37\r\nConnection: close\r\n\r\n\
                    <!doctype html><title>a page</title>\n";

/// How a connection breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// The connection is reset. The client loses what it has not read yet.
    Rst,
    /// The connection is closed in order, wherever in a response.
    Fin,
}

/// What a client gets where the gateway closes a connection in the middle of a chunked response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The end of the connection.
    AsSent,
    /// The last chunk before it, as if the gateway had sent one.
    LastChunk,
}

#[derive(Clone)]
struct Course {
    /// Where connections lead. One that is refused there is reset here.
    target: SocketAddr,
    /// How often everything that was open was broken, and how the last time.
    broken: (usize, Break),
    /// Break one connection, right behind these bytes of a response.
    mark: Option<(Vec<u8>, Break)>,
    ending: Ending,
}

/// Ends with its owner.
pub struct Pipe {
    pub address: SocketAddr,
    course: Arc<watch::Sender<Course>>,
    unanswered: Arc<AtomicUsize>,
    accepting: AbortHandle,
}

impl Pipe {
    pub fn to(target: SocketAddr) -> Pipe {
        let course = Course { target, broken: (0, Break::Fin), mark: None, ending: Ending::AsSent };
        let (course, unanswered) = (Arc::new(watch::Sender::new(course)), Arc::new(AtomicUsize::new(0)));
        let listener = RUNTIME.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let accepting = RUNTIME.spawn(accept(listener, course.clone(), unanswered.clone())).abort_handle();
        Pipe { address, course, unanswered, accepting }
    }

    /// New connections lead there; those that are open stay.
    pub fn lead_to(&self, target: SocketAddr) {
        self.course.send_modify(|course| course.target = target);
    }

    /// Breaks every open connection.
    pub fn cut(&self, how: Break) {
        self.course.send_modify(|course| course.broken = (course.broken.0 + 1, how));
    }

    /// Breaks one connection, right behind these bytes of a response.
    pub fn cut_behind(&self, mark: &str, how: Break) {
        self.course.send_modify(|course| course.mark = Some((mark.into(), how)));
    }

    /// Whether the break that [`cut_behind`](Pipe::cut_behind) ordered has happened.
    pub fn was_cut(&self) -> bool {
        self.course.borrow().mark.is_none()
    }

    pub fn end_with(&self, ending: Ending) {
        self.course.send_modify(|course| course.ending = ending);
    }

    /// How many connections found no gateway.
    pub fn unanswered(&self) -> usize {
        self.unanswered.load(Ordering::SeqCst)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, course: Arc<watch::Sender<Course>>, unanswered: Arc<AtomicUsize>) {
    let mut carried = JoinSet::new();
    while let Ok((mut client, _)) = listener.accept().await {
        let (course, unanswered) = (course.clone(), unanswered.clone());
        carried.spawn(async move {
            if carry(&mut client, &course, &unanswered).await == Break::Rst {
                let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
            }
        });
        while carried.try_join_next().is_some() {}
    }
}

/// Passes bytes both ways until one side ends or an order breaks the connection. Returns how the client's side ends.
async fn carry(client: &mut TcpStream, course: &watch::Sender<Course>, unanswered: &AtomicUsize) -> Break {
    let _ = client.set_nodelay(true);
    let mut first = [0; 10];
    if client.peek(&mut first).await.is_ok_and(|read| first[..read].starts_with(b"GET /page ")) {
        return answer_page(client).await;
    }
    let mut orders = course.subscribe();
    let (target, broken) = {
        let course = orders.borrow_and_update();
        (course.target, course.broken.0)
    };
    let Ok(mut gateway) = TcpStream::connect(target).await else {
        unanswered.fetch_add(1, Ordering::SeqCst);
        return Break::Rst;
    };
    let _ = gateway.set_nodelay(true);
    let ((from_client, to_client), (from_gateway, to_gateway)) = (client.split(), gateway.split());
    tokio::select! {
        how = pass_requests(from_client, to_gateway) => how,
        how = pass_responses(from_gateway, to_client, course) => how,
        course = orders.wait_for(|course| course.broken.0 != broken) => course.map_or(Break::Fin, |course| course.broken.1),
    }
}

async fn answer_page(client: &mut TcpStream) -> Break {
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        match client.read_buf(&mut head).await {
            Ok(1..) => {}
            _ => return Break::Fin,
        }
    }
    let _ = client.write_all(PAGE.as_bytes()).await;
    Break::Fin
}

async fn pass_requests(mut client: ReadHalf<'_>, mut gateway: WriteHalf<'_>) -> Break {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(read @ 1..) = client.read(&mut buffer).await {
        if gateway.write_all(&buffer[..read]).await.is_err() {
            // How the connection ends, the responses say.
            std::future::pending::<()>().await;
        }
    }
    Break::Fin
}

async fn pass_responses(mut gateway: ReadHalf<'_>, mut client: WriteHalf<'_>, course: &watch::Sender<Course>) -> Break {
    let mut buffer = vec![0; 64 * 1024];
    let (mut tail, mut chunked) = (vec![], false);
    loop {
        let piece = match gateway.read(&mut buffer).await {
            Ok(0) => break,
            Ok(read) => &buffer[..read],
            Err(_) => return Break::Rst,
        };
        chunked |= piece.starts_with(b"HTTP/1.1 ")
            && find(&piece.to_ascii_lowercase(), b"\r\ntransfer-encoding: chunked\r\n").is_some();
        let mark = course.borrow().mark.clone();
        if let Some((mark, how)) = mark {
            let kept = tail.len();
            tail.extend(piece);
            if let Some(at) = find(&tail, &mark) {
                let _ = client.write_all(&piece[..(at + mark.len()).saturating_sub(kept)]).await;
                course.send_modify(|course| course.mark = None);
                return how;
            }
            tail.drain(..tail.len().saturating_sub(mark.len()));
        }
        if client.write_all(piece).await.is_err() {
            return Break::Fin;
        }
    }
    if chunked && course.borrow().ending == Ending::LastChunk {
        let _ = client.write_all(b"0\r\n\r\n").await;
    }
    Break::Fin
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}

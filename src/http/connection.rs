//! A client's connection: what actix-web reads and writes, until a stream's socket leaves it.
//!
//! # Leaving
//! A stream outlives what an HTTP server is good at, and costs 10 kB there. So the handler answers with a head and a
//! [`Handoff`] body. actix writes the head, with everything that middleware added; when that has been flushed, the body
//! moves the socket out of the [`Connection`] and errs, on which actix drops its side (and handles no request that was
//! pipelined behind). What is left for it to drop is a connection without a socket.
//!
//! # Raw `>`
//! curl sends `/events/orders.>` as it is, but the URI type that actix uses refuses such characters, as RFC 3986 does.
//! [`FirstLine`] percent-encodes them in the first request of a connection, which is the only one of most of curl's. In
//! later requests they are refused (400).
//!
//! Invariant: nothing here follows HTTP framing. Only actix does: what two parsers follow can be made to differ.

mod bare_answer;
mod first_line;
mod next_head;

use std::{
    any::Any,
    cell::{Cell, RefCell},
    io, net,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use actix_web::{
    body::{BodySize, MessageBody},
    dev::Payload,
    error::PayloadError,
};
use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Sleep,
};

use self::{bare_answer::BareAnswers, first_line::FirstLine, next_head::NextHead};
use super::App;

/// Bytes that are read before answers are written, and beside what an unanswered request needs. actix keeps all requests
/// that it finds in what it has read, which would be 128 KiB: 4,700 small ones, 34 MB for a client that reads no answers
/// (measured), and 2 MB with this. It is what actix reads at a time, so that uploads pause no more often.
const TURN_BYTES: usize = 8 * 1024;

/// Bytes that are read of a body that is not wanted, so that its answer is not overtaken by a reset: about what a client has
/// under way when it is answered, at 100 Mbit/s over 80 ms.
const REST_BYTES_MAX: usize = 1 << 20;

/// The transport of one connection.
pub struct Connection {
    socket_share: Rc<SharedSocket>,
    first_line: FirstLine,
    next_head: NextHead,
    bare_answers: BareAnswers,
    /// Encoded bytes that had no room yet.
    encoded: BytesMut,
    /// Its room among other connections, as long as it is not a stream.
    _place: Box<dyn Any>,
    /// How long its client may take nothing of what is written to it.
    stall: Duration,
    /// Runs since it has taken nothing. Meanwhile it is not read from: actix keeps the answers to all that arrives.
    stalled: Option<Pin<Box<Sleep>>>,
    /// The waker of the task that reads on.
    reader: Option<Waker>,
    /// Bytes that were read without a pause.
    turn_bytes: usize,
    /// Bytes that were read since the handler took something of its request's body, or there was no handler.
    ahead_bytes: usize,
    /// Bytes that were read since a request was answered whose body was not read to its end.
    rest_bytes: usize,
}

/// Where the socket is as long as it has not left. Handlers find it in the request's connection data.
pub struct SharedSocket {
    socket: RefCell<Option<TcpStream>>,
    flushed: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    /// Why there is no room for this connection, so that its requests are refused.
    refusal: Cell<Option<&'static str>>,
    /// When nothing more is read.
    end: RefCell<Option<Pin<Box<Sleep>>>>,
    /// Requests whose head has been read.
    requests: Cell<u64>,
    /// Those of them that are not answered yet.
    unanswered: Cell<usize>,
    /// Whether the handler has taken something of its request's body.
    took_body: Cell<bool>,
    /// Whether that has been read to its end, if there was one.
    is_body_read: Cell<bool>,
    /// Woken when it does, or when the request is answered.
    reader: RefCell<Option<Waker>>,
}

/// A request that is being answered. The next head is waited for once this is dropped.
pub struct Serving(Rc<SharedSocket>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.unanswered.set(self.0.unanswered.get() - 1);
        self.0.wake_reader();
    }
}

/// A request's body. As long as its handler takes of it, more is read.
pub struct Body {
    pub payload: Payload,
    pub socket_share: Rc<SharedSocket>,
}

impl Stream for Body {
    type Item = Result<Bytes, PayloadError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = Pin::new(&mut self.payload).poll_next(cx);
        match &polled {
            Poll::Pending => {}
            Poll::Ready(None) => self.socket_share.is_body_read.set(true),
            Poll::Ready(Some(_)) => {
                self.socket_share.took_body.set(true);
                self.socket_share.wake_reader();
            }
        }
        polled
    }
}

impl SharedSocket {
    /// Notes that a request's head has been read, and that its answer begins. Its body, if it has one, is to be read
    /// by way of a [`Body`].
    pub fn serve(self: Rc<SharedSocket>, has_body: bool) -> Serving {
        self.is_body_read.set(!has_body);
        self.requests.set(self.requests.get() + 1);
        self.unanswered.set(self.unanswered.get() + 1);
        Serving(self)
    }

    fn wake_reader(&self) {
        self.reader.take().into_iter().for_each(Waker::wake);
    }

    /// Reads on for so long at most, whatever comes.
    pub async fn end_after(&self, limit: Duration) {
        let mut end = Box::pin(tokio::time::sleep(limit));
        // Begun here, in the task that reads: it may have nothing to read until then.
        let _ = futures_util::poll!(&mut end);
        *self.end.borrow_mut() = Some(end);
    }

    /// Has its first request refused, which may take so long to come.
    pub async fn refuse_within(&self, limit: Duration, why: &'static str) {
        self.refusal.set(Some(why));
        self.end_after(limit).await;
    }

    pub fn refusal(&self) -> Option<&'static str> {
        self.refusal.get()
    }

    fn has_ended(&self, cx: &mut Context<'_>) -> bool {
        self.end.borrow_mut().as_mut().is_some_and(|end| end.as_mut().poll(cx).is_ready())
    }
}

impl Connection {
    pub fn new(socket: TcpStream, place: impl Any, app: Arc<App>) -> Connection {
        let limits = app.limits.borrow().clone();
        let socket_share = SharedSocket {
            socket: RefCell::new(Some(socket)),
            flushed: Cell::new(false),
            waker: RefCell::default(),
            refusal: Cell::new(None),
            end: RefCell::default(),
            requests: Cell::new(0),
            unanswered: Cell::new(0),
            took_body: Cell::new(false),
            is_body_read: Cell::new(true),
            reader: RefCell::default(),
        };
        Connection {
            socket_share: Rc::new(socket_share),
            first_line: FirstLine::Method,
            next_head: NextHead::new(&limits),
            bare_answers: BareAnswers::new(app),
            encoded: BytesMut::new(),
            _place: Box::new(place),
            stall: limits.stall,
            stalled: None,
            reader: None,
            turn_bytes: 0,
            ahead_bytes: 0,
            rest_bytes: 0,
        }
    }

    pub fn socket_share(&self) -> Rc<SharedSocket> {
        self.socket_share.clone()
    }

    /// Polls the socket, or says `gone` once it has left.
    fn with_socket<T>(
        &self,
        gone: T,
        poll: impl FnOnce(Pin<&mut TcpStream>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut *self.socket_share.socket.borrow_mut() {
            Some(socket) => poll(Pin::new(socket)),
            None => Poll::Ready(Ok(gone)),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.socket_share.has_ended(cx) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if self.stalled.is_some() {
            self.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if self.next_head.is_late(&self.socket_share) || self.rest_bytes > REST_BYTES_MAX {
            // As if the client had closed: there is nothing to answer.
            return Poll::Ready(Ok(()));
        }
        if self.socket_share.took_body.take() || self.socket_share.unanswered.get() == 0 {
            self.ahead_bytes = 0;
        } else if self.ahead_bytes >= TURN_BYTES {
            *self.socket_share.reader.borrow_mut() = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if self.turn_bytes >= TURN_BYTES {
            self.turn_bytes = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.encoded.is_empty() {
            let before = buf.filled().len();
            let polled = self.with_socket((), |socket| socket.poll_read(cx, buf));
            let arrived = &buf.filled()[before..];
            self.turn_bytes = if polled.is_pending() { 0 } else { self.turn_bytes + arrived.len() };
            self.ahead_bytes += arrived.len();
            let is_rest = self.socket_share.unanswered.get() == 0 && !self.socket_share.is_body_read.get();
            self.rest_bytes = if is_rest { self.rest_bytes + arrived.len() } else { 0 };
            self.next_head.has_read(arrived.len());
            self.bare_answers.has_read(arrived);
            let encoded = match self.first_line {
                FirstLine::Passed => None,
                FirstLine::Method | FirstLine::Target => self.first_line.encode(arrived),
            };
            let Some(encoded) = encoded else { return polled };
            self.encoded = encoded;
            buf.set_filled(before);
        }
        let fits = self.encoded.len().min(buf.remaining());
        buf.put_slice(&self.encoded.split_to(fits));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Connection { bare_answers, socket_share, .. } = &mut *self;
        let polled = bare_answers.poll_write(bytes, |bytes| match &mut *socket_share.socket.borrow_mut() {
            Some(socket) => Pin::new(socket).poll_write(cx, bytes),
            None => Poll::Ready(Ok(bytes.len())),
        });
        if polled.is_ready() {
            if self.stalled.take().is_some() {
                self.reader.take().into_iter().for_each(Waker::wake);
            }
            return polled;
        }
        let stall = self.stall;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(stall)));
        stalled.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Called once everything before has been written, and at the end of each of actix's turns.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = self.with_socket((), |socket| socket.poll_flush(cx));
        if polled.is_ready() {
            let Connection { next_head, socket_share, .. } = &mut *self;
            next_head.watch(socket_share, cx);
            self.socket_share.flushed.set(true);
            if let Some(waker) = self.socket_share.waker.borrow_mut().take() {
                waker.wake();
            }
        }
        polled
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with_socket((), |socket| socket.poll_shutdown(cx))
    }
}

/// A response body that is no body: once the head has been flushed, passes the socket on.
pub struct Handoff<F> {
    socket_share: Rc<SharedSocket>,
    armed: bool,
    receive: Option<F>,
}

impl<F: FnOnce(net::TcpStream) + Unpin> Handoff<F> {
    /// A body that passes the connection's socket to `receive`.
    pub fn new(socket_share: Rc<SharedSocket>, receive: F) -> Handoff<F> {
        Handoff { socket_share, armed: false, receive: Some(receive) }
    }
}

/// Said to actix when the socket has left: there is nothing more for it to do.
#[derive(Debug)]
pub struct SocketLeft;

impl std::fmt::Display for SocketLeft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the socket has left for a stream")
    }
}

impl std::error::Error for SocketLeft {}

impl<F: FnOnce(net::TcpStream) + Unpin> MessageBody for Handoff<F> {
    type Error = SocketLeft;

    fn size(&self) -> BodySize {
        BodySize::Stream
    }

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, SocketLeft>>> {
        if !self.armed {
            // The head is in actix's buffer now; everything that is flushed from here on includes it.
            self.armed = true;
            self.socket_share.flushed.set(false);
        }
        if !self.socket_share.flushed.get() {
            *self.socket_share.waker.borrow_mut() = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let socket = self.socket_share.socket.borrow_mut().take().and_then(|socket| socket.into_std().ok());
        if let (Some(socket), Some(receive)) = (socket, self.receive.take()) {
            receive(socket);
        }
        Poll::Ready(Some(Err(SocketLeft)))
    }
}

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
//! [`Target`] follows the requests on the connection, and what it finds is percent-encoded before actix sees it.

mod bare_answer;
mod target;

use std::{
    cell::{Cell, RefCell},
    io, net,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use actix_web::body::{BodySize, MessageBody};
use bytes::{Bytes, BytesMut};
use percent_encoding::percent_encode_byte;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Sleep,
};

use self::{bare_answer::BareAnswers, target::Target};
use super::App;
use crate::limits::Place;

/// After how many pipelined requests answers are written before more are read. actix would read on to 128 KiB: 3,500
/// small requests, which it keeps all at once, with their answers, at 40 MB (measured) for a client that reads none.
const TURN_REQUESTS: usize = 64;

/// The transport of one connection.
pub struct Connection {
    slot: Rc<Slot>,
    target: Target,
    bare_answers: BareAnswers,
    /// Encoded bytes that had no room yet.
    encoded: BytesMut,
    /// Among the connections of its peer, as long as it is not a stream.
    _place: Place,
    /// How long its client may take nothing of what is written to it.
    stall: Duration,
    /// Runs since it has taken nothing. Meanwhile it is not read from: actix keeps the answers to all that arrives.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Who wants to read on.
    reader: Option<Waker>,
    /// Requests that were read without a pause.
    turn_requests: usize,
}

/// Where the socket is as long as it has not left. Handlers find it in the request's connection data.
pub struct Slot {
    socket: RefCell<Option<TcpStream>>,
    flushed: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    /// When nothing more is read.
    end: RefCell<Option<Pin<Box<Sleep>>>>,
}

impl Slot {
    /// Reads on for so long at most, whatever comes.
    pub async fn end_after(&self, limit: Duration) {
        let mut end = Box::pin(tokio::time::sleep(limit));
        // Begun here, in the task that reads: it may have nothing to read until then.
        let _ = futures_util::poll!(&mut end);
        *self.end.borrow_mut() = Some(end);
    }

    fn has_ended(&self, cx: &mut Context<'_>) -> bool {
        self.end.borrow_mut().as_mut().is_some_and(|end| end.as_mut().poll(cx).is_ready())
    }
}

impl Connection {
    pub fn new(socket: TcpStream, place: Place, stall: Duration, app: Arc<App>) -> Connection {
        let slot = Slot {
            socket: RefCell::new(Some(socket)),
            flushed: Cell::new(false),
            waker: RefCell::default(),
            end: RefCell::default(),
        };
        Connection {
            slot: Rc::new(slot),
            target: Target::new(),
            bare_answers: BareAnswers::new(app),
            encoded: BytesMut::new(),
            _place: place,
            stall,
            stalled: None,
            reader: None,
            turn_requests: 0,
        }
    }

    pub fn slot(&self) -> Rc<Slot> {
        self.slot.clone()
    }

    /// Polls the socket, or says `gone` once it has left.
    fn with_socket<T>(
        &self,
        gone: T,
        poll: impl FnOnce(Pin<&mut TcpStream>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut *self.slot.socket.borrow_mut() {
            Some(socket) => poll(Pin::new(socket)),
            None => Poll::Ready(Ok(gone)),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.slot.has_ended(cx) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if self.stalled.is_some() {
            self.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if self.turn_requests >= TURN_REQUESTS {
            self.turn_requests = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.encoded.is_empty() {
            let before = buf.filled().len();
            let polled = self.with_socket((), |socket| socket.poll_read(cx, buf));
            let arrived = &buf.filled()[before..];
            self.bare_answers.has_read(arrived);
            let to_encode = self.target.follow(arrived);
            self.turn_requests = if polled.is_pending() { 0 } else { self.turn_requests + self.target.take_heads() };
            if to_encode.is_empty() {
                return polled;
            }
            let mut rest = 0;
            for at in to_encode {
                self.encoded.extend_from_slice(&arrived[rest..at]);
                self.encoded.extend_from_slice(percent_encode_byte(arrived[at]).as_bytes());
                rest = at + 1;
            }
            self.encoded.extend_from_slice(&arrived[rest..]);
            buf.set_filled(before);
        }
        let fits = self.encoded.len().min(buf.remaining());
        buf.put_slice(&self.encoded.split_to(fits));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Connection { bare_answers, slot, .. } = &mut *self;
        let polled = bare_answers.poll_write(bytes, |bytes| match &mut *slot.socket.borrow_mut() {
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

    /// Called once everything before has been written.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = self.with_socket((), |socket| socket.poll_flush(cx));
        if polled.is_ready() {
            self.slot.flushed.set(true);
            if let Some(waker) = self.slot.waker.borrow_mut().take() {
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
    slot: Rc<Slot>,
    armed: bool,
    receive: Option<F>,
}

impl<F: FnOnce(net::TcpStream) + Unpin> Handoff<F> {
    /// A body that passes the connection's socket to `receive`.
    pub fn new(slot: Rc<Slot>, receive: F) -> Handoff<F> {
        Handoff { slot, armed: false, receive: Some(receive) }
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
            self.slot.flushed.set(false);
        }
        if !self.slot.flushed.get() {
            *self.slot.waker.borrow_mut() = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let socket = self.slot.socket.borrow_mut().take().and_then(|socket| socket.into_std().ok());
        if let (Some(socket), Some(receive)) = (socket, self.receive.take()) {
            receive(socket);
        }
        Poll::Ready(Some(Err(SocketLeft)))
    }
}

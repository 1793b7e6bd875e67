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

mod target;

use std::{
    cell::{Cell, RefCell},
    io, net,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use actix_web::body::{BodySize, MessageBody};
use bytes::{Bytes, BytesMut};
use percent_encoding::percent_encode_byte;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use self::target::Target;
use crate::limits::Place;

/// The transport of one connection.
pub struct Connection {
    slot: Rc<Slot>,
    target: Target,
    /// Encoded bytes that had no room yet.
    encoded: BytesMut,
    /// Among the connections of its peer, as long as it is not a stream.
    _place: Place,
}

/// Where the socket is as long as it has not left. Handlers find it in the request's connection data.
pub struct Slot {
    socket: RefCell<Option<TcpStream>>,
    flushed: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Connection {
    pub fn new(socket: TcpStream, place: Place) -> Connection {
        let slot = Slot { socket: RefCell::new(Some(socket)), flushed: Cell::new(false), waker: RefCell::default() };
        Connection { slot: Rc::new(slot), target: Target::new(), encoded: BytesMut::new(), _place: place }
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
        if self.encoded.is_empty() {
            let before = buf.filled().len();
            let polled = self.with_socket((), |socket| socket.poll_read(cx, buf));
            let arrived = &buf.filled()[before..];
            let to_encode = self.target.follow(arrived);
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
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.with_socket(bytes.len(), |socket| socket.poll_write(cx, bytes))
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

//! The physical floor: a bare epoll loop that accepts, reads a request and writes bytes it is told to write. No HTTP, no
//! ids, no history, no checks. What it costs is what the kernel costs.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, Read, Write},
    net::SocketAddr,
};

use bytes::{Buf, Bytes, BytesMut};
use mio::{
    Events, Interest, Poll, Token,
    net::{TcpListener, TcpStream},
};

use crate::wire::HEAD;

/// An order for everybody.
pub const ALL: u32 = u32::MAX;
/// An order to keep bytes that every later client gets behind its head.
pub const WELCOME: u32 = u32::MAX - 1;

const LISTENER: Token = Token(usize::MAX - 1);
const CONTROL_LISTENER: Token = Token(usize::MAX - 2);
const CONTROL: Token = Token(usize::MAX - 3);
const BACKLOG_ROUNDS: usize = 64;

/// An order as it is sent to a floor: to whom, how many bytes, the bytes.
pub fn order(to: u32, bytes: &[u8]) -> Vec<u8> {
    [&to.to_le_bytes()[..], &(bytes.len() as u32).to_le_bytes(), bytes].concat()
}

struct Client {
    socket: TcpStream,
    request: Vec<u8>,
    opened: bool,
    waiting: VecDeque<Bytes>,
}

struct Floor {
    poll: Poll,
    clients: Vec<Option<Client>>,
    /// Which client asked for which number.
    numbers: Vec<Option<usize>>,
    welcome: Bytes,
}

/// Serves until its control connection ends.
pub fn run() -> io::Result<()> {
    let any: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 0));
    let poll = Poll::new()?;
    let mut listener = TcpListener::bind(any)?;
    let mut control_listener = TcpListener::bind(any)?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    poll.registry().register(&mut control_listener, CONTROL_LISTENER, Interest::READABLE)?;
    println!("{} {}", listener.local_addr()?, control_listener.local_addr()?);
    let mut floor = Floor { poll, clients: vec![], numbers: vec![], welcome: Bytes::new() };
    let mut control: Option<TcpStream> = None;
    let mut orders = BytesMut::new();
    let mut events = Events::with_capacity(1024);
    loop {
        floor.poll.poll(&mut events, None)?;
        for event in &events {
            match event.token() {
                LISTENER => floor.accept(&listener)?,
                CONTROL_LISTENER => {
                    let (mut socket, _) = control_listener.accept()?;
                    floor.poll.registry().register(&mut socket, CONTROL, Interest::READABLE)?;
                    control = Some(socket);
                }
                CONTROL => {
                    let Some(socket) = &mut control else { continue };
                    if read_all(socket, &mut orders)? {
                        return Ok(());
                    }
                    floor.obey(&mut orders);
                }
                Token(client) => {
                    if event.is_readable() {
                        floor.listen_to(client);
                    }
                    if event.is_writable() {
                        floor.write(client, None);
                    }
                }
            }
        }
    }
}

/// Reads what there is; says whether that was the end.
fn read_all(socket: &mut TcpStream, into: &mut BytesMut) -> io::Result<bool> {
    let mut piece = [0; 65536];
    for _ in 0..BACKLOG_ROUNDS {
        match socket.read(&mut piece) {
            Ok(0) => return Ok(true),
            Ok(read) => into.extend_from_slice(&piece[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

impl Floor {
    fn accept(&mut self, listener: &TcpListener) -> io::Result<()> {
        while let Ok((mut socket, _)) = listener.accept() {
            socket.set_nodelay(true)?;
            let token = Token(self.clients.len());
            self.poll.registry().register(&mut socket, token, Interest::READABLE | Interest::WRITABLE)?;
            self.clients.push(Some(Client { socket, request: vec![], opened: false, waiting: VecDeque::new() }));
        }
        Ok(())
    }

    fn listen_to(&mut self, number: usize) {
        let Some(client) = &mut self.clients[number] else { return };
        let mut piece = [0; 1024];
        loop {
            match client.socket.read(&mut piece) {
                Ok(0) => {
                    self.clients[number] = None;
                    return;
                }
                Ok(read) if !client.opened => client.request.extend_from_slice(&piece[..read]),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.clients[number] = None;
                    return;
                }
            }
        }
        if !client.opened && client.request.ends_with(b"\r\n\r\n") {
            client.opened = true;
            // The first line is `GET /events/f42 HTTP/1.1`: 42 is what it is called by.
            let digits = client.request.iter().skip_while(|byte| !byte.is_ascii_digit());
            let digits = digits.take_while(|byte| byte.is_ascii_digit());
            let called = digits.fold(0, |number, digit| number * 10 + usize::from(digit - b'0'));
            client.request = vec![];
            if self.numbers.len() <= called {
                self.numbers.resize(called + 1, None);
            }
            self.numbers[called] = Some(number);
            self.write(number, Some(Bytes::from_static(HEAD.as_bytes())));
            if !self.welcome.is_empty() {
                self.write(number, Some(self.welcome.clone()));
            }
        }
    }

    /// Does what has been ordered; orders for all that wait together leave in one write.
    fn obey(&mut self, orders: &mut BytesMut) {
        let mut all = BytesMut::new();
        while orders.len() >= 8 {
            let to = u32::from_le_bytes([orders[0], orders[1], orders[2], orders[3]]);
            let length = u32::from_le_bytes([orders[4], orders[5], orders[6], orders[7]]) as usize;
            if orders.len() < 8 + length {
                break;
            }
            orders.advance(8);
            let bytes = orders.split_to(length);
            match to {
                ALL => all.extend_from_slice(&bytes),
                WELCOME => self.welcome = bytes.freeze(),
                called => {
                    if let Some(Some(number)) = self.numbers.get(called as usize).copied() {
                        self.write(number, Some(bytes.freeze()));
                    }
                }
            }
        }
        if !all.is_empty() {
            let all = all.freeze();
            for number in 0..self.clients.len() {
                self.write(number, Some(all.clone()));
            }
        }
    }

    fn write(&mut self, number: usize, bytes: Option<Bytes>) {
        let Some(client) = &mut self.clients[number] else { return };
        client.waiting.extend(bytes);
        while let Some(first) = client.waiting.front_mut() {
            match client.socket.write_vectored(&[IoSlice::new(first)]) {
                Ok(written) if written == first.len() => drop(client.waiting.pop_front()),
                Ok(written) => first.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.clients[number] = None;
                    return;
                }
            }
        }
        // A queue that is empty most of the time is no memory of its own.
        if client.waiting.capacity() > 0 {
            client.waiting = VecDeque::new();
        }
    }
}

//! An HTTP/1.1 client that sends exactly what it is told to, sense or nonsense, and reads answers by the rules of
//! RFC 9112. Knows nothing of the gateway.

use std::{
    collections::VecDeque,
    fmt,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use super::PATIENCE;

/// A request, with nothing added to what was said of it but a `Host` where it has none.
#[derive(Clone)]
pub struct Request {
    method: String,
    target: Vec<u8>,
    version: &'static str,
    headers: Vec<(String, Vec<u8>)>,
    body: Body,
}

#[derive(Clone)]
enum Body {
    None,
    Whole(Vec<u8>),
    /// A `Content-Length`, and the body later or never.
    Announced(usize),
    /// In these chunks.
    Chunks(Vec<Vec<u8>>),
    /// In chunks that are sent one by one.
    Chunked,
}

impl Request {
    pub fn new(method: &str, target: impl AsRef<[u8]>) -> Request {
        let (method, target) = (method.to_owned(), target.as_ref().to_owned());
        Request { method, target, version: "HTTP/1.1", headers: vec![], body: Body::None }
    }

    pub fn get(target: impl AsRef<[u8]>) -> Request {
        Request::new("GET", target)
    }

    pub fn post(target: impl AsRef<[u8]>) -> Request {
        Request::new("POST", target)
    }

    /// A batch, still without lines.
    pub fn batch() -> Request {
        Request::post("/events").header("Content-Type", "application/x-ndjson")
    }

    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Request {
        self.headers.push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Request {
        self.body = Body::Whole(body.into());
        self
    }

    pub fn body_of_chunks<B: AsRef<[u8]>>(mut self, chunks: impl IntoIterator<Item = B>) -> Request {
        self.body = Body::Chunks(chunks.into_iter().map(|chunk| chunk.as_ref().to_owned()).collect());
        self
    }

    /// Says how long the body is and does not send it; [`Connection::send_bytes`] does.
    pub fn announce(mut self, length: usize) -> Request {
        self.body = Body::Announced(length);
        self
    }

    /// The body comes by [`Connection::send_chunk`], up to [`Connection::end_chunks`].
    pub fn chunked(mut self) -> Request {
        self.body = Body::Chunked;
        self
    }

    /// Says by a token or key which principal sends it.
    pub fn bearer(self, token: &str) -> Request {
        self.header("Authorization", format!("Bearer {token}"))
    }

    pub fn http_1_0(mut self) -> Request {
        self.version = "HTTP/1.0";
        self
    }

    /// The request as it goes over the wire.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = [self.method.as_bytes(), b" ", &self.target, b" ", self.version.as_bytes(), b"\r\n"].concat();
        let mut line = |name: &str, value: &[u8]| bytes.extend([name.as_bytes(), b": ", value, b"\r\n"].concat());
        if !self.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("Host")) {
            line("Host", b"localhost");
        }
        for (name, value) in &self.headers {
            line(name, value);
        }
        match &self.body {
            Body::None => {}
            Body::Whole(body) => line("Content-Length", body.len().to_string().as_bytes()),
            Body::Announced(length) => line("Content-Length", length.to_string().as_bytes()),
            Body::Chunks(_) | Body::Chunked => line("Transfer-Encoding", b"chunked"),
        }
        bytes.extend(b"\r\n");
        match &self.body {
            Body::Whole(body) => bytes.extend(body),
            Body::Chunks(chunks) => bytes.extend(chunks.iter().flat_map(chunk).chain(*b"0\r\n\r\n")),
            Body::None | Body::Announced(_) | Body::Chunked => {}
        }
        bytes
    }
}

impl From<&str> for Request {
    fn from(target: &str) -> Request {
        Request::get(target)
    }
}

impl From<&String> for Request {
    fn from(target: &String) -> Request {
        Request::get(target)
    }
}

impl From<String> for Request {
    fn from(target: String) -> Request {
        Request::get(target)
    }
}

impl From<&Request> for Request {
    fn from(request: &Request) -> Request {
        request.clone()
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&excerpt(&self.bytes()))
    }
}

/// The status line and headers of an answer.
#[derive(Clone, Debug)]
pub struct Head {
    pub version: String,
    pub status: u16,
    headers: Vec<(String, String)>,
}

impl Head {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| &**value)
    }
}

/// A whole answer.
pub struct Response {
    pub status: u16,
    pub head: Head,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap_or_else(|_| panic!("not UTF-8: {self:?}"))
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    pub fn json_lines(&self) -> Vec<serde_json::Value> {
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line:?}"));
        self.text().lines().map(parse).collect()
    }
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.head, excerpt(&self.body))
    }
}

/// One connection, for one request after the other, or several at once.
pub struct Connection {
    socket: TcpStream,
    /// What has arrived and was not looked at yet.
    ahead: Vec<u8>,
    /// The requests that were sent and not answered: whether each answer has a body at all.
    unanswered: VecDeque<bool>,
    framing: Framing,
}

/// A body of which the connection's end has left something out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut;

/// How the end of the body that is being read is known.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Framing {
    Length(usize),
    Chunked,
    /// So much of the current chunk is to come.
    Chunk(usize),
    UntilClosed,
    Ended,
}

impl Connection {
    pub fn open(address: SocketAddr) -> Connection {
        let socket = TcpStream::connect_timeout(&address, PATIENCE).expect("the listener accepts");
        Connection::over(socket)
    }

    /// The answer to one request, on a connection of its own.
    pub fn ask(address: SocketAddr, request: impl Into<Request>) -> Response {
        let mut connection = Connection::open(address);
        connection.send(request);
        connection.response()
    }

    /// A connection from one of this machine's addresses.
    pub fn open_from(address: SocketAddr, from: std::net::IpAddr) -> Connection {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::new(from, 0).into()).expect("loopback has this address");
        socket.connect_timeout(&address.into(), PATIENCE).expect("the listener accepts");
        Connection::over(socket.into())
    }

    /// A connection that the kernel keeps few received bytes for, so that not reading is soon felt by the sender.
    pub fn open_narrow(address: SocketAddr, receive_bytes: usize) -> Connection {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.set_recv_buffer_size(receive_bytes).expect("a socket has a buffer");
        socket.connect_timeout(&address.into(), PATIENCE).expect("the listener accepts");
        Connection::over(socket.into())
    }

    fn over(socket: TcpStream) -> Connection {
        socket.set_nodelay(true).expect("a socket can be told so");
        socket.set_write_timeout(Some(PATIENCE)).expect("not zero");
        Connection { socket, ahead: vec![], unanswered: VecDeque::new(), framing: Framing::Ended }
    }

    /// Sends a request, or as much of it as it holds.
    pub fn send(&mut self, request: impl Into<Request>) {
        let request = request.into();
        self.unanswered.push_back(request.method != "HEAD");
        // A server that refuses a request may close the connection before all of it has been sent.
        let _ = self.socket.write_all(&request.bytes());
    }

    /// Sends bytes as they are: a part of a body, or anything.
    pub fn send_bytes(&mut self, bytes: impl AsRef<[u8]>) {
        self.socket.write_all(bytes.as_ref()).expect("the other side takes it");
    }

    /// Sends as much as is taken within this time, and says how much that was.
    pub fn send_within(&mut self, limit: Duration, bytes: &[u8]) -> usize {
        self.socket.set_write_timeout(Some(limit)).expect("not zero");
        let mut sent = 0;
        while sent < bytes.len() {
            match self.socket.write(&bytes[sent..]) {
                Ok(written) => sent += written,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
                Err(error) => panic!("the other side does not take it: {error}"),
            }
        }
        self.socket.set_write_timeout(Some(PATIENCE)).expect("not zero");
        sent
    }

    /// Sends bytes, unless the other side goes away meanwhile.
    pub fn try_send_bytes(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    /// Sends the same bytes up to so many times, and says how often until the other side had gone away.
    pub fn send_until_closed(&mut self, bytes: &[u8], times: usize) -> usize {
        (0..times).take_while(|_| self.socket.write_all(bytes).is_ok()).count()
    }

    /// Sends the same bytes again and again and reads nothing, until the other side has gone away.
    pub fn flood(&mut self, bytes: &[u8], mut meanwhile: impl FnMut()) {
        let deadline = Instant::now() + PATIENCE;
        self.socket.set_write_timeout(Some(Duration::from_millis(50))).expect("not zero");
        loop {
            match self.socket.write(bytes).map_err(|error| error.kind()) {
                Err(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => return,
                Ok(_) | Err(_) => assert!(Instant::now() < deadline, "it keeps the connection"),
            }
            meanwhile();
        }
    }

    /// Sends a byte again and again, at this pace, until the other side has gone away.
    pub fn drip_until_closed(&mut self, byte: u8, pace: Duration) {
        loop {
            self.drip(byte, pace);
            let left = self.receive(Instant::now() + PATIENCE);
            if left == 0 {
                return;
            }
        }
    }

    /// Sends a byte again and again, at this pace, until the other side says something or goes away.
    pub fn drip(&mut self, byte: u8, pace: Duration) {
        let deadline = Instant::now() + PATIENCE;
        self.socket.set_read_timeout(Some(pace)).expect("not zero");
        while self.socket.peek(&mut [0]).is_err() && self.socket.write_all(&[byte]).is_ok() {
            assert!(Instant::now() < deadline, "it goes on to take them");
        }
    }

    pub fn send_chunk(&mut self, bytes: impl AsRef<[u8]>) {
        self.send_bytes(chunk(bytes));
    }

    /// Sends a chunk, unless the other side has gone away.
    pub fn try_send_chunk(&mut self, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        self.socket.write_all(&chunk(bytes))
    }

    pub fn end_chunks(&mut self) {
        self.send_bytes("0\r\n\r\n");
    }

    /// Another handle to the same socket, to send on from another thread.
    pub fn sender(&self) -> Connection {
        Connection::over(self.socket.try_clone().expect("sockets can be cloned"))
    }

    /// Ends the connection in both directions, for all handles to it.
    pub fn close(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Reads whatever comes and keeps none of it, until the connection ends.
    pub fn discard(&mut self) {
        self.socket.set_read_timeout(Some(PATIENCE)).expect("not zero");
        let _ = std::io::copy(&mut self.socket, &mut std::io::sink());
    }

    /// Says that nothing more will be sent.
    pub fn close_sending(&mut self) {
        self.socket.shutdown(Shutdown::Write).expect("it is open");
    }

    /// Reads one whole answer, passing over those that only go before it (1xx).
    pub fn response(&mut self) -> Response {
        let head = std::iter::repeat_with(|| self.head()).find(|head| head.status >= 200).expect("it is endless");
        let mut body = vec![];
        while let Some(piece) = self.piece() {
            body.extend(piece);
        }
        Response { status: head.status, head, body }
    }

    /// Reads the head of an answer; its body is up to [`Connection::piece`] and [`Connection::line`].
    pub fn head(&mut self) -> Head {
        let until = Instant::now() + PATIENCE;
        let end = loop {
            if let Some(end) = find(&self.ahead, b"\r\n\r\n") {
                break end;
            }
            assert!(self.receive(until) > 0, "the connection ends within a head: {}", excerpt(&self.ahead));
        };
        let text = String::from_utf8_lossy(&self.ahead[..end]).into_owned();
        self.ahead.drain(..end + 4);
        let mut lines = text.split("\r\n");
        let mut status_line = lines.next().expect("a text has a first line").splitn(3, ' ');
        let version = status_line.next().unwrap_or_default().to_owned();
        let status = status_line.next().and_then(|code| code.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status in {text:?}"));
        let header = |line: &str| line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
        let headers = lines.map(|line| header(line).unwrap_or_else(|| panic!("no header: {line:?}"))).collect();
        let head = Head { version, status, headers };
        self.framing = self.framing_after(&head);
        head
    }

    fn framing_after(&mut self, head: &Head) -> Framing {
        if (100..200).contains(&head.status) {
            return Framing::Ended;
        }
        let has_body = self.unanswered.pop_front().unwrap_or(true);
        let length = head.header("Content-Length").map(|length| length.parse().expect("a length is a number"));
        match (length, head.header("Transfer-Encoding")) {
            _ if !has_body || head.status == 204 || head.status == 304 => Framing::Ended,
            (None, Some("chunked")) => Framing::Chunked,
            (Some(length), None) => Framing::Length(length),
            (None, None) => Framing::UntilClosed,
            both => panic!("a length and a coding: {both:?}"),
        }
    }

    /// What has arrived of the body, waiting for some of it; `None` at its end.
    pub fn piece(&mut self) -> Option<Vec<u8>> {
        self.piece_until(Instant::now() + PATIENCE)
    }

    pub fn piece_until(&mut self, until: Instant) -> Option<Vec<u8>> {
        self.piece_or_cut(until).expect("the connection does not end within a body")
    }

    /// The same of a body that may be cut: an error where the connection ends before the body does.
    pub fn piece_or_cut(&mut self, until: Instant) -> Result<Option<Vec<u8>>, Cut> {
        loop {
            let (wanted, after): (usize, fn(usize) -> Framing) = match self.framing {
                Framing::Ended | Framing::Length(0) => {
                    self.framing = Framing::Ended;
                    return Ok(None);
                }
                Framing::Length(rest) => (rest, Framing::Length),
                Framing::UntilClosed => (usize::MAX, |_| Framing::UntilClosed),
                Framing::Chunked => match self.chunk_size(until)? {
                    0 => {
                        self.framing = Framing::Ended;
                        assert_eq!(self.text_line(until)?, "", "trailers are not expected");
                        return Ok(None);
                    }
                    size => {
                        self.framing = Framing::Chunk(size);
                        continue;
                    }
                },
                Framing::Chunk(0) => {
                    assert_eq!(self.text_line(until)?, "", "a chunk ends with its line");
                    self.framing = Framing::Chunked;
                    continue;
                }
                Framing::Chunk(rest) => (rest, Framing::Chunk),
            };
            if self.ahead.is_empty() && self.receive(until) == 0 {
                let is_whole = std::mem::replace(&mut self.framing, Framing::Ended) == Framing::UntilClosed;
                return if is_whole { Ok(None) } else { Err(Cut) };
            }
            let taken = wanted.min(self.ahead.len());
            self.framing = after(wanted - taken);
            let ahead = self.ahead.split_off(taken);
            return Ok(Some(std::mem::replace(&mut self.ahead, ahead)));
        }
    }

    /// The next line of a body whose pieces are lines, without its end.
    pub fn line(&mut self) -> Option<String> {
        let mut line = self.piece()?;
        while !line.ends_with(b"\n") {
            line.extend(self.piece().unwrap_or_else(|| panic!("the body ends within a line: {}", excerpt(&line))));
        }
        // A piece may hold several lines: those behind the first are for the next call.
        let end = find(&line, b"\n").expect("it ends with one");
        self.put_back(line.split_off(end + 1));
        line.truncate(end);
        Some(String::from_utf8(line).expect("a line of text"))
    }

    fn put_back(&mut self, bytes: Vec<u8>) {
        self.framing = match self.framing {
            Framing::Chunk(rest) => Framing::Chunk(rest + bytes.len()),
            Framing::Length(rest) => Framing::Length(rest + bytes.len()),
            framing => framing,
        };
        self.ahead.splice(..0, bytes);
    }

    /// Bytes as they come after the head of an answer, the framing of its body among them, until those who look at all of
    /// them so far have `seen` enough.
    pub fn raw_body_until(&mut self, mut seen: impl FnMut(&[u8]) -> bool) -> Vec<u8> {
        let until = Instant::now() + PATIENCE;
        while !seen(&self.ahead) {
            assert!(self.receive(until) > 0, "the connection ends: {}", excerpt(&self.ahead));
        }
        std::mem::take(&mut self.ahead)
    }

    /// Waits for the end of the connection, and returns what came before it.
    pub fn rest(&mut self) -> Vec<u8> {
        let until = Instant::now() + PATIENCE;
        while self.receive(until) > 0 {}
        std::mem::take(&mut self.ahead)
    }

    fn chunk_size(&mut self, until: Instant) -> Result<usize, Cut> {
        let line = self.text_line(until)?;
        Ok(usize::from_str_radix(&line, 16).unwrap_or_else(|_| panic!("{line:?} is no size of a chunk")))
    }

    fn text_line(&mut self, until: Instant) -> Result<String, Cut> {
        loop {
            if let Some(end) = find(&self.ahead, b"\r\n") {
                let line = self.ahead.drain(..end + 2).take(end).collect();
                return Ok(String::from_utf8(line).expect("framing is text"));
            }
            if self.receive(until) == 0 {
                self.framing = Framing::Ended;
                return Err(Cut);
            }
        }
    }

    /// Receives more; 0 when the other side has ended the connection, in whatever way.
    fn receive(&mut self, until: Instant) -> usize {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.socket.set_read_timeout(Some(left)).expect("not zero");
        let mut buffer = [0; 65536];
        match self.socket.read(&mut buffer) {
            Ok(received) => {
                self.ahead.extend(&buffer[..received]);
                received
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("nothing more arrives; unread so far: {}", excerpt(&self.ahead))
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => self.receive(until),
            Err(_) => 0,
        }
    }
}

fn chunk(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

/// As much of some bytes as a person wants to see.
pub fn excerpt(bytes: &[u8]) -> String {
    const SHOWN: usize = 600;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN)]);
    match bytes.len() {
        0..=SHOWN => format!("{text:?}"),
        length => format!("{text:?}... ({length} bytes)"),
    }
}

//! A small HTTP server of a test's own: an identity provider, a login page. Answers one request a connection.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use super::PATIENCE;

/// A site. Ends with its owner.
pub struct Site {
    pub address: SocketAddr,
    asked: Arc<AtomicUsize>,
    ended: Arc<AtomicBool>,
    serving: Option<JoinHandle<()>>,
}

/// What a site answers: headers and a body, with 200.
pub struct Page {
    pub headers: Vec<(&'static str, String)>,
    pub body: String,
}

impl Site {
    pub fn start(answer: impl Fn(&str) -> Page + Send + 'static) -> Site {
        Site::start_at("127.0.0.1:0".parse().expect("an address"), answer)
    }

    /// A site that was there before.
    pub fn start_at(address: SocketAddr, answer: impl Fn(&str) -> Page + Send + 'static) -> Site {
        // Not a plain bind: what is left of the one before must not keep the address.
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.set_reuse_address(true).expect("a socket can be told so");
        socket.bind(&address.into()).expect("the address is free");
        socket.listen(64).expect("a socket can listen");
        let listener = TcpListener::from(socket);
        let address = listener.local_addr().expect("it listens");
        let (asked, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let serving = std::thread::spawn({
            let (asked, ended) = (asked.clone(), ended.clone());
            move || {
                for socket in listener.incoming().map_while(Result::ok) {
                    if ended.load(Ordering::SeqCst) {
                        break;
                    }
                    serve(socket, &asked, &answer);
                }
            }
        });
        Site { address, asked, ended, serving: Some(serving) }
    }

    /// How many requests have come.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

fn serve(mut socket: TcpStream, asked: &AtomicUsize, answer: &impl Fn(&str) -> Page) {
    socket.set_read_timeout(Some(PATIENCE)).expect("not zero");
    let (mut head, mut buffer) = (vec![], [0; 4096]);
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        match socket.read(&mut buffer) {
            Ok(read) if read > 0 => head.extend(&buffer[..read]),
            _ => return,
        }
    }
    asked.fetch_add(1, Ordering::SeqCst);
    let head = String::from_utf8_lossy(&head).into_owned();
    let Page { headers, body } = answer(head.split(' ').nth(1).unwrap_or("/"));
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    let text = format!("HTTP/1.1 200 OK\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}");
    let _ = socket.write_all(text.as_bytes());
}

impl Drop for Site {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // Wakes it, to see that.
        drop(TcpStream::connect(self.address));
        let _ = self.serving.take().map(JoinHandle::join);
    }
}

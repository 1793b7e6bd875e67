//! A small client for NATS, for connections that carry what other people have published.
//!
//! It knows the protocol (CONNECT, authentication, TLS, the servers of a cluster, SUB, UNSUB, PUB with a reply, PING) and
//! nothing of JetStream, of streams, or of this gateway's configuration. It could be a crate of its own.
//!
//! | module | is about |
//! |---|---|
//! | `codec` | frames, as bytes (`tokio_util::codec`) |
//! | `headers` | blocks of headers, of which a part may be unreadable |
//! | `connection` | one connection to one server |
//! | `server_pool` | which server is next |
//! | `subscriptions` | what the server is told, has confirmed, and has refused |
//! | `client` | a handle for many, and a connection that one task drives |
//! | `requests` | requests and their replies |
//! | `credentials` | a user's identity and key |
//!
//! # Why it exists
//! async-nats 0.51 is a good client, and stays the one for what only this gateway and the server write (publishing,
//! requests that are answered by JSON). Three things keep it from the rest:
//!
//! - *Odd headers.* A message whose headers are not what its parser expects ends the connection, each time that it is
//!   read: a value that is not UTF-8, a line without a colon, an odd name, version or status. A lone CR in a value is an
//!   assertion, and a panic ends the connection's task for good (nats.rs #1612). Every publisher can store such a message.
//!   Here nothing that a publisher chooses is parsed by the connection: it hands over bytes.
//! - *Memory.* It takes 6 kB for each subscription, and a gateway has one for each of its feeds, ten thousand and more.
//!   Here it is a number, a subject and what the subscriber keeps.
//! - *Order.* Each of its subscriptions is a channel of its own: what came first on the connection may be seen last. Here
//!   [`Connection::next`] is the one place where everything comes out, in order: word that a stream changed is seen before
//!   what was published after it.
//!
//! It could go once async-nats parses headers lazily or leniently, tells of refused and dropped subscriptions, and
//! offers one ordered channel for many subscriptions.

mod client;
mod codec;
mod connection;
mod credentials;
mod headers;
mod requests;
mod server_pool;
mod subscriptions;

#[cfg(fuzzing)]
pub use self::codec::fuzzing;
pub use self::{
    client::{Client, Connection, Event, PING, SILENCE, Subscribing, Subscription},
    codec::{Message, ServerInfo},
    connection::{ConnectOptions, ConnectionError},
    credentials::Credentials,
    headers::Headers,
    requests::{Replies, Requests},
    server_pool::ServerAddress,
};

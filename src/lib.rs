//! Tidegate, a Server-Sent Events gateway: from NATS to every browser, exactly where they left off.
//!
//! A tide gate lets water through one way. Events come in over HTTP or straight into NATS, are kept in a JetStream
//! stream (or, with one command and nothing to install, in this process's memory), and leave as `text/event-stream` to
//! every client that asks. Nodes keep no state that matters: a client resumes on any node with its `Last-Event-ID`.
//!
//! # The way of an event
//!
//! ```text
//! publish:    http::publish, http::batch -> auth -> limits -> broker
//! subscribe:  http::subscribe -> auth -> limits -> hub: Cursor <- Feed <- broker (live hints, history)
//!                     \-> http::connection: the socket leaves the HTTP server -> delivery
//! ```
//!
//! | module | is for | uses |
//! |---|---|---|
//! | [`gateway`] | puts the parts together, drains them in order | everything below |
//! | [`http`] | the URL space, requests and problems, the console, the API description; hands sockets over | auth, limits, delivery, hub, broker, wire |
//! | [`auth`] | authentication and authorization | subject |
//! | [`delivery`] | the streams: writes what their cursors yield to their sockets | limits, hub, wire |
//! | [`limits`] | how much one address or principal may ask for | |
//! | [`hub`] | feeds, cursors, where a stream begins and ends | broker, wire, position |
//! | [`broker`] | the one trait, and its two implementations | nats, event |
//! | [`nats`] | a client for NATS connections that carry what other people published | |
//! | [`wire`] | event -> bytes, as event stream or NDJSON; pure | position, event |
//! | [`sieve`] | which events of its filters a reader wants, by type and content | event |
//! | [`pace`] | how fast a stream or a batch is to go | |
//! | [`position`] | where a client stands, for each of its filters | event |
//! | [`event`], [`subject`] | the words that everything speaks | |
//! | [`memory`] | how many bytes the node holds for its clients, and whether that is too much | |
//! | [`fd_limit`] | how many files the system allows, and limits that fit | config |
//! | [`backoff`], [`config`], [`log`], [`metrics`], [`panics`], [`shutdown`] | leaves that anyone may use | |
//!
//! Uses go downwards only, and each foreign crate has its room; `tests/tidy.rs` holds both. `delivery` stands above
//! `hub` because a stream pulls from its cursor, and nothing is ever pushed at it. Two things are made by hand that a
//! library has, because there are thousands of each and they were measured: a stream is no task of tokio's (`worker` in
//! [`delivery`]), and what other people published does not come over async-nats ([`nats`] says why).
//!
//! # Glossary
//!
//! | word | meaning |
//! |---|---|
//! | stream | JetStream's: the stored events. Where a client's open response is meant, settings and metrics also say *stream* (`limits.streams`, `tidegate_streams`), as they have from the start; code says [`delivery`] or subscription where both could be meant |
//! | feed | the recent events of one filter on this node, shared by all its readers |
//! | cursor | one client's place in its feeds |
//! | hint | what the broker says live; proves nothing by itself |
//! | proven | the sequence up to which a feed is known to be complete (a high-water mark) |
//! | resync | a feed reads again from its proven sequence |
//! | epoch | which incarnation of the stream a sequence belongs to |
//! | position | what stands in an `id:` line: everything up to here has been delivered |
//! | witness | the time of an event in a position, by which a gateway recognizes the stream |
//! | gap | events that a client should get and that can't be delivered |
//! | snapshot | the last event of every subject |
//! | sieve | which events of its filters a reader wants, by type (`type=`) and content (`where=`) |
//! | selection | a sieve, an interval (`every=`), or both; a *derived feed* is the part of a feed that readers with one selection want |
//! | worker | the loop that writes the streams of one processor |
//! | permit | the right to one more stream, connection or batch, returned when it is dropped |
//!
//! # Invariants
//!
//! - *Nothing is sent beyond what is proven.* A feed knows the sequence up to which it is complete; live hints prove nothing
//!   by themselves. See [`hub`] and the doc of its `feed`.
//! - *A place, not a queue.* What a client has not taken is not kept for it: at most one frame that has been begun.
//! - *Every frame's id says "everything up to here"* and is its last line, so that a connection may die after any byte.
//! - *A promise counts as real clients read it*: each event of the gateway's own has a type, data and an id, each frame is
//!   one chunk, and a stream that is to go on elsewhere never gets the last one (see [`wire`]).
//! - *An event is encoded once* for each format, however many clients get it.
//! - *What the broker did not acknowledge is an error*, never a 2xx; what is unknown says so.
//! - *Refused unseen*: what a client may not do is decided from names alone, before anything is looked up; a bad token
//!   is never taken for none.
//! - *Never half-alive*: every connection to NATS is watched, told by readiness while it lacks, and made again; nothing that
//!   is stored can stop one.
//! - *Bounded*: every queue, cache and wait has a limit with a name, and so has what one client may have of them.
//!
//! # Walkthrough: a publish
//!
//! `POST /events/demo` arrives at `http::publish`. `http::authenticate` finds the token, [`auth::Auth::authenticate`] makes a
//! [`auth::Principal`] of it, and everything else is parsed and held against that before the body is read: from there on
//! a [`subject::Subject`] is one, and allowed. [`broker::Publish::publish`] hands the event over; the answer waits for the broker's
//! acknowledgement. The stored event comes back as a hint to every feed whose filter matches. A feed for `demo` sees that
//! the event before it is one it has, appends it and wakes its readers; a feed for `>` reads from its proven sequence to see what it has
//! missed. The worker of each reader's stream ([`delivery`]) has its
//! [`hub::Cursor`] take the frame, and writes it.
//!
//! # Walkthrough: a reconnect
//!
//! A browser comes back with `Last-Event-ID: 0k3f9x-1042.mgk2x9vc`. `hub::resume` holds it against the feed: the epoch is
//! the stream's, the event 1042 was stored at that time (`hub::witnesses`), and 1042 is not past what is proven, so that is its place,
//! and the stream opens with that position. If the feed's log still
//! has what follows, the cursor takes it from there; else it reads pages of history until it is inside the log. If the
//! stream has dropped what follows 1042, a page says so by its `first`, and the client is told a `tidegate.gap`.

#[cfg(test)]
extern crate self as tidegate;

pub mod auth;
pub mod backoff;
pub mod broker;
pub mod config;
pub mod delivery;
pub mod event;
pub mod fd_limit;
#[cfg(test)]
mod fuzz;
pub mod gateway;
pub mod http;
pub mod hub;
pub mod limits;
pub mod log;
pub mod memory;
pub mod metrics;
pub mod nats;
pub mod pace;
pub mod panics;
pub mod position;
pub mod shutdown;
pub mod sieve;
pub mod subject;
pub mod wire;

//! What the black-box tests are written with: a gateway in a process of its own, a client that sends exactly the bytes
//! it is told to, and a reader of event streams that owes nothing to the gateway's code.
//!
//! Nothing here sleeps. Whoever waits, waits for the thing itself, at most for [`PATIENCE`], and then fails with what
//! it has seen.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

pub mod backend;
pub mod broker;
pub mod browser;
pub mod cut;
pub mod gateway;
pub mod http;
pub mod nats;
pub mod nginx;
pub mod prometheus;
pub mod site;
pub mod sse;
pub mod tokens;
pub mod wire;

use std::time::Duration;

/// How long anything that must happen may take. Far more than it does, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(10);

//! Whether a client is still there, by what its kernel acknowledges.
//!
//! A client that vanished without a FIN acknowledges nothing of what is sent to it. One that only does not read still
//! answers the window probes of TCP: it is slow, not gone. (`TCP_USER_TIMEOUT` would end both.)

use std::time::Duration;

use nix::{getsockopt_impl, libc, sockopt_impl, sys::socket::getsockopt};
use tokio::net::TcpStream;

sockopt_impl!(TcpInfo, GetOnly, libc::IPPROTO_TCP, libc::TCP_INFO, libc::tcp_info);

/// Whether something has been sent, and nothing at all acknowledged for longer than `patience`.
pub(super) fn is_gone(socket: &TcpStream, patience: Duration) -> bool {
    getsockopt(socket, TcpInfo)
        .is_ok_and(|info| info.tcpi_unacked > 0 && Duration::from_millis(info.tcpi_last_ack_recv.into()) > patience)
}

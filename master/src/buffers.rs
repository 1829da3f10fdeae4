//! Buffers of sockets that workers may not make so large themselves.

use std::os::fd::OwnedFd;
use std::sync::Once;

use culvert_shared::message::Buffer;
use nix::sys::socket::{setsockopt, sockopt};

/// Sizes a buffer beyond what a process without rights may have.
pub fn size(socket: &OwnedFd, buffer: Buffer, bytes: u32) {
    /// It is the same for all.
    static TOLD: Once = Once::new();
    let bytes = bytes as usize;
    let (sized, limit) = match buffer {
        Buffer::Send => (
            setsockopt(socket, sockopt::SndBufForce, &bytes),
            "net.core.wmem_max",
        ),
        Buffer::Receive => (
            setsockopt(socket, sockopt::RcvBufForce, &bytes),
            "net.core.rmem_max",
        ),
    };
    if let Err(error) = sized {
        TOLD.call_once(|| {
            log::warn!(
                "socket buffers of {bytes} bytes cannot be had: {error}; sessions whose reader is the slower end are slow \
                 until {limit} is at least that, or the master has CAP_NET_ADMIN"
            );
        });
    }
}

//! A session of the self-test: two connections over loopback and the pair that joins them. All four
//! sockets are in the test's hands.

use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use culvert_shared::ids::Direction;
use culvert_shared::sys::repair;

use super::socket::{Socket, connection, prepared, wait_until};
use crate::flow_flag;
use crate::pair::{FlowState, Hold, Joined, LaneNumber, SlotMaps, Terms};
use culvert_shared::sessions::Place;

/// Before a byte: only the SYN that opened `upstream`.
const SENT_BYTES: [u64; 2] = [1, 0];

/// `client` - `downstream` = pair = `upstream` - `server`.
pub struct Session<'a> {
    /// The maps that the pair is in.
    pub maps: &'a SlotMaps,
    /// The pair's place.
    pub place: Place,
    /// Connected to `downstream`.
    pub client: Socket,
    /// The pair's socket towards the client.
    pub downstream: Socket,
    /// The pair's socket towards the server.
    pub upstream: Socket,
    /// Connected to `upstream`.
    pub server: Socket,
    pub(super) deadline: Instant,
}

impl<'a> Session<'a> {
    /// Connects all four, with `buffer_bytes` as each one's SO_SNDBUF and SO_RCVBUF if given.
    pub(super) fn connect(
        maps: &'a SlotMaps,
        place: Place,
        deadline: Instant,
        buffer_bytes: Option<usize>,
    ) -> Result<Session<'a>> {
        let [client, downstream] = connection(["client", "downstream"], deadline, buffer_bytes)?;
        let [upstream, server] = connection(["upstream", "server"], deadline, buffer_bytes)?;
        Ok(Session {
            maps,
            place,
            client,
            downstream,
            upstream,
            server,
            deadline,
        })
    }

    /// Gives what is left to do its own time.
    pub(super) fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
        for socket in [
            &mut self.client,
            &mut self.downstream,
            &mut self.upstream,
            &mut self.server,
        ] {
            socket.deadline = deadline;
        }
    }

    /// Hands both sockets to the kernel.
    pub(super) fn join(&self, backlog_bytes: u32, lane: LaneNumber) -> Result<()> {
        let terms = Terms {
            now_ns: 0,
            backlog_bytes,
            window_bytes: None,
            settable_bytes: 0,
            lane,
        };
        let sockets = [self.downstream.stream.as_fd(), self.upstream.stream.as_fd()];
        match self.maps.join(self.place, sockets, &terms, SENT_BYTES, [true; 2]) {
            Ok(Joined::Wanted) => Ok(()),
            Ok(Joined::ToUpstreamOnly) => bail!("upstream: the kernel refused it as a source"),
            Err(error) => Err(error).context("the kernel refused the sockets"),
        }
    }

    /// Whether the source of to_upstream is held back although its target has drained: what workers ask by the clock.
    pub(super) fn is_due(&self) -> bool {
        let target = self.upstream.stream.as_fd();
        self.maps.hold(self.place, Direction::ToUpstream, target) == Hold::Drained
    }

    /// Lets the source of a direction go that was held back.
    pub(super) fn resume(&self, direction: Direction) -> bool {
        let source = match direction {
            Direction::ToUpstream => &self.downstream,
            Direction::ToDownstream => &self.upstream,
        };
        self.maps.resume(self.place, direction, source.stream.as_fd())
    }

    pub(super) fn flow(&self, direction: Direction) -> FlowState {
        self.maps.flow(self.place, direction)
    }

    /// Waits until the program has counted `bytes` for a direction (they can be at their end a moment
    /// before), and looks at what it has met.
    pub(super) fn counted(&self, direction: Direction, bytes: usize) -> Result<()> {
        wait_until(self.deadline, || {
            self.flow(direction).forwarded_bytes == bytes as u64
        });
        let FlowState {
            forwarded_bytes,
            flags,
            ..
        } = self.flow(direction);
        let way = direction.name();
        ensure!(
            forwarded_bytes == bytes as u64,
            "{way}: {bytes} bytes were sent, the program counts {forwarded_bytes} forwarded"
        );
        let met = flow_flag::describe(flags);
        ensure!(met.is_empty(), "{way}: {met}");
        Ok(())
    }

    /// Puts the client `bytes` back in what it sends.
    pub(super) fn with_client_rewound(mut self, bytes: u32) -> Result<Session<'a>> {
        let new = repair::rewind(self.client.stream.into(), bytes)?;
        self.client.stream = prepared(TcpStream::from(new))?;
        Ok(self)
    }

    /// Ends both streams, as user space does once everything is at the other end: nothing may come before it.
    pub(super) fn finish(self) -> Result<Place> {
        let Session {
            maps,
            place,
            mut client,
            downstream,
            upstream,
            mut server,
            ..
        } = self;
        for (ours, theirs) in [(&downstream, &mut client), (&upstream, &mut server)] {
            ours.end_stream();
            theirs.receive_end()?;
        }
        maps.part(place);
        Ok(place)
    }
}

//! Indices that cross process or crate boundaries. Numbers only: nothing here owns anything.

/// The way of a byte through a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Direction {
    /// From the downstream socket (client) to the upstream socket (server).
    ToUpstream = 0,
    /// From the upstream socket to the downstream socket.
    ToDownstream = 1,
}

impl Direction {
    /// Both directions, in index order.
    pub const BOTH: [Direction; 2] = [Direction::ToUpstream, Direction::ToDownstream];

    /// The other direction.
    pub fn opposite(self) -> Direction {
        match self {
            Direction::ToUpstream => Direction::ToDownstream,
            Direction::ToDownstream => Direction::ToUpstream,
        }
    }

    /// The direction's place in two-element arrays.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The name that status documents and logs use.
    pub fn name(self) -> &'static str {
        match self {
            Direction::ToUpstream => "to_upstream",
            Direction::ToDownstream => "to_downstream",
        }
    }
}

/// One incarnation of a worker process. Never reused while the program runs, never zero: zero marks
/// what nobody owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner(pub u32);

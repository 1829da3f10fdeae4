//! What the master and a worker say to each other: one byte a message, over [`crate::sys::fdpass`].

/// From the master to a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToWorker {
    /// Take no new sessions, finish those that are open (at most `worker_shutdown_timeout`), exit.
    Drain,
    /// Reset what is open and exit now.
    Stop,
    /// Write the log to the descriptor that comes with the message.
    Log,
}

/// From a worker to the master.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToMaster {
    /// The worker accepts connections.
    Ready,
}

impl ToWorker {
    const ALL: [(ToWorker, u8); 3] = [
        (ToWorker::Drain, b'D'),
        (ToWorker::Stop, b'S'),
        (ToWorker::Log, b'L'),
    ];

    /// The message's bytes.
    pub fn encode(self) -> [u8; 1] {
        let byte = Self::ALL
            .iter()
            .find(|(message, _)| *message == self)
            .map_or(0, |(_, byte)| *byte);
        [byte]
    }

    /// The message that the bytes stand for; `None` for anything else.
    pub fn decode(bytes: &[u8]) -> Option<ToWorker> {
        Self::ALL
            .iter()
            .find(|(_, byte)| bytes == [*byte])
            .map(|(message, _)| *message)
    }
}

impl ToMaster {
    /// The message's bytes.
    pub fn encode(self) -> [u8; 1] {
        match self {
            ToMaster::Ready => [b'R'],
        }
    }

    /// The message that the bytes stand for; `None` for anything else.
    pub fn decode(bytes: &[u8]) -> Option<ToMaster> {
        (bytes == b"R").then_some(ToMaster::Ready)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_is_read_as_it_was_written() {
        for (message, _) in ToWorker::ALL {
            assert_eq!(ToWorker::decode(&message.encode()), Some(message));
        }
        assert_eq!(ToMaster::decode(&ToMaster::Ready.encode()), Some(ToMaster::Ready));
        assert_eq!(ToWorker::decode(b"D "), None);
        assert_eq!(ToWorker::decode(b""), None);
    }
}

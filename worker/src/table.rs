//! The sessions of one worker: slots with generations, and the token that names one in epoll and timers.
//! A token of a session that is gone finds nothing, even when its slot is in use again.

/// Which of a session's two sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Side {
    /// The client's.
    Downstream = 0,
    /// The server's.
    Upstream = 1,
}

impl Side {
    /// Its place in two-element arrays.
    pub fn index(self) -> usize {
        self as usize
    }
}

/// Names a session for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    slot: u32,
    generation: u32,
}

impl Token {
    /// The session's slot: small, dense, and used again after it.
    pub fn slot(self) -> u32 {
        self.slot
    }
}

/// Generations are 31 bits, so that a token and a side fit 64.
const GENERATIONS: u32 = 1 << 31;

impl Token {
    /// The token and a side as epoll data.
    pub fn encode(self, side: Side) -> u64 {
        u64::from(self.generation) << 33 | (side.index() as u64) << 32 | u64::from(self.slot)
    }

    /// What [`Token::encode`] made.
    pub fn decode(data: u64) -> (Token, Side) {
        let side = if data >> 32 & 1 == 0 {
            Side::Downstream
        } else {
            Side::Upstream
        };
        (
            Token {
                slot: data as u32,
                generation: (data >> 33) as u32,
            },
            side,
        )
    }
}

/// Sessions by token.
pub struct Table<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    used: usize,
}

struct Slot<T> {
    generation: u32,
    session: Option<Box<T>>,
}

impl<T> Table<T> {
    /// An empty table. It grows with use.
    pub fn new() -> Table<T> {
        Table {
            slots: Vec::new(),
            free: Vec::new(),
            used: 0,
        }
    }

    /// Reserves a slot; the session follows with [`Table::put`].
    pub fn reserve(&mut self) -> Token {
        self.used += 1;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                session: None,
            });
            self.slots.len() as u32 - 1
        });
        Token {
            slot,
            generation: self.slots[slot as usize].generation,
        }
    }

    /// Puts a session into its slot, or back after [`Table::take`].
    pub fn put(&mut self, token: Token, session: Box<T>) {
        if let Some(slot) = self.current(token) {
            slot.session = Some(session);
        }
    }

    /// Takes a session out to work on it; its slot stays its own. `None`: it is gone.
    pub fn take(&mut self, token: Token) -> Option<Box<T>> {
        self.current(token)?.session.take()
    }

    /// Frees the slot of a session that was taken out; its token is worth nothing afterwards.
    pub fn release(&mut self, token: Token) {
        if let Some(slot) = self.current(token) {
            slot.generation = (slot.generation + 1) % GENERATIONS;
            slot.session = None;
            self.free.push(token.slot);
            self.used -= 1;
        }
    }

    fn current(&mut self, token: Token) -> Option<&mut Slot<T>> {
        self.slots
            .get_mut(token.slot as usize)
            .filter(|slot| slot.generation == token.generation)
    }

    /// Sessions in the table.
    pub fn len(&self) -> usize {
        self.used
    }

    /// The token of the session in a slot, if there is one.
    pub fn token_at(&self, slot: u32) -> Option<Token> {
        let at = self.slots.get(slot as usize)?;
        at.session.is_some().then_some(Token {
            slot,
            generation: at.generation,
        })
    }

    /// The tokens of all sessions.
    pub fn tokens(&self) -> Vec<Token> {
        let with_session = self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.session.is_some());
        with_session
            .map(|(at, slot)| Token {
                slot: at as u32,
                generation: slot.generation,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_token_finds_nothing_though_its_slot_is_used_again() {
        let mut table = Table::new();
        let first = table.reserve();
        table.put(first, Box::new(1));
        assert_eq!(table.take(first), Some(Box::new(1)));
        table.release(first);
        let second = table.reserve();
        table.put(second, Box::new(2));
        assert_eq!(second.slot, first.slot);
        assert_eq!(table.take(first), None);
        table.release(first);
        assert_eq!(table.len(), 1);
        assert_eq!(table.tokens(), [second]);
    }

    #[test]
    fn a_token_survives_its_way_through_epoll() {
        for generation in [0, 1, GENERATIONS - 1] {
            for side in [Side::Downstream, Side::Upstream] {
                let token = Token {
                    slot: u32::MAX - 7,
                    generation,
                };
                assert_eq!(Token::decode(token.encode(side)), (token, side));
            }
        }
    }
}

//! Sessions that lead to a host by its name: they wait while the master has its addresses looked up, with nothing read of
//! them, and then try these one after the other. What is known of hosts stands in `hosts`.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::rc::Rc;

use culvert_shared::config::Address;
use culvert_shared::counters::{Board, CloseReason};
use culvert_shared::hosts::{Answer, BATCH, Question};
use culvert_shared::message::ToMaster;
use culvert_shared::sys::fdpass;
use nix::errno::Errno;

use crate::clock;
use crate::drive::Next;
use crate::event_loop::{NAMING_TIMER, Worker};
use crate::hosts::{Host, Look};
use crate::route::Route;
use crate::session::{Phase, Session};
use crate::table::Token;

/// How much longer a session waits than a lookup may take: then the answer says why there is none.
const SLACK_MS: u64 = 500;

/// When the master is told again what it had no room to hear.
const RETRY_MS: u64 = 10;

impl Worker {
    /// A session is to be connected to a host of this name. `attempts`: those that were made in another worker.
    pub(crate) fn lead_to_host(
        &mut self,
        token: Token,
        session: &mut Session,
        (host, port): (String, u16),
        attempts: usize,
    ) -> Next {
        let of_server = session.server.and_then(|server| self.resolvers.get(server));
        let Some(resolver) = of_server.copied().flatten() else {
            log::error!(
                "session {}: there is no resolver to ask for {host}: write for example resolver = \"127.0.0.53\" in [stream]",
                session.number
            );
            return Next::Close(CloseReason::NameFailed);
        };
        let question = Question { resolver, host };
        let timeout = session
            .settings
            .resolver
            .as_ref()
            .map(|resolver| resolver.timeout);
        let patience_ms = timeout.unwrap_or_default().as_millis() as u64 + SLACK_MS;
        let now_ms = clock::now_ms();
        let look = self.hosts.look(&question, token, now_ms, patience_ms);
        // One that has waited in another worker goes on to wait as long as it would have there.
        let since = match session.phase {
            Phase::Naming { deadline_ms } => Some(deadline_ms),
            _ => None,
        };
        let counters = &self.board[0].hosts;
        if since.is_none() {
            Board::add(&counters.sessions, 1);
            Board::add(
                &counters.remembered,
                u64::from(matches!(look, Look::Addresses(_))),
            );
        }
        let mut lead = Box::new(Host::new(question, port));
        lead.attempts = attempts;
        match look {
            Look::Addresses(addresses) => {
                session.host = Some(lead);
                self.begin_host(token, session, addresses)
            }
            Look::Nothing(why) => self.no_host(session, &lead.question.host, &why),
            Look::Full => {
                Board::add(&counters.refused, 1);
                self.no_host(
                    session,
                    &lead.question.host,
                    "too many names are being looked up already",
                )
            }
            Look::Asked => {
                let deadline_ms = since.unwrap_or(now_ms + patience_ms);
                session.host = Some(lead);
                session.phase = Phase::Naming { deadline_ms };
                // If a peer failed before, the master has another socket of it.
                self.keep_again(token, session);
                if session.seat.is_none_or(|seat| !seat.kept) {
                    self.note_young(token, session);
                }
                Next::Wait(deadline_ms)
            }
        }
    }

    /// Lets some of those go on whose question is answered.
    pub(crate) fn go_on_named(&mut self) {
        for (token, said) in self.hosts.ready() {
            let (question, answer) = &*said;
            self.with_session(token, |worker, session| {
                let waits = matches!(session.phase, Phase::Naming { .. });
                let asks = session
                    .host
                    .as_ref()
                    .is_some_and(|host| host.question == *question);
                match answer {
                    // Another one's by now.
                    _ if !waits || !asks => worker.drive(token, session),
                    Answer::Addresses { addresses, .. } => {
                        let order = worker.hosts.order(addresses);
                        worker.begin_host(token, session, order)
                    }
                    Answer::Nothing { why, .. } => worker.no_host(session, &question.host, why),
                }
            });
        }
    }

    /// The addresses of a session's host are known.
    fn begin_host(&mut self, token: Token, session: &mut Session, addresses: VecDeque<IpAddr>) -> Next {
        session.connecting_since_ms = clock::now_ms();
        session.phase = Phase::Connecting { deadline_ms: 0 };
        if let Some(host) = &mut session.host {
            host.left = addresses;
            // After an adoption the one that has failed is known.
            let (port, failed) = (host.port, &session.failed_peers);
            host.left.retain(|ip| {
                let name = SocketAddr::new(*ip, port).to_string();
                failed.iter().all(|peer| peer.name != name)
            });
        }
        self.connect_host(token, session)
    }

    /// Connects to the next address of the session's host.
    pub(crate) fn connect_host(&mut self, token: Token, session: &mut Session) -> Next {
        loop {
            let Some(address) = session.host.as_mut().and_then(|host| host.next()) else {
                return Next::Close(CloseReason::ConnectFailed);
            };
            let address = Address::Tcp(address);
            let tried = self.open(token, session, &address, None);
            let next = match tried {
                Ok(next) => Some(next),
                Err(errno) => self.next_after(session, &address, None, errno),
            };
            if let Some(next) = next {
                return next;
            }
        }
    }

    /// A session was taken over while it was connecting to an address, which has failed. If that was one of a host, the
    /// others are to be tried; which of them were before, nobody knows any more.
    pub(crate) fn lead_again(&mut self, token: Token, session: &mut Session) -> Option<Next> {
        if session.host.is_some() || session.tried.is_some() || !session.settings.proxy_next_upstream {
            return None;
        }
        let Ok(Route::Host(host, port)) = self.route_of(session) else {
            return None;
        };
        if session.settings.proxy_next_upstream_tries == 1 {
            return None;
        }
        Some(self.lead_to_host(token, session, (host, port), 1))
    }

    /// A session that has waited in another worker, or that was to leave for one, waits here.
    pub(crate) fn name_again(&mut self, token: Token, session: &mut Session) -> Next {
        self.recall_hello(session);
        self.connect(token, session)
    }

    /// The session waits no more, for whatever reason.
    pub(crate) fn leave_naming(&mut self, token: Token, session: &Session) {
        if let (Phase::Naming { .. }, Some(host)) = (session.phase, &session.host) {
            self.hosts.leave(&host.question, token);
        }
    }

    /// The session has waited long enough.
    pub(crate) fn named_in_vain(&self, session: &Session) -> Next {
        let host = session.host.as_ref();
        let name = host.map_or("its host", |host| host.question.host.as_str());
        self.no_host(session, name, "no answer came within resolver_timeout")
    }

    fn no_host(&self, session: &Session, host: &str, why: &str) -> Next {
        log::error!(
            "session {}: {host} could not be resolved for client {}: {why}",
            session.number,
            session.client()
        );
        Next::Close(CloseReason::NameFailed)
    }

    /// Tells the master what is to be asked, as far as it has room to hear it.
    pub(crate) fn tell_questions(&mut self) {
        loop {
            let questions = self.hosts.untold(BATCH);
            let count = questions.len();
            if count == 0 {
                return;
            }
            match fdpass::send(self.control.as_fd(), &ToMaster::Ask(questions).encode(), &[]) {
                Ok(()) => self.hosts.told(count),
                Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM | Errno::EINTR) => {
                    return self.wheel.set(NAMING_TIMER, clock::now_ms() + RETRY_MS);
                }
                Err(_) => return self.end_naming(),
            }
        }
    }

    /// The master is gone: nobody will ask for anything any more.
    pub(crate) fn end_naming(&mut self) {
        let why: Rc<str> = Rc::from("the master is gone, and nobody else asks");
        for token in self.hosts.give_up() {
            self.with_session(token, |worker, session| match (session.phase, &session.host) {
                (Phase::Naming { .. }, Some(host)) => worker.no_host(session, &host.question.host, &why),
                _ => worker.drive(token, session),
            });
        }
    }
}

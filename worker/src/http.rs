//! The HTTP side: reads small requests, answers them with what the worker knows. A client has one bounded buffer
//! and bounded time; what it does wrong costs its own connection only.

use std::os::fd::AsFd;

use culvert_shared::counters::CloseReason;
use culvert_shared::ids::Direction;
use nix::errno::Errno;

use crate::clock;
use crate::drive::Next;
use crate::event_loop::Worker;
use crate::page;
use crate::session::{Datapath, Phase, Session, Way};
use crate::sockets;
use crate::table::Side;

/// The longest request, body excluded: nobody is answered who sends a body.
const REQUEST_BYTES: usize = 8 << 10;
/// Header lines of one request.
const HEADERS: usize = 64;
/// HTTP connections that one worker serves at once; they are not to take the sessions' places.
const CONNECTIONS: usize = 64;
/// How long a request may take to arrive, and how long one that has come already may wait for the answer before it to be taken.
const REQUEST_PATIENCE_MS: u64 = 5_000;
/// How long a connection may stay open between requests, counted from the last answer's beginning: so it is how long that may
/// take to be taken, too (nginx: keepalive_timeout 75s, send_timeout 60s).
const IDLE_PATIENCE_MS: u64 = 75_000;
/// How long the client may take to close after we have.
const LINGER_MS: u64 = 2_000;
/// Steps that one connection may make in one turn, so that none starves the sessions.
const TURN_BUDGET: usize = 16;
/// How long workers may take to tell of their sessions when nobody had asked them for a while.
const LOOK_MS: u64 = 60;

const TEXT: &str = "text/plain; charset=utf-8";
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=utf-8";

/// One HTTP connection.
#[derive(Debug, Default)]
pub struct Connection {
    /// What has arrived and was not yet answered.
    request: Vec<u8>,
    /// What is to be sent, and how much of it was.
    answer: Vec<u8>,
    sent: usize,
    /// The answer is the last one.
    last: bool,
    /// It has been sent, and we have closed our side.
    closed: bool,
    /// The workers were asked; the answer is made at this time.
    answer_at_ms: Option<u64>,
}

/// A request that makes sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    path: String,
    head_only: bool,
    prefers_html: bool,
    keep_alive: bool,
    /// It is of HTTP/1.0, whose clients take a connection for kept only if they are told so.
    old: bool,
    /// Its length in bytes.
    pub(crate) length: usize,
}

/// What is wrong with one.
pub(crate) type Refusal = (u16, &'static str);

struct Answer {
    status: u16,
    content_type: &'static str,
    body: String,
}

impl Worker {
    /// Begins to serve a client that has just connected.
    pub(crate) fn answer_http(&mut self, session: &mut Session) -> Next {
        session.is_status = true;
        session.datapath = Datapath::Relay;
        session.phase = Phase::Http {
            deadline_ms: session.started_ms + REQUEST_PATIENCE_MS,
        };
        if self.http_connections >= CONNECTIONS {
            return Next::Close(CloseReason::Resource);
        }
        self.http_connections += 1;
        session.http = Some(Box::default());
        session.ready[Side::Downstream.index()].readable = true;
        session.ready[Side::Downstream.index()].writable = true;
        self.serve_http(session)
    }

    /// Goes on with a client as far as it lets us.
    pub(crate) fn serve_http(&mut self, session: &mut Session) -> Next {
        let Some(mut connection) = session.http.take() else {
            return Next::Close(CloseReason::Status);
        };
        let next = self.serve_connection(session, &mut connection);
        session.http = Some(connection);
        next
    }

    fn serve_connection(&mut self, session: &mut Session, connection: &mut Connection) -> Next {
        let over = Next::Close(CloseReason::Status);
        let ready = Side::Downstream.index();
        if session.ready[ready].failed {
            return over;
        }
        for _ in 0..TURN_BUDGET {
            let now_ms = clock::now_ms();
            let Phase::Http { deadline_ms } = session.phase else {
                return over;
            };
            if now_ms >= deadline_ms {
                end_stream(session);
                return over;
            }
            if connection.sent < connection.answer.len() {
                match sockets::send(session.downstream.as_fd(), &connection.answer[connection.sent..]) {
                    Ok(sent) => connection.sent += sent,
                    Err(Errno::EAGAIN) => return Next::Wait(deadline_ms),
                    Err(_) => return over,
                }
                continue;
            }
            if connection.last && !connection.closed {
                // Bytes that the client still sends would turn our end into a reset, so they are read first.
                connection.closed = true;
                let _ = sockets::shut_down_write(session.downstream.as_fd());
                end_stream(session);
                let deadline_ms = now_ms + LINGER_MS;
                session.phase = Phase::Http { deadline_ms };
                continue;
            }
            if let Some(at_ms) = connection.answer_at_ms.filter(|at_ms| now_ms < *at_ms) {
                return Next::Wait(at_ms);
            }
            if !connection.closed && self.take_request(session, connection, now_ms) {
                continue;
            }
            if connection.answer_at_ms.is_some() {
                continue;
            }
            let mut buffer = [0; 2048];
            match sockets::receive(session.downstream.as_fd(), &mut buffer) {
                Ok(0) => {
                    end_stream(session);
                    return over;
                }
                Ok(_) if connection.closed => {}
                Ok(read) => {
                    if connection.request.is_empty() {
                        let deadline_ms = now_ms + REQUEST_PATIENCE_MS;
                        session.phase = Phase::Http { deadline_ms };
                    }
                    connection.request.extend_from_slice(&buffer[..read]);
                }
                Err(Errno::EAGAIN) => {
                    let Phase::Http { deadline_ms } = session.phase else {
                        return over;
                    };
                    return Next::Wait(deadline_ms);
                }
                Err(_) => return over,
            }
        }
        Next::Again
    }

    /// Answers the request that has arrived, if it is there whole. True: something is to be done for it.
    fn take_request(&mut self, session: &mut Session, connection: &mut Connection, now_ms: u64) -> bool {
        if connection.request.is_empty() {
            return false;
        }
        let (answer, head_only, old) = match parse(&connection.request) {
            Ok(None) if connection.request.len() < REQUEST_BYTES => return false,
            Ok(None) => {
                connection.last = true;
                (refuse((431, "the request is too long")), false, false)
            }
            Err(refusal) => {
                connection.last = true;
                (refuse(refusal), false, false)
            }
            Ok(Some(request)) => {
                let first = connection.answer_at_ms.take().is_none();
                if first && request.path == "/status" && self.lookout.ask(now_ms) {
                    connection.answer_at_ms = Some(now_ms + LOOK_MS);
                    return false;
                }
                connection.request.drain(..request.length);
                connection.last = !request.keep_alive || self.draining;
                self.refresh_groups();
                (self.answer(&request), request.head_only, request.old)
            }
        };
        let persistence = match (connection.last, old) {
            (true, _) => "Connection: close\r\n",
            // RFC 9112, 9.3 and appendix C.2.2: otherwise it waits for the end of the stream.
            (false, true) => "Connection: keep-alive\r\n",
            (false, false) => "",
        };
        connection.answer = answer.encode(head_only, persistence);
        connection.sent = 0;
        let patience_ms = match connection.request.is_empty() {
            true => IDLE_PATIENCE_MS,
            false => REQUEST_PATIENCE_MS,
        };
        let deadline_ms = now_ms + patience_ms;
        session.phase = Phase::Http { deadline_ms };
        true
    }

    fn answer(&self, request: &Request) -> Answer {
        let ok = |content_type, body| Answer {
            status: 200,
            content_type,
            body,
        };
        match request.path.as_str() {
            "/metrics" => ok(METRICS, self.metrics()),
            "/status" if request.prefers_html => ok(HTML, page::render(&self.status_with_sessions())),
            "/status" => ok(JSON, format!("{}\n", self.status_with_sessions())),
            "/healthz" => ok(TEXT, "ok\n".into()),
            "/readyz" => match self.slots_without_worker() {
                none if none.is_empty() => ok(TEXT, "ready\n".into()),
                slots => Answer {
                    status: 503,
                    content_type: TEXT,
                    body: format!("no worker is ready in slots {slots:?}\n"),
                },
            },
            "/" => ok(TEXT, "/metrics\n/status\n/healthz\n/readyz\n".into()),
            _ => refuse((404, "there is /metrics, /status, /healthz and /readyz")),
        }
    }

    /// Ends the connections that wait for a request, so that none keeps a worker that is to leave.
    pub(crate) fn end_idle_http(&mut self) {
        self.end_own(|session| {
            session
                .http
                .as_ref()
                .is_some_and(|http| http.request.is_empty() && http.sent == http.answer.len() && !http.closed)
        });
    }

    /// Ends what this process answers itself, for clients that are slow to ask or to read.
    pub(crate) fn end_services(&mut self) {
        self.end_own(|session| session.is_status);
    }

    /// Ends those of the sessions that have no upstream which are meant; an answer that is not whole, in a reset.
    fn end_own(&mut self, is_meant: impl Fn(&Session) -> bool) {
        for token in self.table.tokens() {
            let Some(session) = self.table.take(token) else {
                continue;
            };
            let meant = is_meant(&session);
            self.table.put(token, session);
            if meant {
                self.with_session(token, |_, session| {
                    if session.http.is_some() {
                        end_stream(session);
                    }
                    Next::Close(CloseReason::Status)
                });
            }
        }
    }
}

/// Our side of the stream is whole: it may end in order.
fn end_stream(session: &mut Session) {
    let whole = session
        .http
        .as_ref()
        .is_none_or(|http| http.sent == http.answer.len());
    let stream = session.stream(Direction::ToDownstream);
    if whole && stream.way != Way::Ended {
        stream.source_ended = true;
        stream.settle();
        stream.settled();
    }
}

/// Reads a request; `None`: it is not there whole.
pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Request>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) if length <= REQUEST_BYTES => length,
        Ok(httparse::Status::Complete(_)) => return Err((431, "the request is too long")),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err((431, "the request has too many headers")),
        Err(_) => return Err((400, "this is no HTTP request")),
    };
    let head_only = match request.method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Err((405, "only GET and HEAD are served")),
    };
    let path = request.path.unwrap_or_default();
    let mut found = Request {
        path: path.split('?').next().unwrap_or_default().to_owned(),
        head_only,
        prefers_html: false,
        keep_alive: request.version == Some(1),
        old: request.version == Some(0),
        length,
    };
    for header in request.headers.iter() {
        let value = String::from_utf8_lossy(header.value).to_ascii_lowercase();
        match header.name.to_ascii_lowercase().as_str() {
            "content-length" if value.trim() != "0" => return Err((413, "a request may have no body")),
            "transfer-encoding" => return Err((413, "a request may have no body")),
            "connection" if value.contains("close") => found.keep_alive = false,
            "connection" if value.contains("keep-alive") => found.keep_alive = true,
            "accept" => found.prefers_html = prefers_html(&value),
            _ => {}
        }
    }
    Ok(Some(found))
}

/// Whether an Accept header names HTML no later than JSON, as a browser's does.
fn prefers_html(accept: &str) -> bool {
    let at = |kind| accept.split(',').position(|part| part.trim().starts_with(kind));
    match (at("text/html"), at(JSON)) {
        (Some(html), Some(json)) => html < json,
        (html, _) => html.is_some(),
    }
}

fn refuse((status, why): Refusal) -> Answer {
    Answer {
        status,
        content_type: TEXT,
        body: format!("{why}\n"),
    }
}

impl Answer {
    /// `persistence`: the header that says what becomes of the connection, if one has to.
    fn encode(&self, head_only: bool, persistence: &str) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            404 => "Not Found",
            405 => "Method Not Allowed",
            413 => "Content Too Large",
            431 => "Request Header Fields Too Large",
            503 => "Service Unavailable",
            _ => "",
        };
        let mut text = format!(
            "HTTP/1.1 {} {reason}\r\nContent-Type: {}\r\nContent-Length: {}\r\nCache-Control: no-store\r\n\
             X-Content-Type-Options: nosniff\r\nContent-Security-Policy: default-src 'none'; style-src 'unsafe-inline'\r\n",
            self.status,
            self.content_type,
            self.body.len()
        );
        if self.status == 405 {
            text.push_str("Allow: GET, HEAD\r\n");
        }
        text.push_str(persistence);
        text.push_str("\r\n");
        if !head_only {
            text.push_str(&self.body);
        }
        text.into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_is_read_as_it_is_meant() {
        let whole = b"HEAD /status?x=1 HTTP/1.1\r\nAccept: text/html,application/json\r\nConnection: close\r\n\r\nGET";
        let request = parse(whole).unwrap().unwrap();
        assert_eq!(
            request,
            Request {
                path: "/status".into(),
                head_only: true,
                prefers_html: true,
                keep_alive: false,
                old: false,
                length: whole.len() - 3,
            }
        );
        assert!(!parse(b"GET / HTTP/1.0\r\n\r\n").unwrap().unwrap().keep_alive);
        assert_eq!(parse(b"GET / HTTP/1.1\r\nAccept"), Ok(None));
    }

    #[test]
    fn what_is_wrong_with_a_request_has_its_number() {
        let status = |text: &[u8]| parse(text).unwrap_err().0;
        assert_eq!(status(b"\x16\x03\x01\x02\x00\x01"), 400);
        assert_eq!(status(b"POST / HTTP/1.1\r\n\r\n"), 405);
        assert_eq!(status(b"GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\n"), 413);
        assert_eq!(
            status(b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"),
            413
        );
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS + 1));
        assert_eq!(status(many.as_bytes()), 431);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(
            bytes in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..300),
                "(GET|HEAD|POST|) ?/?[a-z/?%]{0,9} ?(HTTP/1\\.[01])?\r?\n([A-Za-z-]{0,9}:? ?[ -~]{0,9}\r?\n){0,4}"
                    .prop_map(String::into_bytes),
            ]
        ) {
            if let Ok(Some(request)) = parse(&bytes) {
                prop_assert!(request.length <= bytes.len());
            }
        }
    }
}

//! Questions to name servers and what they answer: bytes to plain values and back. Pure; whatever the bytes are, the
//! answer is a value of [`Answer`], never a panic, and of bounded size.

use std::fmt;
use std::net::IpAddr;

use culvert_shared::hosts::is_of_a_host;
use domain::base::iana::{Class, Opcode, Rcode, Rtype};
use domain::base::name::ToLabelIter;
use domain::base::record::ParsedRecord;
use domain::base::{Message, MessageBuilder, Name, ParsedName};
use domain::rdata::{A, Aaaa, Cname, Soa, Srv};

/// Records that are looked at in one answer: an upstream's room for addresses, and other types among them.
const RECORDS_MAX: usize = 512;

/// Names that may lead to each other within one answer.
const CHAIN_MAX: usize = 16;

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// Hosts and ports of a service.
    Srv,
}

impl Kind {
    fn rtype(self) -> Rtype {
        match self {
            Kind::A => Rtype::A,
            Kind::Aaaa => Rtype::AAAA,
            Kind::Srv => Rtype::SRV,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::A => "A",
            Kind::Aaaa => "AAAA",
            Kind::Srv => "SRV",
        })
    }
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// The name, in lower case, without a dot at its end.
    pub name: String,
    /// What is asked for.
    pub kind: Kind,
}

/// What a name has, of the kind that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Records {
    /// Addresses, sorted, none twice.
    Addresses(Vec<IpAddr>),
    /// Places of a service.
    Services(Vec<Service>),
}

impl Records {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        match self {
            Records::Addresses(addresses) => addresses.is_empty(),
            Records::Services(services) => services.is_empty(),
        }
    }
}

/// One place of a service (RFC 2782).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Service {
    /// Lower is better.
    pub priority: u16,
    /// Share among those of the same priority.
    pub weight: u16,
    /// The host.
    pub target: String,
    /// Its port.
    pub port: u16,
}

/// What bytes say to a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// They are no answer to it.
    Stray,
    /// The name has these, for so many seconds; never empty.
    Found(Records, u32),
    /// The name has none of that kind, or does not exist; for so many seconds, if it is said.
    Nothing(Option<u32>),
    /// The name stands for another one, of which nothing is said.
    Alias(String, u32),
    /// Only a part of the answer has room in a datagram.
    Truncated,
    /// The server says that it failed.
    Refused(String),
    /// It answers the question, and makes no sense.
    Garbled,
}

/// The bytes of a question. `None`: there is no such name.
pub fn query(question: &Question, id: u16) -> Option<Vec<u8>> {
    let name: Name<Vec<u8>> = question.name.parse().ok()?;
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(id);
    builder.header_mut().set_rd(true);
    let mut builder = builder.question();
    builder.push((name, question.kind.rtype())).ok()?;
    Some(builder.finish())
}

/// What the bytes say to the question that was asked with this id.
pub fn read(bytes: &[u8], id: u16, question: &Question) -> Answer {
    let Ok(message) = Message::from_octets(bytes) else {
        return Answer::Stray;
    };
    let header = message.header();
    if header.id() != id || !header.qr() || header.opcode() != Opcode::QUERY || !repeats(&message, question) {
        return Answer::Stray;
    }
    match header.rcode() {
        Rcode::NOERROR | Rcode::NXDOMAIN if header.tc() => Answer::Truncated,
        Rcode::NOERROR => read_answer(&message, question).unwrap_or(Answer::Garbled),
        Rcode::NXDOMAIN => Answer::Nothing(negative_ttl(&message)),
        code => Answer::Refused(code.to_string()),
    }
}

fn repeats(message: &Message<&[u8]>, question: &Question) -> bool {
    message.sole_question().is_ok_and(|asked| {
        asked.qtype() == question.kind.rtype()
            && asked.qclass() == Class::IN
            && text_of(asked.qname()).as_ref() == Some(&question.name)
    })
}

/// One record that may be of use.
struct Found<T> {
    owner: String,
    ttl: u32,
    value: T,
}

fn read_answer(message: &Message<&[u8]>, question: &Question) -> Option<Answer> {
    let mut aliases: Vec<Found<String>> = Vec::new();
    let mut addresses: Vec<Found<IpAddr>> = Vec::new();
    let mut services: Vec<Found<Service>> = Vec::new();
    for record in message.answer().ok()?.take(RECORDS_MAX) {
        let record = record.ok()?;
        if record.class() != Class::IN {
            continue;
        }
        // A record of a name that no host can have is of no use, and no reason to distrust the others.
        let Some(owner) = text_of(&record.owner()) else {
            continue;
        };
        let ttl = record.ttl().as_secs();
        let rtype = record.rtype();
        if rtype == Rtype::CNAME {
            let target = data::<Cname<ParsedName<&[u8]>>>(&record)?;
            if let Some(value) = text_of(target.cname()) {
                aliases.push(Found { owner, ttl, value });
            }
        } else if rtype != question.kind.rtype() {
            continue;
        } else if rtype == Rtype::A {
            let value = IpAddr::V4(data::<A>(&record)?.addr());
            addresses.push(Found { owner, ttl, value });
        } else if rtype == Rtype::AAAA {
            let value = IpAddr::V6(data::<Aaaa>(&record)?.addr());
            addresses.push(Found { owner, ttl, value });
        } else {
            let srv = data::<Srv<ParsedName<&[u8]>>>(&record)?;
            if let Some(target) = text_of(srv.target()).filter(|target| !target.is_empty()) {
                let value = Service {
                    priority: srv.priority(),
                    weight: srv.weight(),
                    target,
                    port: srv.port(),
                };
                services.push(Found { owner, ttl, value });
            }
        }
    }

    let mut name = question.name.clone();
    let mut ttl = u32::MAX;
    for _ in 0..CHAIN_MAX {
        let found = match question.kind {
            Kind::Srv => collect(&services, &name, |service| service.port != 0).map(|(mut found, ttl)| {
                found.sort();
                found.dedup();
                (Records::Services(found), ttl)
            }),
            _ => collect(&addresses, &name, |address| is_usable(*address)).map(|(mut found, ttl)| {
                found.sort();
                found.dedup();
                (Records::Addresses(found), ttl)
            }),
        };
        if let Some((records, own_ttl)) = found {
            return Some(match records.is_empty() {
                true => Answer::Nothing(Some(own_ttl.min(ttl))),
                false => Answer::Found(records, own_ttl.min(ttl)),
            });
        }
        let Some(alias) = aliases.iter().find(|alias| alias.owner == name) else {
            return Some(match name == question.name {
                true => Answer::Nothing(negative_ttl(message)),
                false => Answer::Alias(name, ttl),
            });
        };
        ttl = ttl.min(alias.ttl);
        name = alias.value.clone();
    }
    // A circle, or next to one.
    None
}

/// What a name has, and for how long; `None`: there is no record of it.
fn collect<T: Clone>(found: &[Found<T>], name: &str, is_right: impl Fn(&T) -> bool) -> Option<(Vec<T>, u32)> {
    let of_name = || found.iter().filter(|found| found.owner == name);
    let ttl = of_name().map(|found| found.ttl).min()?;
    let values = of_name()
        .map(|found| &found.value)
        .filter(|value| is_right(value));
    Some((values.cloned().collect(), ttl))
}

fn data<'a, T>(record: &ParsedRecord<'a, &'a [u8]>) -> Option<T>
where
    T: domain::base::rdata::ParseRecordData<'a, &'a [u8]>,
{
    record.to_record::<T>().ok()?.map(|record| record.into_data())
}

/// An address that a connection can be made to.
fn is_usable(address: IpAddr) -> bool {
    // Link-local ones need a scope, which a record has not.
    let is_local = matches!(address, IpAddr::V6(ip) if ip.is_unicast_link_local());
    is_of_a_host(address) && !is_local
}

/// How long it is to be believed that there is nothing (RFC 2308, section 5).
fn negative_ttl(message: &Message<&[u8]>) -> Option<u32> {
    let authority = message.authority().ok()?;
    for record in authority.take(RECORDS_MAX) {
        let record = record.ok()?;
        if record.rtype() == Rtype::SOA {
            let soa = data::<Soa<ParsedName<&[u8]>>>(&record)?;
            return Some(record.ttl().as_secs().min(soa.minimum().as_secs()));
        }
    }
    None
}

/// A name as text, in lower case. `None`: it has bytes that no name of a host or of a service has.
fn text_of(name: &impl ToLabelIter) -> Option<String> {
    let mut text = String::new();
    for label in name.iter_labels().filter(|label| !label.is_root()) {
        if !text.is_empty() {
            text.push('.');
        }
        for byte in label.as_slice() {
            if !byte.is_ascii_alphanumeric() && !matches!(byte, b'-' | b'_') {
                return None;
            }
            text.push(byte.to_ascii_lowercase().into());
        }
    }
    Some(text)
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;

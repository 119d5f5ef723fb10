//! MQTT 3.1.1 as a client sees it that only logs in, subscribes once and keeps alive: what it sends, and a decoder for
//! what a broker may answer. Pure; any thread.
//!
//! Trap: a broker that we have subscribed at may send PUBLISH at any time. It is cut and passed over; with quality 0,
//! which is all that we ask for, nothing has to be answered.

use bytes::{BufMut, BytesMut};

/// What a broker says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packet {
    /// The answer to CONNECT. 0: accepted.
    ConnAck {
        /// Of the specification's table 3.1.
        code: u8,
    },
    /// The answer to SUBSCRIBE.
    SubAck {
        /// Whether it was refused.
        refused: bool,
    },
    /// The answer to PINGREQ.
    PingResp,
    /// A message of quality 0.
    Publish,
}

/// What no broker may send to a client like us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not what an MQTT 3.1.1 broker may say here")]
pub struct Malformed;

/// Who connects. Clean session, no will.
#[derive(Debug, Clone, Copy)]
pub struct Login<'a> {
    /// At most 23 letters and digits is what every broker takes.
    pub client: &'a str,
    /// User and password.
    pub user: Option<(&'a str, &'a str)>,
    /// Seconds after one and a half of which the broker may close a silent connection.
    pub keepalive_s: u16,
}

/// PINGREQ.
pub const PING: [u8; 2] = [0xC0, 0];

/// Appends CONNECT.
pub fn put_connect(login: &Login<'_>, out: &mut BytesMut) {
    let user_bytes = login.user.map_or(0, |(name, password)| 4 + name.len() + password.len());
    out.put_u8(0x10);
    put_length(10 + 2 + login.client.len() + user_bytes, out);
    put_text("MQTT", out);
    out.put_u8(4);
    out.put_u8(if login.user.is_some() { FLAGS_CLEAN | FLAGS_USER | FLAGS_PASSWORD } else { FLAGS_CLEAN });
    out.put_u16(login.keepalive_s);
    put_text(login.client, out);
    if let Some((name, password)) = login.user {
        put_text(name, out);
        put_text(password, out);
    }
}

/// Appends SUBSCRIBE, number [`SUBSCRIBE_ID`], quality 0.
pub fn put_subscribe(topic: &str, out: &mut BytesMut) {
    out.put_u8(0x82);
    put_length(2 + 2 + topic.len() + 1, out);
    out.put_u16(SUBSCRIBE_ID);
    put_text(topic, out);
    out.put_u8(0);
}

/// The first packet in `bytes` and its length; `None`: there is not all of it yet.
pub fn cut(bytes: &[u8]) -> Result<Option<(Packet, usize)>, Malformed> {
    let Some(&first) = bytes.first() else { return Ok(None) };
    // The kind is judged before anything is waited for.
    let sane: fn(usize) -> bool = match first {
        CONNACK => |length| length == 2,
        SUBACK => |length| length == 3,
        PINGRESP => |length| length == 0,
        PUBLISH | PUBLISH_RETAINED => |length| (2..=PACKET_BYTES_MAX).contains(&length),
        _ => return Err(Malformed),
    };
    let Some((length, header)) = length(&bytes[1..])? else { return Ok(None) };
    if !sane(length) {
        return Err(Malformed);
    }
    let end = 1 + header + length;
    let Some(body) = bytes.get(1 + header..end) else { return Ok(None) };
    Ok(Some((packet(first, body)?, end)))
}

fn packet(first: u8, body: &[u8]) -> Result<Packet, Malformed> {
    match (first, body) {
        // A clean session finds nothing kept, so "session present" cannot be.
        (CONNACK, [0, code @ 0..=5]) => Ok(Packet::ConnAck { code: *code }),
        (SUBACK, [high, low, code @ (0 | SUBACK_REFUSED)])
            if u16::from_be_bytes([*high, *low]) == SUBSCRIBE_ID =>
        {
            Ok(Packet::SubAck { refused: *code == SUBACK_REFUSED })
        }
        (PINGRESP, []) => Ok(Packet::PingResp),
        (PUBLISH | PUBLISH_RETAINED, [high, low, rest @ ..]) => {
            let topic = usize::from(u16::from_be_bytes([*high, *low]));
            if topic == 0 || topic > rest.len() { Err(Malformed) } else { Ok(Packet::Publish) }
        }
        _ => Err(Malformed),
    }
}

/// A "remaining length" and how many bytes it took.
fn length(bytes: &[u8]) -> Result<Option<(usize, usize)>, Malformed> {
    let mut length = 0;
    for (at, byte) in bytes.iter().take(LENGTH_BYTES_MAX).enumerate() {
        length |= usize::from(byte & 0x7F) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(Some((length, at + 1)));
        }
    }
    if bytes.len() < LENGTH_BYTES_MAX { Ok(None) } else { Err(Malformed) }
}

fn put_length(mut length: usize, out: &mut BytesMut) {
    while length >= 0x80 {
        out.put_u8(length as u8 | 0x80);
        length >>= 7;
    }
    out.put_u8(length as u8);
}

/// Our own names, all short: none comes near the 65,535 bytes that a text may have.
fn put_text(text: &str, out: &mut BytesMut) {
    debug_assert!(text.len() <= usize::from(u16::MAX));
    out.put_u16(text.len() as u16);
    out.put_slice(text.as_bytes());
}

const CONNACK: u8 = 0x20;
const PUBLISH: u8 = 0x30;
const PUBLISH_RETAINED: u8 = 0x31;
const SUBACK: u8 = 0x90;
const PINGRESP: u8 = 0xD0;
const SUBACK_REFUSED: u8 = 0x80;
const SUBSCRIBE_ID: u16 = 1;
const FLAGS_CLEAN: u8 = 0x02;
const FLAGS_USER: u8 = 0x80;
const FLAGS_PASSWORD: u8 = 0x40;
const LENGTH_BYTES_MAX: usize = 4;
/// More than anybody says to clients that only listen to a topic of their own.
const PACKET_BYTES_MAX: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn connect_and_subscribe_are_as_specified() {
        let mut out = BytesMut::new();
        put_connect(&Login { client: "ab1", user: None, keepalive_s: 60 }, &mut out);
        assert_eq!(&out[..], b"\x10\x0f\0\x04MQTT\x04\x02\0\x3c\0\x03ab1");
        out.clear();
        put_connect(&Login { client: "a", user: Some(("me", "pw")), keepalive_s: 258 }, &mut out);
        assert_eq!(&out[..], b"\x10\x15\0\x04MQTT\x04\xc2\x01\x02\0\x01a\0\x02me\0\x02pw");
        out.clear();
        put_subscribe("lt/1", &mut out);
        assert_eq!(&out[..], b"\x82\x09\0\x01\0\x04lt/1\0");
    }

    #[test]
    fn every_answer_is_understood() {
        for (bytes, packet) in [
            (&b"\x20\x02\0\0"[..], Packet::ConnAck { code: 0 }),
            (b"\x20\x02\0\x05", Packet::ConnAck { code: 5 }),
            (b"\x90\x03\0\x01\0", Packet::SubAck { refused: false }),
            (b"\x90\x03\0\x01\x80", Packet::SubAck { refused: true }),
            (b"\xd0\0", Packet::PingResp),
            (b"\x30\x05\0\x02tth", Packet::Publish),
            (b"\x31\x03\0\x01t", Packet::Publish),
        ] {
            assert_eq!(cut(bytes), Ok(Some((packet, bytes.len()))), "{bytes:x?}");
        }
    }

    #[test]
    fn what_must_not_be_is_refused_as_early_as_it_shows() {
        for bytes in [
            &b"\0"[..],              // no such packet
            b"\x21",                 // CONNACK with flags
            b"\x20\x03",             // of another length
            b"\x20\x02\x01\0",       // a session, and we asked for none
            b"\x20\x02\0\x06",       // no such code
            b"\x90\x03\0\x02\0",     // of a SUBSCRIBE that was not sent
            b"\x90\x03\0\x01\x01",   // more quality than asked for
            b"\xd0\x01",             // PINGRESP with a body
            b"\x32",                 // PUBLISH of quality 1
            b"\x30\x02\0\0",         // without a topic
            b"\x30\x03\0\x02t",      // a topic longer than the packet
            b"\x30\xff\xff\xff\xff", // a length of more than four bytes
            b"\x30\xff\xff\xff\x7f", // 256 MiB
            b"\x10\x0f",             // a client's packet
        ] {
            assert_eq!(cut(bytes), Err(Malformed), "{bytes:x?}");
        }
    }

    #[test]
    fn split_at_every_byte_it_waits() {
        let mut long = vec![0x30, 0x85, 0x02, 0, 1, b't'];
        long.resize(3 + 261, b'x');
        for bytes in [&b"\x20\x02\0\0"[..], b"\x90\x03\0\x01\0", b"\xd0\0", &long] {
            for end in 0..bytes.len() {
                assert_eq!(cut(&bytes[..end]), Ok(None), "{end} of {bytes:x?}");
            }
            assert_eq!(cut(bytes).unwrap().unwrap().1, bytes.len());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(Some((_, used))) = cut(&bytes) {
                prop_assert!((2..=bytes.len()).contains(&used));
                // Nothing behind a packet changes what it is.
                prop_assert_eq!(cut(&bytes[..used]), cut(&bytes));
                // And no part of it is another one.
                for end in 0..used {
                    prop_assert_eq!(cut(&bytes[..end]), Ok(None));
                }
            }
        }

        #[test]
        fn lengths_come_back(wanted in 0_usize..=268_435_455) {
            let mut out = BytesMut::new();
            put_length(wanted, &mut out);
            prop_assert_eq!(length(&out), Ok(Some((wanted, out.len()))));
            for end in 0..out.len() {
                prop_assert_eq!(length(&out[..end]), Ok(None));
            }
        }
    }
}

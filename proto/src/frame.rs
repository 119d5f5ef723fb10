//! Framing of the client protocol: 3 bytes big-endian body length, 1 byte command, body. Pure; any thread.
//!
//! Trap: the length is judged as soon as the header is there. Nobody waits for, or makes room for, a body that is too
//! long.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

use crate::command::Command;

/// Bytes in front of every body.
pub const HEADER_BYTES: usize = 4;

/// Longest body that the three length bytes can announce.
pub const BODY_BYTES_WIRE_MAX: usize = (1 << 24) - 1;

/// One frame, cut out of a receive buffer. The command byte is as received: [`Command::try_from`] tells if it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The command byte.
    pub command: u8,
    /// The body, not decoded.
    pub body: &'a [u8],
}

impl Frame<'_> {
    /// Bytes that this frame took on the wire.
    pub fn wire_bytes(&self) -> usize {
        HEADER_BYTES + self.body.len()
    }
}

/// The header announces a frame longer than the limit. The connection cannot be used any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("frame of {frame_bytes} bytes announced, {limit_bytes} allowed")]
pub struct TooLarge {
    /// Header and body, bytes.
    pub frame_bytes: usize,
    /// The limit that was asked for, bytes.
    pub limit_bytes: usize,
}

/// Cuts the first frame off `buffer`. `Ok(None)`: more bytes are needed. `limit_bytes` counts header and body.
pub fn cut(buffer: &[u8], limit_bytes: usize) -> Result<Option<Frame<'_>>, TooLarge> {
    let Some((header, rest)) = buffer.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let [a, b, c, command] = *header;
    let body_bytes = u32::from_be_bytes([0, a, b, c]) as usize;
    let frame_bytes = HEADER_BYTES + body_bytes;
    if frame_bytes > limit_bytes {
        return Err(TooLarge { frame_bytes, limit_bytes });
    }
    Ok(rest.get(..body_bytes).map(|body| Frame { command, body }))
}

/// Appends one frame to `out`.
///
/// # Panics
/// When the body is longer than three bytes can say; senders cut their bodies far below that.
pub fn put<M: Message>(command: Command, body: &M, out: &mut BytesMut) {
    let body_bytes = body.encoded_len();
    out.reserve(HEADER_BYTES + body_bytes);
    put_header(command, body_bytes, out);
    body.encode_raw(out);
}

/// One frame as bytes of its own.
pub fn encode<M: Message>(command: Command, body: &M) -> Bytes {
    let mut out = BytesMut::new();
    put(command, body, &mut out);
    out.freeze()
}

fn put_header(command: Command, body_bytes: usize, out: &mut BytesMut) {
    assert!(body_bytes <= BODY_BYTES_WIRE_MAX, "a frame body of {body_bytes} bytes cannot be framed");
    out.put_uint(body_bytes as u64, 3);
    out.put_u8(command as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;
    use proptest::prelude::*;

    #[test]
    fn a_header_alone_decides_about_length() {
        assert_eq!(cut(&[0, 0x10, 0, 5], 4096), Err(TooLarge { frame_bytes: 4100, limit_bytes: 4096 }));
        assert_eq!(cut(&[0xff, 0xff, 0xff, 5], 65536).unwrap_err().frame_bytes, 4 + BODY_BYTES_WIRE_MAX);
        assert_eq!(cut(&[0, 0x0f, 0xfc, 5], 4096), Ok(None));
    }

    #[test]
    fn short_input_asks_for_more() {
        let frame = encode(Command::Ping, &wire::Ping { nonce: 300 });
        for end in 0..frame.len() {
            assert_eq!(cut(&frame[..end], 4096), Ok(None), "at {end}");
        }
        let whole = cut(&frame, 4096).unwrap().unwrap();
        assert_eq!((whole.command, whole.wire_bytes()), (Command::Ping as u8, frame.len()));
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in(bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..20), cut_at in any::<proptest::sample::Index>()) {
            let mut stream = BytesMut::new();
            for body in &bodies {
                put(Command::Send, &wire::Send { body: Bytes::copy_from_slice(body), ..Default::default() }, &mut stream);
            }
            let split = cut_at.index(stream.len() + 1);
            let mut seen = Vec::new();
            let mut buffer = Vec::new();
            for part in [&stream[..split], &stream[split..]] {
                buffer.extend_from_slice(part);
                while let Some(frame) = cut(&buffer, 4096).unwrap() {
                    let used = frame.wire_bytes();
                    seen.push(wire::Send::decode(frame.body).unwrap().body.to_vec());
                    buffer.drain(..used);
                }
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(seen, bodies);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64), limit in 0usize..100_000) {
            let _ = cut(&bytes, limit);
        }
    }
}

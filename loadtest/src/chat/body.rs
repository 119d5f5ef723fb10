//! The body of a test message: which run, who sent it, its number, when it was due. Pure.
//!
//! Trap: times are of this process's clock. A body of another run, or of another generator, must not be read as ours:
//! the run stands in it.

use bytes::{BufMut, Bytes, BytesMut};

/// What a body says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Body {
    /// Number of the run.
    pub run: u64,
    /// Connection of the sender.
    pub from: u32,
    /// Number in the lane, from 1.
    pub counter: u64,
    /// When it was due, run time.
    pub due_us: u64,
}

impl Body {
    /// As bytes, padded to `BODY_BYTES`.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(BODY_BYTES);
        out.put_u64(self.run);
        out.put_u32(self.from);
        out.put_u64(self.counter);
        out.put_u64(self.due_us);
        out.resize(BODY_BYTES, b'.');
        out.freeze()
    }

    /// Of this run, or nothing.
    pub fn decode(run: u64, bytes: &[u8]) -> Option<Body> {
        let (head, rest) = bytes.split_first_chunk::<8>()?;
        let (from, rest) = rest.split_first_chunk::<4>()?;
        let (counter, rest) = rest.split_first_chunk::<8>()?;
        let (due_us, rest) = rest.split_first_chunk::<8>()?;
        let body = Body {
            run: u64::from_be_bytes(*head),
            from: u32::from_be_bytes(*from),
            counter: u64::from_be_bytes(*counter),
            due_us: u64::from_be_bytes(*due_us),
        };
        let whole = rest.len() + 28 == BODY_BYTES && rest.iter().all(|byte| *byte == b'.');
        (whole && body.run == run && body.counter > 0 && body.counter <= COUNTER_MAX).then_some(body)
    }
}

/// As long as a short text message.
pub const BODY_BYTES: usize = 64;

/// Bounds the checker's sets, whatever the network brings.
const COUNTER_MAX: u64 = 1 << 26;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_whole_or_not_at_all() {
        let body = Body { run: 99, from: 7, counter: 12, due_us: 1_000_000 };
        let bytes = body.encode();
        assert_eq!(bytes.len(), BODY_BYTES);
        assert_eq!(Body::decode(99, &bytes), Some(body));
        assert_eq!(Body::decode(98, &bytes), None);
        for end in 0..BODY_BYTES {
            assert_eq!(Body::decode(99, &bytes[..end]), None);
        }
    }
}

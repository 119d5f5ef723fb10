//! What a kind of load decides: what is said after connecting, what an answer means, what is due. Owned by one engine
//! thread.
//!
//! Trap: a connection may be closed by any call of [`Io`] that sends; the mode learns of it later, through `lost`.

use bytes::BytesMut;

use super::Io;
use crate::fault::Fault;

/// The connections of one thread: `first .. first + count` of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// This thread's number.
    pub thread: u32,
    /// How many there are.
    pub threads: u32,
    /// Its first connection, of all.
    pub first: u32,
    /// How many it has. In here they are 0 to `count - 1`.
    pub count: u32,
}

/// One kind of load. Indices count from 0 within the thread.
pub trait Mode {
    /// What a thread hands back at the end.
    type Part;

    /// The TCP connection is made: what to say. May be asked twice. `attempt` rises with every connection at this index.
    fn greet(&mut self, index: u32, attempt: u64, out: &mut BytesMut);

    /// Whether a connection is ready as soon as it is made, without an answer.
    fn ready_at_once(&self) -> bool;

    /// Bytes came; how many of them are used up. The rest is shown again with what follows.
    fn receive(&mut self, index: u32, bytes: &[u8], io: &mut Io) -> Result<usize, Fault>;

    /// A connection failed or broke. `Some(ms)`: try again after so long.
    fn lost(&mut self, index: u32, fault: &Fault, io: &mut Io) -> Option<u64>;

    /// Does what is due, and says when (run time) something is due next.
    fn tick(&mut self, io: &mut Io) -> Option<u64>;

    /// The end; connections are closed already.
    fn finish(self) -> Self::Part;
}

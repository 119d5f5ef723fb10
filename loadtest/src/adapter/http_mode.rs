//! Idle HTTP keepalive connections: one request, its answer, then silence. Owned by one engine thread.
//!
//! Trap: a server may close an idle connection when it likes. That counts as dropped, as it does for every protocol.

use bytes::{Bytes, BytesMut};

use super::http;
use crate::engine::{Io, Mode};
use crate::fault::Fault;

pub(super) struct HttpMode {
    request: Bytes,
}

impl HttpMode {
    /// `host` as in the Host header.
    pub fn new(host: &str) -> HttpMode {
        HttpMode { request: http::request(host).into() }
    }
}

impl Mode for HttpMode {
    type Part = ();

    fn greet(&mut self, _: u32, _: u64, out: &mut BytesMut) {
        out.extend_from_slice(&self.request);
    }

    fn ready_at_once(&self) -> bool {
        false
    }

    fn receive(&mut self, index: u32, bytes: &[u8], io: &mut Io) -> Result<usize, Fault> {
        // One request, one answer: whatever else comes is not ours.
        if io.is_ready(index) {
            return Err(Fault::BadFrame);
        }
        match http::cut(bytes).map_err(|_| Fault::BadFrame)? {
            None => Ok(0),
            Some(answer) if answer.wire_bytes < bytes.len() => Err(Fault::BadFrame),
            Some(answer) if answer.status == 200 => {
                io.ready(index);
                Ok(answer.wire_bytes)
            }
            Some(answer) => Err(Fault::Refused { by: "http", code: answer.status }),
        }
    }

    fn lost(&mut self, _: u32, _: &Fault, _: &mut Io) -> Option<u64> {
        None
    }

    fn tick(&mut self, _: &mut Io) -> Option<u64> {
        None
    }

    fn finish(self) {}
}

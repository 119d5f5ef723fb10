//! Sessions at our own gateway that log in and keep alive, for comparisons with other servers. Owned by one engine
//! thread.
//!
//! Trap: this is the plain session only. What a storm of ours can do beyond it (cuts, slow readers) is in
//! [`crate::storm`].

use bytes::BytesMut;
use proto::frame;

use crate::engine::{Io, Mode, Share};
use crate::fault::Fault;
use crate::session::Session;

pub(super) struct SessionMode {
    session: Session,
}

impl SessionMode {
    pub fn new(run: &str, share: Share) -> SessionMode {
        SessionMode { session: Session::new(run, share.first) }
    }
}

impl Mode for SessionMode {
    type Part = ();

    fn greet(&mut self, index: u32, attempt: u64, out: &mut BytesMut) {
        self.session.login(index, attempt, out);
    }

    fn ready_at_once(&self) -> bool {
        false
    }

    fn receive(&mut self, index: u32, bytes: &[u8], io: &mut Io) -> Result<usize, Fault> {
        let mut used = 0;
        while let Some(frame) =
            frame::cut(&bytes[used..], proto::FRAME_BYTES_MAX).map_err(|_| Fault::BadFrame)?
        {
            used += frame.wire_bytes();
            let _ = self.session.hear(index, &frame, io)?;
        }
        Ok(used)
    }

    fn lost(&mut self, _: u32, fault: &Fault, _: &mut Io) -> Option<u64> {
        // Told to come back: that is what a client does, and the time counts.
        Some(fault.wait_ms()).filter(|wait_ms| *wait_ms > 0)
    }

    fn tick(&mut self, io: &mut Io) -> Option<u64> {
        self.session.tick(io)
    }

    fn finish(self) {}
}

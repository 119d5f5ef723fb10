//! Sessions at our own gateway: they log in, if they are to, and keep alive. Owned by one engine thread.
//!
//! Trap: without a login a connection is ready when it is open, and the gateway ends it at its login deadline.

use std::sync::Arc;

use bytes::BytesMut;
use proto::frame;

use crate::engine::{Io, Mode, Share};
use crate::fault::Fault;
use crate::session::{Heard, Session};
use crate::tokens::Tokens;

/// How a session of ours begins.
#[derive(Debug, Clone, Default)]
pub struct SessionOptions {
    /// Only connect.
    pub no_login: bool,
    /// With a token each; none: development logins.
    pub tokens: Option<Arc<Tokens>>,
}

pub(super) struct SessionMode {
    session: Session,
    login: bool,
}

impl SessionMode {
    pub fn new(run: &str, share: Share, options: SessionOptions) -> SessionMode {
        let session = Session::new(run, share.first).with_tokens(options.tokens);
        SessionMode { session, login: !options.no_login }
    }
}

impl Mode for SessionMode {
    type Part = ();

    fn greet(&mut self, index: u32, attempt: u64, out: &mut BytesMut) {
        if self.login {
            self.session.login(index, attempt, out);
        }
    }

    fn ready_at_once(&self) -> bool {
        !self.login
    }

    fn receive(&mut self, index: u32, bytes: &[u8], io: &mut Io) -> Result<usize, Fault> {
        let mut used = 0;
        while let Some(frame) =
            frame::cut(&bytes[used..], proto::FRAME_BYTES_MAX).map_err(|_| Fault::BadFrame)?
        {
            used += frame.wire_bytes();
            // Pushes and the like concern nobody here.
            let _: Heard = self.session.hear(index, &frame, io)?;
        }
        Ok(used)
    }

    fn lost(&mut self, _: u32, fault: &Fault, _: &mut Io) -> Option<u64> {
        // Whoever is told to come back later does, as often as it is told, and the time counts.
        Some(fault.wait_ms()).filter(|wait_ms| *wait_ms > 0)
    }

    fn tick(&mut self, io: &mut Io) -> Option<u64> {
        self.session.tick(io)
    }

    fn finish(self) {}
}

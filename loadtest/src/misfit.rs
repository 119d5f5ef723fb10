//! Clients that behave badly on purpose, beside a storm: half a Login frame and silence, a login and then silence, a
//! login and then no more reading. Owned by engine threads.
//!
//! Trap: a peer that vanishes without FIN or RST needs a packet filter, because the kernel answers for a process that
//! lives. [`Misfit::Silent`] is what can be done without: the peer's kernel acknowledges, nobody reads and nobody beats.

use bytes::BytesMut;
use proto::command::Command;
use proto::frame;
use proto::wire;

use crate::engine::{Io, Mode, Share};
use crate::fault::Fault;
use crate::session::{Heard, Session, user};

/// How it behaves badly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misfit {
    /// Half a Login frame, then nothing.
    HalfFrame,
    /// A login, then neither reading nor heartbeats.
    Silent,
    /// A login, a chat with itself full of long messages, then a request for all of it again and again, unread.
    SlowReader,
}

/// See the head of this file.
pub struct MisfitMode {
    misfit: Misfit,
    session: Session,
    run: String,
    share: Share,
    out: BytesMut,
}

impl MisfitMode {
    /// Of one thread, in a run with this name.
    pub fn new(misfit: Misfit, run: &str, share: Share) -> MisfitMode {
        let session = Session::new(run, share.first).without_heartbeats();
        MisfitMode { misfit, session, run: run.to_owned(), share, out: BytesMut::new() }
    }

    /// Fills its own chat and asks for it, more often than any queue holds.
    fn ask_for_much(&mut self, index: u32, io: &mut Io) {
        let me = user(&self.run, self.share.first + index);
        let chat = format!("{me}:{me}");
        let body = bytes::Bytes::from_static(&[b'x'; BODY_BYTES]);
        self.out.clear();
        for n in 1..=MESSAGES {
            let send =
                wire::Send { stream: 1, n, chat: chat.clone(), body: body.clone(), ..Default::default() };
            frame::put(Command::Send, &send, &mut self.out);
        }
        for _ in 0..PULLS {
            let pull = wire::Pull { chat: chat.clone(), ..wire::Pull::default() };
            frame::put(Command::Pull, &pull, &mut self.out);
        }
        io.send(index, &self.out);
    }
}

impl Mode for MisfitMode {
    type Part = ();

    fn greet(&mut self, index: u32, attempt: u64, out: &mut BytesMut) {
        self.session.login(index, attempt, out);
        if self.misfit == Misfit::HalfFrame {
            out.truncate(out.len() / 2);
        }
    }

    fn ready_at_once(&self) -> bool {
        self.misfit == Misfit::HalfFrame
    }

    fn receive(&mut self, index: u32, bytes: &[u8], io: &mut Io) -> Result<usize, Fault> {
        let mut used = 0;
        while let Some(frame) =
            frame::cut(&bytes[used..], proto::FRAME_BYTES_MAX).map_err(|_| Fault::BadFrame)?
        {
            used += frame.wire_bytes();
            let Heard::LoggedIn(_) = self.session.hear(index, &frame, io)? else { continue };
            io.stop_reading(index);
            if self.misfit == Misfit::SlowReader {
                self.ask_for_much(index, io);
            }
        }
        Ok(used)
    }

    fn lost(&mut self, _: u32, _: &Fault, _: &mut Io) -> Option<u64> {
        None
    }

    fn tick(&mut self, _: &mut Io) -> Option<u64> {
        None
    }

    fn finish(self) {}
}

const BODY_BYTES: usize = 8 * 1024;
/// As many as may be unanswered in one chat.
const MESSAGES: u64 = 32;
/// Each is answered with as much of the 256 KiB as one frame holds.
const PULLS: u32 = 64;

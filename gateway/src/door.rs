//! When newcomers are let in; and when nobody more gets in: whoever comes is told why and where else to ask, and is let go.
//! On the worker's thread.
//!
//! In a rush, that is while more are logging in than leave in one batch, each worker looks at its door every
//! `workers.rush_ms` and not when epoll says so. At a million over 53 workers each look found one newcomer, and each answer
//! woke another worker: 2.2 turns a login. In company they stay together through bridge, state and back. A crowd that comes
//! while nobody logs in is a rush as well (see [`Crowd`]); beside logins it is not, or live frames would wait for it.
//!
//! Trap: a listener is watched level-triggered, so a connection that cannot be taken off it would wake the worker for ever.
//! With the fd table full, a spare fd makes room for one at a time, long enough to tell it; without even that the listener
//! is left alone until somebody leaves, or the next tick. Meanwhile the kernel goes on giving this listener its share of
//! the new connections: they wait in its backlog, and the other workers' are not slowed down.

use std::io;

use bytes::Bytes;
use proto::Command;
use proto::wire::{self, Code};

use crate::connection::reason_text;
use crate::metrics::Why;
use crate::sys::{self, Epoll, Fd, Interest};
use crate::worker::{LISTENER, Worker};

/// What a worker keeps for those whom it cannot let in.
pub(crate) struct Door {
    /// `TOO_MANY_CONNECTIONS`, the same for everybody.
    refusal: Bytes,
    /// Holds an fd and does nothing. Gone while its fd is lent to a connection, or when none could be had after that.
    spare: Option<Epoll>,
    /// There is no fd to let anybody in with.
    paused: bool,
    /// In a rush: when the door opens next.
    opens_ms: Option<u64>,
    crowd: Crowd,
    /// The listener is not watched.
    unwatched: bool,
    /// When the log was last told of it.
    warned_ms: Option<u64>,
}

/// Between two lines in the log about the same trouble.
const WARN_EVERY_MS: u64 = 10_000;

impl Door {
    /// Makes the spare fd, in the table of the calling thread. `ipconf_url`: told to whoever is refused, if it is not empty.
    pub fn new(ipconf_url: &str) -> io::Result<Door> {
        Ok(Door {
            refusal: refusal(ipconf_url),
            spare: Some(Epoll::new()?),
            paused: false,
            opens_ms: None,
            crowd: Crowd::default(),
            unwatched: false,
            warned_ms: None,
        })
    }

    /// Whether it waits for an fd to come free.
    pub fn is_shut(&self) -> bool {
        self.paused || self.spare.is_none()
    }

    /// When the worker is to look again, in a rush.
    pub fn opens_ms(&self) -> Option<u64> {
        self.opens_ms
    }

    /// Says why, and that nothing more comes.
    pub fn tell(&self, fd: &Fd, buffer: &mut Vec<u8>) {
        // The socket's buffer is empty, so this fits; and if not, the close alone says enough.
        if sys::write(fd, &self.refusal).is_ok() && sys::shutdown_write(fd).is_ok() {
            // A close over unread bytes is a reset, which may overtake the reason. A Login that has come is read, therefore.
            let _ = sys::read(fd, buffer);
        }
    }
}

/// Those who come and do not log in: what this worker saw of the whole gateway when it began to count. Pure.
#[derive(Default)]
struct Crowd {
    since_ms: u64,
    connections: u64,
    logins: u64,
}

impl Crowd {
    /// Whether at least `rush` newcomers came per `rush_ms` while nobody logged in. `connections`: now, on this gateway;
    /// `logins`: of all time. Counts anew after each `rush_ms`, and after each login.
    fn is_rush(&mut self, now_ms: u64, rush_ms: u64, rush: u64, connections: u64, logins: u64) -> bool {
        let came = connections.saturating_sub(self.connections);
        let passed_ms = now_ms.saturating_sub(self.since_ms);
        // Whoever looks late has seen more come, which is no rush by itself.
        let is_rush = logins == self.logins && came * rush_ms >= rush * passed_ms.max(rush_ms);
        if passed_ms >= rush_ms || logins != self.logins {
            *self = Crowd { since_ms: now_ms, connections, logins };
        }
        is_rush
    }
}

/// What came of the spare fd.
#[derive(PartialEq, Eq)]
enum Lent {
    /// Somebody was told.
    Told,
    /// Nobody was waiting: the kernel asks for an fd before it looks.
    Nobody,
    /// It was no help.
    Useless,
}

fn refusal(ipconf_url: &str) -> Bytes {
    proto::frame::encode(
        Command::Error,
        &wire::Error {
            code: Code::TooManyConnections as i32,
            text: reason_text(Code::TooManyConnections).to_owned(),
            closing: true,
            ipconf: ipconf_url.to_owned(),
            ..Default::default()
        },
    )
}

impl Worker {
    /// Tells a connection that there is no room for it, and lets it go.
    pub(crate) fn turn_away(&mut self, fd: &Fd) {
        self.stats().closed(Why::Code(Code::TooManyConnections));
        let mut buffer = self.lend_buffer();
        self.door.tell(fd, &mut buffer);
        self.return_buffer(buffer);
    }

    /// There is no fd, or no memory, for the next connection. True: it was told so by means of the spare fd, and the one
    /// behind it may be asked in.
    pub(crate) fn out_of_room(&mut self, error: &io::Error) -> bool {
        let lent = match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => self.lend_spare(),
            _ => Lent::Useless,
        };
        if lent == Lent::Nobody {
            return false;
        }
        self.stats().accept_errors.add(1);
        self.warn(
            "no fd or memory for another connection: new ones are refused until some leave",
            Some(error),
        );
        if lent == Lent::Useless {
            self.pause_listener();
        }
        lent == Lent::Told
    }

    fn lend_spare(&mut self) -> Lent {
        let (Some(spare), Some(listener)) = (self.door.spare.take(), &self.listener) else {
            return Lent::Useless;
        };
        drop(spare);
        let lent = match sys::accept(listener) {
            Ok((fd, _)) => {
                self.stats().accepted.add(1);
                self.turn_away(&fd);
                Lent::Told
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Lent::Nobody,
            Err(_) => Lent::Useless,
        };
        self.door.spare = Epoll::new().ok();
        lent
    }

    /// Tells the log, at most every ten seconds.
    pub(crate) fn warn(&mut self, what: &'static str, error: Option<&io::Error>) {
        if self.door.warned_ms.is_none_or(|then| self.now_ms >= then + WARN_EVERY_MS) {
            self.door.warned_ms = Some(self.now_ms);
            let error = error.map(tracing::field::display);
            tracing::warn!(worker = self.index, error, connections = self.table.count(), "{what}");
        }
    }

    /// Whether newcomers are to be let in now: in a rush the clock says so, else epoll, which has told of `arrivals` or not.
    pub(crate) fn lets_in(&mut self, arrivals: bool) -> bool {
        if self.door.opens_ms.map_or(!arrivals, |opens_ms| self.now_ms < opens_ms) {
            return false;
        }
        let (bridge, rush_ms) = (&self.shared.metrics.bridge, self.shared.config.workers.rush_ms);
        let rush = self.shared.config.link.login_batch_frames_max as u64;
        let connections = self.shared.admission.connections() as u64;
        let crowd = self.door.crowd.is_rush(self.now_ms, rush_ms, rush, connections, bridge.logins_up.get());
        let is_rush = rush_ms > 0 && (crowd || bridge.logins_waiting.get() >= rush);
        self.door.opens_ms = is_rush.then_some(self.now_ms + rush_ms);
        self.watch_listener();
        true
    }

    /// As many as fit a turn were let in, and more may be there: the door stays open in a rush too.
    pub(crate) fn more_wait(&mut self) {
        if self.door.opens_ms.is_some() {
            self.door.opens_ms = Some(self.now_ms);
        }
    }

    fn pause_listener(&mut self) {
        self.door.paused = true;
        self.watch_listener();
    }

    /// Brings epoll's interest in the listener in line with the door.
    fn watch_listener(&mut self) {
        let unwatched = self.door.paused || self.door.opens_ms.is_some();
        let interest = if unwatched { Interest::Nothing } else { Interest::Read };
        if unwatched != self.door.unwatched
            && let Some(listener) = &self.listener
            && self.epoll.modify(listener, LISTENER, interest).is_ok()
        {
            self.door.unwatched = unwatched;
        }
    }

    /// Somebody left, or a second is over: new connections may find room again.
    pub(crate) fn resume_listener(&mut self) {
        if self.door.spare.is_none() {
            self.door.spare = Epoll::new().ok();
        }
        self.door.paused = false;
        self.watch_listener();
    }
}

#[cfg(test)]
mod tests {
    use proto::command::ServerFrame;

    use super::*;

    #[test]
    fn a_crowd_is_a_rush_while_nobody_logs_in() {
        const RUSH_MS: u64 = 20;
        let mut crowd = Crowd::default();
        let mut look = |now_ms, connections, logins| crowd.is_rush(now_ms, RUSH_MS, 100, connections, logins);
        assert!(!look(5, 0, 0));
        assert!(!look(10, 99, 0), "one is missing");
        assert!(look(19, 100, 0), "within the time");
        assert!(look(20, 150, 0));
        assert!(!look(39, 160, 0), "these were counted from the last time on");
        assert!(!look(41, 249, 0));
        assert!(look(71, 400, 0), "151 in 30 ms");
        assert!(!look(10_000, 1_000, 0), "over a long time they are not many");
        assert!(!look(10_010, 2_000, 1), "somebody logs in");
        assert!(!look(10_020, 2_050, 1));
        assert!(look(10_025, 2_100, 1), "and nobody did since");
        assert!(!look(10_050, 500, 1), "many left");
    }

    #[test]
    fn the_refusal_names_ipconf_when_there_is_one() {
        for url in ["", "http://127.0.0.1:6789"] {
            let bytes = refusal(url);
            let frame = proto::frame::cut(&bytes, proto::FRAME_BYTES_MAX).unwrap().unwrap();
            let ServerFrame::Error(error) =
                ServerFrame::decode(frame.command, frame.body.to_vec().into()).unwrap()
            else {
                panic!("an Error")
            };
            assert_eq!((error.code(), error.closing, &*error.ipconf), (Code::TooManyConnections, true, url));
        }
    }
}

//! A connection under any bytes in any pieces, between whatever the state server and the clock may do: a worker without its
//! thread hears the same stream whole, in the pieces that the input wants, and byte by byte, and must do the same each time.
//!
//! An input is: one byte for the limits and how far the connection is, one for how many steps there are, three for each step
//! (what, and behind how many bytes of the stream), and the stream.
//!
//! Trap: sockets and epoll are left out ([`Worker::received`] is where bytes enter, and what is queued is taken away), so that
//! a run takes microseconds. What they add is tested in `worker/tests/`.

use std::cell::RefCell;
use std::sync::Arc;

use bytes::Bytes;
use crossbeam_channel::bounded;
use prometheus_client::registry::Registry;
use proto::command::ServerFrame;
use proto::link::Bind;
use proto::wire::{self, Code};
use proto::{Command, frame};

use crate::admission::Admission;
use crate::batch::DownItem;
use crate::burst::{Burst, HOLDER_BYTES};
use crate::config::{Config, Limits};
use crate::connection::{Connection, NONE, Stage, flag};
use crate::id::Place;
use crate::metrics::Metrics;
use crate::sys::{self, EventFd, Fd};
use crate::wake::{Starved, Wake};
use crate::worker::{Inbox, Shared, Worker};

/// Longest stream, bytes; what it causes is far below the soft limit of a queue.
const STREAM_BYTES_MAX: usize = 16 * 1024;

/// Streams up to this long are fed byte by byte as well.
const BYTEWISE_MAX: usize = 256;

/// Steps of one input.
const STEPS_MAX: u8 = 7;

/// Frame limits before and after login.
const LIMITS: [(usize, usize); 4] = [(4096, 65_536), (64, 256), (16, 32), (4, 4)];

/// The burst budget in which one client may hold 100 bytes.
const TIGHT_BYTES_MAX: usize = 16 * 100;

/// Who the connection is once bound.
const BIND: Bind = Bind { user: 7, device: 8, binding: 9, valid_ms: 0 };

thread_local! {
    static RIGS: RefCell<Option<[Rig; 2]>> = const { RefCell::new(None) };
}

/// Runs one input.
pub fn run(input: &[u8]) {
    let Some(plan) = Plan::read(input) else { return };
    RIGS.with_borrow_mut(|rigs| {
        let [roomy, tight] =
            rigs.get_or_insert_with(|| [Rig::new(64 * 1024 * 1024), Rig::new(TIGHT_BYTES_MAX)]);
        if plan.is_tight {
            // What is refused for want of room depends on the pieces; that it ends well does not.
            tight.play(&plan, Pieces::AsPlanned).holds(&plan);
            return;
        }
        let whole = roomy.play(&plan, Pieces::Whole);
        whole.holds(&plan);
        assert_eq!(roomy.play(&plan, Pieces::AsPlanned), whole, "in pieces");
        if plan.stream.len() <= BYTEWISE_MAX {
            assert_eq!(roomy.play(&plan, Pieces::Bytes), whole, "byte by byte");
        }
    });
}

/// An input, understood.
struct Plan<'a> {
    limits: usize,
    is_bound: bool,
    is_tight: bool,
    /// In order of their place in the stream.
    steps: Vec<(usize, Step)>,
    stream: &'a [u8],
}

/// What happens between bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Step {
    /// Nothing: the next bytes come by themselves.
    Split,
    /// The turn ends: what is queued is written.
    Turn,
    /// State answers the Login.
    Bind,
    /// State answers some other Login.
    BindOther,
    /// A message for this user.
    Push,
    /// A message for whoever was here before.
    PushOther,
    /// State ends it, as bound or as not bound yet.
    Close,
    /// Nothing was heard for too long.
    Idle,
}

impl Step {
    const ALL: [Step; 8] = [
        Step::Split,
        Step::Turn,
        Step::Bind,
        Step::BindOther,
        Step::Push,
        Step::PushOther,
        Step::Close,
        Step::Idle,
    ];
}

impl Plan<'_> {
    fn read(input: &[u8]) -> Option<Plan<'_>> {
        let [setup, count, rest @ ..] = input else { return None };
        let (steps, stream) = rest.split_at_checked(3 * usize::from(count % (STEPS_MAX + 1)))?;
        if stream.len() > STREAM_BYTES_MAX {
            return None;
        }
        let step = |bytes: &[u8]| {
            let at = usize::from(u16::from_be_bytes([bytes[1], bytes[2]])) % (stream.len() + 1);
            (at, Step::ALL[usize::from(bytes[0]) % Step::ALL.len()])
        };
        let mut steps: Vec<_> = steps.chunks_exact(3).map(step).collect();
        steps.sort_by_key(|(at, _)| *at);
        let (limits, is_bound, is_tight) = (usize::from(setup & 3), setup & 4 != 0, setup & 8 != 0);
        Some(Plan { limits, is_bound, is_tight, steps, stream })
    }
}

/// How the stream arrives.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Pieces {
    Whole,
    AsPlanned,
    Bytes,
}

/// A worker, and what is kept between inputs.
struct Rig {
    worker: Box<Worker>,
    burst: Arc<Burst>,
    configs: Vec<Arc<Config>>,
    spare: Option<Fd>,
}

/// What came of a stream.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    /// Frames up: user, device, binding, command, body.
    up: Vec<(u64, u32, u64, u8, Vec<u8>)>,
    /// Bytes to the client.
    out: Vec<u8>,
    /// Deliveries that found nobody.
    gone: usize,
    stage: Option<Stage>,
    /// What is kept of a frame that is not whole.
    tail: Vec<u8>,
}

impl Rig {
    fn new(clients_bytes_max: usize) -> Rig {
        let configs = LIMITS.map(|(login_frame_bytes_max, frame_bytes_max)| {
            let limits = Limits { login_frame_bytes_max, frame_bytes_max, ..Limits::default() };
            Arc::new(Config { limits, ..Config::default() })
        });
        // Nobody is at the other end: what goes up is taken from the worker's hands.
        let (up, _) = bounded(1);
        let (_, down) = bounded(1);
        let burst = Arc::new(Burst::new(clients_bytes_max, 0));
        let shared = Shared {
            config: Arc::default(),
            admission: Arc::new(Admission::new(&Limits {
                connections_per_address_max: 0,
                ..Limits::default()
            })),
            burst: burst.clone(),
            metrics: Metrics::new(1, &mut Registry::default()),
            up,
            up_wake: Wake::new(EventFd::new().expect("an eventfd")),
        };
        let inbox =
            Inbox { down, wake: Wake::new(EventFd::new().expect("an eventfd")), starved: Starved::new() };
        let mut worker = Worker::new(0, 1, any_port(), 1000, shared, inbox).expect("a worker");
        // Somebody else is there all the time, or the table's page would come and go with each run.
        worker.table.insert(Connection::new(socket(), 0), 0).expect("room");
        Rig { worker, burst, configs: configs.into(), spare: None }
    }

    fn play(&mut self, plan: &Plan<'_>, pieces: Pieces) -> Outcome {
        let place = self.open(plan);
        let mut outcome = Outcome::default();
        let mut fed = 0;
        for (at, step) in &plan.steps {
            if pieces == Pieces::Whole && matches!(step, Step::Split | Step::Turn) {
                continue;
            }
            self.feed(place, &plan.stream[fed..*at], pieces, &mut outcome);
            fed = *at;
            self.step(place, *step, &mut outcome);
        }
        self.feed(place, &plan.stream[fed..], pieces, &mut outcome);
        self.take_queue(place, &mut outcome);
        self.end(place, &mut outcome);
        outcome
    }

    fn open(&mut self, plan: &Plan<'_>) -> Place {
        self.worker.shared.config = self.configs[plan.limits].clone();
        self.worker.login_number = 0;
        let address =
            self.worker.shared.admission.enter([127, 0, 0, 1].into()).expect("nobody else is counted");
        let fd = self.spare.take().unwrap_or_else(socket);
        let mut connection = Connection::new(fd, address);
        if plan.is_bound {
            connection.stage = Stage::Bound;
            (connection.user, connection.device, connection.binding) = (BIND.user, BIND.device, BIND.binding);
        }
        self.worker.stats().bound.set(u64::from(plan.is_bound));
        self.worker.table.insert(connection, 0).expect("room")
    }

    fn feed(&mut self, place: Place, bytes: &[u8], pieces: Pieces, outcome: &mut Outcome) {
        let piece_bytes = if pieces == Pieces::Bytes { 1 } else { bytes.len().max(1) };
        for piece in bytes.chunks(piece_bytes) {
            self.worker.received(place, piece);
            if pieces == Pieces::Bytes {
                self.take_queue(place, outcome);
            }
        }
    }

    fn step(&mut self, place: Place, step: Step, outcome: &mut Outcome) {
        let login = self.worker.login_number;
        match step {
            Step::Split => {}
            Step::Turn => self.take_queue(place, outcome),
            Step::Bind => self.deliver(place, DownItem { login, bind: Some(BIND), ..answer(BIND.user) }),
            Step::BindOther => {
                self.deliver(place, DownItem { login: login + 1, bind: Some(BIND), ..answer(BIND.user) });
            }
            Step::Push => self.deliver(place, DownItem { push: true, ..answer(BIND.user) }),
            Step::PushOther => self.deliver(place, DownItem { push: true, ..answer(BIND.user + 1) }),
            Step::Close => {
                let stage = self.worker.table.get_mut(place).map(|connection| connection.stage);
                let user = if stage == Some(Stage::Bound) { BIND.user } else { 0 };
                self.deliver(place, DownItem { login, close: true, ..answer(user) });
            }
            Step::Idle => self.worker.refuse(place, Code::Idle),
        }
    }

    fn deliver(&mut self, place: Place, item: DownItem) {
        let connection = self.worker.connection_id(place);
        self.worker.deliver(DownItem { connection, ..item });
    }

    /// As at the end of a turn whose socket takes everything.
    fn take_queue(&mut self, place: Place, outcome: &mut Outcome) {
        self.worker.dirty.clear();
        let Some(connection) = self.worker.table.get_mut(place) else { return };
        connection.flags &= !flag::DIRTY;
        let index = std::mem::replace(&mut connection.queue, NONE);
        if index != NONE {
            self.worker.queues.get_mut(index).copy_to(&mut outcome.out);
            self.worker.queues.give_back(index);
        }
    }

    fn end(&mut self, place: Place, outcome: &mut Outcome) {
        let held_bytes = self.burst.clients_bytes();
        // As `Worker::close`, but the socket serves the next run too.
        if let Some(connection) = self.worker.table.remove(place) {
            outcome.stage = Some(connection.stage);
            if connection.tail != NONE {
                outcome.tail = self.worker.tails.take(connection.tail);
                self.worker.tails.remove(connection.tail);
            }
            self.worker.shared.admission.leave(connection.address);
            self.spare = Some(connection.fd);
        }
        // A piece more may make a vector grow to twice its size.
        let allowed_bytes =
            if outcome.tail.is_empty() { 0 } else { HOLDER_BYTES + 2 * outcome.tail.len().max(4) };
        assert!(held_bytes <= allowed_bytes, "{held_bytes} bytes held for {}", outcome.tail.len());
        assert_eq!((self.burst.clients_bytes(), self.worker.queues.count()), (0, 0), "all is given back");
        assert_eq!(self.worker.shared.admission.connections(), 0);
        let batch = std::mem::take(&mut self.worker.batch);
        outcome.gone = batch.gone.len();
        let mut bodies = &batch.bodies[..];
        for up in batch.frames {
            let (body, others) = bodies.split_at(up.body_bytes as usize);
            outcome.up.push((up.user, up.device, up.binding, up.command, body.to_vec()));
            bodies = others;
        }
        assert!(bodies.is_empty(), "every body has its frame");
    }
}

impl Outcome {
    /// What is so whatever came.
    fn holds(&self, plan: &Plan<'_>) {
        let limit_bytes = LIMITS[plan.limits].1.max(LIMITS[plan.limits].0);
        assert!(self.tail.len() < limit_bytes, "what is kept is less than a frame");
        assert!(self.tail.is_empty() || self.stage != Some(Stage::Closing));
        let up_bytes: usize = self.up.iter().map(|up| frame::HEADER_BYTES + up.4.len()).sum();
        assert!(up_bytes <= plan.stream.len(), "nothing goes up that did not come");
        let logins = self.up.iter().filter(|up| up.3 == Command::Login as u8).count();
        assert!(logins <= usize::from(!plan.is_bound), "one Login a connection");
        for (index, (user, device, binding, command, _)) in self.up.iter().enumerate() {
            if index == 0 && !plan.is_bound {
                assert_eq!((*user, *device, *binding, *command), (0, 0, 1, Command::Login as u8));
                continue;
            }
            assert_eq!((*user, *device, *binding), (BIND.user, BIND.device, BIND.binding));
            let command = Command::try_from(*command).expect("a known command");
            assert!(command.is_from_client() && !matches!(command, Command::Login | Command::Ping));
        }
        self.out_holds();
    }

    /// What the client gets is whole frames, and nothing behind one that closes.
    fn out_holds(&self) {
        let mut rest = &self.out[..];
        let mut is_over = false;
        while !rest.is_empty() {
            let frame =
                frame::cut(rest, proto::FRAME_BYTES_MAX).expect("no long frame").expect("a whole frame");
            assert!(!is_over, "nothing follows the last frame");
            let decoded = ServerFrame::decode(frame.command, Bytes::copy_from_slice(frame.body));
            is_over =
                matches!(decoded.expect("a frame for clients"), ServerFrame::Error(error) if error.closing);
            rest = &rest[frame.wire_bytes()..];
        }
        assert!(!is_over || self.stage.is_none_or(|stage| stage == Stage::Closing));
    }
}

fn answer(user: u64) -> DownItem {
    let frames = frame::encode(Command::Resync, &wire::Resync {});
    DownItem { connection: 0, user, frames, ..DownItem::default() }
}

fn any_port() -> std::net::SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// A socket of which nothing but its being there is used.
fn socket() -> Fd {
    sys::listen(any_port(), 1, 0).expect("a socket")
}

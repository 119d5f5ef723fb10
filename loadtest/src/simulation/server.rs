//! A state server: the real core and its real tasks, polled by hand, one store call at a time.
//!
//! What tonic and tokio do around them is done here: streams come and go, turns run beside each other and pass on their
//! answers in the order of their batches, pushes go out one round behind the other.
//!
//! Trap: a task is polled when its store call or its pause is over, or when another task wakes it; nothing else goes on.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use proto::link::{LinkPing, Up, up};
use state::config::Config;
use state::simulation::{Server, Stream, Turned, has_logins};

use super::event::Event;
use super::gateway::state_id;
use super::net::{Net, Packet, Side};
use super::plan::{MS, Plan, Plant, SMALL_BYTES_MAX};
use super::storage::{Caller, Storage};

/// One state server slot of the simulated fleet.
pub struct ServerHost {
    index: usize,
    /// Which life; events of others are void.
    pub life: u64,
    server: Option<Server>,
    links: BTreeMap<usize, Link>,
    tasks: BTreeMap<u64, Task>,
    next_task: u64,
    is_pushing: bool,
    recency_off: bool,
    /// Messages stored at the wish of this life, and those of them that have gone through the fan-out.
    pub stored: u64,
    /// See `stored`.
    pub pushed: u64,
}

struct Link {
    stream: Stream,
    live: VecDeque<Slot>,
    logins: VecDeque<Slot>,
    /// It has ended; what was begun is finished.
    ended: bool,
    passing: bool,
    /// Looks, half a second apart, since anything came.
    quiet_looks: u32,
}

/// A batch: its turn runs, or waits for those before it.
struct Slot {
    task: u64,
    turned: Option<Turned>,
}

struct Task {
    kind: Kind,
    job: Job,
    woken: Arc<Woken>,
}

/// Set when a task may go on.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Turn { pipe: usize },
    PassOn { pipe: usize },
    Push { messages: u64 },
    Marks,
    Flush,
    Repush,
    Other,
}

impl ServerHost {
    /// Not started.
    pub fn new(index: usize, plan: &Plan) -> Self {
        ServerHost {
            index,
            life: 0,
            server: None,
            links: BTreeMap::new(),
            tasks: BTreeMap::new(),
            next_task: 0,
            is_pushing: false,
            recency_off: plan.has(Plant::RecencyOff),
            stored: 0,
            pushed: 0,
        }
    }

    /// Whether it runs.
    pub fn is_up(&self) -> bool {
        self.server.is_some()
    }

    /// Begins a life.
    pub fn start(&mut self, storage: &mut Storage, plan: &Plan, start: Instant, net: &mut Net) {
        let mut config = Config::default();
        config.node.id = state_id(self.index);
        // Servers of different versions or configurations run side by side.
        config.limits.message_bytes_max = if net.draw.permille(500) { SMALL_BYTES_MAX } else { 4_096 };
        config.limits.sync_chats_max = net.draw.between(1, 3) as usize;
        config.limits.pulls_per_turn_max = 2;
        let life = net.draw.bits() >> 12;
        let server =
            Server::new(config, life, Box::new(storage.handle(plan)), Box::new(storage.clock(start)));
        let repush = server.repush();
        self.server = Some(server);
        (self.stored, self.pushed, self.is_pushing) = (0, 0, false);
        net.after(1, Event::Marks { server: self.index, life: self.life });
        net.after(200 * MS, Event::Flushes { server: self.index, life: self.life });
        self.spawn(Kind::Repush, wrap(repush), storage, net);
    }

    /// The process dies. Whether something was stored that is not pushed.
    pub fn die(&mut self, storage: &mut Storage, net: &mut Net) -> bool {
        for (pipe, link) in std::mem::take(&mut self.links) {
            if !link.ended {
                let in_flight = net.draw.permille(500);
                net.close(pipe, Side::Other, in_flight);
            }
        }
        self.tasks.clear();
        self.server = None;
        self.life += 1;
        storage.forget(self.index, net);
        self.stored > self.pushed
    }

    /// Something from a gateway.
    pub fn up(&mut self, pipe: usize, up: Up, storage: &mut Storage, net: &mut Net) {
        let Some(server) = &self.server else { return };
        if let Some(link) = self.links.get_mut(&pipe) {
            link.quiet_looks = 0;
        }
        match (up.kind, self.links.get_mut(&pipe)) {
            (Some(up::Kind::Hello(mut hello)), None) => {
                if self.recency_off {
                    hello.replay_ms = 0;
                }
                let (stream, first) = server.open(hello);
                net.send(pipe, Side::Other, Packet::Down(first));
                let fresh = Link {
                    stream,
                    live: VecDeque::new(),
                    logins: VecDeque::new(),
                    ended: false,
                    passing: false,
                    quiet_looks: 0,
                };
                self.links.insert(pipe, fresh);
            }
            (Some(up::Kind::Batch(batch)), Some(link)) => {
                let lane = if has_logins(&batch) { &mut link.logins } else { &mut link.live };
                lane.push_back(Slot { task: self.next_task + 1, turned: None });
                let job = server.turn(&mut link.stream, batch);
                let job = Box::pin(async move { Some(job.await) });
                self.spawn(Kind::Turn { pipe }, job, storage, net);
            }
            (Some(up::Kind::Done(done)), Some(link)) => {
                if let Some(job) = server.done(&link.stream, done) {
                    self.spawn(Kind::Other, wrap(job), storage, net);
                }
            }
            (Some(up::Kind::Ping(LinkPing { nonce })), Some(link)) => {
                let job = server.pong(&link.stream, nonce);
                self.spawn(Kind::Other, wrap(job), storage, net);
            }
            _ => {}
        }
        self.settle(storage, net);
    }

    /// A stream has ended.
    pub fn ended(&mut self, pipe: usize, storage: &mut Storage, net: &mut Net) {
        if let Some(link) = self.links.get_mut(&pipe) {
            link.ended = true;
            link.stream.hang_up();
        }
        self.settle(storage, net);
    }

    /// A task goes on: its store call is answered, or its pause is over.
    pub fn goes_on(&mut self, task: u64, storage: &mut Storage, net: &mut Net) {
        self.poll(task, storage, net);
        self.settle(storage, net);
    }

    /// Writes its mark and looks at those of others, unless it is still at it.
    pub fn marks(&mut self, storage: &mut Storage, net: &mut Net) {
        net.after(500 * MS, Event::Marks { server: self.index, life: self.life });
        self.leave_the_quiet(storage, net);
        let busy = self.tasks.values().any(|task| matches!(task.kind, Kind::Marks));
        if let Some(server) = self.server.as_ref().filter(|_| !busy && !self.recency_off) {
            let job = server.tick();
            self.spawn(Kind::Marks, wrap(job), storage, net);
            self.settle(storage, net);
        }
    }

    /// Writes delivered cursors, unless it is still at it.
    pub fn flush(&mut self, storage: &mut Storage, net: &mut Net) {
        net.after(200 * MS, Event::Flushes { server: self.index, life: self.life });
        let busy = self.tasks.values().any(|task| matches!(task.kind, Kind::Flush));
        if let Some(server) = self.server.as_ref().filter(|_| !busy) {
            let job = server.flush_delivered();
            self.spawn(Kind::Flush, wrap(job), storage, net);
            self.settle(storage, net);
        }
    }

    /// Tasks that have not ended.
    pub fn stuck(&self) -> usize {
        let endless = |task: &&Task| matches!(task.kind, Kind::Marks | Kind::Flush | Kind::Repush);
        self.tasks.values().filter(|task| !endless(task)).count()
    }

    /// Streams of gateways that say nothing, or have another one, end here.
    fn leave_the_quiet(&mut self, storage: &mut Storage, net: &mut Net) {
        let Some(server) = &self.server else { return };
        for link in self.links.values_mut().filter(|link| !link.ended) {
            link.quiet_looks += 1;
            link.ended = link.quiet_looks > QUIET_LOOKS_MAX || server.is_over(&link.stream);
        }
        self.settle(storage, net);
    }

    fn spawn(&mut self, kind: Kind, job: Job, storage: &mut Storage, net: &mut Net) {
        self.next_task += 1;
        self.tasks.insert(self.next_task, Task { kind, job, woken: Arc::default() });
        self.poll(self.next_task, storage, net);
    }

    fn poll(&mut self, id: u64, storage: &mut Storage, net: &mut Net) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        storage.begin(Caller { server: self.index, life: self.life, task: id }, net.now_us);
        task.woken.0.store(false, Ordering::Relaxed);
        let waker = Waker::from(task.woken.clone());
        let mut context = Context::from_waker(&waker);
        let Poll::Ready(turned) = task.job.as_mut().poll(&mut context) else { return };
        let kind = task.kind;
        self.tasks.remove(&id);
        match kind {
            Kind::Turn { pipe } => {
                let Some(link) = self.links.get_mut(&pipe) else { return };
                let slot = link.live.iter_mut().chain(&mut link.logins).find(|slot| slot.task == id);
                if let Some(slot) = slot {
                    slot.turned = turned;
                }
            }
            Kind::PassOn { pipe } => {
                if let Some(link) = self.links.get_mut(&pipe) {
                    link.passing = false;
                }
            }
            Kind::Push { messages } => {
                self.pushed += messages;
                self.is_pushing = false;
            }
            Kind::Marks | Kind::Flush | Kind::Repush | Kind::Other => {}
        }
    }

    /// Passes on what is answered, pushes what was accepted, sends what waits; until nothing is left to do at once.
    fn settle(&mut self, storage: &mut Storage, net: &mut Net) {
        loop {
            let woken =
                self.tasks.iter().find(|(_, task)| task.woken.0.load(Ordering::Relaxed)).map(|(id, _)| *id);
            if let Some(id) = woken {
                self.poll(id, storage, net);
            } else if let Some((kind, job)) = self.next_job() {
                self.spawn(kind, job, storage, net);
            } else {
                break;
            }
        }
        let Some(server) = &self.server else { return };
        for (pipe, link) in &mut self.links {
            for down in link.stream.downs() {
                net.send(*pipe, Side::Other, Packet::Down(down));
            }
        }
        let over =
            |link: &Link| link.ended && link.live.is_empty() && link.logins.is_empty() && !link.passing;
        let pipes: Vec<usize> =
            self.links.iter().filter(|(_, link)| over(link)).map(|(pipe, _)| *pipe).collect();
        for pipe in pipes {
            if let Some(link) = self.links.remove(&pipe) {
                server.close(link.stream);
            }
            net.close(pipe, Side::Other, true);
        }
    }

    fn next_job(&mut self) -> Option<(Kind, Job)> {
        let server = self.server.as_mut()?;
        for (pipe, link) in &mut self.links {
            if link.passing {
                continue;
            }
            let Link { stream, live, logins, .. } = link;
            let ready =
                [live, logins].into_iter().find(|lane| lane.front().is_some_and(|s| s.turned.is_some()));
            if let Some(turned) = ready.and_then(VecDeque::pop_front).and_then(|slot| slot.turned) {
                link.passing = true;
                return Some((Kind::PassOn { pipe: *pipe }, wrap(server.pass_on(stream, turned))));
            }
        }
        if !self.is_pushing
            && let Some((messages, job)) = server.push()
        {
            self.is_pushing = true;
            return Some((Kind::Push { messages }, wrap(job)));
        }
        None
    }
}

type Job = Pin<Box<dyn Future<Output = Option<Turned>> + Send>>;

fn wrap(job: Pin<Box<dyn Future<Output = ()> + Send>>) -> Job {
    Box::pin(async move {
        job.await;
        None
    })
}

/// As the service has it: a gateway that is silent for longer than three seconds is left.
const QUIET_LOOKS_MAX: u32 = 6;

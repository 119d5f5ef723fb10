//! Everything there is in one run, and which event goes to whom. One thread.
//!
//! A run has four parts: faults and messages; no more messages while faults go on; everything heals, and what was sent must
//! arrive; at last each device sends once more, because who is deaf shows only then.
//!
//! Trap: a host that is stopped does nothing, but its kernel takes what comes. Such events are held, in order.

use std::collections::BTreeMap;
use std::time::Instant;

use state::store::{Op, read};

use super::device::Device;
use super::draw::Draw;
use super::event::Event;
use super::gateway::GatewayHost;
use super::judge::Judge;
use super::net::{Host, Net, Packet, Side};
use super::plan::{MS, Plan};
use super::server::ServerHost;
use super::storage::Storage;
use super::trace;

/// See the head of this file.
pub struct World {
    pub(super) plan: Plan,
    pub(super) net: Net,
    pub(super) storage: Storage,
    pub(super) devices: Vec<Device>,
    pub(super) gateways: Vec<GatewayHost>,
    pub(super) servers: Vec<ServerHost>,
    pub(super) judge: Judge,
    /// What is held for hosts that are stopped.
    pub(super) held: BTreeMap<Host, Vec<Event>>,
    pub(super) is_healed: bool,
    pub(super) faults: u64,
    pub(super) crashes: u64,
    pub(super) crashes_between: u64,
    start: Instant,
    sends: bool,
    /// Of everything that happened, in order.
    pub(super) hash: u64,
    traces: bool,
}

impl World {
    /// As drawn.
    pub fn new(plan: Plan, draw: Draw, traces: bool) -> Self {
        let start = Instant::now();
        let mut net = Net::new(&plan, draw);
        let mut devices = Vec::new();
        for (user, count) in plan.devices_per_user.iter().enumerate() {
            for number in 0..*count {
                let index = devices.len();
                devices.push(Device::new(index, &user_name(user), &format!("d{number}"), &plan, start));
                // Some join when much has been said already.
                let wait_us = net.draw.delay(1_500 * MS, 5, plan.faults_us / 2);
                net.after(wait_us, Event::Start(Host::Device(index)));
                net.after(wait_us + 1, Event::Submits { device: index });
            }
        }
        for gateway in 0..plan.gateways {
            let wait_us = net.draw.between(1, 50 * MS);
            net.after(wait_us, Event::Start(Host::Gateway(gateway)));
        }
        for server in 0..plan.servers {
            let wait_us = net.draw.between(1, 50 * MS);
            net.after(wait_us, Event::Start(Host::Server(server)));
        }
        net.after(1_000 * MS, Event::Breaks);
        net.after(20 * MS, Event::Persists);
        World {
            storage: Storage::new(&plan),
            gateways: (0..plan.gateways).map(|at| GatewayHost::new(at, plan.heartbeat_ms)).collect(),
            servers: (0..plan.servers).map(|at| ServerHost::new(at, &plan)).collect(),
            devices,
            judge: Judge::default(),
            held: BTreeMap::new(),
            is_healed: false,
            faults: 0,
            crashes: 0,
            crashes_between: 0,
            start,
            sends: true,
            hash: 0,
            traces,
            net,
            plan,
        }
    }

    /// The whole run. What is wrong stands in the judge.
    pub fn run(&mut self) {
        let quiet_us = self.net.draw.between(0, 800 * MS);
        self.run_until(self.plan.faults_us - quiet_us);
        self.sends = false;
        self.run_until(self.plan.faults_us);
        self.heal();
        self.becomes_complete("after everything healed", COMPLETE_US_MAX);
        for device in 0..self.devices.len() {
            self.submits(device);
        }
        self.becomes_complete("after everybody has spoken once more", PROBE_US_MAX);
        let stuck: usize = self.servers.iter().map(ServerHost::stuck).sum();
        if stuck > 0 {
            self.run_until(self.net.now_us + STUCK_US_MAX);
            let stuck: usize = self.servers.iter().map(ServerHost::stuck).sum();
            if stuck > 0 {
                self.judge.wrong(|| format!("{stuck} tasks of servers never end"));
            }
        }
        self.judge.stored(&self.storage.memory.chats());
    }

    /// Prints a line of the trace.
    pub(super) fn note(&self, what: impl FnOnce() -> String) {
        if self.traces {
            println!("{:>12.3} ms  {}", self.net.now_us as f64 / 1_000.0, what());
        }
    }

    fn run_until(&mut self, until_us: u64) {
        while self.judge.violation.is_none()
            && let Some(event) = self.net.next_event(until_us)
        {
            self.happens(event);
        }
    }

    /// Runs until every device is online and has everything.
    fn becomes_complete(&mut self, when: &str, within_us: u64) {
        let until_us = self.net.now_us + within_us;
        while self.judge.violation.is_none() && self.net.now_us < until_us {
            if self.what_lacks().is_none() {
                return;
            }
            self.run_until(self.net.now_us + 100 * MS);
        }
        if let Some(lacks) = self.what_lacks() {
            self.judge.wrong(|| format!("{} s {when}, {lacks}", within_us / MS / 1_000));
        }
    }

    fn what_lacks(&self) -> Option<String> {
        let chats = self.storage.memory.chats();
        for device in &self.devices {
            let user = &device.user;
            if !device.is_online() {
                return Some(format!("a device of {user} is not logged in"));
            }
            if device.unsent() > 0 {
                return Some(format!("{} messages of a device of {user} have no answer", device.unsent()));
            }
            for (chat, messages) in chats.iter().filter(|(chat, _)| chat.split(':').any(|name| name == user))
            {
                let head = messages.len() as u64;
                let has = device.app.chats.get(chat).map_or(0, |(.., last)| *last);
                if head > has {
                    return Some(format!("a device of {user} has {has} of {head} messages of {chat}"));
                }
            }
        }
        None
    }

    fn heal(&mut self) {
        self.is_healed = true;
        self.judge.healed_us = self.net.now_us;
        self.net.heal();
        self.storage.heal();
        self.note(|| "everything heals".to_owned());
        let stopped: Vec<Host> = self.held.keys().copied().collect();
        stopped.into_iter().for_each(|host| self.resumes(host));
    }

    fn happens(&mut self, event: Event) {
        self.hash = (self.hash ^ self.net.now_us).wrapping_mul(0x100_0000_01b3);
        self.hash = (self.hash ^ self.net.draw.clone().bits()).wrapping_mul(0x100_0000_01b3);
        if let Some(held) = self.host_of(&event).and_then(|host| self.held.get_mut(&host)) {
            return held.push(event);
        }
        if self.traces
            && let Some(line) = trace::line(&event, &self.net)
        {
            self.note(|| line);
        }
        match event {
            Event::Arrives { pipe, side, packet } => self.arrives(pipe, side, packet),
            Event::Ended { pipe, side } => self.ended(pipe, side),
            Event::Start(host) => self.starts(host),
            Event::Resumes(host) => self.resumes(host),
            Event::Submits { device } => {
                let wait_us = self.net.draw.between(1, 2 * self.plan.send_every_us);
                if self.sends {
                    self.net.after(wait_us, Event::Submits { device });
                    self.submits(device);
                }
            }
            Event::Breaks => self.breaks(),
            Event::StoreBack => self.storage.back(),
            Event::Dies { server, life } => {
                if self.servers[server].life == life && !self.is_healed {
                    self.server_dies(server);
                }
            }
            Event::Persists => {
                self.storage.memory.persist();
                if self.judge.violation.is_none() && !self.is_healed {
                    self.net.after(30 * MS, Event::Persists);
                }
            }
            Event::CallArrives { call } => {
                self.storage.arrives(call, &mut self.net, &self.plan);
                self.after_appends();
            }
            Event::CallAnswered { call } => {
                let caller = self.storage.answered(call);
                self.goes_on(caller.map(|caller| (caller.server, caller.life, caller.task)));
            }
            Event::CallExpires { call } => {
                let caller = self.storage.expires(call);
                self.goes_on(caller.map(|caller| (caller.server, caller.life, caller.task)));
            }
            Event::Wakes { server, life, task } => self.goes_on(Some((server, life, task))),
            Event::Marks { server, life } => {
                if self.servers[server].life == life {
                    self.servers[server].marks(&mut self.storage, &mut self.net);
                }
            }
            Event::Flushes { server, life } => {
                if self.servers[server].life == life {
                    self.servers[server].flush(&mut self.storage, &mut self.net);
                }
            }
            event => self.at_the_edge(event),
        }
        self.storage.take(&mut self.net, &self.plan, self.is_healed);
    }

    /// What happens at gateways and devices.
    fn at_the_edge(&mut self, event: Event) {
        let (net, judge) = (&mut self.net, &mut self.judge);
        match event {
            Event::Confirms { device, life, chat, history, seq } if self.devices[device].life == life => {
                self.devices[device].confirm(&chat, history, seq, net, judge);
            }
            Event::Ticks { device, life } if self.devices[device].life == life => {
                self.devices[device].tick(net, judge);
            }
            Event::Connects { device, life } if self.devices[device].life == life => {
                let up = self.gateways.iter().enumerate().filter(|(_, gateway)| gateway.is_up());
                let listening: Vec<usize> = up.map(|(at, _)| at).collect();
                self.devices[device].connect(&listening, net);
            }
            Event::LoginExpires { device, pipe } => self.devices[device].login_expires(pipe, net, judge),
            Event::Pumps { gateway, life } if self.gateways[gateway].life == life => {
                self.gateways[gateway].pump(net);
            }
            Event::Pings { gateway, life } if self.gateways[gateway].life == life => {
                self.gateways[gateway].ping(net);
            }
            Event::Follows { gateway, life, server } if self.gateways[gateway].life == life => {
                let listens = self.servers[server].is_up();
                self.gateways[gateway].follow(server, listens, net);
            }
            Event::HelloExpires { gateway, pipe } => self.gateways[gateway].hello_expires(pipe, net),
            Event::Places { gateway, life, items, ticket } if self.gateways[gateway].life == life => {
                self.gateways[gateway].place(items, ticket, net);
            }
            Event::Reads { gateway, life, connection } if self.gateways[gateway].life == life => {
                self.gateways[gateway].reads(connection, net);
            }
            _ => {}
        }
    }

    fn arrives(&mut self, pipe: usize, side: Side, packet: Packet) {
        if !self.net.is_open(pipe, side) {
            return;
        }
        let (net, judge) = (&mut self.net, &mut self.judge);
        match (net.host(pipe, side), packet) {
            (Host::Device(at), Packet::Frames(bytes)) => self.devices[at].frames(pipe, &bytes, net, judge),
            (Host::Gateway(at), Packet::Frames(bytes)) => self.gateways[at].client_frames(pipe, &bytes, net),
            (Host::Gateway(at), Packet::Down(down)) => self.gateways[at].down(pipe, down, net),
            (Host::Server(at), Packet::Up(up)) => self.servers[at].up(pipe, up, &mut self.storage, net),
            _ => {}
        }
    }

    fn ended(&mut self, pipe: usize, side: Side) {
        if !self.net.is_open(pipe, side) {
            return;
        }
        let (net, judge) = (&mut self.net, &mut self.judge);
        match net.host(pipe, side) {
            Host::Device(at) => self.devices[at].ended(pipe, net, judge),
            Host::Gateway(at) => self.gateways[at].ended(pipe, net),
            Host::Server(at) => self.servers[at].ended(pipe, &mut self.storage, net),
        }
        self.net.ended(pipe, side);
    }

    fn starts(&mut self, host: Host) {
        self.note(|| format!("{host:?} starts"));
        match host {
            Host::Device(at) => self.devices[at].start(&mut self.net),
            Host::Gateway(at) => {
                self.storage.begin(Default::default(), self.net.now_us);
                let incarnation = read::incarnation(self.storage.memory.apply_one(&Op::Incarnate));
                let servers = self.servers.len();
                self.gateways[at].start(incarnation.unwrap_or(1), servers, &mut self.net);
            }
            Host::Server(at) => {
                self.servers[at].start(&mut self.storage, &self.plan, self.start, &mut self.net);
            }
        }
    }

    fn resumes(&mut self, host: Host) {
        if let Some(held) = self.held.remove(&host) {
            held.into_iter().for_each(|event| self.net.after(0, event));
        }
    }

    fn goes_on(&mut self, caller: Option<(usize, u64, u64)>) {
        if let Some((server, life, task)) = caller
            && self.servers[server].life == life
        {
            self.servers[server].goes_on(task, &mut self.storage, &mut self.net);
        }
    }

    /// Right behind an append is the best moment for a fault.
    fn after_appends(&mut self) {
        for caller in std::mem::take(&mut self.storage.stored) {
            let (server, life) = (caller.server, caller.life);
            if self.servers[server].life != life {
                continue;
            }
            self.servers[server].stored += 1;
            if self.is_healed {
                continue;
            }
            if self.net.draw.permille(self.plan.crash_after_append) {
                let wait_us = self.net.draw.between(0, 2 * self.plan.store_us);
                self.net.after(wait_us, Event::Dies { server, life });
            }
            if self.net.draw.permille(self.plan.cut_after_append) {
                self.links_break(server);
            }
        }
    }

    /// A device sends to somebody; some messages are to be refused.
    fn submits(&mut self, device: usize) {
        let users = self.plan.users;
        let me = self.devices[device].user.clone();
        let draw = &mut self.net.draw;
        let other = user_name(draw.index(users));
        let (mut chat, mut body_bytes) = (pair(&me, &other), 1);
        if draw.permille(self.plan.too_large) && self.sends {
            body_bytes = 200;
        } else if draw.permille(self.plan.to_group) && self.sends {
            chat = "#7".to_owned();
        } else if draw.permille(self.plan.to_strangers) && self.sends {
            chat = pair("nobody", &other);
        }
        self.devices[device].submit(&chat, body_bytes, &mut self.net, &mut self.judge);
    }

    fn host_of(&self, event: &Event) -> Option<Host> {
        match event {
            Event::CallAnswered { call } | Event::CallExpires { call } => {
                self.storage.caller(*call).map(|caller| Host::Server(caller.server))
            }
            event => event.host(|pipe, side| self.net.host(pipe, side)),
        }
    }
}

fn user_name(user: usize) -> String {
    format!("u{user}")
}

fn pair(one: &str, other: &str) -> String {
    let (low, high) = if one < other { (one, other) } else { (other, one) };
    format!("{low}:{high}")
}

/// Until everything that was sent has an answer and is shown everywhere: a client resends after 5 s, and marks are judged for 2.
const COMPLETE_US_MAX: u64 = 30_000 * MS;
/// The same for a message sent when nothing is broken.
const PROBE_US_MAX: u64 = 5_000 * MS;
/// Longest that a task of a server may go on when nothing happens any more.
const STUCK_US_MAX: u64 = 30_000 * MS;

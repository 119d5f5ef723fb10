//! A gateway with a state server behind it, in memory, on a port of its own, with faults on demand. For tests only: it
//! keeps the rules of the wire that a client can notice, nothing else.

#![allow(dead_code)]

pub mod device;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;
use proto::wire::{self, Code};
use proto::{Command, frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};

/// What to do with a frame that arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// The connection breaks before the frame is looked at.
    BreakBefore,
    /// The frame is carried out, and the connection breaks instead of the answer.
    BreakAfter,
    /// The frame is swallowed.
    Swallow,
    /// The frame is carried out, and nobody hears of it.
    LoseAnswer,
    Unavailable,
}

/// What to do with a push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PushFault {
    None,
    Twice,
    /// Leaves behind the next push.
    Late,
    Skip,
    SkipAndResync,
}

#[derive(Default)]
pub struct World {
    pub history: u64,
    /// What is below was cut by retention.
    pub first: u64,
    pub chats: BTreeMap<String, Vec<wire::Message>>,
    /// Of (chat, stream).
    rows: HashMap<(String, u64), Row>,
    pub delivered: HashMap<(String, String), u64>,
    pub logins: Vec<wire::Login>,
    pub push_acks: Vec<wire::PushAck>,
    /// Every frame that arrived, with its length.
    pub received: Vec<(Command, usize)>,
    /// Answers to logins, before the ordinary one.
    pub refuse: VecDeque<wire::Error>,
    pub heartbeat_ms: u32,
    pub answer_pings: bool,
    connections: Vec<Conn>,
    next_connection: u64,
    late: Vec<(u64, Bytes)>,
    pub fault: Option<Box<dyn FnMut(Command) -> Fault + Send>>,
    pub push_fault: Option<Box<dyn FnMut() -> PushFault + Send>>,
}

/// Watermark, and the last 32 of (n, seq).
type Row = (u64, VecDeque<(u64, u64)>);

struct Conn {
    id: u64,
    user: String,
    frames: mpsc::UnboundedSender<Bytes>,
}

#[derive(Clone)]
pub struct Fake {
    pub address: SocketAddr,
    world: Arc<Mutex<World>>,
    changed: Arc<Notify>,
}

impl Fake {
    pub async fn start() -> Fake {
        let world =
            World { history: 77, first: 1, heartbeat_ms: 30_000, answer_pings: true, ..World::default() };
        Fake::with(Arc::new(Mutex::new(world)), Arc::default()).await
    }

    /// Another gateway before the same state.
    pub async fn another(&self) -> Fake {
        Fake::with(self.world.clone(), self.changed.clone()).await
    }

    async fn with(world: Arc<Mutex<World>>, changed: Arc<Notify>) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = Fake { address: listener.local_addr().unwrap(), world, changed };
        let accepting = fake.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let fake = accepting.clone();
                tokio::spawn(async move {
                    let id = {
                        let mut world = fake.world();
                        world.next_connection += 1;
                        world.next_connection
                    };
                    fake.serve(id, stream).await;
                    fake.world().connections.retain(|conn| conn.id != id);
                    fake.changed.notify_waiters();
                });
            }
        });
        fake
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// Waits until the world is as it should be.
    pub async fn until(&self, mut good: impl FnMut(&World) -> bool) {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if good(&self.world()) {
                    return;
                }
                changed.await;
            }
        };
        if tokio::time::timeout(std::time::Duration::from_secs(60), wait).await.is_err() {
            let world = self.world();
            let heads: Vec<_> = world.chats.iter().map(|(chat, messages)| (chat, messages.len())).collect();
            panic!("still {heads:?}, {:?}, {} logins", world.delivered, world.logins.len());
        }
    }

    /// Sends a frame to every connection of a user.
    pub fn tell<M: Message>(&self, user: &str, command: Command, body: &M) {
        let frame = frame::encode(command, body);
        for conn in self.world().connections.iter().filter(|conn| conn.user == user) {
            let _ = conn.frames.send(frame.clone());
        }
    }

    async fn serve(&self, id: u64, stream: TcpStream) {
        let (mut reader, mut writer) = stream.into_split();
        let (frames, mut outgoing) = mpsc::unbounded_channel::<Bytes>();
        let mut input = BytesMut::new();
        loop {
            while let Some(cut) = frame::cut(&input, proto::FRAME_BYTES_MAX).unwrap() {
                let (command, body) =
                    (Command::try_from(cut.command).unwrap(), Bytes::copy_from_slice(cut.body));
                let used = cut.wire_bytes();
                input.advance(used);
                let go_on = self.world().handle(id, command, body, &frames);
                self.changed.notify_waiters();
                if !go_on {
                    // What was answered so far still leaves.
                    while let Ok(frame) = outgoing.try_recv() {
                        let _ = writer.write_all(&frame).await;
                    }
                    return;
                }
            }
            tokio::select! {
                read = reader.read_buf(&mut input) => if !matches!(read, Ok(1..)) { return },
                frame = outgoing.recv() => {
                    let Some(frame) = frame else { return };
                    if frame.is_empty() || writer.write_all(&frame).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Breaks every connection.
    pub fn break_all(&self) {
        for conn in &self.world().connections {
            let _ = conn.frames.send(Bytes::new());
        }
    }
}

impl World {
    pub fn online(&self, user: &str) -> usize {
        self.connections.iter().filter(|conn| conn.user == user).count()
    }

    /// Stores a message and pushes it to everybody but one connection.
    pub fn append(&mut self, chat: &str, sender: &str, body: Bytes, except: u64) -> u64 {
        let messages = self.chats.entry(chat.to_owned()).or_default();
        let seq = messages.len() as u64 + 1;
        let message = wire::Message {
            seq,
            sender: sender.to_owned(),
            time_us: 1_000 + seq,
            body,
            ..Default::default()
        };
        messages.push(message.clone());
        let push = wire::Push {
            chat: chat.to_owned(),
            history: self.history,
            message: Some(message),
            ack_within_ms: 0,
        };
        let bytes = frame::encode(Command::Push, &push);
        let mut late = std::mem::take(&mut self.late);
        for conn in &self.connections {
            if conn.id == except || !chat.split(':').any(|member| member == conn.user) {
                continue;
            }
            let fault = self.push_fault.as_mut().map_or(PushFault::None, |fault| fault());
            match fault {
                PushFault::None => drop(conn.frames.send(bytes.clone())),
                PushFault::Twice => {
                    let _ = conn.frames.send(bytes.clone());
                    let _ = conn.frames.send(bytes.clone());
                }
                PushFault::Late => self.late.push((conn.id, bytes.clone())),
                PushFault::Skip => {}
                PushFault::SkipAndResync => {
                    drop(conn.frames.send(frame::encode(Command::Resync, &wire::Resync {})));
                }
            }
        }
        for (id, bytes) in late.drain(..) {
            if let Some(conn) = self.connections.iter().find(|conn| conn.id == id) {
                let _ = conn.frames.send(bytes);
            }
        }
        seq
    }

    /// False: the connection ends.
    fn handle(
        &mut self,
        id: u64,
        command: Command,
        body: Bytes,
        frames: &mpsc::UnboundedSender<Bytes>,
    ) -> bool {
        let fault = self.fault.as_mut().map_or(Fault::None, |fault| fault(command));
        let mut answers = Vec::new();
        self.received.push((command, frame::HEADER_BYTES + body.len()));
        match fault {
            Fault::BreakBefore => return false,
            Fault::Swallow => return true,
            Fault::Unavailable if matches!(command, Command::Send | Command::Sync | Command::Pull) => {
                answers.push(frame::encode(Command::Error, &unavailable(command, body)));
            }
            _ => {
                if !self.carry_out(id, command, body, frames, &mut answers) {
                    answers.into_iter().for_each(|answer| drop(frames.send(answer)));
                    return false;
                }
            }
        }
        if fault == Fault::BreakAfter {
            return false;
        }
        if fault == Fault::LoseAnswer {
            return true;
        }
        answers.into_iter().for_each(|answer| drop(frames.send(answer)));
        true
    }

    fn carry_out(
        &mut self,
        id: u64,
        command: Command,
        body: Bytes,
        frames: &mpsc::UnboundedSender<Bytes>,
        answers: &mut Vec<Bytes>,
    ) -> bool {
        let user = self.connections.iter().find(|conn| conn.id == id).map(|conn| conn.user.clone());
        match command {
            Command::Login => {
                let login = wire::Login::decode(body).unwrap();
                self.logins.push(login.clone());
                if let Some(error) = self.refuse.pop_front() {
                    answers.push(frame::encode(Command::Error, &error));
                    return false;
                }
                self.connections.push(Conn { id, user: login.user, frames: frames.clone() });
                answers.push(frame::encode(
                    Command::LoginAck,
                    &wire::LoginAck {
                        wire: 1,
                        heartbeat_ms: self.heartbeat_ms,
                        durability: wire::Durability::Strict as i32,
                        unanswered_max: 32,
                        ..Default::default()
                    },
                ));
            }
            Command::Ping if self.answer_pings => {
                let ping = wire::Ping::decode(body).unwrap();
                answers.push(frame::encode(Command::Pong, &wire::Pong { nonce: ping.nonce }));
            }
            Command::Ping => {}
            Command::Send => {
                answers.push(self.send(id, &user.unwrap(), wire::Send::decode(body).unwrap()));
            }
            Command::Sync => {
                answers.push(self.sync(&user.unwrap(), &wire::Sync::decode(body).unwrap()));
            }
            Command::Pull => answers.push(self.pull(&wire::Pull::decode(body).unwrap())),
            Command::PushAck => {
                let ack = wire::PushAck::decode(body).unwrap();
                let delivered = self.delivered.entry((user.unwrap(), ack.chat.clone())).or_default();
                *delivered = ack.seq.max(*delivered);
                self.push_acks.push(ack);
            }
            _ => panic!("a client sent {command:?}"),
        }
        true
    }

    fn send(&mut self, id: u64, user: &str, send: wire::Send) -> Bytes {
        let error = |code: Code, expected: u64| {
            let (stream, n, chat) = (send.stream, send.n, send.chat.clone());
            let error = wire::Error { code: code as i32, stream, n, chat, expected, ..Default::default() };
            frame::encode(Command::Error, &error)
        };
        if !send.chat.split(':').any(|member| member == user) {
            return error(Code::NotAMember, 0);
        }
        let key = (send.chat.clone(), send.stream);
        let watermark = self.rows.get(&key).map_or(0, |row| row.0);
        if send.n > watermark + 1 {
            return error(Code::OutOfOrder, watermark + 1);
        }
        if send.n == watermark + 1 {
            let seq = self.append(&send.chat, user, send.body.clone(), id);
            let row = self.rows.entry(key.clone()).or_default();
            row.0 = send.n;
            row.1.push_back((send.n, seq));
            if row.1.len() > 32 {
                row.1.pop_front();
            }
        }
        let Some((_, seq)) = self.rows[&key].1.iter().find(|(n, _)| *n == send.n) else {
            return error(Code::TooOld, 0);
        };
        let ack = wire::SendAck {
            stream: send.stream,
            n: send.n,
            chat: send.chat.clone(),
            seq: *seq,
            time_us: 1_000 + seq,
            history: self.history,
        };
        frame::encode(Command::SendAck, &ack)
    }

    fn sync(&self, user: &str, sync: &wire::Sync) -> Bytes {
        let inside = |name: &str| name > &*sync.after && (sync.until.is_empty() || name <= &*sync.until);
        let news = |name: &str, head: u64| {
            let held = sync.cursors.iter().find(|cursor| cursor.chat == name);
            held.is_none_or(|held| (held.history, held.seq) != (self.history, head))
        };
        let chats = self
            .chats
            .iter()
            .filter(|(name, _)| name.split(':').any(|member| member == user) && inside(name))
            .map(|(name, messages)| wire::ChatHead {
                chat: name.clone(),
                history: self.history,
                head: messages.len() as u64,
                delivered: self.delivered.get(&(user.to_owned(), name.clone())).copied().unwrap_or(0),
                first: self.first,
                ..Default::default()
            })
            .filter(|head| news(&head.chat, head.head))
            .collect();
        frame::encode(Command::SyncAck, &wire::SyncAck { request: sync.request, chats, ..Default::default() })
    }

    fn pull(&self, pull: &wire::Pull) -> Bytes {
        let messages = &self.chats[&pull.chat];
        let kept = messages.iter().filter(|message| message.seq > pull.cursor && message.seq >= self.first);
        let found: Vec<_> = kept.take(10).cloned().collect();
        let head = messages.len() as u64;
        let has_more = found.last().is_some_and(|last| last.seq < head);
        let ack = wire::PullAck {
            request: pull.request,
            chat: pull.chat.clone(),
            history: self.history,
            messages: found,
            has_more,
            head,
            first: self.first,
            ..Default::default()
        };
        frame::encode(Command::PullAck, &ack)
    }
}

fn unavailable(command: Command, body: Bytes) -> wire::Error {
    let code = Code::Unavailable as i32;
    let error = wire::Error { code, command: command as u32, retry_after_ms: 20, ..Default::default() };
    match command {
        Command::Send => {
            let send = wire::Send::decode(body).unwrap();
            wire::Error { stream: send.stream, n: send.n, chat: send.chat, ..error }
        }
        Command::Sync => wire::Error { request: wire::Sync::decode(body).unwrap().request, ..error },
        _ => wire::Error { request: wire::Pull::decode(body).unwrap().request, ..error },
    }
}

//! A gateway and state server in one small thread, with faults on demand: what the loads are tested against.
//!
//! Trap: it keeps the wire protocol's rules (dedupe, order of ids, seqs) because the client library insists on them; it
//! keeps nothing else.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::{Buf, BytesMut};
use prost::Message;
use proto::command::Command;
use proto::{frame, wire};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// What goes wrong, once, at the hundredth message.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    #[default]
    Nothing,
    /// It is acknowledged and not stored.
    Lose,
    /// It is stored twice.
    Double,
    /// It is stored behind the sender's next one in that chat.
    Swap,
    /// Its sender's connection is closed without an answer.
    Cut,
    /// Logins are refused.
    RefuseLogins,
    /// The first 20 logins are told to come back in a moment.
    PutOffSomeLogins,
    /// Only the first 30 logins are answered; the next is closed.
    CloseSomeLogins,
}

/// Ends with this value.
pub struct Fake {
    pub address: SocketAddr,
    _runtime: tokio::runtime::Runtime,
}

impl Fake {
    pub fn start(fault: Fault) -> Fake {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let world = Arc::new(Mutex::new(World { fault, ..World::default() }));
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(serve(socket, world.clone()));
            }
        });
        Fake { address, _runtime: runtime }
    }
}

#[derive(Default)]
struct World {
    fault: Fault,
    users: HashMap<String, Sender>,
    chats: HashMap<String, ChatLog>,
    logins: u64,
    sends: u64,
    held: Option<(String, wire::Send)>,
}

#[derive(Default)]
struct ChatLog {
    messages: Vec<wire::Message>,
    /// Per stream: the answers so far, by n - 1.
    streams: HashMap<u64, Vec<wire::SendAck>>,
}

/// Bytes to write; none: close.
type Sender = mpsc::UnboundedSender<Option<bytes::Bytes>>;

async fn serve(socket: TcpStream, world: Arc<Mutex<World>>) {
    let (mut reader, mut writer) = socket.into_split();
    let (out, mut outgoing) = mpsc::unbounded_channel::<Option<bytes::Bytes>>();
    tokio::spawn(async move {
        while let Some(Some(bytes)) = outgoing.recv().await {
            if writer.write_all(&bytes).await.is_err() {
                return;
            }
        }
    });
    let (mut buffer, mut user) = (BytesMut::new(), String::new());
    while reader.read_buf(&mut buffer).await.is_ok_and(|got| got > 0) {
        while let Some(frame) = frame::cut(&buffer, proto::FRAME_BYTES_MAX).unwrap() {
            let (command, body, used) =
                (Command::try_from(frame.command).unwrap(), frame.body.to_vec(), frame.wire_bytes());
            buffer.advance(used);
            if !world.lock().unwrap().take(&mut user, command, &body, &out) {
                let _ = out.send(None);
                return;
            }
        }
    }
}

fn put<M: Message>(out: &Sender, command: Command, body: &M) {
    let _ = out.send(Some(frame::encode(command, body)));
}

impl World {
    /// False: close the connection.
    fn take(&mut self, user: &mut String, command: Command, body: &[u8], out: &Sender) -> bool {
        match command {
            Command::Login => {
                *user = wire::Login::decode(body).unwrap().user;
                return self.login(user, out);
            }
            Command::Ping => {
                let nonce = wire::Ping::decode(body).unwrap().nonce;
                put(out, Command::Pong, &wire::Pong { nonce });
            }
            Command::Send => return self.send(user, wire::Send::decode(body).unwrap(), out),
            Command::Sync => {
                let request = wire::Sync::decode(body).unwrap().request;
                let mine = |chat: &&String| chat.split(':').any(|name| name == user);
                let mut chats: Vec<_> = self
                    .chats
                    .keys()
                    .filter(mine)
                    .map(|chat| wire::ChatHead {
                        chat: chat.clone(),
                        history: HISTORY,
                        head: self.chats[chat].messages.len() as u64,
                        delivered: 0,
                        ..Default::default()
                    })
                    .collect();
                chats.sort_by(|one, other| one.chat.cmp(&other.chat));
                put(out, Command::SyncAck, &wire::SyncAck { request, chats, ..Default::default() });
            }
            Command::Pull => {
                let pull = wire::Pull::decode(body).unwrap();
                let log = self.chats.entry(pull.chat.clone()).or_default();
                let from = (pull.cursor as usize).min(log.messages.len());
                let to = (from + 100).min(log.messages.len());
                let answer = wire::PullAck {
                    request: pull.request,
                    chat: pull.chat,
                    history: HISTORY,
                    messages: log.messages[from..to].to_vec(),
                    has_more: to < log.messages.len(),
                    head: log.messages.len() as u64,
                    ..Default::default()
                };
                put(out, Command::PullAck, &answer);
            }
            Command::PushAck => {}
            other => panic!("a client sent {other:?}"),
        }
        true
    }

    fn login(&mut self, user: &str, out: &Sender) -> bool {
        self.logins += 1;
        if self.fault == Fault::RefuseLogins {
            let code = wire::Code::LoginRefused as i32;
            put(out, Command::Error, &wire::Error { code, closing: true, ..Default::default() });
            return false;
        }
        if self.fault == Fault::PutOffSomeLogins && self.logins <= 20 {
            let code = wire::Code::Unavailable as i32;
            let error = wire::Error { code, closing: true, retry_after_ms: 50, ..Default::default() };
            put(out, Command::Error, &error);
            return false;
        }
        if self.fault == Fault::CloseSomeLogins && self.logins > 30 {
            return false;
        }
        self.users.insert(user.to_owned(), out.clone());
        put(
            out,
            Command::LoginAck,
            &wire::LoginAck { wire: 1, heartbeat_ms: 100, unanswered_max: 32, ..Default::default() },
        );
        true
    }

    fn send(&mut self, user: &str, send: wire::Send, out: &Sender) -> bool {
        let log = self.chats.entry(send.chat.clone()).or_default();
        let answers = log.streams.entry(send.stream).or_default();
        if let Some(answer) = answers.get(send.n as usize - 1) {
            put(out, Command::SendAck, answer);
            return true;
        }
        let held =
            self.held.as_ref().is_some_and(|(_, held)| held.chat == send.chat && held.stream == send.stream);
        if !held && send.n != answers.len() as u64 + 1 {
            let error = wire::Error {
                code: wire::Code::OutOfOrder as i32,
                command: Command::Send as u32,
                stream: send.stream,
                n: send.n,
                chat: send.chat.clone(),
                expected: answers.len() as u64 + 1,
                ..Default::default()
            };
            put(out, Command::Error, &error);
            return true;
        }
        self.sends += 1;
        let fault = if self.sends == 100 { self.fault } else { Fault::Nothing };
        match fault {
            Fault::Cut => return false,
            Fault::Swap => self.held = Some((user.to_owned(), send)),
            Fault::Lose => self.answer(&send, u64::MAX / 2, out),
            Fault::Double => {
                self.append(user, &send);
                let seq = self.append(user, &send);
                self.answer(&send, seq, out);
            }
            _ => {
                let seq = self.append(user, &send);
                if held && let Some((user, first)) = self.held.take() {
                    let first_seq = self.append(&user, &first);
                    self.answer(&first, first_seq, out);
                }
                self.answer(&send, seq, out);
            }
        }
        true
    }

    fn append(&mut self, sender: &str, send: &wire::Send) -> u64 {
        let log = self.chats.entry(send.chat.clone()).or_default();
        let seq = log.messages.len() as u64 + 1;
        let message = wire::Message {
            seq,
            sender: sender.to_owned(),
            time_us: seq,
            body: send.body.clone(),
            ..Default::default()
        };
        log.messages.push(message.clone());
        let push = wire::Push {
            chat: send.chat.clone(),
            history: HISTORY,
            message: Some(message),
            ack_within_ms: 0,
        };
        for name in send.chat.split(':').filter(|name| *name != sender) {
            if let Some(out) = self.users.get(name) {
                put(out, Command::Push, &push);
            }
        }
        seq
    }

    fn answer(&mut self, send: &wire::Send, seq: u64, out: &Sender) {
        let ack = wire::SendAck {
            stream: send.stream,
            n: send.n,
            chat: send.chat.clone(),
            seq,
            time_us: seq,
            history: HISTORY,
        };
        let log = self.chats.entry(send.chat.clone()).or_default();
        log.streams.entry(send.stream).or_default().push(ack.clone());
        put(out, Command::SendAck, &ack);
    }
}

const HISTORY: u64 = 77;

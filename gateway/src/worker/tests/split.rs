//! Valid streams cut at every byte, over real sockets: what arrives in two pieces does what it does in one.

use prost::Message;
use proto::link::Bind;

use super::*;
use crate::batch::DownItem;

const BIND: Bind = Bind { user: 7, device: 8, binding: 9, valid_ms: 0 };

/// Commands and bodies.
type Frames = Vec<(u8, Vec<u8>)>;

/// What a connection's stream came to.
#[derive(Debug, PartialEq)]
struct Outcome {
    up: Frames,
    back: Vec<u8>,
}

impl Rig {
    /// Writes, and turns until all of it is read.
    fn feed(&mut self, client: &mut TcpStream, bytes: &[u8]) {
        let upto = self.worker.stats().bytes_in.get() + bytes.len() as u64;
        client.write_all(bytes).unwrap();
        self.turn_until(|rig| rig.worker.stats().bytes_in.get() == upto && rig.worker.dirty.is_empty());
    }

    /// Frames that have gone up, and the connection and login of the first.
    fn went_up(&mut self) -> (Frames, Option<(u64, u64)>) {
        let (mut frames, mut who) = (Vec::new(), None);
        for mut batch in self.up.try_iter() {
            for frame in &batch.frames {
                who = who.or(Some((frame.connection, frame.binding)));
                frames.push((frame.command, batch.bodies.split_to(frame.body_bytes as usize).to_vec()));
            }
        }
        (frames, who)
    }

    /// A client whose Login and whose frames behind it come in two pieces each.
    fn converse(&mut self, login_at: usize, stream: &[u8], at: usize, back_bytes: usize) -> Outcome {
        let mut client = self.connect();
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let login = login();
        self.feed(&mut client, &login[..login_at]);
        self.feed(&mut client, &login[login_at..]);
        let (mut up, who) = self.went_up();
        let (connection, login) = who.expect("the Login");
        let frames = frame::encode(Command::LoginAck, &wire::LoginAck::default());
        let bind = Some(BIND);
        let user = BIND.user;
        self.worker.deliver(DownItem { connection, user, frames, bind, login, ..DownItem::default() });
        self.worker.flush();
        self.feed(&mut client, &stream[..at]);
        self.feed(&mut client, &stream[at..]);
        up.extend(self.went_up().0);
        let mut back = vec![0; back_bytes];
        client.read_exact(&mut back).unwrap();
        assert_eq!(self.burst.clients_bytes(), 0);
        drop(client);
        self.turn_until(|rig| rig.worker.table.count() == 0 && !rig.up.is_empty());
        up.extend(self.went_up().0);
        Outcome { up, back }
    }
}

fn frames() -> Vec<u8> {
    let chat = || "alice:bob".to_owned();
    [
        frame::encode(Command::Ping, &wire::Ping { nonce: 300 }),
        frame::encode(Command::PushAck, &wire::PushAck { chat: chat(), history: 3, seq: 4 }),
        frame::encode(Command::Pull, &wire::Pull { request: 1, chat: chat(), ..Default::default() }),
        frame::encode(Command::Ping, &wire::Ping { nonce: 0 }),
        frame::encode(
            Command::Send,
            &wire::Send {
                stream: 5,
                n: 1,
                chat: chat(),
                body: bytes::Bytes::from_static(b"hello"),
                ..Default::default()
            },
        ),
    ]
    .concat()
}

#[test]
fn a_stream_cut_at_any_byte_does_the_same() {
    let mut rig = Rig::new(1 << 20);
    let stream = frames();
    let back = [
        frame::encode(Command::LoginAck, &wire::LoginAck::default()),
        frame::encode(Command::Pong, &wire::Pong { nonce: 300 }),
        frame::encode(Command::Pong, &wire::Pong { nonce: 0 }),
    ]
    .concat();
    let whole = rig.converse(0, &stream, 0, back.len());
    assert_eq!(whole.back, back);
    let commands: Vec<u8> = whole.up.iter().map(|(command, _)| *command).collect();
    let sent = [Command::Login, Command::PushAck, Command::Pull, Command::Send].map(|command| command as u8);
    assert_eq!(commands, [&sent[..], &[0]].concat(), "in order, and its end");
    assert_eq!(wire::Send::decode(&*whole.up[3].1).unwrap().body, "hello");
    for at in 1..login().len() {
        assert_eq!(rig.converse(at, &stream, 0, back.len()), whole, "the Login is cut at {at}");
    }
    for at in 1..stream.len() {
        assert_eq!(rig.converse(0, &stream, at, back.len()), whole, "cut at {at}");
    }
}

#[test]
fn a_stream_that_ends_badly_does_so_wherever_it_is_cut() {
    let mut rig = Rig::new(1 << 20);
    let hello = frame::encode(Command::Ping, &wire::Ping { nonce: 1 });
    for (bad, code) in [
        (&[0xff, 0xff, 0xff, Command::Send as u8][..], Code::FrameTooLarge),
        (&[0, 0, 0, 255], Code::UnknownCommand),
        (&[0, 0, 2, Command::Ping as u8, 8, 0x80], Code::BadBody),
        (&login(), Code::AlreadyLoggedIn),
    ] {
        // What stands behind the end is never looked at.
        let stream = [&hello, bad, &hello].concat();
        let told = [
            frame::encode(Command::LoginAck, &wire::LoginAck::default()),
            frame::encode(Command::Pong, &wire::Pong { nonce: 1 }),
            frame::encode(Command::Error, &wire::Error { closing: true, ..crate::receive::refusal(code) }),
        ]
        .concat();
        let whole = rig.converse(0, &stream, 0, told.len());
        assert_eq!(whole.back, told, "{code:?}");
        for at in 1..stream.len() {
            assert_eq!(rig.converse(0, &stream, at, told.len()), whole, "{code:?}, cut at {at}");
        }
    }
}

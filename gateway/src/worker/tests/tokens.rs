//! Logins that end by themselves, ends that come before their login's answer, and guesses.

use super::*;
use crate::connection::Stage;
use crate::id;

const USER: u64 = 7;

fn until(rig: &mut Rig, is_so: impl Fn(&Rig) -> bool) {
    rig.turn_until(|rig| is_so(rig));
}

impl Rig {
    /// A client whose Login is up: connection and number of the login.
    fn logging_in(&mut self) -> (TcpStream, u64, u64) {
        let mut client = self.connect();
        client.write_all(&login()).unwrap();
        loop {
            until(self, |rig| !rig.up.is_empty());
            // Others may be leaving meanwhile.
            let mut frames = self.up.try_iter().flat_map(|batch| batch.frames);
            if let Some(frame) = frames.find(|frame| frame.command == Command::Login as u8) {
                return (client, frame.connection, frame.binding);
            }
        }
    }

    fn log_in(&mut self, connection: u64, login: u64, valid_ms: u64) {
        let bind = Some(proto::link::Bind { user: USER, device: 1, binding: 1, valid_ms });
        let frames = frame::encode(Command::LoginAck, &wire::LoginAck::default());
        self.worker.deliver(DownItem { connection, frames, bind, login, ..DownItem::default() });
    }

    /// What the client has got when its connection has ended.
    fn end(&mut self, mut client: TcpStream) -> Vec<u8> {
        client.set_nonblocking(true).unwrap();
        let (begin, mut got, mut buffer) = (Instant::now(), Vec::new(), [0; 4096]);
        loop {
            match client.read(&mut buffer) {
                Ok(0) => return got,
                Ok(count) => got.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.step(),
                Err(error) => panic!("{error}"),
            }
            assert!(begin.elapsed() < Duration::from_secs(30), "it does not end: {got:?}");
        }
    }
}

fn frames(bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let (mut rest, mut all) = (bytes, Vec::new());
    while let Some(cut) = frame::cut(rest, proto::FRAME_BYTES_MAX).unwrap() {
        all.push((cut.command, cut.body.to_vec()));
        rest = &rest[cut.wire_bytes()..];
    }
    all
}

fn error(frame: &(u8, Vec<u8>)) -> wire::Error {
    assert_eq!(frame.0, Command::Error as u8);
    wire::Error::decode(&frame.1[..]).unwrap()
}

#[test]
fn a_login_is_good_for_as_long_as_it_was_told_and_no_longer() {
    let mut rig = Rig::new(1 << 20);
    let (client, connection, login) = rig.logging_in();
    let (_other, other, other_login) = rig.logging_in();
    rig.log_in(connection, login, 3_600_000);
    rig.log_in(other, other_login, 0);
    rig.step();
    // An hour in which the process stood still counts too.
    rig.worker.born -= Duration::from_secs(3_602);
    until(&mut rig, |rig| rig.worker.stats().closed_for(Why::Code(Code::TokenExpired)) == 1);
    let told = frames(&rig.end(client));
    let error = error(&told[1]);
    assert_eq!((told.len(), told[0].0), (2, Command::LoginAck as u8));
    assert_eq!((error.code(), error.closing, error.command), (Code::TokenExpired, true, 0));
    assert!(rig.worker.table.get_mut(id::place(other)).is_some(), "who has no token has no end");
}

#[test]
fn an_end_that_overtakes_the_answer_to_a_login_is_kept_for_it() {
    let end = |connection, user| {
        let frames =
            frame::encode(Command::Kick, &wire::Kick { code: Code::TokenRevoked as i32, text: "".into() });
        DownItem { connection, user, frames, close: true, ..DownItem::default() }
    };
    let mut rig = Rig::new(1 << 20);
    let (client, connection, login) = rig.logging_in();
    rig.worker.deliver(end(connection, USER));
    rig.step();
    rig.log_in(connection, login, 0);
    let told: Vec<u8> = frames(&rig.end(client)).into_iter().map(|frame| frame.0).collect();
    assert_eq!(told, [Command::LoginAck as u8, Command::Kick as u8]);
    // For another user it is not meant.
    let (_client, connection, login) = rig.logging_in();
    rig.worker.deliver(end(connection, USER + 1));
    rig.log_in(connection, login, 0);
    rig.step();
    assert_eq!(rig.worker.table.get_mut(id::place(connection)).unwrap().stage, Stage::Bound);
}

/// A store that did not answer may have bound a refused login all the same.
#[test]
fn the_end_of_a_refused_login_that_may_be_bound_is_told() {
    let refusal = |connection, login| {
        let error = wire::Error { code: Code::Unavailable as i32, closing: true, ..Default::default() };
        let bind = Some(proto::link::Bind { user: USER, device: 1, binding: 1, valid_ms: 0 });
        let frames = frame::encode(Command::Error, &error);
        DownItem { connection, frames, bind, login, close: true, ..DownItem::default() }
    };
    let mut rig = Rig::new(1 << 20);
    let (client, connection, login) = rig.logging_in();
    rig.worker.deliver(refusal(connection, login));
    let told = frames(&rig.end(client));
    assert_eq!((told.len(), error(&told[0]).code()), (1, Code::Unavailable));
    rig.turn_until(|rig| rig.worker.table.count() == 0 && !rig.up.is_empty());
    let up: Vec<_> = rig.up.try_iter().flat_map(|batch| batch.frames).collect();
    assert_eq!(
        up.iter().map(|up| (up.command, up.connection, up.user)).collect::<Vec<_>>(),
        [(0, connection, USER)]
    );
    assert_eq!(rig.worker.stats().bound.get(), 0);
    // Who is gone already is told of as gone.
    rig.worker.deliver(refusal(connection, login));
    let gone = std::mem::take(&mut rig.worker.batch.gone);
    assert_eq!(
        gone.iter().map(|gone| (gone.connection, gone.user, gone.pushed)).collect::<Vec<_>>(),
        [(connection, USER, false)]
    );
    // And it ends nobody whom another server has let in by the same login.
    let (_client, connection, login) = rig.logging_in();
    rig.log_in(connection, login, 0);
    rig.worker.deliver(refusal(connection, login));
    rig.step();
    assert_eq!(rig.worker.table.get_mut(id::place(connection)).unwrap().stage, Stage::Bound);
    assert!(rig.worker.batch.gone.is_empty());
}

#[test]
fn guesses_of_an_address_are_counted_and_then_it_waits() {
    let limits = Limits { refused_logins_per_address_max: 3, ..Limits::default() };
    let mut rig = Rig::with(Config { limits, ..Config::default() }, 1 << 20);
    let refuse = |rig: &mut Rig, guess| {
        let (client, connection, login) = rig.logging_in();
        let error = wire::Error { code: Code::LoginRefused as i32, closing: true, ..Default::default() };
        let frames = frame::encode(Command::Error, &error);
        rig.worker.deliver(DownItem { connection, frames, login, close: true, guess, ..DownItem::default() });
        rig.end(client);
    };
    (0..9).for_each(|_| refuse(&mut rig, false));
    (0..2).for_each(|_| refuse(&mut rig, true));
    // One who does not wait for the answer.
    let (client, connection, login_number) = rig.logging_in();
    drop(client);
    rig.turn_until(|rig| rig.worker.table.count() == 0);
    rig.worker.deliver(DownItem {
        connection,
        login: login_number,
        close: true,
        guess: true,
        ..DownItem::default()
    });
    rig.up.try_iter().for_each(drop);
    let mut client = rig.connect();
    client.write_all(&login()).unwrap();
    let told = frames(&rig.end(client));
    let error = error(&told[0]);
    assert_eq!(
        (error.code(), error.closing, error.command),
        (Code::RateLimited, true, Command::Login as u32)
    );
    assert!((1..=60_000).contains(&error.retry_after_ms), "{error:?}");
    assert!(rig.up.is_empty(), "nothing of it goes up");
}

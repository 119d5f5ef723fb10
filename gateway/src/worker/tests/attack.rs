//! Hostile clients, over real sockets: what each sends, which code closes it (`wire.md`, sections 4 and 12), what it costs
//! meanwhile, and that whoever stands beside it feels nothing.
//!
//! Trap: what a state server would answer is not here; what passes on to it counts as let through.

use std::io::ErrorKind;
use std::net::IpAddr;

use super::*;
use crate::config::Limits;
use crate::connection::Stage;

impl Rig {
    fn with_limits(limits: Limits) -> Rig {
        Rig::with(Config { limits, ..Config::default() }, 1 << 20)
    }

    /// Makes turns until this client has been told something, and returns what: the one frame before the end.
    fn told(&mut self, client: &mut TcpStream) -> wire::Error {
        client.set_nonblocking(true).unwrap();
        let (mut bytes, begin) = (Vec::new(), Instant::now());
        loop {
            assert!(begin.elapsed() < Duration::from_secs(60), "nothing is said");
            self.step();
            let mut buffer = [0; 1024];
            match client.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        let cut = frame::cut(&bytes, 4096).unwrap().expect("a whole frame");
        assert_eq!(
            (cut.command, cut.wire_bytes()),
            (Command::Error as u8, bytes.len()),
            "one Error, then the end"
        );
        let error = wire::Error::decode(cut.body).unwrap();
        assert!(error.closing);
        error
    }

    fn send(&mut self, client: &mut TcpStream, bytes: &[u8]) {
        let upto = self.worker.stats().bytes_in.get() + bytes.len() as u64;
        client.write_all(bytes).unwrap();
        self.turn_until(|rig| rig.worker.stats().bytes_in.get() >= upto);
    }

    /// It has gone, and nothing of it is left.
    fn assert_empty(&mut self) {
        self.turn_until(|rig| rig.worker.table.count() == 0);
        assert_eq!((self.burst.clients_bytes(), self.worker.queues.count()), (0, 0));
        assert_eq!(self.worker.shared.admission.connections(), 0);
    }
}

fn header(body_bytes: usize, command: u8) -> [u8; 4] {
    let [_, a, b, c] = (body_bytes as u32).to_be_bytes();
    [a, b, c, command]
}

/// The stages in which a client can be heard.
const STAGES: [Stage; 3] = [Stage::Fresh, Stage::LoggingIn, Stage::Bound];

fn client_at(rig: &mut Rig, stage: Stage) -> TcpStream {
    match stage {
        Stage::Bound => rig.bound(7).0,
        _ => {
            let mut client = rig.connect();
            if stage == Stage::LoggingIn {
                rig.send(&mut client, &login());
                rig.up.try_iter().for_each(drop);
            }
            client
        }
    }
}

#[test]
fn every_command_in_every_stage_gets_the_code_that_the_protocol_names() {
    let mut rig = Rig::new(1 << 20);
    let from_clients = [
        Command::Login,
        Command::Ping,
        Command::Send,
        Command::Sync,
        Command::Pull,
        Command::PushAck,
        Command::Members,
        Command::Read,
        Command::Watch,
        Command::Typing,
        Command::Settings,
    ];
    for stage in STAGES {
        for byte in 0..=255u8 {
            let mut client = client_at(&mut rig, stage);
            rig.up.try_iter().for_each(drop);
            rig.send(&mut client, &header(0, byte));
            let known = from_clients.into_iter().find(|command| *command as u8 == byte);
            let expected = match (stage, known) {
                (_, None) => Code::UnknownCommand,
                (Stage::Fresh, Some(Command::Login)) => continue,
                (_, Some(Command::Login)) => Code::AlreadyLoggedIn,
                (Stage::Bound, Some(_)) => continue,
                (_, Some(_)) => Code::NotLoggedIn,
            };
            assert_eq!(rig.told(&mut client).code(), expected, "command {byte} in {stage:?}");
            assert!(rig.up.try_iter().all(|batch| batch.frames.iter().all(|frame| frame.command == 0)));
        }
        rig.worker.batch = UpBatch::default();
    }
    rig.assert_empty();
}

#[test]
fn a_length_beyond_the_limit_closes_at_the_header_and_costs_no_memory() {
    let mut rig = Rig::new(1 << 20);
    for stage in STAGES {
        let limit = if stage == Stage::Bound { proto::FRAME_BYTES_MAX } else { proto::LOGIN_FRAME_BYTES_MAX };
        for body_bytes in [limit - 3, limit, 65_533, 65_536, 1 << 20, 0x7f_ffff, 0x80_0000, 0xff_ffff] {
            for command in [0, Command::Login as u8, Command::Send as u8, 255] {
                let mut client = client_at(&mut rig, stage);
                rig.send(&mut client, &header(body_bytes, command));
                assert_eq!(rig.burst.clients_bytes(), 0, "{body_bytes} in {stage:?}");
                assert_eq!(rig.told(&mut client).code(), Code::FrameTooLarge, "{body_bytes} in {stage:?}");
            }
        }
        // The longest that is allowed is waited for, with room for what has come and no more.
        let mut client = client_at(&mut rig, stage);
        rig.send(&mut client, &header(limit - 4, Command::Login as u8));
        assert!((4..256).contains(&rig.burst.clients_bytes()), "{}", rig.burst.clients_bytes());
        assert_eq!(rig.worker.stats().closed_for(Why::Code(Code::FrameTooLarge)) % 32, 0);
        drop(client);
        rig.turn_until(|rig| rig.burst.clients_bytes() == 0);
    }
    rig.assert_empty();
}

#[test]
fn all_lengths_that_three_bytes_can_say_are_judged_by_the_header_alone() {
    for limit in [proto::LOGIN_FRAME_BYTES_MAX, proto::FRAME_BYTES_MAX] {
        for body_bytes in 0..1usize << 24 {
            let header = header(body_bytes, 5);
            let is_right = match frame::cut(&header, limit) {
                Ok(Some(frame)) => body_bytes == 0 && frame.wire_bytes() == 4,
                Ok(None) => body_bytes > 0 && body_bytes + 4 <= limit,
                Err(_) => body_bytes + 4 > limit,
            };
            assert!(is_right, "{body_bytes} under {limit}");
        }
    }
}

#[test]
fn a_login_that_drips_is_closed_at_the_deadline_and_one_that_arrives_in_time_is_not() {
    let mut rig = Rig::new(1 << 20);
    let bytes = login();
    let (mut dripping, mut silent, mut late) = (rig.connect(), rig.connect(), rig.connect());
    rig.turn_until(|rig| rig.worker.table.count() == 3);
    // A byte a second, as long as nobody stops it: the deadline is that of the whole frame.
    let drip = header(4000, Command::Login as u8).into_iter().chain([0; 100]);
    for byte in drip.take(9) {
        rig.send(&mut dripping, &[byte]);
        rig.pass(1_000);
    }
    rig.send(&mut late, &bytes);
    assert_eq!(rig.up.try_iter().flat_map(|batch| batch.frames).count(), 1);
    assert_eq!(rig.worker.stats().closed_for(Why::Code(Code::LoginTimeout)), 0);
    rig.send(&mut dripping, &[0]);
    rig.pass(1_000);
    for client in [&mut dripping, &mut silent] {
        assert_eq!(rig.told(client).code(), Code::LoginTimeout);
    }
    assert_eq!(rig.worker.stats().closed_for(Why::Code(Code::LoginTimeout)), 2);
    drop((dripping, silent));
    rig.turn_until(|rig| rig.worker.table.count() == 1);
    assert_eq!(rig.burst.clients_bytes(), 0);
    // Whoever is logged in may take its time over a frame, as long as something comes.
    let (mut client, _) = rig.bound(7);
    drop(late);
    for byte in header(4000, Command::Send as u8).into_iter().chain([0; 20]) {
        rig.send(&mut client, &[byte]);
        rig.pass(60_000);
    }
    assert_eq!(rig.worker.stats().closed_for(Why::Code(Code::Idle)), 0);
    drop(client);
    rig.assert_empty();
}

#[test]
fn a_crowd_that_drips_stays_within_its_budget_and_others_get_in() {
    let mut rig = Rig::with(Config::default(), 64 * 1024);
    let mut crowd: Vec<TcpStream> = (0..300).map(|_| rig.connect()).collect();
    rig.turn_until(|rig| rig.worker.table.count() == 300);
    for client in &mut crowd {
        // Refused ones may be closed already.
        let _ = client.write_all(&[&header(4000, Command::Login as u8)[..], &[0; 400]].concat());
    }
    rig.turn_until(|rig| rig.worker.stats().burst_refused.get() > 0 && rig.worker.dirty.is_empty());
    assert!(rig.burst.clients_bytes() <= 64 * 1024);
    let (mut client, _) = rig.bound(7);
    rig.send(&mut client, &frame::encode(Command::Send, &wire::Send::default()));
    assert_eq!(rig.up.try_iter().flat_map(|batch| batch.frames).count(), 1);
    drop((client, crowd));
    rig.assert_empty();
}

#[test]
fn a_flood_from_one_address_is_capped_and_other_addresses_get_in() {
    let limits = Limits { connections_per_address_max: 5, ..Limits::default() };
    let mut rig = Rig::with_limits(limits);
    let target = rig.worker.address().unwrap();
    let from = |last: u8| sys::connect(Some(IpAddr::from([127, 0, 7, last])), target, false).unwrap();
    let flood: Vec<Fd> = (0..200).map(|_| from(1)).collect();
    rig.turn_until(|rig| rig.worker.stats().accepted.get() == 200);
    assert_eq!(rig.worker.table.count(), 5);
    assert_eq!(rig.worker.stats().closed_for(Why::Code(Code::TooManyConnections)), 195);
    // Two of these might share the flooder's counter, by chance; not all.
    let others: Vec<Fd> = (2..12).map(from).collect();
    rig.turn_until(|rig| rig.worker.stats().accepted.get() == 210);
    assert!(rig.worker.table.count() >= 5 + 8, "{}", rig.worker.table.count());
    // Whoever was turned away was told why.
    let told = flood.iter().filter(|fd| {
        let mut buffer = Vec::with_capacity(256);
        let Ok(_) = sys::read(*fd, &mut buffer) else { return false };
        let cut = frame::cut(&buffer, 4096).unwrap().unwrap();
        wire::Error::decode(cut.body).unwrap().code() == Code::TooManyConnections
    });
    assert_eq!(told.count(), 195);
    // When the flood is over, its address is one like any other.
    drop(flood);
    rig.turn_until(|rig| rig.worker.table.count() <= 10);
    let back = from(1);
    rig.turn_until(|rig| rig.worker.stats().accepted.get() == 211);
    assert_eq!(rig.worker.stats().closed_for(Why::Code(Code::TooManyConnections)) / 5, 195 / 5);
    drop((back, others));
    rig.assert_empty();
}

#[test]
fn whoever_vanishes_without_a_word_is_gone_within_the_idle_limit() {
    let mut rig = Rig::new(1 << 20);
    let limits = Limits::default();
    let (mut client, _) = rig.bound(7);
    let (beating, _) = rig.bound(8);
    let mut beating = beating;
    // The middle of a second, which is where a tick is least exact.
    rig.pass(500);
    rig.send(&mut client, &frame::encode(Command::PushAck, &wire::PushAck::default()));
    let spent_ms = 88_000;
    for _ in 0..spent_ms / 22_000 {
        rig.pass(22_000);
        rig.send(&mut beating, &frame::encode(Command::Ping, &wire::Ping::default()));
    }
    assert_eq!(rig.worker.table.count(), 2);
    rig.pass(limits.idle_ms_max - spent_ms);
    // It reads nothing, closes nothing, answers nothing; its place, its fd and its counters are free at once.
    rig.step();
    assert_eq!((rig.worker.table.count(), rig.worker.shared.admission.connections()), (1, 1));
    assert_eq!(rig.worker.stats().closed_for(Why::Code(Code::Idle)), 1);
    assert_eq!(rig.told(&mut client).code(), Code::Idle, "if it is there after all, it learns why");
    drop(beating);
    rig.assert_empty();
}

#[test]
fn the_kernel_gives_up_on_clients_that_do_not_acknowledge() {
    for (set_ms, expected) in [(60_000, Duration::from_secs(60)), (0, Duration::ZERO)] {
        let mut rig = Rig::with_limits(Limits { unacknowledged_ms_max: set_ms, ..Limits::default() });
        let (_client, connection) = rig.bound(7);
        let fd = &rig.worker.table.get_mut(id::place(connection)).unwrap().fd;
        assert_eq!(sys::user_timeout(fd).unwrap(), expected, "inherited from the listener");
    }
}

#[test]
fn a_worker_whose_batch_finds_no_charge_waits_without_spinning_and_loses_nothing() {
    let mut rig = Rig::new(1 << 20);
    let (mut one, mut two) = (rig.connect(), rig.connect());
    rig.turn_until(|rig| rig.worker.table.count() == 2);
    let taken = rig.burst.batch(2 << 20).expect("alone, any size passes");
    one.write_all(&login()).unwrap();
    rig.turn_until(|rig| rig.worker.held_back);
    // More comes, which keeps the sockets ready; nothing of it is read.
    two.write_all(&login()).unwrap();
    let (began, turns, cpu_before) = (Instant::now(), 100, sys::thread_cpu_time());
    for _ in 0..turns {
        assert!(rig.worker.turn(&mut rig.events).unwrap());
        assert!(rig.worker.held_back && rig.up.is_empty());
    }
    // A millisecond each, whatever is ready.
    assert!(began.elapsed() > UP_WAIT * turns / 2, "{:?}", began.elapsed());
    assert!(sys::thread_cpu_time() - cpu_before < began.elapsed() / 2);
    assert!(rig.worker.stats().up_full.get() >= u64::from(turns));
    assert_eq!(rig.worker.batch.frames.len(), 1);
    drop(taken);
    rig.turn_until(|rig| rig.up.len() == 2);
    assert_eq!(rig.up.try_iter().flat_map(|batch| batch.frames).count(), 2);
    assert_eq!(rig.burst.batches_bytes(), 0);
}

/// Four bytes each: thirty thousand of them in one client's socket.
#[test]
fn small_frames_count_with_what_they_take() {
    let config = Config { limits: Limits::default(), ..Config::default() };
    let read_max = config.workers.read_bytes_per_turn_max;
    let mut rig = Rig::with(config, 1 << 20);
    let mut clients: Vec<TcpStream> = (1..=8).map(|user| rig.bound(user).0).collect();
    let flood = header(0, Command::Send as u8).repeat(30_000);
    for client in &mut clients {
        client.set_nonblocking(true).unwrap();
        let _ = client.write(&flood).unwrap();
    }
    let most = read_max / FRAME_OVERHEAD_BYTES + crate::receive::FIRST_READ_BYTES / frame::HEADER_BYTES;
    let mut taken = 0;
    for _ in 0..20 {
        rig.step();
        let frames: usize = rig.up.try_iter().map(|batch| batch.frames.len()).sum();
        assert!(frames <= most, "{frames} frames in a turn");
        taken += frames;
    }
    assert!(taken > most, "it goes on: {taken}");
}

#[test]
fn the_pongs_of_one_read_leave_in_one_piece() {
    let mut rig = Rig::new(1 << 20);
    let (mut client, _) = rig.bound(1);
    let frames_before = rig.worker.stats().frames_in.get();
    client.write_all(&header(0, Command::Ping as u8).repeat(1_000)).unwrap();
    rig.turn_until(|rig| rig.worker.stats().frames_in.get() == frames_before + 1_000);
    rig.turn_until(|rig| rig.worker.queues.count() == 0);
    let mut pongs = vec![0; 4_000];
    client.read_exact(&mut pongs).unwrap();
    assert_eq!(pongs, header(0, Command::Pong as u8).repeat(1_000));
}

/// Stopped while it was at work, and not while it waited.
#[test]
fn a_pause_in_the_middle_of_a_turn_is_held_against_nobody() {
    let mut rig = Rig::new(1 << 20);
    let (_client, _) = rig.bound(1);
    rig.step();
    let paused = Duration::from_millis(2 * Limits::default().idle_ms_max);
    let before_ms = rig.worker.now_ms;
    rig.worker.started -= paused;
    rig.worker.turn_at -= paused;
    (0..5).for_each(|_| rig.step());
    assert_eq!(rig.worker.table.count(), 1);
    assert!(rig.worker.now_ms < before_ms + paused.as_millis() as u64 / 2);
}

#[test]
fn those_who_fall_silent_together_are_closed_few_at_a_time() {
    let mut config = Config::default();
    config.workers.writes_per_turn_max = 2;
    let mut rig = Rig::with(config, 1 << 20);
    let clients: Vec<TcpStream> = (1..=7).map(|user| rig.bound(user).0).collect();
    rig.pass(Limits::default().idle_ms_max + 2_000);
    for left in [5, 3, 1, 0] {
        rig.step();
        assert_eq!(rig.worker.table.count(), left);
    }
    drop(clients);
}

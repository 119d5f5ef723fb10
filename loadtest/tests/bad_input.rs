//! What bad input gets: a typed Error as `wire.md` lists, a counter, and nothing lost for others. Raw sockets against
//! real processes.

mod raw;

use std::io::Write;
use std::time::Duration;

use loadtest::supervisor::{Cluster, ClusterOptions, http_get};
use proto::Command;
use proto::command::ServerFrame;
use proto::wire::{self, Code};
use raw::Raw;

/// Longest that anything here may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);

fn cluster(gateway_sets: &[&str]) -> Cluster {
    let gateway_sets = gateway_sets.iter().map(|set| (*set).to_owned()).collect();
    Cluster::start(ClusterOptions { gateway_sets, ..ClusterOptions::default() }).unwrap()
}

fn login(user: &str) -> wire::Login {
    wire::Login {
        wire_min: 1,
        wire_max: 1,
        user: user.into(),
        device: "raw".into(),
        attempt: 1,
        token: String::new(),
        agent: "test".into(),
    }
}

fn counter(cluster: &Cluster, line: &str) -> f64 {
    let text = http_get(cluster.gateways[0].admin, "/metrics", PATIENCE).unwrap().body;
    let found =
        text.lines().find_map(|l| l.strip_prefix(line)).unwrap_or_else(|| panic!("{line} in\n{text}"));
    found.trim().parse().unwrap()
}

/// Each of these is answered with its code on a connection of its own, and ends it.
#[test]
fn what_ends_a_connection_says_why() {
    let cluster = cluster(&[]);
    let open = || Raw::connect(cluster.gateways[0].client);
    let too_long =
        |bytes: usize, command: Command| [&(bytes as u32).to_be_bytes()[1..], &[command as u8]].concat();
    let before_login: [(&str, Vec<u8>, Code); 12] = [
        ("a long frame before login", too_long(4093, Command::Login), Code::FrameTooLarge),
        ("the longest header", vec![0xff, 0xff, 0xff, 1], Code::FrameTooLarge),
        ("command 0", vec![0, 0, 0, 0], Code::UnknownCommand),
        ("command 255", vec![0, 0, 0, 255], Code::UnknownCommand),
        (
            "a server's command",
            raw::frame(Command::LoginAck, &wire::LoginAck::default()),
            Code::UnknownCommand,
        ),
        ("a ping before login", raw::frame(Command::Ping, &wire::Ping::default()), Code::NotLoggedIn),
        ("a send before login", raw::frame(Command::Send, &wire::Send::default()), Code::NotLoggedIn),
        ("garbage as login", vec![0, 0, 3, 1, 0xff, 0xff, 0xff], Code::BadBody),
        (
            "no common version",
            raw::frame(Command::Login, &wire::Login { wire_min: 2, wire_max: 9, ..login("v") }),
            Code::UnsupportedVersion,
        ),
        ("a bad name", raw::frame(Command::Login, &login("a:b")), Code::BadName),
        (
            "a token",
            raw::frame(Command::Login, &wire::Login { token: "t".into(), ..login("t") }),
            Code::LoginRefused,
        ),
        (
            "attempt 0",
            raw::frame(Command::Login, &wire::Login { attempt: 0, ..login("t") }),
            Code::BadRequest,
        ),
    ];
    for (what, bytes, code) in before_login {
        let mut raw = open();
        raw.write_all(&bytes).unwrap();
        let error = raw.error();
        assert_eq!((error.code(), error.closing), (code, true), "{what}: {error:?}");
        assert!(raw.is_closed(), "{what}");
    }
    let after_login: [(&str, Vec<u8>, Code); 5] = [
        ("a second login", raw::frame(Command::Login, &login("again")), Code::AlreadyLoggedIn),
        ("a long frame", too_long(65_533, Command::Send), Code::FrameTooLarge),
        ("command 25", vec![0, 0, 0, 25], Code::UnknownCommand),
        ("garbage as send", vec![0, 0, 3, Command::Send as u8, 0xff, 0xff, 0xff], Code::BadBody),
        ("garbage as ping", vec![0, 0, 3, Command::Ping as u8, 0xff, 0xff, 0xff], Code::BadBody),
    ];
    for (at, (what, bytes, code)) in after_login.into_iter().enumerate() {
        let mut raw = open();
        raw.login(&login(&format!("after{at}")));
        raw.write_all(&bytes).unwrap();
        let error = raw.error();
        assert_eq!((error.code(), error.closing), (code, true), "{what}: {error:?}");
        assert!(raw.is_closed(), "{what}");
    }
    for (reason, count) in [
        ("frame_too_large", 3.0),
        ("unknown_command", 4.0),
        ("not_logged_in", 2.0),
        ("already_logged_in", 1.0),
    ] {
        assert_eq!(
            counter(&cluster, &format!("rookery_gateway_closed_total{{reason=\"{reason}\"}}")),
            count,
            "{reason}"
        );
    }
}

/// Requests that cannot be done are refused on a connection that lives on.
#[test]
fn what_is_refused_leaves_the_connection() {
    let cluster = cluster(&[]);
    let mut raw = Raw::connect(cluster.gateways[0].client);
    raw.login(&login("ann"));
    let send = |n: u64, chat: &str, body: Vec<u8>| wire::Send {
        stream: 7,
        n,
        chat: chat.into(),
        body: body.into(),
        ..Default::default()
    };
    let long = vec![b'x'; proto::MESSAGE_BYTES_MAX + 1];
    for (what, send, code, expected) in [
        ("no chat", send(1, "ann", vec![1]), Code::BadChat, 0),
        ("a bad name in a chat", send(1, "ann:", vec![1]), Code::BadChat, 0),
        ("others' chat", send(1, "bob:eve", vec![1]), Code::NotAMember, 0),
        ("a group", send(1, "#5", vec![1]), Code::NotAMember, 0),
        ("not the first", send(2, "ann:bob", vec![1]), Code::OutOfOrder, 1),
        ("n = 0", send(0, "ann:bob", vec![1]), Code::BadRequest, 0),
        ("a long body", send(1, "ann:bob", long.clone()), Code::MessageTooLarge, 0),
        ("its id again", send(1, "ann:bob", vec![1]), Code::MessageTooLarge, 0),
    ] {
        raw.send(Command::Send, &send);
        let error = raw.error();
        assert_eq!(
            (error.code(), error.expected, error.closing),
            (code, expected, false),
            "{what}: {error:?}"
        );
        assert_eq!((error.stream, error.n, &error.chat), (7, send.n, &send.chat), "{what}");
    }
    raw.send(Command::Send, &send(2, "bob:ann", vec![b'y'; proto::MESSAGE_BYTES_MAX]));
    let ServerFrame::SendAck(ack) = raw.next() else { panic!() };
    assert_eq!((ack.seq, ack.n, ack.chat.as_str()), (1, 2, "ann:bob"));
    for (what, pull, code) in [
        ("others' chat", wire::Pull { chat: "bob:eve".into(), ..Default::default() }, Code::NotAMember),
        ("a group", wire::Pull { chat: "#5".into(), ..Default::default() }, Code::NotAMember),
        ("no chat", wire::Pull::default(), Code::BadChat),
        (
            "too many",
            wire::Pull { chat: "ann:bob".into(), limit: 101, ..Default::default() },
            Code::BadRequest,
        ),
    ] {
        raw.send(Command::Pull, &wire::Pull { request: 9, ..pull });
        let error = raw.error();
        assert_eq!((error.code(), error.request, error.closing), (code, 9, false), "{what}: {error:?}");
    }
    raw.send(
        Command::Sync,
        &wire::Sync { request: 3, after: "b".into(), until: "a".into(), ..Default::default() },
    );
    assert_eq!((raw.error().code(), 3), (Code::BadRequest, 3));
    raw.send(Command::PushAck, &wire::PushAck { chat: "bob:eve".into(), history: 1, seq: 1 });
    raw.send(Command::Ping, &wire::Ping { nonce: 77 });
    assert_eq!(raw.next(), ServerFrame::Pong(wire::Pong { nonce: 77 }), "a PushAck has no answer");
}

/// Pulls are cut to what a frame holds, and go on where they ended.
#[test]
fn a_pull_never_exceeds_a_frame() {
    let cluster = cluster(&[]);
    let mut raw = Raw::connect(cluster.gateways[0].client);
    raw.login(&login("ann"));
    for n in 1..=5 {
        let body = vec![n as u8; proto::MESSAGE_BYTES_MAX].into();
        raw.send(
            Command::Send,
            &wire::Send { stream: 7, n, chat: "ann:ann".into(), body, ..Default::default() },
        );
        assert!(matches!(raw.next(), ServerFrame::SendAck(_)));
    }
    let (mut cursor, mut seqs) = (0, Vec::new());
    loop {
        raw.send(Command::Pull, &wire::Pull { chat: "ann:ann".into(), cursor, ..Default::default() });
        let ServerFrame::PullAck(ack) = raw.next() else { panic!() };
        seqs.extend(ack.messages.iter().map(|message| message.seq));
        cursor = *seqs.last().unwrap();
        assert_eq!((ack.head, ack.messages.len()), (5, 1));
        if !ack.has_more {
            break;
        }
    }
    assert_eq!(seqs, [1, 2, 3, 4, 5]);
}

/// Whoever sends one byte at a time is served; whoever stops before login is closed at the deadline, and whoever stops
/// later at the idle limit; nobody else notices.
#[test]
fn slow_and_silent_clients() {
    let cluster =
        cluster(&["limits.login_ms_max=3000", "limits.idle_ms_max=8000", "limits.heartbeat_ms=1000"]);
    let address = cluster.gateways[0].client;
    let mut dripping = Raw::connect(address);
    for byte in raw::frame(Command::Login, &login("drip")) {
        dripping.write_all(&[byte]).unwrap();
    }
    assert!(matches!(dripping.next(), ServerFrame::LoginAck(_)));
    let mut silent = Raw::connect(address);
    let mut half = Raw::connect(address);
    half.write_all(&raw::frame(Command::Login, &login("half"))[..9]).unwrap();
    for raw in [&mut silent, &mut half] {
        assert_eq!(raw.error().code(), Code::LoginTimeout);
        assert!(raw.is_closed());
    }
    // In the middle of a frame, and then nothing: idle like everybody who says nothing.
    dripping.write_all(&[0, 1, 0]).unwrap();
    assert_eq!(dripping.error().code(), Code::Idle);
    let mut other = Raw::connect(address);
    assert_eq!(other.login(&login("other")).heartbeat_ms, 1000);
}

/// A client that never reads costs its own queue and then its connection, and its peers nothing.
#[test]
fn a_client_that_never_reads_is_closed_at_its_hard_limit() {
    let cluster = cluster(&[
        "limits.queue_bytes_soft=65536",
        "limits.queue_bytes_hard=262144",
        "listen.send_buffer_bytes=16384",
        "limits.stalled_ms_max=2000",
    ]);
    let address = cluster.gateways[0].client;
    let mut deaf = Raw::connect(address);
    deaf.login(&login("deaf"));
    let mut other = Raw::connect(address);
    other.login(&login("other"));
    let body = bytes::Bytes::from(vec![7u8; 16 * 1024]);
    // 16 MB of pushes to somebody who takes none: far more than kernel and gateway hold for one connection.
    for n in 1..=1_000 {
        other.send(
            Command::Send,
            &wire::Send { stream: 1, n, chat: "deaf:other".into(), body: body.clone(), ..Default::default() },
        );
        assert!(matches!(other.next(), ServerFrame::SendAck(_)), "at {n}");
    }
    let deadline = std::time::Instant::now() + PATIENCE;
    while counter(&cluster, "rookery_gateway_closed_total{reason=\"slow_reader\"}") < 1.0 {
        assert!(std::time::Instant::now() < deadline, "the stalled connection is closed");
        std::thread::yield_now();
    }
    assert!(counter(&cluster, "rookery_gateway_pushes_skipped_total") > 0.0);
    other.send(Command::Ping, &wire::Ping { nonce: 1 });
    assert!(matches!(other.next(), ServerFrame::Pong(_)));
}

/// One too many is told so; when somebody leaves there is room again.
#[test]
fn a_full_gateway_says_so() {
    let cluster = cluster(&["limits.connections_max=3", "limits.connections_per_address_max=0"]);
    let address = cluster.gateways[0].client;
    let mut held: Vec<Raw> = (0..3).map(|_| Raw::connect(address)).collect();
    for (at, raw) in held.iter_mut().enumerate() {
        raw.login(&login(&format!("u{at}")));
    }
    let mut extra = Raw::connect(address);
    assert_eq!(extra.error().code(), Code::TooManyConnections);
    drop(held.pop());
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let mut raw = Raw::connect(address);
        raw.send(Command::Login, &login("late"));
        match raw.next() {
            ServerFrame::LoginAck(_) => break,
            other => assert!(std::time::Instant::now() < deadline, "{other:?}"),
        }
    }
}

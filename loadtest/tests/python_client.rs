//! The second implementation of the wire, `scripts/python_client.py`, against real processes and against the Rust client.
//! The test's own thread drives everything; each script has two reader threads.
//!
//! Trap: a script whose standard output nobody reads stops at a full pipe. The kills below use that: what was read so far
//! bounds how far the script is, so that a kill comes in the middle for sure.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use client::{Client, Event, Events, Keep, Message, Options, Target};
use loadtest::supervisor::{Cluster, ClusterOptions};
use serde::Deserialize;
use tokio::runtime::Runtime;

/// Longest that anything here may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(120);
/// Lines that the test may lag behind a script, beside what its pipe holds.
const LINES_AHEAD_MAX: usize = 16;

/// A run of the script.
struct Script {
    child: Child,
    lines: Receiver<String>,
    notes: Option<JoinHandle<String>>,
}

impl Script {
    fn start<A: AsRef<str>>(args: &[A]) -> Script {
        Script::run("", &["scripts/python_client.py"], args)
    }

    fn run<A: AsRef<str>>(folder: &str, program: &[&str], args: &[A]) -> Script {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let mut child = Command::new("python3")
            .args(program)
            .args(args.iter().map(AsRef::as_ref))
            .current_dir(root.join(folder))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("cannot start python3, 3.11 or later, which this test needs (Debian: apt-get install python3): {error}")
            });
        let (stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (line, lines) = sync_channel(LINES_AHEAD_MAX);
        // Ends with the script, or when nobody wants its lines any more.
        std::thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|text| line.send(text))
        });
        let notes = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        Script { child, lines, notes: Some(notes) }
    }

    /// The next line, of JSON.
    fn next<T: for<'a> Deserialize<'a>>(&mut self) -> T {
        let line = match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(error) => panic!("no line from the script: {error}; it said:\n{}", self.kill()),
        };
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error} in {line}"))
    }

    fn take<T: for<'a> Deserialize<'a>>(&mut self, count: usize) -> Vec<T> {
        (0..count).map(|_| self.next()).collect()
    }

    /// Its exit code, the lines not read yet, and what it said on standard error.
    fn end(mut self) -> (i32, Vec<String>, String) {
        let deadline = Instant::now() + PATIENCE;
        let mut rest = Vec::new();
        // The lines end when the script does.
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            rest.push(line);
        }
        if Instant::now() >= deadline {
            panic!("the script does not end; it said:\n{}", self.kill());
        }
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        (code, rest, self.notes.take().unwrap().join().unwrap())
    }

    /// As [`Script::end`], of a script that printed all it had to and succeeded; what it said on standard error.
    fn succeed(self) -> String {
        let (code, rest, notes) = self.end();
        assert_eq!((code, rest.len()), (0, 0), "{rest:?}\n{notes}");
        notes
    }

    fn kill(&mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.notes.take().map(|notes| notes.join().unwrap_or_default()).unwrap_or_default()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What `send` prints.
#[derive(Debug, Deserialize)]
struct Sent {
    chat: String,
    seq: u64,
}

/// What `listen --json` prints.
#[derive(Debug, Deserialize)]
struct Shown {
    chat: String,
    seq: u64,
    sender: String,
    text: String,
    send_time_us: u64,
}

/// A cluster, a folder for clients, and a runtime for the Rust client.
struct Stage {
    runtime: Runtime,
    cluster: Cluster,
    folder: tempfile::TempDir,
}

impl Stage {
    fn new(options: ClusterOptions) -> Stage {
        Stage {
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap(),
            cluster: Cluster::start(options).unwrap(),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn gateway(&self) -> String {
        self.cluster.gateways[0].client.to_string()
    }

    fn state_file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn send(&self, user: &str, to: &str, texts: &[String]) -> Script {
        let (gateway, state) =
            (self.gateway(), self.state_file(&format!("{user}-sends.json")).display().to_string());
        let mut args = vec!["send", "--gateway", &gateway, "--user", user, "--to", to, "--timeout", "120"];
        args.extend(["--state", &state]);
        args.extend(texts.iter().map(String::as_str));
        Script::start(&args)
    }

    /// A message from alice to bob, and the end of its script awaited: killed before, it would leave it to the next one.
    fn send_one(&self, text: &str) -> Sent {
        let mut send = self.send("alice", "bob", &[text.to_owned()]);
        let sent = send.next();
        send.succeed();
        sent
    }

    fn listen(&self, user: &str, state: &str, count: usize) -> Script {
        let (gateway, count) = (self.gateway(), count.to_string());
        let state = self.state_file(state).display().to_string();
        let args = ["listen", "--gateway", &gateway, "--user", user, "--json", "--state", &state];
        Script::start(&[&args[..], &["--count", &count, "--timeout", "120"]].concat())
    }

    fn rust(&self, user: &str) -> (Client, Events) {
        let target = Target::Gateway(vec![self.gateway()]);
        let keep = Keep::Under(self.folder.path().to_owned());
        let options = Options { keep, ..Options::new(user, "rust", target) };
        self.runtime.block_on(Client::connect(options)).unwrap()
    }

    fn receive(&self, events: &mut Events, count: usize) -> Vec<Message> {
        let receive = async {
            let mut messages = Vec::with_capacity(count);
            while messages.len() < count {
                match events.next().await.expect("the session goes on") {
                    Event::Message(message) => {
                        events.confirm(&message);
                        messages.push(message);
                    }
                    Event::Gap { .. } | Event::HistoryLost { .. } | Event::Ended(_) => {
                        panic!("not in this story")
                    }
                    Event::Connected { .. } | Event::Synced | Event::Disconnected { .. } => {}
                    Event::Delivered { .. }
                    | Event::Read { .. }
                    | Event::Unread { .. }
                    | Event::Hidden { .. }
                    | Event::Presence { .. }
                    | Event::Typing { .. }
                    | Event::WatchRefused { .. }
                    | Event::EarlierFailed { .. }
                    | Event::Trouble { .. } => {}
                }
            }
            messages
        };
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, receive).await }).expect("messages come")
    }
}

fn numbered(count: usize) -> Vec<String> {
    (1..=count).map(|n| format!("message {n}")).collect()
}

fn body(message: &Message) -> String {
    String::from_utf8(message.body.to_vec()).unwrap()
}

#[test]
fn it_reads_and_writes_every_vector() {
    let (code, lines, notes) = Script::start(&["--vectors", "proto/vectors/wire.json"]).end();
    assert_eq!(code, 0, "{lines:?}\n{notes}");
    assert!(lines.concat().contains("frames") && lines.concat().ends_with(": 0 wrong"), "{lines:?}");
}

/// A check that never failed proves nothing: one digit changed in one frame is found.
#[test]
fn it_finds_a_vector_that_is_wrong() {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto/vectors/wire.json");
    let text = std::fs::read_to_string(vectors).unwrap();
    let changed = text.replacen("0000030308ac02", "0000030308ad02", 1);
    assert_ne!(text, changed);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("wire.json");
    std::fs::write(&file, changed).unwrap();
    let (code, lines, notes) = Script::start(&["--vectors", &file.display().to_string()]).end();
    assert_eq!(code, 1, "{lines:?}\n{notes}");
    assert!(lines[0].starts_with("ping, decoded"), "{lines:?}");
}

/// Its session logic against a model of the server that loses, delays, repeats and forgets.
#[test]
fn its_seeded_simulation_passes() {
    let seed = std::env::var("SEED").unwrap_or_else(|_| rand::random::<u32>().to_string());
    let (code, lines, notes) =
        Script::run("scripts", &["-B", "-m", "python.simulation"], &["300", &seed]).end();
    assert_eq!(code, 0, "from seed {seed}: {lines:?}\n{notes}");
}

#[test]
fn wrong_usage_is_64() {
    let wrong: [&[&str]; 4] =
        [&[], &["send", "--user", "a"], &["listen", "--user", "a:b"], &["listen", "--count", "x"]];
    for args in wrong {
        assert_eq!(Script::start(args).end().0, 64, "{args:?}");
    }
}

/// The same conversation on the embedded store and registry.
#[test]
fn the_story_on_the_embedded_parts() {
    let stage = Stage::new(ClusterOptions { embedded: true, ..ClusterOptions::default() });
    let (code, lines, notes) = Script::start(&["story", "--gateway", &stage.gateway()]).end();
    assert_eq!((code, lines.len()), (0, 15), "{lines:#?}\n{notes}");
}

/// The scripted conversation, twice on the same servers; its gateway found by ipconf. And the ends of the commands.
#[test]
fn the_story_and_the_exit_codes() {
    let stage = Stage::new(ClusterOptions { ipconf: true, ..ClusterOptions::default() });
    let url = stage.cluster.ipconf.as_ref().unwrap().url();
    for round in 0..2 {
        let (code, lines, notes) = Script::start(&["story", "--ipconf", &url]).end();
        assert_eq!(code, 0, "round {round}: {lines:#?}\n{notes}");
        assert_eq!(lines.len(), 15, "{lines:#?}");
        println!("{}", lines.join("\n"));
    }
    let (code, lines, notes) =
        Script::start(&["listen", "--ipconf", &url, "--user", "nobody", "--json", "--timeout", "0.5"]).end();
    assert_eq!((code, lines.len()), (3, 0), "{notes}");
    let (code, _, notes) =
        Script::start(&["listen", "--ipconf", &url, "--user", "nobody", "--count", "0"]).end();
    assert_eq!(code, 0, "{notes}");
    let too_long = "x".repeat(32_769);
    let (code, lines, notes) =
        Script::start(&["send", "--ipconf", &url, "--user", "a", "--to", "b", &too_long]).end();
    assert_eq!((code, lines.len()), (1, 0), "{notes}");
    assert!(notes.contains("too long"), "{notes}");
    let (code, _, notes) = Script::start(&[
        "send",
        "--gateway",
        "127.0.0.1:1",
        "--user",
        "a",
        "--to",
        "b",
        "--timeout",
        "0.5",
        "hi",
    ])
    .end();
    assert_eq!(code, 3, "nobody is there");
    assert!(notes.contains("it is unknown whether 1 messages were sent"), "{notes}");
}

/// A newer login of the device ends the listening program, and it does not come back.
#[test]
fn who_is_replaced_stays_away() {
    let stage = Stage::new(ClusterOptions::default());
    let mut older = stage.listen("bob", "one.json", 2);
    stage.send_one("hello");
    older.next::<Shown>();
    let mut newer = stage.listen("bob", "two.json", 1);
    let (code, _, notes) = older.end();
    assert_eq!(code, 1, "{notes}");
    assert!(notes.contains("kicked: REPLACED"), "{notes}");
    stage.send_one("again");
    assert_eq!(newer.next::<Shown>().text, "again");
    newer.succeed();
}

#[test]
fn python_and_rust_talk_to_each_other() {
    let stage = Stage::new(ClusterOptions::default());
    let (bob, mut events) = stage.rust("bob");

    let texts: Vec<String> = ["hello", "", "two\nlines", "Zoë 😀"].map(str::to_owned).into();
    let mut send = stage.send("alice", "bob", &texts);
    let sent: Vec<Sent> = send.take(texts.len());
    send.succeed();
    assert!(sent.iter().map(|sent| (sent.chat.as_str(), sent.seq)).eq((1..=4).map(|seq| ("alice:bob", seq))));
    let seen = stage.receive(&mut events, texts.len());
    assert!(seen.iter().all(|message| &*message.sender == "alice"));
    assert_eq!(seen.iter().map(body).collect::<Vec<_>>(), texts);

    let mut listen = stage.listen("alice", "alice.json", 9);
    // A device without a cursor begins with what its user has on none: all nine, her own four too.
    for n in 5..=9_u64 {
        let answer = stage.runtime.block_on(bob.send("alice", format!("Zoë {n}"))).unwrap();
        assert_eq!(answer.seq, n);
    }
    let shown: Vec<Shown> = listen.take(9);
    listen.succeed();
    assert!(shown.iter().map(|shown| shown.seq).eq(1..=9));
    let own: Vec<&str> = shown[..4].iter().map(|shown| shown.text.as_str()).collect();
    assert_eq!(own, texts);
    for (n, shown) in (5..).zip(&shown[4..]) {
        assert_eq!((&*shown.chat, &*shown.sender, &*shown.text), ("alice:bob", "bob", &*format!("Zoë {n}")));
        assert!(shown.send_time_us > seen[3].time_us);
    }
}

#[test]
fn who_was_away_gets_everything_in_order_once() {
    let stage = Stage::new(ClusterOptions::default());
    let mut listen = stage.listen("bob", "bob.json", 1);
    stage.send_one("first");
    assert_eq!(listen.next::<Shown>().text, "first");
    listen.succeed();

    let mut send = stage.send("alice", "bob", &numbered(200));
    assert!(send.take::<Sent>(200).iter().map(|sent| sent.seq).eq(2..=201));
    send.succeed();
    let mut listen = stage.listen("bob", "bob.json", 200);
    let shown: Vec<Shown> = listen.take(200);
    listen.succeed();
    assert!(shown.iter().map(|shown| shown.seq).eq(2..=201));
    assert_eq!(shown.into_iter().map(|shown| shown.text).collect::<Vec<_>>(), numbered(200));

    stage.send_one("one more");
    let mut listen = stage.listen("bob", "bob.json", 1);
    assert_eq!(listen.next::<Shown>().text, "one more", "nothing comes twice");
    listen.succeed();
}

/// The sending script itself is killed; the next run with its state file finishes what it left, once and in order.
#[test]
fn a_killed_script_goes_on_where_it_was() {
    const COUNT: usize = 500;
    let stage = Stage::new(ClusterOptions::default());
    let mut listen = stage.listen("bob", "bob.json", COUNT + 1);
    let mut send = stage.send("alice", "bob", &numbered(COUNT));
    send.take::<Sent>(20);
    send.kill();

    let (code, lines, notes) = stage.send("alice", "bob", &["the last".to_owned()]).end();
    assert_eq!(code, 0, "{notes}");
    assert_eq!(lines.last().unwrap(), &format!("{{\"chat\":\"alice:bob\",\"seq\":{}}}", COUNT + 1));
    let shown: Vec<Shown> = listen.take(COUNT + 1);
    listen.succeed();
    let texts: Vec<String> = shown.into_iter().map(|shown| shown.text).collect();
    assert_eq!(texts, [numbered(COUNT), vec!["the last".to_owned()]].concat());
}

/// The store comes back empty: the counters that alice kept and the cursor that bob kept belong to a history that is gone.
#[test]
fn a_store_that_lost_everything_is_noticed_on_both_sides() {
    let mut stage = Stage::new(ClusterOptions::default());
    let mut listen = stage.listen("bob", "bob.json", 3);
    let mut send = stage.send("alice", "bob", &numbered(3));
    assert!(send.take::<Sent>(3).iter().map(|sent| sent.seq).eq(1..=3));
    send.succeed();
    listen.take::<Shown>(3);
    listen.succeed();

    stage.cluster.states[0].process.kill().unwrap();
    let () = redis::cmd("FLUSHALL")
        .query(&mut stage.cluster.redis.as_ref().unwrap().connection().unwrap())
        .unwrap();
    stage.cluster.states[0].process.restart().unwrap();
    stage.cluster.gateways[0].process.restart().unwrap();

    let mut send = stage.send("alice", "bob", &["anew".to_owned()]);
    assert_eq!(send.next::<Sent>().seq, 1);
    send.succeed();
    let mut listen = stage.listen("bob", "bob.json", 1);
    let shown = listen.next::<Shown>();
    assert_eq!((shown.seq, &*shown.text), (1, "anew"));
    assert!(listen.succeed().contains("its history was lost after message 3"));
}

/// Alice's script sends 3,000 while bob listens in Python and in Rust; `kill` comes after the 200th acknowledgement. Gives
/// what alice's and bob's script said.
fn kill_while_sending(kill: impl FnOnce(&mut Cluster)) -> (String, String) {
    // Lines in the pipe (64 KiB), in the reader's buffer (8 KiB), in the channel: 2,600 at most. The rest is not even sent
    // when the kill comes.
    const COUNT: usize = 3_000;
    let mut stage = Stage::new(ClusterOptions::default());
    // Before the first message: a device that is new sees what the user's others have not acknowledged yet, and news of that
    // may take some 50 ms.
    let (_bob, mut events) = stage.rust("bob");
    let mut listen = stage.listen("bob", "bob.json", COUNT + 1);
    stage.send_one("first");
    assert_eq!(listen.next::<Shown>().text, "first");
    assert_eq!(body(&stage.receive(&mut events, 1)[0]), "first");

    let mut send = stage.send("alice", "bob", &numbered(COUNT));
    let mut sent: Vec<Sent> = send.take(200);
    kill(&mut stage.cluster);
    sent.extend(send.take::<Sent>(COUNT - 200));
    let sent_notes = send.succeed();
    assert!(sent.iter().map(|sent| sent.seq).eq(2..=COUNT as u64 + 1), "her order, no gap, none twice");

    let shown: Vec<Shown> = listen.take(COUNT);
    let listen_notes = listen.succeed();
    assert!(shown.iter().map(|shown| shown.seq).eq(2..=COUNT as u64 + 1));
    assert_eq!(shown.into_iter().map(|shown| shown.text).collect::<Vec<_>>(), numbered(COUNT));
    let seen = stage.receive(&mut events, COUNT);
    assert_eq!(seen.iter().map(body).collect::<Vec<_>>(), numbered(COUNT));
    (sent_notes, listen_notes)
}

#[test]
fn a_gateway_killed_during_sending_loses_and_doubles_nothing() {
    let notes = kill_while_sending(|cluster| {
        cluster.gateways[0].process.kill().unwrap();
        cluster.gateways[0].process.restart().unwrap();
    });
    for notes in [notes.0, notes.1] {
        assert!(notes.contains("not connected") && notes.matches("logged in").count() == 2, "{notes}");
    }
}

#[test]
fn a_state_server_killed_during_sending_costs_not_even_the_connection() {
    let notes = kill_while_sending(|cluster| {
        cluster.states[0].process.kill().unwrap();
        cluster.states[0].process.restart().unwrap();
    });
    for notes in [notes.0, notes.1] {
        assert!(!notes.contains("not connected") && notes.matches("logged in").count() == 1, "{notes}");
    }
}

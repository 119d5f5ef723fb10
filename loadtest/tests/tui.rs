//! The terminal chat in real terminals: two people, a gateway that dies, restarts, signals. Each terminal is a
//! pseudo-terminal whose output is read by a terminal emulator; the tests see what a person would see.
//!
//! Trap: the screen is drawn some time after something happened. Tests wait until it shows what they look for, and never
//! look once. `ROOKERY_TERMINAL_CAPTURE=FILE` writes the conversation of the first test there, for the documentation.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use loadtest::supervisor::{Cluster, ClusterOptions, binary};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

/// Longest that anything here may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);
const ROWS: u16 = 20;
const COLUMNS: u16 = 80;

/// A terminal with a program in it.
struct Terminal {
    keys: File,
    /// Kept open, to look at its modes when the program is gone.
    line: File,
    screen: Arc<(Mutex<Shown>, Condvar)>,
    child: Child,
    label: String,
}

struct Shown {
    parser: vt100::Parser,
    /// Everything that was ever written.
    raw: Vec<u8>,
}

impl Terminal {
    fn start(label: &str, program: &Path, arguments: &[&str], state: &Path) -> Terminal {
        let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&keys).unwrap();
        unlockpt(&keys).unwrap();
        let path = ptsname(&keys, Vec::new()).unwrap();
        // Opened by somebody with a session of his own (every test run from a shell has one), this does not take it.
        let path = Path::new(OsStr::from_bytes(path.as_bytes()));
        let line = rustix::fs::open(
            path,
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY,
            rustix::fs::Mode::empty(),
        );
        let (keys, line) = (File::from(keys), File::from(line.unwrap()));
        tcsetwinsize(&keys, winsize(COLUMNS, ROWS)).unwrap();
        let stdio = || Stdio::from(line.try_clone().unwrap());
        // setsid makes the terminal the program's own, as a window would; it becomes the program, pid and all.
        let child = Command::new("setsid")
            .arg("-c")
            .arg(program)
            .args(arguments)
            .env("XDG_STATE_HOME", state)
            .env("TERM", "xterm-256color")
            .env("TZ", "UTC")
            .env("RUST_BACKTRACE", "0")
            .env_remove("RUST_LOG")
            .env_remove("ROOKERY_IPCONF")
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap();
        let parser = vt100::Parser::new(NonZeroU16::new(ROWS).unwrap(), NonZeroU16::new(COLUMNS).unwrap(), 0);
        let screen = Arc::new((Mutex::new(Shown { parser, raw: Vec::new() }), Condvar::new()));
        let (mut output, seen) = (keys.try_clone().unwrap(), screen.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // An error when the last one who had the terminal closed it.
            while let Ok(read @ 1..) = output.read(&mut bytes) {
                let mut shown = seen.0.lock().unwrap();
                shown.parser.process(&bytes[..read]);
                shown.raw.extend_from_slice(&bytes[..read]);
                seen.1.notify_all();
            }
        });
        Terminal { keys, line, screen, child, label: label.to_owned() }
    }

    fn keys(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    fn enter(&mut self, line: &str) {
        self.keys(line);
        self.until(&format!("{line:?} in the input line"), |screen| {
            screen.lines().last().is_some_and(|row| row.ends_with(line.trim_end()))
        });
        self.keys("\r");
    }

    fn screen(&self) -> String {
        contents(&self.screen.0.lock().unwrap().parser)
    }

    fn raw(&self) -> Vec<u8> {
        self.screen.0.lock().unwrap().raw.clone()
    }

    /// Waits until the screen is as it should be, and returns it.
    fn until(&self, what: &str, mut good: impl FnMut(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut shown = self.screen.0.lock().unwrap();
        loop {
            let screen = contents(&shown.parser);
            if good(&screen) {
                return screen;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let label = &self.label;
                drop(shown);
                panic!("{label}: still not {what} on:\n{screen}");
            }
            shown = self.screen.1.wait_timeout(shown, left).unwrap().0;
        }
    }

    fn shows(&self, what: &str) -> String {
        self.until(&format!("{what:?}"), |screen| screen.contains(what))
    }

    fn resize(&mut self, columns: u16, rows: u16) {
        let (height, wide) = (NonZeroU16::new(rows).unwrap(), NonZeroU16::new(columns).unwrap());
        self.screen.0.lock().unwrap().parser.screen_mut().set_size(height, wide);
        tcsetwinsize(&self.keys, winsize(columns, rows)).unwrap();
    }

    fn signal(&self, signal: Signal) {
        nix::sys::signal::kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for the end of the program and looks whether the terminal is as before.
    fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "{} still runs:\n{}", self.label, self.screen());
            std::thread::sleep(Duration::from_millis(10)); // the pace of asking
        };
        let modes = tcgetattr(&self.line).unwrap().local_modes;
        assert!(modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG), "still raw");
        let deadline = Instant::now() + PATIENCE;
        let mut shown = self.screen.0.lock().unwrap();
        loop {
            let screen = shown.parser.screen();
            if !screen.alternate_screen() && !screen.hide_cursor() && !screen.bracketed_paste() {
                return status;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the terminal was not given back");
            shown = self.screen.1.wait_timeout(shown, left).unwrap().0;
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- terminal of {} ----\n{}", self.label, self.screen());
        }
    }
}

fn winsize(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn contents(parser: &vt100::Parser) -> String {
    let (_, columns) = parser.screen().size();
    let rows: Vec<String> =
        parser.screen().rows(0, columns.get()).map(|row| row.trim_end().to_owned()).collect();
    rows.join("\n")
}

/// `client` of a user, at the gateway of a cluster.
fn chat(cluster: &Cluster, user: &str, state: &Path) -> Terminal {
    let gateway = cluster.gateways[0].client.to_string();
    let terminal =
        Terminal::start(user, &binary("client").unwrap(), &["--gateway", &gateway, "--user", user], state);
    terminal.shows("durability strict");
    terminal
}

/// The list of chats has this row, whatever blanks it holds.
fn listed(screen: &str, row: &str) -> bool {
    let list = screen.lines().filter_map(|line| line.split('│').next());
    let mut words = list.map(|row| row.split_whitespace().collect::<Vec<_>>().join(" "));
    // Whether somebody is there is not what is asked.
    words.any(|found| found.trim_start_matches("• ") == row)
}

#[test]
fn two_people_chat_in_their_terminals() {
    let mut cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let state = tempfile::tempdir().unwrap();
    let (mut alice, mut bob) = (chat(&cluster, "alice", state.path()), chat(&cluster, "bob", state.path()));

    // Everybody sees what was said, the writer that it was accepted.
    alice.enter("/chat bob");
    alice.enter("hello, bob");
    alice.shows("✓ alice: hello, bob");
    bob.shows("  alice: hello, bob");
    // He looks at it, which she sees.
    alice.shows("●✓ alice: hello, bob");
    bob.enter("hello, alice. 日本語, é, 👋");
    bob.shows("✓ bob: hello, alice. 日本語, é, 👋");
    alice.shows("  bob: hello, alice. 日本語, é, 👋");

    // A third one writes to alice, who looks at bob: unread, until she looks.
    let mut carol = chat(&cluster, "carol", state.path());
    carol.enter("/chat alice");
    carol.enter("lunch?");
    carol.enter("at noon?");
    carol.shows("✓ carol: at noon?");
    alice.until("2 unread of carol", |screen| listed(screen, "carol 2"));
    let before = alice.screen();
    assert!(!before.contains("lunch?"), "{before}");
    alice.keys("\t");
    let screen = alice.shows("carol: at noon?");
    assert!(screen.contains("carol: lunch?") && listed(&screen, "› carol"), "{screen}");
    alice.keys("\x1b[Z");
    alice.shows("hello, bob");

    // The help, and back.
    alice.enter("/help");
    alice.shows("open the chat with a user");
    alice.keys(" ");
    alice.until("the help gone", |screen| !screen.contains("open the chat with a user"));

    // Smaller, one by one, and back.
    for (columns, rows) in [(40, 12), (1, 1), (COLUMNS, ROWS)] {
        alice.resize(columns, rows);
    }
    alice.shows("✓ alice: hello, bob");

    // The gateway dies; both are told, and what alice types meanwhile arrives when it is back.
    cluster.gateways[0].process.kill().unwrap();
    alice.shows("offline, connecting …:");
    bob.shows("offline, connecting …:");
    alice.enter("are you still there?");
    alice.shows("… alice: are you still there?");
    cluster.gateways[0].process.restart().unwrap();
    alice.shows("✓ alice: are you still there?");
    bob.shows("  alice: are you still there?");
    bob.enter("yes, here again");
    let screen = alice.shows("  bob: yes, here again");
    let screen_of_bob = bob.shows("✓ bob: yes, here again");
    assert!(screen.contains("online 127.0.0.1:") && screen.contains("durability strict"), "{screen}");
    if let Some(file) = std::env::var_os("ROOKERY_TERMINAL_CAPTURE") {
        alice.keys("see you at no");
        let screen = alice.shows("> see you at no");
        std::fs::write(file, format!("{screen}\n\n{screen_of_bob}\n")).unwrap();
        alice.keys("\x15");
    }

    // What a stranger's text holds does not steer the terminal.
    let evil = "\u{1b}]0;owned\u{7}\u{1b}[2J\u{9b}31m";
    let status = Command::new(binary("client").unwrap())
        .args([
            "--gateway",
            &cluster.gateways[0].client.to_string(),
            "send",
            "--user",
            "bob",
            "--to",
            "alice",
            evil,
        ])
        .env("XDG_STATE_HOME", state.path())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    // The emulator leaves out U+FFFD, which stands for each control.
    alice.shows("bob: ]0;owned[2J31m");
    let raw = alice.raw();
    let holds = |wanted: &[u8]| raw.windows(wanted.len()).any(|bytes| bytes == wanted);
    assert!(holds("\u{fffd}]0;owned\u{fffd}\u{fffd}[2J\u{fffd}31m".as_bytes()) && !holds(b"\x1b]"));

    // She leaves; the terminal is as before. Back again she sees the last messages, none of them new.
    alice.enter("/quit");
    assert_eq!(alice.ended().code(), Some(0));
    bob.enter("one for later");
    bob.shows("✓ bob: one for later");
    let mut alice = chat(&cluster, "alice", state.path());
    let screen = alice.shows("  bob: one for later");
    assert_eq!(screen.matches("are you still there?").count(), 1, "{screen}");
    assert!(listed(&screen, "carol"), "nothing unread: {screen}");
    alice.keys("\x03");
    assert_eq!(alice.ended().code(), Some(0));
}

#[test]
fn signals_errors_and_panics_give_the_terminal_back() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let state = tempfile::tempdir().unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        let mut alice = chat(&cluster, "alice", state.path());
        alice.signal(signal);
        assert_eq!(alice.ended().code(), Some(0), "{signal}");
    }

    // Another program takes the device: told, after the terminal was given back.
    let mut alice = chat(&cluster, "alice", state.path());
    let elsewhere = tempfile::tempdir().unwrap();
    let _other = chat(&cluster, "alice", elsewhere.path());
    assert_eq!(alice.ended().code(), Some(69));
    alice.shows("client: ended by the server: REPLACED");

    // An optimised build has no such command.
    if cfg!(debug_assertions) {
        let mut bob = chat(&cluster, "bob", state.path());
        bob.enter("/panic");
        assert_eq!(bob.ended().code(), Some(101));
        bob.shows("asked to by /panic");
    }

    // A second one on the same state is refused before it touches the terminal.
    let _bob = chat(&cluster, "bob", state.path());
    let gateway = cluster.gateways[0].client.to_string();
    let program = binary("client").unwrap();
    let mut second =
        Terminal::start("bob", &program, &["--gateway", &gateway, "--user", "bob"], state.path());
    assert_eq!(second.ended().code(), Some(64));
    let screen = second.shows("another program runs as this user and device");
    assert!(screen.starts_with("client: "), "{screen}");
}

/// A flood is shown at a pace that a slow link can carry, and counted in full.
#[test]
fn a_flood_is_drawn_at_most_thirty_times_a_second() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let state = tempfile::tempdir().unwrap();
    let mut alice = chat(&cluster, "alice", state.path());
    alice.enter("/chat carol");
    // What is drawn for that is not of the flood.
    alice.until("carol's chat open", |screen| listed(screen, "› carol"));
    // Every picture ends by showing the cursor.
    let pictures = |alice: &Terminal| alice.raw().windows(6).filter(|bytes| bytes == b"\x1b[?25h").count();
    let (start, before) = (Instant::now(), pictures(&alice));
    let gateway = cluster.gateways[0].client.to_string();
    let mut bob = Command::new(binary("client").unwrap())
        .args(["--gateway", &gateway, "send", "--user", "bob", "--to", "alice", "--stdin"])
        .env("XDG_STATE_HOME", state.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let lines: String = (1..=2_000).map(|number| format!("line {number}\n")).collect();
    bob.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(bob.wait().unwrap().success());
    alice.until("2000 unread of bob", |screen| listed(screen, "bob 2000"));
    let (drawn, most) = (pictures(&alice) - before, start.elapsed().as_millis() as usize / 33 + 2);
    assert!(drawn <= most, "{drawn} pictures, {most} allowed");
    alice.keys("\t");
    alice.shows("  bob: line 2000");
    alice.keys("\x1b[5~\x1b[5~");
    alice.shows("more rows below, PgDn");
}

/// A message that was not answered when the user left is said so, and sent when the device comes back.
#[test]
fn what_was_typed_offline_is_sent_by_the_next_start() {
    let mut cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let state = tempfile::tempdir().unwrap();
    let mut alice = chat(&cluster, "alice", state.path());
    alice.enter("/chat bob");
    cluster.gateways[0].process.kill().unwrap();
    alice.shows("offline, connecting …:");
    alice.enter("for later");
    alice.shows("… alice: for later");
    alice.keys("\x03");
    assert_eq!(alice.ended().code(), Some(0));
    alice.shows("1 message(s) without an answer");
    cluster.gateways[0].process.restart().unwrap();
    let alice = chat(&cluster, "alice", state.path());
    alice.shows("✓ alice: for later");
    let bob = chat(&cluster, "bob", state.path());
    bob.shows("  alice: for later");
}

/// A device that is new holds nothing of a chat; whoever scrolls up sees all of it. And in a group one's own messages are counted.
#[test]
fn a_new_device_scrolls_back_and_a_group_counts() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let state = tempfile::tempdir().unwrap();
    let (mut alice, mut bob) = (chat(&cluster, "alice", state.path()), chat(&cluster, "bob", state.path()));
    alice.enter("/group Rooks");
    alice.shows("✓ alice: [makes the group Rooks]");
    alice.enter("/add bob");
    alice.enter("/add carol");
    alice.enter("hello, all");
    // He looks at it; she was never here.
    bob.shows("  alice: hello, all");
    alice.shows("✓ alice: hello, all  ✓✓ 1/2 ●✓ 1/2");
    // From himself alone.
    bob.enter("/hide");
    bob.until("that it is gone", |screen| !screen.contains("hello, all"));
    assert!(alice.screen().contains("hello, all"));

    let gateway = cluster.gateways[0].client.to_string();
    let mut dave = Command::new(binary("client").unwrap())
        .args(["--gateway", &gateway, "send", "--user", "dave", "--to", "alice", "--stdin"])
        .env("XDG_STATE_HOME", state.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let lines: String = (1..=120).map(|number| format!("line {number}\n")).collect();
    dave.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(dave.wait().unwrap().success());
    alice.until("120 unread of dave", |screen| listed(screen, "dave 120"));
    alice.enter("/quit");
    assert_eq!(alice.ended().code(), Some(0));

    let arguments = ["--gateway", &gateway, "--user", "alice", "--device", "new"];
    let mut alice = Terminal::start("alice", &binary("client").unwrap(), &arguments, state.path());
    alice.shows("durability strict");
    alice.enter("/chat dave");
    alice.shows("What this device holds of the chat begins here.");
    let mut screen = alice.screen();
    for _ in 0..100 {
        if screen.contains("The chat begins here.") {
            break;
        }
        // It scrolls, or says that it has asked.
        alice.keys("\x1b[5~");
        screen = alice.until("another picture", |now| now != screen);
    }
    assert!(screen.contains("  dave: line 1\n") && screen.contains("more rows below"), "{screen}");
}

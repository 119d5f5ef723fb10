//! The program `client` as scripts use it: output, exit codes, state folders; against a gateway in this process.

mod fake;

use std::path::Path;
use std::process::{Output, Stdio};

use fake::{Fake, Fault};
use proto::Command as Frame;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::Command;

fn client(fake: &Fake, state: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_client"));
    command
        .arg("--gateway")
        .arg(fake.address.to_string())
        .args(arguments)
        .env("XDG_STATE_HOME", state)
        .env_remove("RUST_LOG")
        .env_remove("ROOKERY_IPCONF")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

async fn run(fake: &Fake, state: &Path, arguments: &[&str]) -> (i32, String, String) {
    finished(client(fake, state, arguments).output().await.unwrap())
}

fn finished(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn send_prints_where_the_message_stands_and_leaves_nothing_behind() {
    let fake = Fake::start().await;
    let state = tempfile::tempdir().unwrap();
    for seq in 1..=2 {
        let (code, out, err) =
            run(&fake, state.path(), &["send", "--user", "alice", "--to", "bob", "hello"]).await;
        assert_eq!((code, &*err), (0, ""));
        assert_eq!(out, format!("{{\"chat\":\"alice:bob\",\"seq\":{seq}}}\n"));
    }
    assert_eq!(std::fs::read_dir(state.path().join("rookery")).unwrap().count(), 0);
    assert!(fake.world().logins.iter().all(|login| login.device.starts_with("send-")));
}

#[tokio::test]
async fn lines_of_stdin_are_sent_in_order() {
    let fake = Fake::start().await;
    let state = tempfile::tempdir().unwrap();
    let mut child = client(&fake, state.path(), &["send", "--user", "alice", "--to", "bob", "--stdin"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines: String = (1..=300).map(|number| format!("line {number}\n")).collect();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).await.unwrap();
    let (code, out, _) = finished(child.wait_with_output().await.unwrap());
    assert_eq!((code, out.lines().count()), (0, 300));
    let stored: String = fake.world().chats["alice:bob"]
        .iter()
        .map(|message| format!("{}\n", String::from_utf8_lossy(&message.body)))
        .collect();
    assert_eq!(stored, lines);
}

#[tokio::test]
async fn no_answer_is_unknown_and_a_refusal_is_usage() {
    let fake = Fake::start().await;
    let state = tempfile::tempdir().unwrap();
    fake.world().fault =
        Some(Box::new(|frame| if frame == Frame::Send { Fault::Swallow } else { Fault::None }));
    let send = ["send", "--user", "alice", "--to"];
    let (code, out, err) =
        run(&fake, state.path(), &["send", "--user", "alice", "--timeout", "0.3", "--to", "bob", "x"]).await;
    assert_eq!((code, &*out), (69, ""));
    assert!(err.contains("unknown"), "{err}");
    fake.world().fault = None;
    let (code, _, err) = run(&fake, state.path(), &[&send[..], &["bob:carol", "x"]].concat()).await;
    assert_eq!(code, 64);
    assert!(err.contains("NOT_A_MEMBER"), "{err}");
    let (code, _, err) = run(&fake, state.path(), &[&send[..], &["b:o:b", "x"]].concat()).await;
    assert_eq!(code, 64, "{err}");
    let (code, _, err) = run(&fake, state.path(), &["send", "--user", "a:b", "--to", "bob", "x"]).await;
    assert_eq!(code, 64, "{err}");
}

#[tokio::test]
async fn listen_goes_on_where_its_device_was() {
    let fake = Fake::start().await;
    let state = tempfile::tempdir().unwrap();
    for number in 1..=5 {
        fake.world().append("alice:bob", "alice", format!("text {number}").into(), 0);
    }
    let listen = ["--device", "phone", "listen", "--user", "bob", "--json", "--timeout", "60", "--count"];
    let (code, out, err) = run(&fake, state.path(), &[&listen[..], &["3"]].concat()).await;
    assert_eq!((code, &*err), (0, ""));
    let first = out.lines().next().unwrap();
    let expected =
        r#"{"chat":"alice:bob","seq":1,"sender":"alice","text":"text 1","send_time_us":1001,"history":77}"#;
    assert_eq!(first, expected);
    assert_eq!(out.lines().count(), 3);
    assert_eq!(fake.world().push_acks.last().unwrap().seq, 3, "acknowledged before the exit");
    let (code, out, _) = run(&fake, state.path(), &[&listen[..], &["2"]].concat()).await;
    assert_eq!(code, 0);
    let seqs: Vec<_> = out
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["seq"].clone())
        .collect();
    assert_eq!(seqs, [4, 5]);
    let timeout = ["listen", "--user", "bob", "--device", "phone", "--count", "1", "--timeout", "0.3"];
    let (code, out, _) = run(&fake, state.path(), &timeout).await;
    assert_eq!((code, &*out), (3, ""));
}

#[tokio::test]
async fn listen_prints_what_comes_and_a_second_one_is_told_who_holds_the_device() {
    let fake = Fake::start().await;
    let state = tempfile::tempdir().unwrap();
    let arguments = ["listen", "--user", "bob", "--device", "phone"];
    let mut child = client(&fake, state.path(), &arguments).stdout(Stdio::piped()).spawn().unwrap();
    fake.until(|world| world.online("bob") == 1).await;
    fake.world().append("alice:bob", "alice", "hi".into(), 0);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().unwrap(), "[alice:bob 1] alice: hi");
    let (code, _, err) = run(&fake, state.path(), &arguments).await;
    assert_eq!(code, 64);
    assert!(err.contains("another program"), "{err}");
    let kick = proto::wire::Kick { code: proto::wire::Code::Replaced as i32, text: String::new() };
    fake.tell("bob", Frame::Kick, &kick);
    assert_eq!(child.wait().await.unwrap().code(), Some(69));
}

/// SIGKILL in the middle: what had its id is sent again under it by the device's next run, in order, and nothing twice.
#[tokio::test]
async fn a_killed_sender_is_finished_by_its_next_run() {
    let fake = Fake::start().await;
    let state = tempfile::tempdir().unwrap();
    let mut sends = 0;
    fake.world().fault = Some(Box::new(move |command| match command {
        // From the 51st on the answers are lost, and from the 61st on the messages.
        Frame::Send => {
            sends += 1;
            match sends {
                0..51 => Fault::None,
                51..61 => Fault::LoseAnswer,
                _ => Fault::Swallow,
            }
        }
        _ => Fault::None,
    }));
    let arguments = ["send", "--user", "alice", "--to", "bob", "--device", "phone"];
    let mut child = client(&fake, state.path(), &[&arguments[..], &["--stdin"]].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines: String = (1..=300).map(|number| format!("line {number}\n")).collect();
    let mut stdin = child.stdin.take().unwrap();
    // Nobody reads it to the end.
    let _writing = tokio::spawn(async move { stdin.write_all(lines.as_bytes()).await });
    fake.until(|world| world.received.iter().filter(|(got, _)| *got == Frame::Send).count() >= 70).await;
    child.kill().await.unwrap();
    assert_eq!(fake.world().chats["alice:bob"].len(), 60);
    fake.world().fault = None;
    let (code, _, err) = run(&fake, state.path(), &[&arguments[..], &["the last"]].concat()).await;
    assert_eq!(code, 0, "{err}");
    let stored: Vec<_> = fake.world().chats["alice:bob"]
        .iter()
        .map(|message| String::from_utf8_lossy(&message.body).into_owned())
        .collect();
    let (last, lines) = stored.split_last().unwrap();
    assert_eq!(last, "the last");
    assert!(lines.len() >= 70, "all that was sent has an id: {}", lines.len());
    assert!(
        lines.iter().enumerate().all(|(index, line)| *line == format!("line {}", index + 1)),
        "{lines:?}"
    );
}

/// SIGSTOP over several heartbeats, once with a connection that lives on and once with one that breaks meanwhile.
#[tokio::test]
async fn a_program_that_stood_still_gives_up_no_good_connection_and_leaves_a_bad_one_at_once() {
    let fake = Fake::start().await;
    let state = tempfile::tempdir().unwrap();
    // A stall of the machine is not to be taken for a dead gateway.
    fake.world().heartbeat_ms = 1_500;
    let arguments = ["listen", "--user", "bob", "--json"];
    let mut child = client(&fake, state.path(), &arguments).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let pid = child.id().unwrap().to_string();
    let signal = async |name: &str| {
        assert!(Command::new("kill").args([name, &pid]).status().await.unwrap().success());
    };
    for (number, breaks) in [(1, false), (2, true)] {
        fake.until(|world| world.online("bob") == 1).await;
        signal("-STOP").await;
        fake.world().append("alice:bob", "alice", "meanwhile".into(), 0);
        if breaks {
            fake.break_all();
        }
        // The pause is the fault: more than the heartbeats that a silent server is given.
        tokio::time::sleep(std::time::Duration::from_secs(6)).await;
        let woken = std::time::Instant::now();
        signal("-CONT").await;
        let line = lines.next_line().await.unwrap().unwrap();
        assert!(line.contains(&format!("\"seq\":{number},")), "{line}");
        fake.until(|world| world.logins.len() == 1 + usize::from(breaks) && world.online("bob") == 1).await;
        // Not after the time that is given to a gateway which may be slow.
        assert!(woken.elapsed() < std::time::Duration::from_secs(5), "{:?}", woken.elapsed());
    }
    child.kill().await.unwrap();
}

#[tokio::test]
async fn ipconf_is_asked_and_the_next_gateway_is_tried() {
    let fake = Fake::start().await;
    let state = tempfile::tempdir().unwrap();
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dead_address = dead.local_addr().unwrap();
    drop(dead);
    let ipconf = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", ipconf.local_addr().unwrap());
    let live = fake.address;
    tokio::spawn(async move {
        let gateway = |address| format!(r#"{{"addr":"{address}","zone":"","load":0.1}}"#);
        // First nobody, then a dead one in front of the live one.
        for gateways in [String::new(), format!("{},{}", gateway(dead_address), gateway(live))] {
            let (mut stream, _) = ipconf.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let read = stream.read(&mut request).await.unwrap();
            assert!(request[..read].starts_with(b"GET /ip/list"));
            let body = format!(r#"{{"gateways":[{gateways}],"wait_ms":10}}"#);
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        }
    });
    let mut command = Command::new(env!("CARGO_BIN_EXE_client"));
    command.args(["send", "--user", "alice", "--to", "bob", "hello"]).env("ROOKERY_IPCONF", url);
    let (code, _, err) = finished(command.env("XDG_STATE_HOME", state.path()).output().await.unwrap());
    assert_eq!((code, &*err), (0, ""));
    assert_eq!(fake.world().chats["alice:bob"].len(), 1);
}

#[tokio::test]
async fn help_says_what_there_is() {
    let fake = Fake::start().await;
    let state = tempfile::tempdir().unwrap();
    let (code, out, _) = run(&fake, state.path(), &["--help"]).await;
    assert_eq!(code, 0);
    assert!(out.contains("client --user alice") && out.contains("client send --user alice"), "{out}");
    let (code, out, err) = run(&fake, state.path(), &[]).await;
    assert_eq!((code, &*out), (64, ""));
    assert!(err.contains("--user NAME"), "{err}");
    let (code, _, err) = run(&fake, state.path(), &["--user", "alice"]).await;
    assert_eq!(code, 64);
    assert!(err.contains("needs a terminal"), "{err}");
    let (code, _, err) = run(&fake, state.path(), &["--user", "alice", "listen", "--user", "bob"]).await;
    assert_eq!(code, 64);
    assert!(err.contains("behind the subcommand"), "{err}");
    let (code, out, _) = run(&fake, state.path(), &["--version"]).await;
    assert_eq!((code, out.trim()), (0, concat!("client ", env!("CARGO_PKG_VERSION"))));
    let (code, _, _) = run(&fake, state.path(), &["listen", "--nonsense"]).await;
    assert_eq!(code, 64);
}

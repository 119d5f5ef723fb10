//! What a redb store does when its process is killed, and what a second process hears.
//!
//! Trap: the process that is killed is this test's own program, started again for [`writer_to_be_killed`] alone. That
//! test does nothing unless it is told a file.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use bytes::Bytes;
use state::config::{Config, StoreConfig};
use state::store::{Append, Appended, MessageId, Op, Store, read};
use state::store_redb::{OpenError, RedbStore};

/// Names the file to the program started again.
const FILE: &str = "ROOKERY_TEST_REDB_FILE";

const ROUNDS: usize = 12;
const CHATS: u64 = 5;

async fn open(path: &Path) -> RedbStore {
    RedbStore::open(path, &StoreConfig::default()).await.expect("the store opens")
}

fn append(chat: u64, n: u64) -> Op {
    let body = Bytes::from(format!("{chat}/{n}"));
    let (chat, sender) = (format!("kill:w{chat}"), "kill".to_owned());
    let id = MessageId::Numbered { stream: 7, n };
    Op::Append(Append { chat, sender, id, body, ..Append::default() })
}

fn head(chat: u64) -> Op {
    Op::Head { chat: format!("kill:w{chat}"), user: "kill".into() }
}

fn start_writer(path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer_to_be_killed", "--nocapture"])
        .env(FILE, path)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Writes until it is killed, in calls of all sizes and several at once, and prints each id only behind its answer.
#[tokio::test]
async fn writer_to_be_killed() {
    let Ok(path) = std::env::var(FILE) else { return };
    let store = open(Path::new(&path)).await;
    let mut next = HashMap::new();
    for chat in 0..CHATS {
        let at = read::head(store.apply(&[head(chat)]).await.swap_remove(0)).unwrap();
        next.insert(chat, at.seq + 1);
    }
    println!("\nready");
    loop {
        let calls = next.iter_mut().map(|(chat, next)| {
            let (chat, first) = (*chat, *next);
            // Fewer than the store remembers answers to, so that the newest one printed can be asked again.
            *next += rand::random_range(1..proto::UNANSWERED_MAX);
            let ops: Vec<Op> = (first..*next).map(|n| append(chat, n)).collect();
            let store = &store;
            async move {
                for (n, outcome) in (first..).zip(store.apply(&ops).await) {
                    assert!(matches!(read::appended(outcome), Ok(Appended::Stored { seq, .. }) if seq == n));
                    println!("answered {chat} {n}");
                }
            }
        });
        futures_util::future::join_all(calls).await;
    }
}

#[tokio::test]
async fn what_was_answered_survives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    let mut answered: HashMap<u64, u64> = HashMap::new();
    for round in 0..ROUNDS {
        let mut child = start_writer(&path);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(lines.any(|line| line == "ready"), "the writer opens what was left");
        let wanted = rand::random_range(1..3_000);
        let mut seen = 0;
        // Everything that it printed before it died counts, also what is still in the pipe.
        for line in lines {
            let Some(id) = line.strip_prefix("answered ") else { continue };
            // A line cut off by the kill names a smaller n than was answered: that one was, too.
            let Some((chat, Ok(n))) = id.split_once(' ').map(|(chat, n)| (chat, n.parse::<u64>())) else {
                continue;
            };
            let newest = answered.entry(chat.parse().unwrap()).or_default();
            *newest = n.max(*newest);
            seen += 1;
            if seen == wanted {
                child.kill().unwrap();
            }
        }
        assert!(seen >= wanted);
        child.wait().unwrap();

        let store = open(&path).await;
        for (chat, newest) in &mut answered {
            let at = read::head(store.apply(&[head(*chat)]).await.swap_remove(0)).unwrap();
            assert!(at.seq >= *newest, "round {round}: {newest} of chat {chat} answered, {} there", at.seq);
            let mut seen = 0;
            while seen < at.seq {
                let reader = String::new();
                let of = format!("kill:w{chat}");
                let pull = Op::Pull { chat: of, reader, cursor: seen, limit: 1_000, reverse: false };
                let page = read::page(store.apply(&[pull]).await.swap_remove(0)).unwrap();
                assert!(!page.messages.is_empty(), "{seen} of {} messages", at.seq);
                for message in page.messages {
                    seen += 1;
                    assert_eq!((message.seq, &message.body[..]), (seen, format!("{chat}/{seen}").as_bytes()));
                }
            }
            let again = store.apply(&[append(*chat, *newest)]).await.swap_remove(0);
            let again = read::appended(again).unwrap();
            assert!(
                matches!(again, Appended::Stored { seq, again: true, .. } if seq == *newest),
                "{again:?}"
            );
            // What was found here is as good as answered.
            *newest = at.seq;
        }
    }
    assert_eq!(answered.len() as u64, CHATS);
}

/// The name in the refusal is that of the process that has the file, and goes with it.
#[tokio::test]
async fn a_second_process_is_told_who_has_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    let mut child = start_writer(&path);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line == "ready"));

    let error = RedbStore::open(&path, &StoreConfig::default()).await.err().expect("it must refuse");
    assert!(matches!(error, OpenError::Held { .. }));
    let holder = format!("process {}", child.id());
    assert!(error.to_string().contains(&holder), "{error}");
    let mut config = Config::default();
    config.store.url = format!("redb:{}", path.display());
    let fatal = state::server::open_store(&config).await.err().expect("it must refuse");
    assert_eq!(fatal.exit_code(), 69);
    assert!(fatal.message().contains(&holder) && !fatal.message().contains('\n'), "{}", fatal.message());

    child.kill().unwrap();
    child.wait().unwrap();
    drop(open(&path).await);
}

/// A file that is no store is named, and left as it is.
#[tokio::test]
async fn a_file_of_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("letter.txt");
    std::fs::write(&path, "Dear Bob".repeat(100)).unwrap();
    let error = RedbStore::open(&path, &StoreConfig::default()).await.err().expect("it must refuse");
    assert!(matches!(error, OpenError::File { .. }));
    assert!(error.to_string().contains("letter.txt"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), "Dear Bob".repeat(100).as_bytes());
}

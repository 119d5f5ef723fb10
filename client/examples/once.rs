//! Every message once in a store of one's own, whatever dies when. The store here is a file of JSON lines.
//!
//!     cargo run -p rookery-client --example once -- --gateway 127.0.0.1:7000 --user bob --file bob.jsonl
//!
//! Kill it as often and as hard as you like, and run it again: no message is missing in the file, and none stands there
//! twice. The pattern is four steps, in this order, one message at a time:
//!
//! 1. take an event;
//! 2. is its (chat, history, seq) in the store already? Then go to 4;
//! 3. store it together with these three, in one transaction, and wait until that is durable;
//! 4. confirm it.
//!
//! Trap: confirm before the store is durable, and a crash in between loses the message: the server will not bring again what
//! was confirmed.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use clap::Parser;
use client::{Client, Event, Events, Keep, Options, Target};
use serde::{Deserialize, Serialize};

/// Keep every message of a user in a file, once
#[derive(Debug, Parser)]
struct Arguments {
    /// Gateway, HOST:PORT; may come several times
    #[arg(long, required = true)]
    gateway: Vec<String>,
    /// Whose messages
    #[arg(long)]
    user: String,
    /// This program's device name; another program needs another one
    #[arg(long, default_value = "once")]
    device: String,
    /// Where the library keeps the device's state; default: the user's state folder
    #[arg(long)]
    state: Option<PathBuf>,
    /// The store
    #[arg(long)]
    file: PathBuf,
    /// End after so many new lines
    #[arg(long)]
    count: Option<u64>,
    /// Crash behind the N-th new line, when it is stored and not confirmed
    #[arg(long, value_name = "N")]
    crash_at: Option<u64>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let keep = arguments.state.map_or(Keep::Default, Keep::Under);
    let target = Target::Gateway(arguments.gateway);
    let options = Options { keep, ..Options::new(arguments.user, arguments.device, target) };
    let mut ledger = Ledger::open(&arguments.file)?;
    let (client, mut events) = Client::start(options)?;
    let mut stored = 0;
    while arguments.count.is_none_or(|count| stored < count) {
        let Some(event) = events.next().await else { break };
        if let Event::Ended(ended) = event {
            anyhow::bail!(ended);
        }
        if ledger.put(&event)? {
            stored += 1;
            if arguments.crash_at == Some(stored) {
                std::process::abort();
            }
        }
        confirm(&events, &event);
    }
    client.close().await;
    Ok(())
}

/// Step 4. That what the event tells was in the store already makes no difference.
fn confirm(events: &Events, event: &Event) {
    events.confirm_event(event);
}

/// A line of the file.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Line {
    chat: String,
    history: u64,
    /// Of the message; of a gap, its last; of a lost history, 0.
    seq: u64,
    /// First seq of a gap.
    #[serde(skip_serializing_if = "Option::is_none")]
    gap_from: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sender: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

/// The application's own store.
struct Ledger {
    file: File,
    /// How far each (chat, history) is stored. Seqs rise, so the highest one tells of all.
    stored: BTreeMap<(String, u64), u64>,
}

impl Ledger {
    fn open(path: &Path) -> io::Result<Ledger> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        // A crash in the middle of a line leaves half of it; it was not durable, so it was not confirmed.
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64)?;
        file.seek(io::SeekFrom::End(0))?;
        let mut stored = BTreeMap::new();
        for line in text[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let line: Line = serde_json::from_slice(line)?;
            stored.insert((line.chat, line.history), line.seq);
        }
        Ok(Ledger { file, stored })
    }

    /// Steps 2 and 3. False: it stands there already, or there is nothing to store.
    fn put(&mut self, event: &Event) -> io::Result<bool> {
        let (chat, history, seq) = match event {
            Event::Message(message) => (&message.chat, message.history, message.seq),
            Event::Gap { chat, history, to, .. } => (chat, *history, *to),
            Event::Hidden { chat, history, seq } => (chat, *history, *seq),
            Event::HistoryLost { chat, history, from_seq } => (chat, *history, from_seq - 1),
            Event::Delivered { .. }
            | Event::Read { .. }
            | Event::Unread { .. }
            | Event::Presence { .. }
            | Event::Typing { .. }
            | Event::WatchRefused { .. }
            | Event::EarlierFailed { .. }
            | Event::Trouble { .. }
            | Event::Connected { .. }
            | Event::Synced
            | Event::Disconnected { .. }
            | Event::Ended(_) => {
                return Ok(false);
            }
        };
        let key = (chat.to_string(), history);
        let before = self.stored.get(&key).copied();
        if before.is_some_and(|stored| seq <= stored) {
            return Ok(false);
        }
        let mut line = Line { chat: key.0.clone(), history, seq, gap_from: None, sender: None, text: None };
        match event {
            Event::Message(message) => {
                line.sender = Some(message.sender.clone());
                line.text = Some(String::from_utf8_lossy(&message.body).into_owned());
            }
            // Of a gap that has grown since, only what is new.
            Event::Gap { from, .. } => {
                line.gap_from = Some(before.map_or(*from, |stored| *from.max(&(stored + 1))))
            }
            _ => {}
        }
        let mut bytes = serde_json::to_vec(&line)?;
        bytes.push(b'\n');
        self.file.write_all(&bytes)?;
        self.file.sync_data()?;
        self.stored.insert(key, seq);
        Ok(true)
    }
}

#[cfg(test)]
#[path = "../tests/fake/mod.rs"]
mod fake;

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[tokio::test]
    async fn however_often_it_dies_before_it_confirms_every_message_stands_there_once() {
        const MESSAGES: u64 = 40;
        let fake = fake::Fake::start().await;
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("bob.jsonl");
        for number in 1..=MESSAGES {
            fake.world().append("alice:bob", "alice", Bytes::from(format!("{number}")), 0);
        }
        fake.world().first = 3;
        let mut lives = 0;
        let is_done = |ledger: &Ledger| ledger.stored.values().any(|seq| *seq == MESSAGES);
        while !is_done(&Ledger::open(&path).unwrap()) {
            lives += 1;
            let target = Target::Gateway(vec![fake.address.to_string()]);
            let keep = Keep::Under(root.path().to_owned());
            let (client, mut events) =
                Client::start(Options { keep, ..Options::new("bob", "once", target) }).unwrap();
            let mut ledger = Ledger::open(&path).unwrap();
            let mut stored = 0;
            // Five are stored, the last of them is not confirmed.
            while stored < 5 && !is_done(&ledger) {
                let next = tokio::time::timeout(std::time::Duration::from_secs(20), events.next());
                let event = next.await.expect("an event").unwrap();
                stored += u64::from(ledger.put(&event).unwrap());
                if stored < 5 {
                    confirm(&events, &event);
                }
            }
            client.close().await;
            drop(ledger);
            // And half a line, as of a crash while it was written.
            OpenOptions::new().append(true).open(&path).unwrap().write_all(br#"{"chat":"al"#).unwrap();
        }
        assert!(lives >= 7);
        Ledger::open(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Line> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((lines[0].gap_from, lines[0].seq), (Some(1), 2));
        let messages: Vec<_> = lines[1..].iter().map(|line| (line.seq, line.text.clone().unwrap())).collect();
        assert_eq!(messages, (3..=MESSAGES).map(|seq| (seq, seq.to_string())).collect::<Vec<_>>());
    }
}

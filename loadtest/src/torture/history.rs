//! What happened in one load, in the order in which we saw it: kept in memory for the verdict, written as JSON lines for
//! people. Many tasks add to it; a thread of its own writes.
//!
//! Trap: the order of records of one device is true. Between devices it is the order in which their tasks ran, a few
//! milliseconds apart under load.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Serialize, Serializer};

use super::TortureError;

/// A message of a load: the `n`-th of its sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId {
    /// The sender, by number of the user.
    pub from: u32,
    /// From 1.
    pub n: u32,
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.from, self.n)
    }
}

impl Serialize for MessageId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A device that takes part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Number of its user, as in [`MessageId::from`].
    pub user: u32,
    /// The user's name.
    pub name: String,
    /// The device's name.
    pub device: String,
    /// It is gone while messages are sent, and comes back in the end.
    pub away: bool,
}

/// Where a message stands: for ever the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Place {
    /// The chat.
    #[serde(serialize_with = "shared_text")]
    pub chat: Arc<str>,
    /// Its history.
    pub history: u64,
    /// Its number there.
    pub seq: u64,
}

/// Whom a message goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum To {
    /// By number, as in [`MessageId::from`].
    User(u32),
    /// By number, in the order of [`What::Made`].
    Group(u32),
}

/// Users who come into a group and go out of it by one message.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Change {
    /// By number, as in [`MessageId::from`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub joins: Vec<u32>,
    /// The same.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub leaves: Vec<u32>,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum What {
    /// A group was made, before anybody sent anything.
    Made {
        /// Where the message stands that made it.
        #[serde(flatten)]
        place: Place,
        /// Numbers of users.
        members: Vec<u32>,
    },
    /// The application asked for a group to be changed.
    Asked {
        /// By number, in the order of [`What::Made`].
        group: u32,
        /// How.
        #[serde(flatten)]
        change: Change,
    },
    /// The server holds the change that was asked for.
    Changed {
        /// Where it stands.
        #[serde(flatten)]
        place: Place,
        /// How.
        #[serde(flatten)]
        change: Change,
    },
    /// The server refused the change that was asked for.
    Unchanged {
        /// By number, in the order of [`What::Made`].
        group: u32,
        /// The code.
        code: String,
    },
    /// The application asked for it to be sent.
    Sent {
        /// Which.
        id: MessageId,
        /// Whom it goes to.
        to: To,
    },
    /// The server holds it.
    Acked {
        /// Which.
        id: MessageId,
        /// Where it stands.
        #[serde(flatten)]
        place: Place,
    },
    /// The server refused it for good.
    Refused {
        /// Which.
        id: MessageId,
        /// The code.
        code: String,
    },
    /// Nobody knows: the session ended before an answer.
    Unknown {
        /// Which.
        id: MessageId,
    },
    /// The application was shown it. `id` is missing when the body is none of ours.
    Shown {
        /// Which.
        id: Option<MessageId>,
        /// Where it stands.
        #[serde(flatten)]
        place: Place,
        /// Who sent it, as the server says; only when the body does not say the same.
        #[serde(skip_serializing_if = "Option::is_none")]
        liar: Option<String>,
    },
    /// The application was shown that a group was changed, which is a message in its place.
    Told {
        /// Where it stands.
        #[serde(flatten)]
        place: Place,
        /// How.
        #[serde(flatten)]
        change: Change,
    },
    /// The application has it in its own store, and said so.
    Confirmed {
        /// Where it stands.
        #[serde(flatten)]
        place: Place,
    },
    /// Logged in.
    Connected {
        /// The gateway.
        address: String,
    },
    /// The connection is gone.
    Disconnected {
        /// Why.
        reason: String,
    },
    /// The session is over.
    Ended {
        /// Why.
        reason: String,
    },
    /// The server told of a lost history.
    HistoryLost {
        /// From here on it hands out anew.
        #[serde(flatten)]
        place: Place,
    },
    /// The server has nothing to show there.
    Gap {
        /// The first that is missing.
        #[serde(flatten)]
        place: Place,
        /// The last that is missing.
        to: u64,
    },
    /// A fault begins.
    FaultBegin {
        /// Which.
        fault: String,
    },
    /// A fault ends, or is repaired.
    FaultEnd {
        /// Which.
        fault: String,
    },
}

/// When, who, what.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record {
    /// Microseconds since the load began.
    pub at_us: u64,
    /// The device, by its place in [`History::devices`]; none for faults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub who: Option<u32>,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// See the head of this file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    /// Who takes part.
    pub devices: Vec<Device>,
    /// What happened.
    pub records: Vec<Record>,
    /// Whether every connection of the load was meant to live: no gateway was hurt.
    pub gateways_live: bool,
}

/// A history that grows. Cheap to clone; any thread.
#[derive(Debug, Clone)]
pub struct Journal {
    began: Instant,
    shared: Arc<Mutex<History>>,
    /// The thread that writes wakes up for it.
    news: Sender<()>,
}

/// The thread that writes a journal; [`Scribe::finish`] ends it.
#[derive(Debug)]
pub struct Scribe {
    path: PathBuf,
    journal: Journal,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Journal {
    /// Begins one, written to `path`.
    pub fn begin(
        path: &Path,
        devices: Vec<Device>,
        gateways_live: bool,
    ) -> Result<(Journal, Scribe), TortureError> {
        let failed = |error| TortureError::io(format!("cannot write {}", path.display()), error);
        let mut file = File::create(path).map_err(failed)?;
        for device in &devices {
            writeln!(file, "{}", serde_json::to_string(device).unwrap_or_default()).map_err(failed)?;
        }
        let (news, wake) = channel();
        let history = History { devices, records: Vec::new(), gateways_live };
        let journal = Journal { began: Instant::now(), shared: Arc::new(Mutex::new(history)), news };
        let shared = journal.shared.clone();
        let write = move || write_all(&mut file, &shared, &wake);
        let thread = std::thread::Builder::new().name("history".into()).spawn(write).map_err(failed)?;
        let scribe = Scribe { path: path.to_owned(), journal: journal.clone(), thread: Some(thread) };
        Ok((journal, scribe))
    }

    /// Adds one record. `who`: the device.
    pub fn add(&self, who: Option<u32>, what: What) {
        // Taken under the lock, so that times rise.
        let mut history = self.shared.lock();
        let at_us = self.began.elapsed().as_micros() as u64;
        history.records.push(Record { at_us, who, what });
    }

    /// The time that a record of now would have.
    pub fn now_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }
}

impl Scribe {
    /// Everything is written; the history, and where it lies.
    pub fn finish(mut self) -> Result<(History, PathBuf), TortureError> {
        // An error means that it ended by itself; the join says why.
        let _ = self.journal.news.send(());
        if let Some(thread) = self.thread.take() {
            let written = thread.join().unwrap_or_else(|_| Err(std::io::Error::other("the writer panicked")));
            written
                .map_err(|error| TortureError::io(format!("cannot write {}", self.path.display()), error))?;
        }
        let history = std::mem::take(&mut *self.journal.shared.lock());
        Ok((history, self.path.clone()))
    }
}

/// Until it is told to end. Records are copied out, so that nobody waits for the disk.
fn write_all(file: &mut File, shared: &Mutex<History>, wake: &Receiver<()>) -> std::io::Result<()> {
    let (mut written, mut lines) = (0, Vec::new());
    loop {
        let last = !matches!(wake.recv_timeout(WRITE_EVERY), Err(RecvTimeoutError::Timeout));
        let fresh: Vec<Record> = {
            let history = shared.lock();
            history.records[written..].to_vec()
        };
        written += fresh.len();
        lines.clear();
        for record in &fresh {
            serde_json::to_writer(&mut lines, record)?;
            lines.push(b'\n');
        }
        file.write_all(&lines)?;
        if last {
            return Ok(());
        }
    }
}

fn shared_text<S: Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

/// What a killed run leaves unwritten.
const WRITE_EVERY: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_record_is_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("F1-7.jsonl");
        let device = Device { user: 0, name: "a".into(), device: "phone".into(), away: false };
        let (journal, scribe) = Journal::begin(&path, vec![device], true).unwrap();
        let id = MessageId { from: 0, n: 1 };
        let place = Place { chat: "a:b".into(), history: 9, seq: 1 };
        journal.add(Some(0), What::Sent { id, to: To::User(1) });
        journal.add(Some(0), What::Acked { id, place: place.clone() });
        journal.add(Some(1), What::Shown { id: Some(id), place, liar: None });
        journal.add(None, What::FaultBegin { fault: "state-0 SIGKILL".into() });
        let (history, path) = scribe.finish().unwrap();
        assert_eq!(history.records.len(), 4);
        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 5);
        assert_eq!(lines[1]["what"], "sent");
        assert_eq!((&lines[2]["id"], &lines[2]["seq"]), (&"0-1".into(), &1.into()));
        assert_eq!(lines[4]["fault"], "state-0 SIGKILL");
    }
}

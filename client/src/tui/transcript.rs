//! What was shown, kept beside the device's state so that a restart shows the last messages again. Owned by the event loop.
//!
//! A file per chat, `transcript/PEER.jsonl`: a line with the chat's name, then a line per record. It holds the last
//! [`MESSAGES_MAX`] messages; twice as much is cut when it is reached.
//!
//! Trap: this is a convenience, the server and the device's log are the truth. A line that cannot be read is skipped, and
//! a file that cannot be written is told and no more.

use std::collections::{HashMap, HashSet};
use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::chat::{Stored, peer};

/// One line of a transcript.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Record {
    Message {
        history: u64,
        seq: u64,
        sender: String,
        time_us: u64,
        text: String,
        read: bool,
    },
    /// What was said of the messages around it: that some are missing, or are shown anew.
    Remark {
        text: String,
        time_us: u64,
    },
    /// Everything before this line was read.
    Read,
    /// This message is not to be shown any more.
    Hidden {
        history: u64,
        seq: u64,
    },
}

/// The first line.
#[derive(Serialize, Deserialize)]
struct Head {
    chat: String,
}

impl Record {
    /// Of a message that came into a chat.
    pub fn of(stored: &Stored<'_>, read: bool) -> Record {
        Record::Message {
            history: stored.id.0,
            seq: stored.id.1,
            sender: stored.sender.to_owned(),
            time_us: stored.time_us,
            text: stored.text.to_owned(),
            read,
        }
    }
}

/// See the head of this file.
#[derive(Debug)]
pub struct Transcripts {
    folder: PathBuf,
    me: String,
    sizes: HashMap<String, Size>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Size {
    lines: usize,
    bytes: usize,
}

impl Transcripts {
    /// In the folder of a device, whose lock the caller holds.
    pub fn open(device_folder: &Path, me: &str) -> io::Result<Self> {
        let folder = device_folder.join("transcript");
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        Ok(Transcripts { folder, me: me.to_owned(), sizes: HashMap::new() })
    }

    /// Every chat with its records, the latest files first, at most `chats_max`.
    pub fn load(&mut self, chats_max: usize) -> io::Result<Vec<(String, Vec<Record>)>> {
        let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
        for file in std::fs::read_dir(&self.folder)? {
            let file = file?;
            if file.path().extension().is_some_and(|end| end == "jsonl") {
                files.push((file.metadata()?.modified()?, file.path()));
            }
        }
        files.sort_by(|one, other| other.cmp(one));
        let mut chats = Vec::new();
        for (_, path) in files.into_iter().take(chats_max) {
            // A file that is not where its chat's would be is not ours.
            if let Some((chat, records)) = self.read(&path)?
                && self.path(&chat) == path
            {
                chats.push((chat, records));
            }
        }
        Ok(chats)
    }

    /// Appends a record. It outlives this process at once, not the power going off.
    pub fn keep(&mut self, chat: &str, record: &Record) -> io::Result<()> {
        let path = self.path(chat);
        let mut bytes = Vec::new();
        if !self.sizes.contains_key(chat) && self.read(&path)?.is_none() {
            put_line(&mut bytes, &Head { chat: chat.to_owned() })?;
            let _ = std::fs::remove_file(&path);
        }
        put_line(&mut bytes, record)?;
        OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?.write_all(&bytes)?;
        let size = self.sizes.entry(chat.to_owned()).or_default();
        size.lines += 1;
        size.bytes += bytes.len();
        if size.lines > 2 * MESSAGES_MAX || size.bytes > 2 * FILE_BYTES_MAX {
            self.read(&path)?;
        }
        Ok(())
    }

    /// What a file holds; written anew when it holds too much, or something that cannot be read.
    fn read(&mut self, path: &Path) -> io::Result<Option<(String, Vec<Record>)>> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let text = String::from_utf8_lossy(&bytes);
        let mut lines = text.lines();
        let head = lines.next().and_then(|line| serde_json::from_str::<Head>(line).ok());
        let Some(Head { chat }) = head else { return Ok(None) };
        let total = lines.clone().count();
        let mut records: Vec<Record> = lines.filter_map(|line| serde_json::from_str(line).ok()).collect();
        let intact = records.len() == total && bytes.ends_with(b"\n");
        let mut size = Size { lines: total, bytes: bytes.len() };
        if !intact || total > MESSAGES_MAX || bytes.len() > FILE_BYTES_MAX {
            cut(&mut records);
            size = write_anew(path, &chat, &records)?;
        }
        self.sizes.insert(chat.clone(), size);
        Ok(Some((chat, records)))
    }

    fn path(&self, chat: &str) -> PathBuf {
        // The name of a pair may be too long for a file, the name of the other one is not.
        self.folder.join(format!("{}.jsonl", client::store::file_name(peer(chat, &self.me))))
    }
}

/// Leaves the last messages, each with its own mark of having been read.
fn cut(records: &mut Vec<Record>) {
    let mut all_read = false;
    for record in records.iter_mut().rev() {
        match record {
            Record::Read => all_read = true,
            Record::Message { read, .. } => *read |= all_read,
            Record::Hidden { .. } | Record::Remark { .. } => {}
        }
    }
    let hidden = |record: &Record| match record {
        Record::Hidden { history, seq } => Some((*history, *seq)),
        _ => None,
    };
    let hidden: HashSet<(u64, u64)> = records.iter().filter_map(hidden).collect();
    records.retain(|record| match record {
        Record::Message { history, seq, .. } => !hidden.contains(&(*history, *seq)),
        Record::Remark { .. } => true,
        Record::Read | Record::Hidden { .. } => false,
    });
    let mut bytes = 0;
    let fits = records.iter().rev().take(MESSAGES_MAX).take_while(|record| {
        // As written: controls take six times their length.
        bytes += serde_json::to_vec(record).map_or(0, |line| line.len() + 1);
        bytes <= FILE_BYTES_MAX
    });
    let fits = fits.count().max(1).min(records.len());
    records.drain(..records.len() - fits);
}

fn write_anew(path: &Path, chat: &str, records: &[Record]) -> io::Result<Size> {
    let mut bytes = Vec::new();
    put_line(&mut bytes, &Head { chat: chat.to_owned() })?;
    for record in records {
        put_line(&mut bytes, record)?;
    }
    let new = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&bytes)?;
    std::fs::rename(&new, path)?;
    Ok(Size { lines: records.len(), bytes: bytes.len() })
}

fn put_line(bytes: &mut Vec<u8>, line: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *bytes, line)?;
    bytes.push(b'\n');
    Ok(())
}

/// Messages kept per chat, and their size.
pub const MESSAGES_MAX: usize = 500;
const FILE_BYTES_MAX: usize = 256 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn message(seq: u64, read: bool) -> Record {
        let (sender, text) = ("bob".to_owned(), format!("text\n\u{1b}{seq}"));
        Record::Message { history: u64::MAX, seq, sender, time_us: seq, text, read }
    }

    fn load(folder: &Path) -> Vec<(String, Vec<Record>)> {
        let mut chats = Transcripts::open(folder, "alice").unwrap().load(9).unwrap();
        chats.sort_by(|one, other| one.0.cmp(&other.0));
        chats
    }

    #[test]
    fn what_was_kept_is_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let mut transcripts = Transcripts::open(folder.path(), "alice").unwrap();
        let long = format!("alice:{}", "é".repeat(32));
        for chat in ["alice:bob", "#17", "alice:alice", &long] {
            transcripts.keep(chat, &message(1, false)).unwrap();
            transcripts.keep(chat, &Record::Read).unwrap();
        }
        // Without load: a file of an earlier run is continued.
        let mut transcripts = Transcripts::open(folder.path(), "alice").unwrap();
        transcripts.keep("#17", &message(2, true)).unwrap();
        let chats = load(folder.path());
        let names: Vec<_> = chats.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["#17", "alice:alice", "alice:bob", &long]);
        assert_eq!(chats[0].1, [message(1, false), Record::Read, message(2, true)]);
        assert_eq!(chats[2].1, [message(1, false), Record::Read]);
    }

    #[test]
    fn a_torn_file_is_mended() {
        let folder = tempfile::tempdir().unwrap();
        let mut transcripts = Transcripts::open(folder.path(), "alice").unwrap();
        (1..=2).for_each(|seq| transcripts.keep("alice:bob", &message(seq, false)).unwrap());
        let path = transcripts.path("alice:bob");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
        let mut transcripts = Transcripts::open(folder.path(), "alice").unwrap();
        transcripts.keep("alice:bob", &message(3, false)).unwrap();
        assert_eq!(load(folder.path())[0].1, [message(1, false), message(3, false)]);
        std::fs::write(&path, b"\xff garbage").unwrap();
        assert_eq!(load(folder.path()), []);
        let mut transcripts = Transcripts::open(folder.path(), "alice").unwrap();
        transcripts.keep("alice:bob", &message(4, false)).unwrap();
        assert_eq!(load(folder.path())[0].1, [message(4, false)]);
    }

    #[test]
    fn a_file_keeps_the_last_messages_and_what_was_read() {
        let folder = tempfile::tempdir().unwrap();
        let mut transcripts = Transcripts::open(folder.path(), "alice").unwrap();
        let last = 3 * MESSAGES_MAX as u64;
        for seq in 1..=last {
            transcripts.keep("alice:bob", &message(seq, false)).unwrap();
            if seq == last - 2 {
                transcripts.keep("alice:bob", &Record::Read).unwrap();
            }
        }
        let [(_, records)] = &load(folder.path())[..] else { panic!("one chat") };
        assert_eq!(records.len(), MESSAGES_MAX);
        assert_eq!(
            records[MESSAGES_MAX - 3..],
            [message(last - 2, true), message(last - 1, false), message(last, false)]
        );
        let evil = "\u{1}".repeat(proto::MESSAGE_BYTES_MAX);
        for seq in last + 1..last + 20 {
            let (sender, text) = ("bob".to_owned(), evil.clone());
            let record = Record::Message { history: 7, seq, sender, time_us: seq, text, read: false };
            transcripts.keep("alice:bob", &record).unwrap();
            let bytes = std::fs::metadata(transcripts.path("alice:bob")).unwrap().len();
            assert!(bytes < 4 * FILE_BYTES_MAX as u64, "{bytes}");
        }
        assert_eq!(load(folder.path())[0].1.len(), 1);
    }
}

//! What a device keeps over restarts: its last attempt, cursors, streams, unanswered messages. Owned by the session's task.
//!
//! A folder per user and device holds `lock`, locked as long as a program runs, and `log`: records with their CRC32C,
//! appended, and written anew through a rename when most of it is history.
//!
//! Trap: a record that cannot be read ends the log, and with it our knowledge of the last numbers given; and a folder may be an older copy of
//! itself. So no stream of the file gets a new number (`outbox/queue.rs`): that number may have been sent with another body.

mod hidden;
mod place;
mod record;

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hidden::Hidden;
pub use place::{default_root, device_folder, file_name};
use record::Record;

use crate::body::Body;
use crate::outbox::StoredChat;

/// Why there is no store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Two programs with one device would kick each other and give out the same ids.
    #[error("another program runs as this user and device (it holds {0}); choose another device name")]
    Locked(PathBuf),
    /// Neither is set, so there is no default place.
    #[error("neither XDG_STATE_HOME nor HOME is set; name a folder for the state")]
    NoHome,
    /// The file system.
    #[error("{path}: {error}")]
    Io {
        /// What was touched.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
}

/// See the head of this file.
#[derive(Debug)]
pub struct Store {
    disk: Option<Disk>,
    state: State,
    /// Records not written yet.
    pending: Vec<u8>,
    must_sync: bool,
}

#[derive(Debug)]
struct Disk {
    folder: PathBuf,
    log: Arc<File>,
    log_bytes: u64,
    /// Size at which the log is looked at again.
    rewrite_at_bytes: u64,
    lock: Arc<Held>,
}

/// A locked file. Let go of by name and not by closing it: a program that is just starting another one has every file open twice until
/// that one runs, and the lock would stay as long.
#[derive(Debug)]
struct Held(File);

impl Drop for Held {
    fn drop(&mut self) {
        // Closing it is the second best.
        let _ = self.0.unlock();
    }
}

/// What the records say together.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct State {
    pub attempt: u64,
    pub complete: bool,
    /// History, seq, up to where that is acknowledged.
    pub cursors: BTreeMap<String, (u64, u64, u64)>,
    pub chats: BTreeMap<String, Chat>,
    /// What its user has hidden.
    pub hidden: Hidden,
    /// The log ended in a record that cannot be read.
    pub torn: bool,
}

#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Chat {
    pub stream: u64,
    pub next_n: u64,
    /// n → body, and the wall clock in ms when it got its id.
    pub unanswered: BTreeMap<u64, (Body, u64)>,
}

impl Store {
    /// Without a disk.
    pub fn memory() -> Self {
        Store { disk: None, state: State::default(), pending: Vec::new(), must_sync: false }
    }

    /// Opens or makes the folder of this user and device under `root`.
    pub fn open(root: &Path, user: &str, device: &str) -> Result<Self, StoreError> {
        let folder = device_folder(root, user, device);
        let at = |path: &Path| {
            let path = path.to_owned();
            move |error| StoreError::Io { path, error }
        };
        // Messages are nobody else's business.
        DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(at(&folder))?;
        let lock_path = folder.join("lock");
        let lock = create(&lock_path).map_err(at(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::Locked(lock_path)),
            Err(TryLockError::Error(error)) => return Err(at(&lock_path)(error)),
        }
        let log_path = folder.join("log");
        let bytes = match std::fs::read(&log_path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(at(&log_path)(error)),
        };
        let state = State::read(&bytes);
        if state.torn {
            tracing::warn!(path = %log_path.display(), "the end of the state cannot be read, and is left out");
        }
        let (log, log_bytes) = if bytes.is_empty() || state.torn {
            rewrite(&folder, &state.to_bytes()).map_err(at(&log_path))?
        } else {
            (create(&log_path).map_err(at(&log_path))?, bytes.len() as u64)
        };
        let rewrite_at_bytes = REWRITE_BYTES_MIN.max(log_bytes * 4);
        let disk =
            Disk { folder, log: Arc::new(log), log_bytes, rewrite_at_bytes, lock: Arc::new(Held(lock)) };
        Ok(Store { disk: Some(disk), state, pending: Vec::new(), must_sync: false })
    }

    /// There is a disk: what is put outlives the process.
    pub fn is_kept(&self) -> bool {
        self.disk.is_some()
    }

    /// The last attempt used.
    pub fn attempt(&self) -> u64 {
        self.state.attempt
    }

    /// The first Sync of this device was complete.
    pub fn is_complete(&self) -> bool {
        self.state.complete
    }

    /// (chat, history, seq, acked) of every chat.
    pub fn cursors(&self) -> impl Iterator<Item = (&str, u64, u64, u64)> {
        self.state.cursors.iter().map(|(chat, (history, seq, acked))| (chat.as_str(), *history, *seq, *acked))
    }

    /// What the outbox is restored from.
    pub fn outbox(&self) -> Vec<StoredChat> {
        let chats = self.state.chats.iter().map(|(name, chat)| StoredChat {
            chat: name.clone(),
            stream: chat.stream,
            next_n: chat.next_n,
            unanswered: chat.unanswered.iter().map(|(n, (body, _))| (*n, body.clone())).collect(),
        });
        chats.collect()
    }

    /// Chats with an unanswered message that got its id longer ago. `now_ms`: the wall clock.
    pub fn overdue(&self, now_ms: u64, resend_ms_max: u64) -> impl Iterator<Item = &str> {
        let is_old = move |time_ms: u64| now_ms.saturating_sub(time_ms) > resend_ms_max;
        let chats = self.state.chats.iter();
        chats
            .filter(move |(_, chat)| chat.unanswered.values().any(|(_, time_ms)| is_old(*time_ms)))
            .map(|(name, _)| name.as_str())
    }

    /// This attempt is about to be used.
    pub fn put_attempt(&mut self, attempt: u64) {
        self.must_sync = true;
        self.put(Record::attempt(attempt));
    }

    /// See [`crate::inbox::Action::Store`].
    pub fn put_cursor(&mut self, chat: &str, history: u64, seq: u64, acked: u64) {
        self.put(Record::cursor(chat, history, seq, acked));
    }

    /// See [`crate::inbox::Action::StoreComplete`].
    pub fn put_complete(&mut self) {
        // Forgotten, this would be a new device again, and would begin behind what others acknowledged meanwhile.
        self.must_sync = true;
        self.put(Record::complete());
    }

    /// Its user does not want to see this message any more.
    pub fn put_hidden(&mut self, chat: &str, history: u64, seq: u64) {
        if !self.is_hidden(chat, history, seq) {
            self.put(Record::hidden(chat, history, seq));
        }
    }

    /// Whether that was put.
    pub fn is_hidden(&self, chat: &str, history: u64, seq: u64) -> bool {
        self.state.hidden.holds(chat, history, seq)
    }

    /// See [`crate::outbox::Action::StoreStream`].
    pub fn put_stream(&mut self, chat: &str, stream: u64) {
        self.must_sync = true;
        self.put(Record::stream(chat, stream, 1));
    }

    /// See [`crate::outbox::Action::Store`].
    pub fn put_message(&mut self, chat: &str, n: u64, body: impl Into<Body>, now_ms: u64) {
        self.must_sync = true;
        self.put(Record::message(chat, n, body.into(), now_ms));
    }

    /// See [`crate::outbox::Action::StoreAnswered`].
    pub fn put_answered(&mut self, chat: &str, n: u64) {
        self.put(Record::answered(chat, n));
    }

    /// Hands what was put to the system, so that it outlives this process; or says what has to be done before anything that was put may be
    /// acted on, and then [`Store::written`] with what came of it.
    pub fn write(&mut self) -> Result<Option<Write>, StoreError> {
        let pending = std::mem::take(&mut self.pending);
        let must_sync = std::mem::take(&mut self.must_sync);
        let Some(disk) = &mut self.disk else { return Ok(None) };
        if disk.log_bytes + pending.len() as u64 > disk.rewrite_at_bytes {
            // What is pending is in the state already.
            let (folder, bytes, lock) = (disk.folder.clone(), self.state.to_bytes(), disk.lock.clone());
            return Ok(Some(Write(Work::Anew { folder, bytes, _lock: lock })));
        }
        if !pending.is_empty() {
            let error = |error| StoreError::Io { path: disk.folder.join("log"), error };
            (&*disk.log).write_all(&pending).map_err(error)?;
            disk.log_bytes += pending.len() as u64;
        }
        Ok(must_sync.then(|| Write(Work::Sync(disk.log.clone()))))
    }

    /// It was done.
    pub fn written(&mut self, written: Written) {
        if let (Some(disk), Written(Some((log, log_bytes)))) = (&mut self.disk, written) {
            (disk.log, disk.log_bytes) = (Arc::new(log), log_bytes);
            disk.rewrite_at_bytes = REWRITE_BYTES_MIN.max(log_bytes * 4);
        }
    }

    /// Removes the folder: this device will not come back.
    pub fn remove(self) -> Result<(), StoreError> {
        let Some(disk) = self.disk else { return Ok(()) };
        std::fs::remove_dir_all(&disk.folder)
            .map_err(|error| StoreError::Io { path: disk.folder.clone(), error })?;
        // The user's folder goes with its last device; that it is not empty is no error.
        if let Some(user) = disk.folder.parent() {
            let _ = std::fs::remove_dir(user);
        }
        Ok(())
    }

    fn put(&mut self, record: Record) {
        if self.disk.is_some() {
            record.append_to(&mut self.pending);
        }
        self.state.apply(record);
    }
}

/// What waits for the disk, and so is not for the session's thread.
#[derive(Debug)]
pub struct Write(Work);

#[derive(Debug)]
enum Work {
    /// The log is to be durable.
    Sync(Arc<File>),
    /// It is written anew. Nobody else may have the folder before that is done, whoever waits for it.
    Anew { folder: PathBuf, bytes: Vec<u8>, _lock: Arc<Held> },
}

/// What came of a [`Write`]: the new log, if there is one.
#[derive(Debug)]
pub struct Written(Option<(File, u64)>);

impl Write {
    /// Does it.
    pub fn run(self) -> Result<Written, StoreError> {
        let (path, done) = match self.0 {
            Work::Sync(log) => ("state log".into(), log.sync_data().map(|()| None)),
            Work::Anew { folder, bytes, _lock } => (folder.join("log"), rewrite(&folder, &bytes).map(Some)),
        };
        done.map(Written).map_err(|error| StoreError::Io { path, error })
    }
}

/// Writes a new log, durable before it takes the place of the old one.
fn rewrite(folder: &Path, bytes: &[u8]) -> io::Result<(File, u64)> {
    let (path, new_path) = (folder.join("log"), folder.join("log.new"));
    match std::fs::remove_file(&new_path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = create(&new_path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&new_path, &path)?;
    File::open(folder)?.sync_all()?;
    Ok((file, bytes.len() as u64))
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// A log smaller than this is left alone.
const REWRITE_BYTES_MIN: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_lets_go_leaves_no_lock_behind_in_a_program_that_is_starting_another() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path(), "alice", "phone").unwrap();
        let inherited = store.disk.as_ref().unwrap().lock.0.try_clone().unwrap();
        drop(store);
        Store::open(root.path(), "alice", "phone").expect("nobody has it");
        drop(inherited);
    }

    #[test]
    fn what_was_put_is_there_after_a_restart_also_behind_rewrites() {
        let root = tempfile::tempdir().unwrap();
        let mut store = Store::open(root.path(), "alice", "a/b").unwrap();
        assert!(matches!(Store::open(root.path(), "alice", "a/b"), Err(StoreError::Locked(_))));
        Store::open(root.path(), "alice", "other").expect("another device has a lock of its own");
        store.put_attempt(7);
        store.put_complete();
        store.put_stream("a:b", 99);
        for n in 1..=200 {
            store.put_message("a:b", n, vec![0u8; 32 * 1024], 1_000);
            let write = store.write().unwrap().expect("a message is to be durable");
            let written = write.run().unwrap();
            store.written(written);
            if n > 1 {
                store.put_answered("a:b", n - 1);
            }
            store.put_cursor("a:b", 5, n, n - 1);
        }
        assert!(store.write().unwrap().is_none());
        assert!(store.disk.as_ref().unwrap().log_bytes < 2 * REWRITE_BYTES_MIN);
        drop(store);
        let store = Store::open(root.path(), "alice", "a/b").unwrap();
        assert_eq!((store.attempt(), store.is_complete()), (7, true));
        assert_eq!(store.cursors().collect::<Vec<_>>(), [("a:b", 5, 200, 199)]);
        let [chat] = &store.outbox()[..] else { panic!("one chat") };
        assert_eq!((chat.stream, chat.next_n, chat.unanswered.len()), (99, 201, 1));
        assert_eq!(store.overdue(1_500, 1_000).count(), 0);
        assert_eq!(store.overdue(2_500, 1_000).collect::<Vec<_>>(), ["a:b"]);
        store.remove().unwrap();
        assert!(root.path().join("alice").exists(), "the other device is still there");
    }
}

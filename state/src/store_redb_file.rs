//! The file of the redb store: whose it is, what layout it has, and the database in it.
//!
//! Beside FILE stands FILE.lock, locked (flock) for as long as a process has the store, and saying which. redb locks FILE
//! itself, but cannot say who has it.
//!
//! Trap: the lock's text outlives its owner. Only the lock says whether anybody is there.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use parking_lot::RwLock;
use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, RepairSession, WriteTransaction};

use crate::config::StoreConfig;
use crate::store::{CHAT_BUCKETS, StoreError};
use crate::store_redb_history::{self as history, Histories};
use crate::store_redb_migrate::migrate;
use crate::store_redb_read::{META, TABLES};
use crate::store_redb_row::LAYOUT;

/// Why the store does not open.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum OpenError {
    #[error("the store {} is in use by {holder}: stop that one, or set store.url to another file", path.display())]
    Held { path: PathBuf, holder: String },
    #[error("{0}")]
    Layout(String),
    #[error("the store {} cannot be opened: {reason}", path.display())]
    File { path: PathBuf, reason: String },
}

/// The file, ours alone.
#[derive(Debug)]
pub struct StoreFile {
    path: PathBuf,
    cache_bytes_max: usize,
    /// Of the last commit.
    histories: RwLock<Arc<Histories>>,
    /// `None` between a failure and the next successful opening.
    database: RwLock<Option<Database>>,
    _lock: File,
}

impl StoreFile {
    /// Takes the lock, opens or makes the file, repairs it when its last owner was killed, checks or writes its layout.
    pub fn open(path: &Path, config: &StoreConfig) -> Result<StoreFile, OpenError> {
        let failed = |reason: String| OpenError::File { path: path.to_owned(), reason };
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(|e| failed(format!("making its folder: {e}")))?;
        let lock = lock(path)?;
        let began = Instant::now();
        let database = open_database(path, config.cache_bytes_max).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => OpenError::Held {
                path: path.to_owned(),
                holder: "a program that is not a state server".to_owned(),
            },
            error => failed(error.to_string()),
        })?;
        // A new file is there after a power cut only when its folder says so.
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| failed(e.to_string()))?;
        let histories = check_layout(&database, config, path)?;
        tracing::info!(path = %path.display(), ms = began.elapsed().as_millis() as u64, "the store is open");
        Ok(StoreFile {
            path: path.to_owned(),
            cache_bytes_max: config.cache_bytes_max,
            histories: RwLock::new(Arc::new(histories)),
            database: RwLock::new(Some(database)),
            _lock: lock,
        })
    }

    /// As the last commit left them.
    pub fn histories(&self) -> Arc<Histories> {
        self.histories.read().clone()
    }

    /// These are committed.
    pub fn set_histories(&self, histories: Arc<Histories>) {
        *self.histories.write() = histories;
    }

    /// A snapshot.
    pub fn begin_read(&self) -> Result<ReadTransaction, StoreError> {
        let database = self.database.read();
        let database = database.as_ref().ok_or_else(|| self.closed("it failed"))?;
        database.begin_read().map_err(|error| self.closed(error))
    }

    /// A change. Opens the file anew if it was closed.
    pub fn begin_write(&self) -> Result<WriteTransaction, StoreError> {
        if let Some(database) = self.database.read().as_ref() {
            return database.begin_write().map_err(|error| self.closed(error));
        }
        let mut database = self.database.write();
        // A write that failed may still stand in the page cache as if it had not: what is read from here on is what is on disk.
        let cached = File::open(&self.path).map_err(|error| self.closed(error))?;
        posix_fadvise(&cached, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
            .map_err(|error| self.closed(error))?;
        let opened = open_database(&self.path, self.cache_bytes_max).map_err(|error| self.closed(error))?;
        // A commit that failed may have happened.
        if let Some(meta) = read_meta(&opened).map_err(|error| self.closed(error))? {
            self.set_histories(Arc::new(histories_in(&meta)));
        }
        tracing::info!(path = %self.path.display(), "the store is open again");
        database.insert(opened).begin_write().map_err(|error| self.closed(error))
    }

    /// After a failure: redb refuses everything until the file is opened anew.
    pub fn close(&self, why: &str) {
        if self.database.write().take().is_some() {
            tracing::error!(path = %self.path.display(), "the store failed and is opened anew: {why}");
        }
    }

    fn closed(&self, why: impl std::fmt::Display) -> StoreError {
        StoreError::Refused(format!("{} is not open: {why}", self.path.display()))
    }
}

fn open_database(path: &Path, cache_bytes_max: usize) -> Result<Database, redb::DatabaseError> {
    let shown = path.display().to_string();
    // Percent logged last, plus 1; 0: nothing yet.
    let logged = AtomicU64::new(0);
    let repairing = move |repair: &mut RepairSession| {
        let percent = (repair.progress() * 100.0) as u64;
        let before = logged.load(Ordering::Relaxed);
        if before == 0 || percent >= before + 9 {
            logged.store(percent + 1, Ordering::Relaxed);
            tracing::warn!(percent, "the store {shown} was not closed: it is being checked");
        }
    };
    redb::Builder::new().set_cache_size(cache_bytes_max).set_repair_callback(repairing).create(path)
}

/// Our lock on the file beside it, with our name in it.
fn lock(path: &Path) -> Result<File, OpenError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".lock");
    let failed =
        |error: io::Error| OpenError::File { path: path.to_owned(), reason: format!("its lock: {error}") };
    let mut options = OpenOptions::new();
    // Not truncated: it may be another's.
    let mut file =
        options.read(true).write(true).create(true).truncate(false).open(&beside).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            // The name is for people only; what cannot be read is left out.
            let _ = file.read_to_string(&mut text);
            return Err(OpenError::Held { path: path.to_owned(), holder: holder(&text) });
        }
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    let text = format!("pid = {}\nsince_unix_s = {}\n", std::process::id(), unix_s());
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(text.as_bytes()))
        .map_err(failed)?;
    Ok(file)
}

/// What the lock's text says of its owner.
fn holder(text: &str) -> String {
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix('=')?.trim().parse().ok())
    };
    match (value("pid"), value("since_unix_s")) {
        (Some(pid), Some(since)) => {
            let age_s = unix_s().saturating_sub(since);
            format!("process {pid}, which has it for {age_s} s (since Unix time {since})")
        }
        _ => "another process, which is just starting".to_owned(),
    }
}

/// Makes the tables and the meta record, migrates it, or compares it. The histories.
fn check_layout(database: &Database, config: &StoreConfig, path: &Path) -> Result<Histories, OpenError> {
    let failed = |error: redb::Error| OpenError::File { path: path.to_owned(), reason: error.to_string() };
    let Some(mut meta) = read_meta(database).map_err(failed)? else {
        make(database, config).map_err(failed)?;
        return check_layout(database, config, path);
    };
    if meta.get("layout") == Some(&1) {
        migrate(database, usize::MAX).map_err(failed)?;
        meta.insert("layout".to_owned(), LAYOUT);
    }
    for (field, ours) in [("layout", LAYOUT), ("chat_buckets", CHAT_BUCKETS.into())] {
        let stored = meta.get(field).copied().unwrap_or(0);
        if stored != ours {
            return Err(OpenError::Layout(format!(
                "the store {} was made with {field} = {stored}, this server reads {field} = {ours}: use the version \
                 it was made with or a newer one, or another store",
                path.display()
            )));
        }
    }
    Ok(histories_in(&meta))
}

fn histories_in(meta: &HashMap<String, u64>) -> Histories {
    let mut histories = Histories::new(meta.get(history::FILE).copied().unwrap_or(0));
    for (key, value) in meta {
        if let Some(bucket) = history::bucket(key) {
            histories.draw(bucket, *value);
        }
    }
    histories
}

/// `None`: the file is new.
fn read_meta(database: &Database) -> Result<Option<HashMap<String, u64>>, redb::Error> {
    let table = match database.begin_read()?.open_table(META) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut meta = HashMap::new();
    for entry in table.iter()? {
        let (key, value) = entry?;
        meta.insert(key.value().to_owned(), value.value());
    }
    Ok(Some(meta))
}

fn make(database: &Database, config: &StoreConfig) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    for table in TABLES {
        transaction.open_table(table)?;
    }
    {
        let mut meta = transaction.open_table(META)?;
        for (field, value) in [
            ("layout", LAYOUT),
            ("chat_buckets", CHAT_BUCKETS.into()),
            (history::FILE, history::new_history()),
            ("route_buckets", config.route_buckets.into()),
        ] {
            meta.insert(field, value)?;
        }
    }
    transaction.commit()?;
    Ok(())
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

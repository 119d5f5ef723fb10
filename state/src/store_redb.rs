//! The embedded store: one redb file, one process. Its thread writes, and any thread reads.
//!
//! All calls that wait are put into one write transaction and answered after its fsync; so many callers share the cost of
//! one. A call of questions only is answered from the last committed state without waiting for the writer; a mixed
//! one goes to the writer as a whole, which keeps its order.
//!
//! Layout (`store_redb_row` writes it): table `chat` holds a chat's head with the streams used last in one row, older
//! streams, messages and delivered cursors; `recent`, `oldest`, `mark`, `route`, `user`, `name`, `listed`, `forget` and
//! `meta` hold the rest.
//! Chats stand in keys as text: a table from text to number would be one more look-up per chat and transaction, and keys
//! of 8 bytes instead were no faster (1,024 messages a call, 20,000 chats, 2 cores: 24 against 23 µs of CPU and 9.5
//! against 9.4 kB written per message). Nor is a call sorted by chat before it is done: same figures.
//!
//! Trap: redb can do without fsync (`Durability::None`) and can keep savepoints. Both make the file grow, and the first
//! breaks the promise: neither may appear here.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use proto::link;
use proto::wire::Durability;
use tokio::sync::{mpsc, oneshot};

use crate::config::StoreConfig;
use crate::store::{Op, Outcome, Store, StoreError};
use crate::store_redb_file::StoreFile;
use crate::store_redb_marks::LifeMarks;
use crate::store_redb_read as ask;
use crate::store_redb_step::Terms;
use crate::store_redb_writer::{Call, Writer};

pub use crate::store_redb_file::OpenError;

/// redb.
pub struct RedbStore {
    file: Arc<StoreFile>,
    response_max: Duration,
    /// `None` only while it is being dropped.
    calls: Option<mpsc::Sender<Call>>,
    writer: Option<JoinHandle<u64>>,
}

/// Calls that may wait for the writer; beyond that callers wait to hand theirs over.
const CALLS_WAITING_MAX: usize = 1_024;

impl RedbStore {
    /// Opens or makes the file and starts the writer. After a kill this reads the whole file.
    pub async fn open(path: &Path, config: &StoreConfig) -> Result<RedbStore, OpenError> {
        let (at, settings) = (path.to_owned(), config.clone());
        let failed = |reason: String| OpenError::File { path: path.to_owned(), reason };
        let file = tokio::task::spawn_blocking(move || StoreFile::open(&at, &settings))
            .await
            .map_err(|error| failed(error.to_string()))??;
        let file = Arc::new(file);
        let terms = Terms {
            dedupe_s: u64::from(config.dedupe_days) * 86_400,
            named_us: u64::from(config.named_ids_hours) * 3_600_000_000,
            messages_max: config.retention_messages_max,
            kept_us: u64::from(config.retention_days) * 86_400 * 1_000_000,
        };
        let snapshot = file.begin_read().map_err(|error| failed(error.to_string()))?;
        let marks = LifeMarks::read(&snapshot).map_err(|error| failed(error.to_string()))?;
        drop(snapshot);
        let (sender, calls) = mpsc::channel(CALLS_WAITING_MAX);
        let writer = Writer::new(file.clone(), terms, marks, calls);
        let writer = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || writer.run())
            .map_err(|error| failed(error.to_string()))?;
        Ok(RedbStore {
            file,
            response_max: Duration::from_millis(config.response_ms_max),
            calls: Some(sender),
            writer: Some(writer),
        })
    }

    #[cfg(test)]
    pub(crate) fn file(&self) -> &StoreFile {
        &self.file
    }

    async fn read(&self, ops: Vec<Op>) -> Vec<Outcome> {
        let count = ops.len();
        let file = self.file.clone();
        // A cold page is a disk read, which the server's one thread must not wait for.
        let read = tokio::task::spawn_blocking(move || match file.begin_read() {
            Ok(transaction) => {
                let histories = file.histories();
                ops.iter().map(|op| ask::answer(&transaction, &histories, op)).collect()
            }
            Err(error) => vec![Err(error); ops.len()],
        });
        read.await.unwrap_or_else(|error| vec![Err(StoreError::Refused(error.to_string())); count])
    }

    async fn write(&self, ops: Vec<Op>) -> Vec<Outcome> {
        let count = ops.len();
        let (answer, answered) = oneshot::channel();
        let gone = || vec![Err(StoreError::Unknown("the store's thread has ended".to_owned())); count];
        let Some(calls) = &self.calls else { return gone() };
        if calls.send(Call { ops, answer }).await.is_err() {
            return gone();
        }
        answered.await.unwrap_or_else(|_| gone())
    }
}

#[async_trait::async_trait]
impl Store for RedbStore {
    async fn apply(&self, ops: &[Op]) -> Vec<Outcome> {
        if ops.is_empty() {
            return Vec::new();
        }
        let answers = async {
            if ops.iter().all(ask::is_question) {
                self.read(ops.to_vec()).await
            } else {
                self.write(ops.to_vec()).await
            }
        };
        match tokio::time::timeout(self.response_max, answers).await {
            Ok(outcomes) => outcomes,
            Err(_) => vec![Err(self.late()); ops.len()],
        }
    }

    async fn durability(&self) -> Result<(Durability, String), StoreError> {
        // A call of nothing: answered when the writer lives and its file is open.
        let (answer, answered) = oneshot::channel();
        let asked = async {
            let gone = || StoreError::Unknown("the store's thread has ended".to_owned());
            let calls = self.calls.as_ref().ok_or_else(gone)?;
            calls.send(Call { ops: Vec::new(), answer }).await.map_err(|_| gone())?;
            answered.await.map_err(|_| StoreError::Refused("the store's file is not open".to_owned()))
        };
        tokio::time::timeout(self.response_max, asked).await.unwrap_or_else(|_| Err(self.late()))?;
        Ok((Durability::Strict, "redb fsyncs before it answers".to_owned()))
    }

    fn stored(&self) -> link::Stored {
        link::Stored { contents: self.file.histories().file(), stamp: 0 }
    }
}

impl RedbStore {
    fn late(&self) -> StoreError {
        StoreError::Unknown(format!("no answer within {} ms", self.response_max.as_millis()))
    }
}

/// Lets the writer finish and closes the file, so that the next opening has nothing to repair.
impl Drop for RedbStore {
    fn drop(&mut self) {
        drop(self.calls.take());
        if let Some(writer) = self.writer.take() {
            // A panic there has been printed, and its callers have been told.
            let _ = writer.join();
        }
    }
}

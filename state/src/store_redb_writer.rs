//! The thread that writes to the redb store: takes all calls that wait, does them in one transaction, commits with
//! fsync, answers.
//!
//! Trap: a commit that failed may have happened. Its callers are told so, and the file is opened anew, because redb
//! refuses everything until then.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot};

use crate::store::{Op, Outcome, StoreError};
use crate::store_redb_file::StoreFile;
use crate::store_redb_marks::LifeMarks;
use crate::store_redb_step::{Finished, Step, Terms};

/// Operations to be done together, and who waits for their answers. Dropped unanswered: the file is not open.
#[derive(Debug)]
pub struct Call {
    /// In their order.
    pub ops: Vec<Op>,
    /// One answer each.
    pub answer: oneshot::Sender<Vec<Outcome>>,
}

/// The thread.
pub struct Writer {
    file: Arc<StoreFile>,
    terms: Terms,
    calls: mpsc::Receiver<Call>,
    marks: LifeMarks,
    forgot: Option<Instant>,
}

/// A transaction takes no further call when it has so many operations: the first ones wait for the last.
const GROUP_OPS_MAX: usize = 512;

/// Time between two looks for streams and names to forget.
const FORGET_EVERY: Duration = Duration::from_secs(10);

impl Writer {
    /// Of this file.
    pub fn new(file: Arc<StoreFile>, terms: Terms, marks: LifeMarks, calls: mpsc::Receiver<Call>) -> Self {
        Writer { file, terms, calls, marks, forgot: None }
    }

    /// Until nobody can call any more. How many transactions it took.
    pub fn run(mut self) -> u64 {
        let mut transactions = 0;
        while let Some(first) = self.calls.blocking_recv() {
            let mut count = first.ops.len();
            let mut group = vec![first];
            while count < GROUP_OPS_MAX
                && let Ok(call) = self.calls.try_recv()
            {
                count += call.ops.len();
                group.push(call);
            }
            // Who stopped waiting was told "unknown" and will ask again.
            group.retain(|call| !call.answer.is_closed());
            transactions += 1;
            match self.commit(&group) {
                Ok(outcomes) => {
                    for (call, outcomes) in group.into_iter().zip(outcomes) {
                        let _ = call.answer.send(outcomes);
                    }
                }
                Err(error) => {
                    for call in group.into_iter().filter(|call| !call.ops.is_empty()) {
                        let _ = call.answer.send(vec![Err(error.clone()); call.ops.len()]);
                    }
                }
            }
        }
        self.write_marks();
        transactions
    }

    /// The last ones, that found no company.
    fn write_marks(&mut self) {
        if !self.marks.is_unwritten() {
            return;
        }
        let write = || -> Result<(), String> {
            let transaction = self.file.begin_write().map_err(|error| error.to_string())?;
            self.marks.write(&transaction).map_err(|error| error.to_string())?;
            transaction.commit().map_err(|error| error.to_string())
        };
        if let Err(error) = write() {
            tracing::warn!(error, "the last marks are not written");
        }
    }

    /// All of it or, with an error, nothing that anybody may rely on.
    fn commit(&mut self, group: &[Call]) -> Result<Vec<Vec<Outcome>>, StoreError> {
        let transaction = self.file.begin_write().inspect_err(|error| self.file.close(&error.to_string()))?;
        let histories = self.file.histories();
        let mut step = Step::new(&transaction, self.terms, histories, &mut self.marks, unix_us());
        let done = || -> Result<(Vec<Vec<Outcome>>, Finished), redb::Error> {
            let mut outcomes = Vec::with_capacity(group.len());
            for call in group {
                outcomes.push(call.ops.iter().map(|op| step.apply(op)).collect::<Result<_, _>>()?);
            }
            if self.forgot.is_none_or(|forgot| forgot.elapsed() > FORGET_EVERY) {
                step.forget()?;
                let more = step.forget_names()?;
                self.forgot = (!more).then(Instant::now);
            }
            Ok((outcomes, step.finish()?))
        };
        match done() {
            // Nothing changed, so there is nothing to wait for: all that was read is on disk.
            Ok((outcomes, finished)) if !finished.changed => Ok(outcomes),
            Ok((outcomes, finished)) => match transaction.commit() {
                Ok(()) => {
                    if finished.marked {
                        self.marks.written();
                    }
                    self.file.set_histories(finished.histories);
                    Ok(outcomes)
                }
                Err(error) => {
                    self.file.close(&error.to_string());
                    Err(StoreError::Unknown(error.to_string()))
                }
            },
            Err(error) => {
                drop(transaction);
                self.file.close(&error.to_string());
                Err(StoreError::Refused(error.to_string()))
            }
        }
    }
}

fn unix_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::StoreConfig;
    use crate::store::{Answer, Store};
    use crate::store_redb::RedbStore;

    /// After a failure of the file the next call opens it again, and finds what was there.
    #[tokio::test]
    async fn a_closed_file_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.redb");
        let store = RedbStore::open(&path, &StoreConfig::default()).await.unwrap();
        let numbers = [Op::UserNumbers { count: 1 }];
        let Ok(Answer::UserNumbers(first)) = store.apply(&numbers).await[0] else { panic!() };
        store.file().close("a test");
        let question = [Op::User { name: "nobody".into() }];
        assert!(matches!(store.apply(&question).await[..], [Err(StoreError::Refused(_))]));
        store.durability().await.unwrap();
        assert_eq!(store.apply(&question).await, [Ok(Answer::User(None))]);
        let Ok(Answer::UserNumbers(second)) = store.apply(&numbers).await[0] else { panic!() };
        assert!(second > first);
    }

    /// Callers at once share transactions: far fewer fsyncs than calls.
    #[tokio::test]
    async fn calls_that_wait_share_a_commit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.redb");
        let file = Arc::new(StoreFile::open(&path, &StoreConfig::default()).unwrap());
        let (sender, calls) = mpsc::channel(100);
        let answers: Vec<_> = (0..100)
            .map(|_| {
                let (answer, answered) = oneshot::channel();
                let call = Call { ops: vec![Op::UserNumbers { count: 1 }], answer };
                sender.try_send(call).expect("there is room");
                answered
            })
            .collect();
        drop(sender);
        let terms = Terms { dedupe_s: 1, named_us: 1, messages_max: 0, kept_us: 0 };
        let writer = Writer::new(file, terms, LifeMarks::default(), calls);
        let commits = std::thread::spawn(move || writer.run()).join().unwrap();
        assert_eq!(commits, 1);
        let mut numbers = Vec::new();
        for answer in answers {
            let Ok(Answer::UserNumbers(number)) = answer.await.unwrap()[0] else { panic!() };
            numbers.push(number);
        }
        assert_eq!(numbers, (numbers[0]..numbers[0] + 100).collect::<Vec<_>>(), "in the order of the calls");
    }
}

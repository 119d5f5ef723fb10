//! Readiness: named conditions that must all hold, and facts worth showing beside them. Cloneable, any thread.
//!
//! Trap: a condition that nobody has set does not exist. Declare with [`Readiness::starting`] what must come true before
//! the server counts as ready.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

/// Whether a server can do its work, and if not, why.
#[derive(Debug, Clone)]
pub struct Readiness {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    conditions: Mutex<BTreeMap<String, Result<(), String>>>,
    notes: Mutex<BTreeMap<String, String>>,
    ready: watch::Sender<bool>,
}

impl Readiness {
    /// Without conditions, and so ready. The version is noted.
    pub fn new() -> Self {
        Self::starting(&[])
    }

    /// Not ready until each of these conditions has been set to `Ok`.
    pub fn starting(conditions: &[&str]) -> Self {
        let waiting = |name: &&str| ((*name).to_owned(), Err("not reached yet".to_owned()));
        let readiness = Self {
            inner: Arc::new(Inner {
                conditions: Mutex::new(conditions.iter().map(waiting).collect()),
                notes: Mutex::default(),
                ready: watch::Sender::new(conditions.is_empty()),
            }),
        };
        readiness.note("version", crate::VERSION);
        readiness
    }

    /// Sets a condition: it holds, or the reason why not.
    pub fn set(&self, name: &str, state: Result<(), String>) {
        let mut conditions = self.inner.conditions.lock();
        conditions.insert(name.to_owned(), state);
        let ready = conditions.values().all(Result::is_ok);
        // Under the lock, so that two threads cannot publish in the wrong order.
        self.inner.ready.send_if_modified(|now| std::mem::replace(now, ready) != ready);
    }

    /// The conditions that do not hold, each with its reason, by name.
    pub fn reasons(&self) -> Vec<(String, String)> {
        let conditions = self.inner.conditions.lock();
        let failing = conditions.iter().filter_map(|(name, state)| Some((name, state.as_ref().err()?)));
        failing.map(|(name, reason)| (name.clone(), reason.clone())).collect()
    }

    /// Whether all conditions hold.
    pub fn is_ready(&self) -> bool {
        *self.inner.ready.borrow()
    }

    /// Follows [`Readiness::is_ready`].
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.inner.ready.subscribe()
    }

    /// Shows a fact in `/readyz`, such as `durability=strict`. The latest value of a key stands.
    pub fn note(&self, key: &str, value: impl Into<String>) {
        self.inner.notes.lock().insert(key.to_owned(), value.into());
    }

    /// All facts noted.
    pub fn notes(&self) -> BTreeMap<String, String> {
        self.inner.notes.lock().clone()
    }
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_every_condition_holds() {
        let readiness = Readiness::starting(&["registry", "store"]);
        assert!(!readiness.is_ready());
        readiness.set("registry", Ok(()));
        assert_eq!(readiness.reasons(), [("store".to_owned(), "not reached yet".to_owned())]);
        let watch = readiness.watch();
        readiness.clone().set("store", Ok(()));
        assert!(readiness.is_ready() && *watch.borrow());
        readiness.set("store", Err("gone".into()));
        assert!(!*watch.borrow());
    }
}

//! A registration's claim to a name: the lock, and the file that says who is there. Blocking; threads for blocking work.
//!
//! Trap: a process can register one name twice, and then the later registration counts, as it does on etcd. The lock is
//! held once for both, so what the earlier one still does must not touch the files: every deed asks whose turn it is.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::lock::Lock;

/// Where the files of one endpoint lie.
#[derive(Debug, Clone)]
pub(super) struct Paths {
    /// The endpoint, as JSON.
    pub(super) endpoint: PathBuf,
    /// Locked by the living owner.
    pub(super) lock: PathBuf,
    /// Becomes the endpoint by being renamed, so that nobody reads half of it. Only the owner writes it.
    next: PathBuf,
}

impl Paths {
    /// A suffix each: no two ids share a file, whatever is in them.
    pub(super) fn new(folder: &Path, id: &str) -> Self {
        let path = |suffix: &str| folder.join(format!("{id}.{suffix}"));
        Self { endpoint: path("json"), lock: path("lock"), next: path("next") }
    }

    /// Removes what a dead owner left. Living ones are not touched, and nobody takes this for one.
    pub(super) fn clean(&self) -> io::Result<()> {
        // With a shared lock: an exclusive one would make the dead look alive once more.
        let Some(vacant) = Lock::try_keep_out(&self.lock)? else { return Ok(()) };
        remove(&self.endpoint)?;
        remove(&self.next)?;
        drop(vacant);
        match Lock::try_own(&self.lock)? {
            Some(lock) if !self.endpoint.exists() => lock.remove(),
            _ => Ok(()),
        }
    }
}

/// What [`Claim::keep`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    /// The files say what they should.
    Yes,
    /// A later registration of this process has the name now.
    Superseded,
    /// Somebody removed the lock file, and another may own the name by now.
    Lost,
}

/// A living name. Dropping it leaves the files as a killed process does: without a lock, and so dead.
#[derive(Debug)]
pub(super) struct Claim {
    paths: Paths,
    turn: u64,
}

/// The locks of this process by path, each with the turn that it is held for. Process ids would not do to know our own:
/// two containers that share the directory may both be process 1.
static HELD: Mutex<BTreeMap<PathBuf, Held>> = Mutex::new(BTreeMap::new());
static TURNS: AtomicU64 = AtomicU64::new(0);

#[derive(Debug)]
struct Held {
    lock: Lock,
    turn: u64,
}

impl Claim {
    /// One try. `None`: another process has the name, or looks at it just now.
    pub(super) fn try_take(paths: &Paths) -> io::Result<Option<Self>> {
        let mut held = HELD.lock();
        let turn = TURNS.fetch_add(1, Ordering::Relaxed);
        // Made only when it is one: dropping a claim locks HELD.
        let claim = || Self { paths: paths.clone(), turn };
        if let Some(ours) = held.get_mut(&paths.lock)
            && ours.lock.is_in_place()
        {
            ours.turn = turn;
            return Ok(Some(claim()));
        }
        let Some(mut lock) = Lock::try_own(&paths.lock)? else { return Ok(None) };
        lock.sign()?;
        held.insert(paths.lock.clone(), Held { lock, turn });
        Ok(Some(claim()))
    }

    /// Writes the endpoint if it is `news`, or if its file has gone.
    pub(super) fn keep(&self, endpoint: &[u8], news: bool) -> io::Result<Kept> {
        // Held while writing, so that a later registration cannot be overtaken by this write.
        let held = HELD.lock();
        match held.get(&self.paths.lock).filter(|ours| ours.turn == self.turn) {
            None => return Ok(Kept::Superseded),
            Some(ours) if !ours.lock.is_in_place() => return Ok(Kept::Lost),
            Some(_) => {}
        }
        if news || !self.paths.endpoint.exists() {
            fs::write(&self.paths.next, endpoint)?;
            fs::rename(&self.paths.next, &self.paths.endpoint)?;
        }
        Ok(Kept::Yes)
    }

    /// Gives the name back and removes its files.
    pub(super) fn release(&self) -> io::Result<()> {
        let mut held = HELD.lock();
        let Some(ours) = self.withdraw(&mut held) else { return Ok(()) };
        if ours.lock.is_in_place() {
            remove(&self.paths.endpoint)?;
            ours.lock.remove()?;
        }
        Ok(())
    }

    fn withdraw(&self, held: &mut BTreeMap<PathBuf, Held>) -> Option<Held> {
        let ours = held.get(&self.paths.lock).is_some_and(|ours| ours.turn == self.turn);
        if ours { held.remove(&self.paths.lock) } else { None }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        drop(self.withdraw(&mut HELD.lock()));
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::super::lock::is_owned;
    use super::*;

    fn paths() -> (tempfile::TempDir, Paths) {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::new(folder.path(), "g-1");
        (folder, paths)
    }

    fn files(folder: &tempfile::TempDir) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_later_claim_of_a_process_counts() {
        let (folder, paths) = paths();
        let first = Claim::try_take(&paths).unwrap().unwrap();
        assert_eq!(first.keep(b"1", true).unwrap(), Kept::Yes);
        let second = Claim::try_take(&paths).unwrap().unwrap();
        assert_eq!(second.keep(b"2", true).unwrap(), Kept::Yes);
        assert_eq!(first.keep(b"1", true).unwrap(), Kept::Superseded);
        first.release().unwrap();
        drop(first);
        assert!(is_owned(&paths.lock).unwrap());
        assert_eq!(fs::read(&paths.endpoint).unwrap(), b"2");
        second.release().unwrap();
        assert!(files(&folder).is_empty());
    }

    #[test]
    fn what_the_dead_leave_is_cleaned_and_the_living_are_not_touched() {
        let (folder, paths) = paths();
        let claim = Claim::try_take(&paths).unwrap().unwrap();
        claim.keep(b"1", true).unwrap();
        paths.clean().unwrap();
        assert_eq!(files(&folder), ["g-1.json", "g-1.lock"]);
        drop(claim);
        assert_eq!(files(&folder), ["g-1.json", "g-1.lock"]);
        paths.clean().unwrap();
        assert!(files(&folder).is_empty());
        // An endpoint without a lock file has no owner either.
        fs::write(&paths.endpoint, "1").unwrap();
        paths.clean().unwrap();
        assert!(files(&folder).is_empty());
    }

    #[test]
    fn a_name_of_another_is_not_taken() {
        let (_folder, paths) = paths();
        let others = Lock::try_own(&paths.lock).unwrap().unwrap();
        assert!(Claim::try_take(&paths).unwrap().is_none());
        drop(others);
        assert!(Claim::try_take(&paths).unwrap().is_some());
    }

    #[test]
    fn removed_files_come_back_or_are_known_to_be_lost() {
        let (folder, paths) = paths();
        let claim = Claim::try_take(&paths).unwrap().unwrap();
        claim.keep(b"1", true).unwrap();
        fs::remove_file(&paths.endpoint).unwrap();
        assert_eq!(claim.keep(b"1", false).unwrap(), Kept::Yes);
        assert!(paths.endpoint.exists());
        fs::remove_file(&paths.lock).unwrap();
        assert_eq!(claim.keep(b"1", false).unwrap(), Kept::Lost);
        // Even within one process the name is then taken anew, under a lock that others see.
        let again = Claim::try_take(&paths).unwrap().unwrap();
        assert!(is_owned(&paths.lock).unwrap());
        assert_eq!(claim.keep(b"1", true).unwrap(), Kept::Superseded);
        again.release().unwrap();
        assert!(!files(&folder).contains(&"g-1.lock".to_owned()));
    }
}

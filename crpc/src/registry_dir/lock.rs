//! Lock files: whoever holds the exclusive advisory lock on `ID.lock` is alive. Blocking; threads for blocking work.
//!
//! Trap: a lock belongs to an inode, and a file can be removed while somebody waits for its lock. So a lock counts only
//! when its inode is still the one at the path, and only its exclusive holder removes a lock file. And every lock is
//! given back by name, never by closing alone: a thread that takes a copy of the fd table (a gateway's worker) copies
//! open locks too, and such a copy would hold them for ever.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A lock on the file at a path, given back when dropped or when the process ends, however it ends.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    path: PathBuf,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    /// For the living.
    Exclusive,
    /// For whoever wants to know that nobody lives there, as long as it looks.
    Shared,
}

impl Lock {
    /// One try to become the owner. `None`: somebody lives there, or looks at it just now.
    pub(super) fn try_own(path: &Path) -> io::Result<Option<Self>> {
        Self::try_take(path, Kind::Exclusive)
    }

    /// One try to keep owners out. `None`: one is in.
    pub(super) fn try_keep_out(path: &Path) -> io::Result<Option<Self>> {
        Self::try_take(path, Kind::Shared)
    }

    fn try_take(path: &Path, kind: Kind) -> io::Result<Option<Self>> {
        for _ in 0..TRIES {
            // Two may create it at once; both get the same file.
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
            let taken = match kind {
                Kind::Exclusive => file.try_lock(),
                Kind::Shared => file.try_lock_shared(),
            };
            match taken {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error),
            }
            let lock = Self { file, path: path.to_owned() };
            if lock.is_in_place() {
                return Ok(Some(lock));
            }
        }
        // Removed under our hands each time: others are at it.
        Ok(None)
    }

    /// Whether the locked file is still the one that others find.
    pub(super) fn is_in_place(&self) -> bool {
        let inode = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        match (self.file.metadata(), fs::metadata(&self.path)) {
            (Ok(ours), Ok(theirs)) => inode(ours) == inode(theirs),
            _ => false,
        }
    }

    /// Writes this process's id into it, for [`holder`].
    pub(super) fn sign(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        writeln!(self.file, "{}", std::process::id())
    }

    /// Gives an owned lock back, and removes the file.
    pub(super) fn remove(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing would do, but for copies of the descriptor; see the trap above.
        let _ = self.file.unlock();
    }
}

/// Whether an owner lives there. Never creates a file, and needs no right to write.
pub(super) fn is_owned(path: &Path) -> io::Result<bool> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened?,
    };
    match file.try_lock_shared() {
        Ok(()) => file.unlock().map(|()| false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Who says to own it, for people.
pub(super) fn holder(path: &Path) -> String {
    let signed = fs::read_to_string(path).unwrap_or_default();
    signed.trim().parse::<u32>().map_or("another process".into(), |pid| format!("process {pid}"))
}

/// Each failed try means that somebody else went through in between.
const TRIES: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    #[test]
    fn one_owns_and_all_see_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.lock");
        assert!(!is_owned(&path).unwrap() && !path.exists());
        let mut lock = Lock::try_own(&path).unwrap().unwrap();
        lock.sign().unwrap();
        assert!(Lock::try_own(&path).unwrap().is_none());
        assert!(Lock::try_keep_out(&path).unwrap().is_none());
        assert!(is_owned(&path).unwrap());
        assert_eq!(holder(&path), format!("process {}", std::process::id()));
        drop(lock);
        assert!(!is_owned(&path).unwrap());
        Lock::try_own(&path).unwrap().unwrap().remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_copied_descriptor_does_not_keep_a_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.lock");
        let lock = Lock::try_own(&path).unwrap().unwrap();
        let _copy = lock.file.try_clone().unwrap();
        drop(lock);
        assert!(!is_owned(&path).unwrap());
    }

    #[test]
    fn there_is_never_a_second_owner_though_files_come_and_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.lock");
        let (owned, times) = (AtomicBool::new(false), AtomicU32::new(0));
        let work = |thread: u32| {
            for turn in 0..2_000 {
                if let Some(lock) = Lock::try_own(&path).unwrap() {
                    assert!(!owned.swap(true, Ordering::SeqCst), "two owners");
                    times.fetch_add(1, Ordering::SeqCst);
                    owned.store(false, Ordering::SeqCst);
                    if (turn + thread).is_multiple_of(2) {
                        lock.remove().unwrap();
                    }
                }
                let _ = is_owned(&path).unwrap();
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|thread| drop(scope.spawn(move || work(thread)))));
        assert!(times.load(Ordering::SeqCst) > 1_000, "{times:?}");
    }
}

//! The append-only files of a Redis that does not run: found, cut, flipped, copied and put back.
//!
//! Trap: a Redis 7 keeps a base and increments under `appendonlydir/`; what was written last is in the increment with the
//! highest number. A running Redis holds its file open and would write behind a cut.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::ToolError;
use crate::supervisor::AOF_FOLDER as FOLDER;

/// The file that was appended to last.
pub fn tail(redis_folder: &Path) -> Result<PathBuf, ToolError> {
    let folder = redis_folder.join(FOLDER);
    let entries =
        std::fs::read_dir(&folder).map_err(ToolError::io(format!("cannot list {}", folder.display())))?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .filter_map(|path| Some((increment(path.file_name()?.to_str()?)?, path)))
        .max()
        .map(|(_, path)| path)
        .ok_or_else(|| ToolError::Failed(format!("no append-only file in {}", folder.display())))
}

/// `appendonly.aof.N.incr.aof` → N.
fn increment(name: &str) -> Option<u64> {
    name.strip_suffix(".incr.aof")?.rsplit_once('.')?.1.parse().ok()
}

/// How long a file is.
pub fn bytes(file: &Path) -> Result<u64, ToolError> {
    std::fs::metadata(file)
        .map(|meta| meta.len())
        .map_err(ToolError::io(format!("cannot see {}", file.display())))
}

/// Leaves the first so many bytes.
pub fn cut(file: &Path, bytes: u64) -> Result<(), ToolError> {
    let opened = OpenOptions::new().write(true).open(file);
    opened
        .and_then(|opened| opened.set_len(bytes).and_then(|()| opened.sync_all()))
        .map_err(ToolError::io(format!("cannot cut {}", file.display())))
}

/// Adds bytes at the end, as a write that was under way.
pub fn append(file: &Path, bytes: &[u8]) -> Result<(), ToolError> {
    let opened = OpenOptions::new().append(true).open(file);
    opened
        .and_then(|mut file| file.write_all(bytes))
        .map_err(ToolError::io(format!("cannot add to {}", file.display())))
}

/// Turns bits of the byte at this place.
pub fn flip(file: &Path, at: u64, bits: u8) -> Result<(), ToolError> {
    let flip = || -> std::io::Result<()> {
        let mut opened = OpenOptions::new().read(true).write(true).open(file)?;
        let mut byte = [0];
        opened.seek(SeekFrom::Start(at))?;
        opened.read_exact(&mut byte)?;
        opened.seek(SeekFrom::Start(at))?;
        opened.write_all(&[byte[0] ^ bits])
    };
    flip().map_err(ToolError::io(format!("cannot flip a byte of {}", file.display())))
}

/// Every place at which these bytes stand.
pub fn find(file: &Path, wanted: &[u8]) -> Result<Vec<u64>, ToolError> {
    let mut all = Vec::new();
    File::open(file)
        .and_then(|mut opened| opened.read_to_end(&mut all))
        .map_err(ToolError::io(format!("cannot read {}", file.display())))?;
    Ok(all
        .windows(wanted.len().max(1))
        .enumerate()
        .filter(|(_, at)| *at == wanted)
        .map(|(at, _)| at as u64)
        .collect())
}

/// A copy of all append-only files of a Redis.
#[derive(Debug)]
pub struct Copy {
    folder: tempfile::TempDir,
}

impl Copy {
    /// Takes it. Of a running Redis it is what a backup of that moment would be: a prefix, perhaps torn at its end.
    pub fn take(redis_folder: &Path) -> Result<Copy, ToolError> {
        let folder = tempfile::tempdir().map_err(ToolError::io("cannot make a folder for a copy"))?;
        copy_files(&redis_folder.join(FOLDER), folder.path())?;
        Ok(Copy { folder })
    }

    /// Puts it in the place of what is there.
    pub fn put_back(&self, redis_folder: &Path) -> Result<(), ToolError> {
        erase(redis_folder)?;
        copy_files(self.folder.path(), &redis_folder.join(FOLDER))
    }
}

/// Removes all append-only files: the Redis comes back empty.
pub fn erase(redis_folder: &Path) -> Result<(), ToolError> {
    let folder = redis_folder.join(FOLDER);
    std::fs::remove_dir_all(&folder).map_err(ToolError::io(format!("cannot remove {}", folder.display())))
}

fn copy_files(from: &Path, to: &Path) -> Result<(), ToolError> {
    let copy = || -> std::io::Result<()> {
        std::fs::create_dir_all(to)?;
        for entry in std::fs::read_dir(from)? {
            let entry = entry?;
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
        Ok(())
    };
    copy().map_err(ToolError::io(format!("cannot copy {} to {}", from.display(), to.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_highest_increment() {
        let folder = tempfile::tempdir().unwrap();
        let files = folder.path().join(FOLDER);
        std::fs::create_dir(&files).unwrap();
        for name in [
            "appendonly.aof.manifest",
            "appendonly.aof.1.base.rdb",
            "appendonly.aof.9.incr.aof",
            "appendonly.aof.10.incr.aof",
        ] {
            std::fs::write(files.join(name), name).unwrap();
        }
        let tail = tail(folder.path()).unwrap();
        assert!(tail.ends_with("appendonly.aof.10.incr.aof"));
        let copy = Copy::take(folder.path()).unwrap();
        assert_eq!(find(&tail, b"aof").unwrap(), [11, 23]);
        flip(&tail, 11, 1).unwrap();
        assert_eq!(find(&tail, b"aof").unwrap(), [23]);
        cut(&tail, 12).unwrap();
        append(&tail, b"xy").unwrap();
        assert_eq!(bytes(&tail).unwrap(), 14);
        copy.put_back(folder.path()).unwrap();
        assert_eq!(find(&tail, b"aof").unwrap(), [11, 23]);
        erase(folder.path()).unwrap();
        assert!(super::tail(folder.path()).is_err());
    }
}

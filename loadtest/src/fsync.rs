//! How long this disk takes to make 4 KiB durable: to be printed beside every durable figure. Main thread, while no load
//! runs.
//!
//! Trap: it varies by a factor of twenty from one minute to the next on shared machines, so a probe says something only
//! about its own run.

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use hdrhistogram::Histogram;

use crate::engine::histogram;
use crate::monitor::RunError;

/// Writes and syncs a file in a directory, many times.
#[derive(Debug)]
pub struct FsyncProbe {
    folder: PathBuf,
    times: Histogram<u64>,
}

impl FsyncProbe {
    /// In `folder`; without one, in `target/` if there is one, else in the temp dir.
    pub fn new(folder: Option<&Path>) -> FsyncProbe {
        let target = Path::new("target");
        let folder = match folder {
            Some(folder) => folder.to_owned(),
            None if target.is_dir() => target.to_owned(),
            None => std::env::temp_dir(),
        };
        FsyncProbe { folder, times: histogram(3) }
    }

    /// One round of a hundred.
    pub fn measure(&mut self) -> Result<(), RunError> {
        let path = self.folder.join(format!("fsync-probe-{}", std::process::id()));
        let result = self.write(&path);
        // It may not exist; the write's own error says why.
        let _ = std::fs::remove_file(&path);
        result.map_err(|error| RunError::Io {
            what: format!("cannot measure fsync in {}", self.folder.display()),
            error,
        })
    }

    /// Where.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A quantile, milliseconds.
    pub fn millis(&self, quantile: f64) -> f64 {
        crate::engine::millis(&self.times, quantile).unwrap_or(0.0)
    }

    fn write(&mut self, path: &Path) -> std::io::Result<()> {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).open(path)?;
        let block = [0x5a; 4096];
        // Appends for a while, as a log does, without growing without end.
        for round in 0..WRITES {
            if round % 64 == 0 {
                file.seek(SeekFrom::Start(0))?;
            }
            let start = Instant::now();
            file.write_all(&block)?;
            file.sync_data()?;
            self.times.saturating_record(start.elapsed().as_micros() as u64);
        }
        Ok(())
    }
}

const WRITES: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_measures_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut probe = FsyncProbe::new(Some(folder.path()));
        probe.measure().unwrap();
        assert!(probe.millis(0.5) > 0.0 && probe.millis(0.99) >= probe.millis(0.5));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(FsyncProbe::new(Some(Path::new("/no/such/folder"))).measure().is_err());
    }
}

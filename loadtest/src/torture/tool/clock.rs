//! A clock that jumps under a running process, by libfaketime. What a process is started with is given as environment; the
//! jump itself is a line in a file that the library reads at every call.
//!
//! Trap: only the wall clock moves. Timers run on the monotonic one, which no machine sets; a tool that moved both would show
//! storms that cannot happen.

use std::path::{Path, PathBuf};

use super::ToolError;

/// See the head of this file.
#[derive(Debug)]
pub struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    /// Correct at first; its file lies in `folder`.
    pub fn make(folder: &Path) -> Result<Clock, ToolError> {
        let library = LIBRARIES.iter().map(PathBuf::from).find(|path| path.is_file());
        let library = library
            .ok_or_else(|| ToolError::Missing("needs libfaketime, of the package libfaketime".into()))?;
        let clock = Clock { library, file: folder.join("clock") };
        clock.jump(0)?;
        Ok(clock)
    }

    /// What a process needs to live by it.
    pub fn environment(&self) -> Vec<(String, String)> {
        [
            ("LD_PRELOAD", self.library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.display().to_string()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("DONT_FAKE_MONOTONIC", "1".to_owned()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
    }

    /// From now on so many seconds off.
    pub fn jump(&self, seconds: i64) -> Result<(), ToolError> {
        // Renamed into place: a reader never sees half a line.
        let half = self.file.with_extension("new");
        std::fs::write(&half, format!("{seconds:+}\n"))
            .and_then(|()| std::fs::rename(&half, &self.file))
            .map_err(ToolError::io("cannot write the clock's file"))
    }
}

/// Where Debian puts it; the variant for programs with threads.
const LIBRARIES: [&str; 3] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/faketime/libfaketimeMT.so.1",
];

//! A disk so small that it gets full: a tmpfs, mounted in the process's own mounts and unmounted on drop.
//!
//! Trap: it can be unmounted only after whoever has files there has ended; so it must outlive the server that writes to it.
//! The drop detaches it all the same, and the memory is freed with the last file.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{ToolError, namespace};

/// See the head of this file.
#[derive(Debug)]
pub struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    /// With so much room.
    pub fn mount(bytes: u64) -> Result<SmallDisk, ToolError> {
        namespace::need()?;
        let folder = tempfile::Builder::new().prefix("rookery-disk-").tempdir();
        let folder = folder.map_err(ToolError::io("cannot make a folder for a small disk"))?;
        let options = format!("size={bytes}");
        mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
            .map_err(|error| ToolError::Io { what: "cannot mount a tmpfs".into(), error: error.into() })?;
        Ok(SmallDisk { folder })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Takes all the room that is left but so much.
    pub fn fill(&self, leave_bytes: u64) -> Result<Filler, ToolError> {
        let path = self.path().join("filler");
        let what = || format!("cannot fill {}", self.path().display());
        let mut file = File::create(&path).map_err(ToolError::io(what()))?;
        let mut filled = 0;
        loop {
            match file.write(&[0; 4_096]) {
                Ok(count) if count > 0 => filled += count as u64,
                _ => break,
            }
        }
        file.set_len(filled.saturating_sub(leave_bytes)).map_err(ToolError::io(what()))?;
        Ok(Filler { path })
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = umount2(self.folder.path(), MntFlags::MNT_DETACH) {
            tracing::error!(%error, folder = %self.folder.path().display(), "a small disk could not be unmounted");
        }
    }
}

/// What takes the room. Gone on drop.
#[derive(Debug)]
pub struct Filler {
    path: PathBuf,
}

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

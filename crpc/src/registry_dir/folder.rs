//! The folder of one service: who is in it, and what the dead left. Blocking; threads for blocking work.
//!
//! Trap: looking comes before reading. A file read first might be a dead predecessor's, and the lock seen afterwards its
//! successor's.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::claim::Paths;
use super::lock::is_owned;
use crate::registry::{Endpoint, Table};

/// The files of one service below the registry's root.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    root: Arc<Path>,
    path: PathBuf,
}

/// Who lives in a folder, and what was left out and why.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Listing {
    pub(super) table: Table,
    pub(super) left_out: Vec<String>,
}

impl Folder {
    /// `service` has been checked to be a plain name.
    pub(super) fn new(root: Arc<Path>, service: &str) -> Self {
        let path = root.join(service);
        Self { root, path }
    }

    pub(super) fn paths(&self, id: &str) -> Paths {
        Paths::new(&self.path, id)
    }

    pub(super) fn create(&self) -> io::Result<()> {
        fs::create_dir_all(&self.path)
    }

    /// The living. A root that is gone is an error, a folder that is not there is a service without servers.
    pub(super) fn list(&self) -> io::Result<Listing> {
        let mut listing = Listing::default();
        let mut endpoints = Vec::new();
        for id in self.ids(".json")? {
            match self.read(&id) {
                Ok(Some(endpoint)) => endpoints.push(Arc::new(endpoint)),
                Ok(None) => {}
                Err(Unread::Passing(error)) => return Err(error),
                Err(Unread::Wrong(reason)) => listing.left_out.push(format!("{id}.json: {reason}")),
            }
        }
        listing.table = Table::new(endpoints);
        listing.left_out.sort();
        Ok(listing)
    }

    /// Removes what dead owners left. What cannot be removed is passed over: it is dead all the same.
    pub(super) fn clean(&self) -> io::Result<()> {
        for suffix in [".json", ".lock"] {
            for id in self.ids(suffix)? {
                if let Err(error) = self.paths(&id).clean() {
                    tracing::debug!(folder = %self.path.display(), id, %error, "a dead endpoint was not removed");
                }
            }
        }
        Ok(())
    }

    /// The living endpoint under an id.
    fn read(&self, id: &str) -> Result<Option<Endpoint>, Unread> {
        let paths = self.paths(id);
        if !is_owned(&paths.lock).map_err(Unread::from)? {
            return Ok(None);
        }
        let mut text = Vec::new();
        match File::open(&paths.endpoint) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?.take(ENDPOINT_BYTES_MAX).read_to_end(&mut text)?,
        };
        match serde_json::from_slice::<Endpoint>(&text) {
            Ok(endpoint) if endpoint.id == id => Ok(Some(endpoint)),
            Ok(endpoint) => Err(Unread::Wrong(format!("the id in it is {:?}", endpoint.id))),
            Err(error) => Err(Unread::Wrong(format!("no endpoint: {error}"))),
        }
    }

    fn ids(&self, suffix: &str) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return fs::metadata(&self.root).map(|_| Vec::new());
            }
            opened => opened?,
        };
        let mut ids = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            ids.extend(name.to_str().and_then(|name| name.strip_suffix(suffix)).map(str::to_owned));
        }
        Ok(ids)
    }
}

/// Why an endpoint was not read.
enum Unread {
    /// Like being out of descriptors: says nothing about the endpoint, so the whole list is void.
    Passing(io::Error),
    /// The file itself is wrong, and the others are not.
    Wrong(String),
}

impl From<io::Error> for Unread {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::IsADirectory => Unread::Wrong(error.to_string()),
            _ => Unread::Passing(error),
        }
    }
}

/// An endpoint with its report is some hundred bytes.
const ENDPOINT_BYTES_MAX: u64 = 256 * 1024;

#[cfg(test)]
mod tests {
    use super::super::claim::Claim;
    use super::*;

    #[test]
    fn only_the_living_and_readable_are_listed() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::new(root.path().into(), "gateway");
        assert_eq!(folder.list().unwrap(), Listing::default());
        folder.create().unwrap();
        let enter = |id: &str, text: &str| {
            let claim = Claim::try_take(&folder.paths(id)).unwrap().unwrap();
            claim.keep(text.as_bytes(), true).unwrap();
            claim
        };
        let text = |id: &str| serde_json::to_string(&Endpoint::new("gateway", id, "a:1")).unwrap();
        let _alive = enter("g-1.json", &text("g-1.json"));
        let _torn = enter("g-2", &text("g-2")[..20]);
        let _wrong = enter("g-3", &text("g-4"));
        drop(enter("g-5", &text("g-5")));
        fs::write(folder.paths("g-6").endpoint, text("g-6")).unwrap();
        fs::create_dir(folder.paths("g-7").endpoint).unwrap();
        let listing = folder.list().unwrap();
        assert_eq!(listing.table.len(), 1);
        assert_eq!(listing.table[0].id, "g-1.json");
        assert_eq!(listing.left_out.len(), 2, "{:?}", listing.left_out);
        assert!(listing.left_out[0].starts_with("g-2.json: no endpoint: EOF"), "{:?}", listing.left_out);

        folder.clean().unwrap();
        assert!(!folder.paths("g-5").endpoint.exists() && !folder.paths("g-6").endpoint.exists());
        assert_eq!(folder.list().unwrap(), listing);
        fs::remove_dir_all(root.path()).unwrap();
        assert!(folder.list().is_err(), "a root that is gone says nothing about who lives");
    }
}

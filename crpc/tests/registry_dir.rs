//! What a directory in particular must keep: between processes, and against what people do to files.
//!
//! Trap: other processes here are this same test program, told by a variable to play [`another_process`]; run by itself
//! that test does nothing.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crpc::config::RegistryConfig;
use crpc::registry::{self, Endpoint, Registry, RegistryError};
use serde_json::json;

use common::{gateway, ids, until};

const LONG: Duration = Duration::from_secs(60);

async fn open(path: &Path) -> Arc<dyn Registry> {
    let config =
        RegistryConfig { kind: "directory".into(), path: Some(path.to_owned()), ..Default::default() };
    registry::open(&config).await.unwrap()
}

/// A process that registers gateway `g-1`, killed when dropped.
struct Other {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Other {
    fn start(path: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "another_process", "--nocapture"])
            .env(PLAY, path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Self { child, said }
    }

    /// The next thing that it says.
    fn says(&mut self) -> String {
        let mut lines = self.said.by_ref().lines().map(|line| line.unwrap());
        lines.find_map(|line| Some(line.split_once(SAYS)?.1.to_owned())).expect("it ended")
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL.
    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.kill();
    }
}

const PLAY: &str = "ROOKERY_TEST_REGISTRY_PATH";
const SAYS: &str = "another process says: ";

#[tokio::test]
async fn another_process() {
    let Some(path) = std::env::var_os(PLAY) else { return };
    let registered = open(Path::new(&path)).await.register(gateway("g-1")).await;
    match registered {
        Err(error) => println!("{SAYS}{error}"),
        Ok(handle) => {
            println!("{SAYS}registered");
            // Until the other side closes its end.
            let _ = tokio::task::spawn_blocking(|| std::io::stdin().read(&mut [0])).await;
            handle.deregister().await;
            println!("{SAYS}deregistered");
        }
    }
}

#[tokio::test]
async fn a_killed_process_is_gone_at_once_and_its_files_with_the_next_registration() {
    let folder = tempfile::tempdir().unwrap();
    let registry = open(folder.path()).await;
    let mut tables = registry.watch("gateway").await.unwrap();
    let mut other = Other::start(folder.path());
    assert_eq!(other.says(), "registered");
    assert_eq!(registry.list("gateway").await.unwrap().len(), 1);
    until(&mut tables, LONG, "g-1", |table| ids(table) == ["g-1"]).await;
    other.kill();
    assert!(registry.list("gateway").await.unwrap().is_empty(), "dead from that moment");
    until(&mut tables, LONG, "nobody", |table| table.is_empty()).await;

    let left = folder.path().join("gateway/g-1.json");
    assert!(left.exists());
    let handle = registry.register(gateway("g-2")).await.unwrap();
    assert!(!left.exists() && !left.with_extension("lock").exists());
    handle.deregister().await;
    assert_eq!(std::fs::read_dir(folder.path().join("gateway")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_process_that_ends_well_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut other = Other::start(folder.path());
    assert_eq!(other.says(), "registered");
    drop(other.child.stdin.take());
    assert_eq!(other.says(), "deregistered");
    assert_eq!(std::fs::read_dir(folder.path().join("gateway")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_name_has_one_living_process() {
    let folder = tempfile::tempdir().unwrap();
    let registry = open(folder.path()).await;
    let mut other = Other::start(folder.path());
    assert_eq!(other.says(), "registered");
    let error = registry.register(Endpoint { addr: "b:1".into(), ..gateway("g-1") }).await.unwrap_err();
    let wanted = format!("gateway g-1 is registered already, by process {}: stop it", other.pid());
    assert!(error.to_string().starts_with(&wanted), "{error}");
    assert_eq!(crpc::Fatal::from(error).exit_code(), 69);
    assert_eq!(*registry.list("gateway").await.unwrap()[0], gateway("g-1"), "untouched");

    other.kill();
    let handle = registry.register(gateway("g-1")).await.unwrap();
    let refused = Other::start(folder.path()).says();
    assert!(refused.contains(&format!("by process {}", std::process::id())), "{refused}");
    drop(handle);
}

#[test]
fn of_many_that_start_at_once_one_gets_the_name() {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..3 {
        let mut others: Vec<_> = (0..4).map(|_| Other::start(folder.path())).collect();
        let said: Vec<_> = others.iter_mut().map(Other::says).collect();
        assert_eq!(said.iter().filter(|said| *said == "registered").count(), 1, "{said:?}");
        let winner = others[said.iter().position(|said| said == "registered").unwrap()].pid();
        let by = format!("by process {winner}:");
        assert!(said.iter().all(|said| said == "registered" || said.contains(&by)), "{winner}: {said:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_never_hinder_an_owner_or_see_half_an_entry() {
    let folder = tempfile::tempdir().unwrap();
    let registry = open(folder.path()).await;
    let _steady = registry.register(gateway("steady")).await.unwrap();
    let (stop, text) = (Arc::new(AtomicBool::new(false)), "x".repeat(20_000));
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let (registry, stop, text) = (registry.clone(), stop.clone(), text.clone());
            tokio::spawn(async move {
                let mut looks = 0_u32;
                // However late it came to its turn.
                while !stop.load(Ordering::Relaxed) || looks <= 10 {
                    let table = registry.list("gateway").await.unwrap();
                    assert!(table.get("steady").is_some());
                    if let Some(gateway) = table.get("busy") {
                        assert!(gateway.report == json!(text) || gateway.report.is_null());
                    }
                    looks += 1;
                }
            })
        })
        .collect();
    for _ in 0..50 {
        let handle = registry.register(gateway("busy")).await.unwrap();
        handle.report(json!(text));
        // Nobody may get in the way of a living owner's files, or of the next one's.
        handle.deregister().await;
        registry.register(gateway("busy")).await.unwrap().abandon();
    }
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.await.unwrap();
    }
}

#[tokio::test]
async fn whoever_removes_the_directory_gets_it_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("registry");
    let registry = open(&path).await;
    let mut tables = registry.watch("gateway").await.unwrap();
    let _handle = registry.register(gateway("g-1")).await.unwrap();
    until(&mut tables, LONG, "g-1", |table| table.len() == 1).await;
    std::fs::remove_dir_all(&path).unwrap();
    // The table stays as it is until the owner is back, or an empty directory says that nobody is there.
    tokio::time::timeout(LONG, async {
        while registry.list("gateway").await.map_or(0, |table| table.len()) == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await; // the pace of asking
        }
    })
    .await
    .expect("back, under a lock that others see");
    until(&mut tables, LONG, "g-1 again", |table| table.len() == 1).await;
}

#[tokio::test]
async fn the_last_table_stays_while_the_directory_is_away() {
    let folder = tempfile::tempdir().unwrap();
    let (path, away) = (folder.path().join("registry"), folder.path().join("away"));
    let registry = open(&path).await;
    let mut tables = registry.watch("gateway").await.unwrap();
    // Another process's, so that nobody here makes the directory anew.
    let mut other = Other::start(&path);
    assert_eq!(other.says(), "registered");
    until(&mut tables, LONG, "g-1", |table| table.len() == 1).await;
    other.kill();
    std::fs::rename(&path, &away).unwrap();
    let error = registry.list("gateway").await.unwrap_err();
    assert!(matches!(&error, RegistryError::Unusable { .. }), "{error}");
    assert!(error.to_string().contains("change registry.path"), "{error}");
    std::fs::rename(&away, &path).unwrap();
    until(&mut tables, LONG, "nobody, for the directory says so", |table| table.is_empty()).await;
}

#[tokio::test]
async fn a_path_that_cannot_be_one_is_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let config = RegistryConfig { kind: "directory".into(), path: Some(file.clone()), ..Default::default() };
    for path in [file.clone(), file.join("below")] {
        let error = registry::open(&RegistryConfig { path: Some(path.clone()), ..config.clone() }).await;
        let error = error.err().unwrap().to_string();
        let wanted = format!("the registry's directory {} cannot be used: ", path.display());
        assert!(error.starts_with(&wanted) && error.ends_with("change registry.path"), "{error}");
    }
}

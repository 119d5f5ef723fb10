//! A real etcd for one test: free ports, data in a temporary folder, killed when dropped. Blocking; any thread.
//!
//! Trap: a free port is only free until somebody takes it, and etcd cannot be handed a socket. So starting tries again.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The process. Restarts keep port and data.
pub struct Etcd {
    port: u16,
    peer_port: u16,
    folder: tempfile::TempDir,
    child: Child,
}

#[allow(dead_code)] // each test file uses its part
impl Etcd {
    /// Starts one and waits until it answers.
    pub fn start() -> Self {
        let candidates = (0..5).map(|_| {
            let folder = tempfile::tempdir().unwrap();
            let (port, peer_port) = (free_port(), free_port());
            let child = spawn(port, peer_port, &folder);
            Self { port, peer_port, folder, child }
        });
        candidates
            .into_iter()
            .find_map(|mut etcd| etcd.is_up_in_time().then_some(etcd))
            .expect("etcd does not start")
    }

    /// Its address as the configuration takes it.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again after [`Etcd::kill`], on the same port and data.
    pub fn restart(&mut self) {
        self.child = spawn(self.port, self.peer_port, &self.folder);
        assert!(self.is_up_in_time(), "etcd does not start again");
    }

    /// The same as one that is full: it takes no writes from the first one on, which somebody must try.
    pub fn restart_full(&mut self) {
        self.child = spawn_with(self.port, self.peer_port, &self.folder, &["--quota-backend-bytes", "1"]);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.alarms().contains("NOSPACE") {
            assert!(Instant::now() < deadline, "etcd does not find that it is full");
            std::thread::sleep(Duration::from_millis(20)); // the pace of asking
        }
    }

    /// What etcdctl says of them; nothing while it does not answer.
    fn alarms(&self) -> String {
        let mut etcdctl = Command::new("etcdctl");
        etcdctl.env("ETCDCTL_API", "3").args(["--endpoints", &self.url(), "alarm", "list"]);
        etcdctl
            .output()
            .map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).into())
    }

    /// Removes its data; only while it is dead.
    pub fn wipe(&mut self) {
        std::fs::remove_dir_all(self.folder.path().join("data")).unwrap();
    }

    /// Runs etcdctl against it and returns what it prints.
    pub fn etcdctl(&self, args: &[&str]) -> String {
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.url()])
            .args(args)
            .output()
            .expect("etcdctl is part of the Debian package etcd-client");
        assert!(output.status.success(), "etcdctl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn is_up_in_time(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            if self.health().is_some_and(|answer| answer.contains("\"health\":\"true\"")) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20)); // the pace of polling, not a wait for success
        }
        false
    }

    fn health(&self) -> Option<String> {
        let addr = SocketAddr::from(([127, 0, 0, 1], self.port));
        let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(1)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A port that nobody listens on just now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn spawn(port: u16, peer_port: u16, folder: &tempfile::TempDir) -> Child {
    spawn_with(port, peer_port, folder, &[])
}

fn spawn_with(port: u16, peer_port: u16, folder: &tempfile::TempDir, more: &[&str]) -> Child {
    let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer_port}"));
    let log = std::fs::File::create(folder.path().join("log")).unwrap();
    Command::new("etcd")
        .arg("--data-dir")
        .arg(folder.path().join("data"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}"), "--logger", "zap"])
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("etcd is the Debian package etcd-server")
}

//! Tells systemd how the server is (`sd_notify`): `READY=1` once, `STATUS=` when it changes, `STOPPING=1` at the end. A task
//! on the admin port's runtime, so that a busy data path does not delay it.
//!
//! Trap: systemd waits with whatever is ordered behind this unit until `READY=1`, and takes it once. A server that is
//! unready later stays "active" there; its status line says why.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::PathBuf;
use std::time::Duration;

use crate::health::Readiness;
use crate::shutdown::Shutdown;

/// Follows readiness and shutdown until the process ends. Returns at once when `NOTIFY_SOCKET` is not set: then nobody
/// asked.
pub async fn run(readiness: Readiness, shutdown: Shutdown) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    match Notifier::to(socket.into()) {
        Ok(notifier) => notifier.follow(&readiness, &shutdown).await,
        Err(error) => tracing::warn!(%error, "systemd cannot be told about readiness: NOTIFY_SOCKET"),
    }
}

struct Notifier {
    socket: UnixDatagram,
    address: SocketAddr,
}

impl Notifier {
    /// A leading `@` stands for the zero byte of an abstract address.
    fn to(path: PathBuf) -> io::Result<Self> {
        let bytes = path.into_os_string().into_vec();
        let address = match bytes.strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(&bytes))?,
        };
        let socket = UnixDatagram::unbound()?;
        // systemd reads quickly; a full queue must not hold up the admin port.
        socket.set_nonblocking(true)?;
        Ok(Self { socket, address })
    }

    async fn follow(&self, readiness: &Readiness, shutdown: &Shutdown) {
        let (mut changes, mut told, mut ready_told) = (readiness.watch(), String::new(), false);
        while !shutdown.is_begun() {
            let ready = *changes.borrow_and_update();
            let status = status(readiness);
            if ready && !ready_told {
                ready_told = self.tell(&format!("READY=1\nSTATUS={status}"));
                told = status;
            } else if told != status && self.tell(&format!("STATUS={status}")) {
                told = status;
            }
            tokio::select! {
                _ = changes.changed() => {}
                () = shutdown.wait() => {}
                // Reasons change, and a full queue empties, without a word from `changes`.
                () = tokio::time::sleep(STATUS_EVERY) => {}
            }
        }
        self.tell("STOPPING=1\nSTATUS=stopping");
    }

    fn tell(&self, state: &str) -> bool {
        let sent = self.socket.send_to_addr(state.as_bytes(), &self.address);
        if let Err(error) = &sent {
            tracing::debug!(%error, "telling systemd failed");
        }
        sent.is_ok()
    }
}

/// One line for people.
fn status(readiness: &Readiness) -> String {
    let waiting = readiness.reasons().into_iter().map(|(name, reason)| format!("{name}: {reason}"));
    let waiting = waiting.collect::<Vec<_>>().join("; ").replace(['\n', '\r'], " ");
    if waiting.is_empty() { "ready".into() } else { format!("not ready: {waiting}") }
}

const STATUS_EVERY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    fn a_life(notifier: Notifier, systemd: &UnixDatagram) {
        systemd.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let (readiness, shutdown) = (Readiness::starting(&["store"]), Shutdown::new());
        let (seen, stop) = (readiness.clone(), shutdown.clone());
        let task = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(notifier.follow(&seen, &stop));
        });
        assert_eq!(receive(systemd), "STATUS=not ready: store: not reached yet");
        readiness.set("store", Ok(()));
        assert_eq!(receive(systemd), "READY=1\nSTATUS=ready");
        readiness.set("store", Err("gone\naway".into()));
        assert_eq!(receive(systemd), "STATUS=not ready: store: gone away");
        readiness.set("store", Ok(()));
        assert_eq!(receive(systemd), "STATUS=ready", "READY=1 is said once");
        shutdown.begin();
        assert_eq!(receive(systemd), "STOPPING=1\nSTATUS=stopping");
        task.join().unwrap();
    }

    #[test]
    fn a_life_over_a_socket_in_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        a_life(Notifier::to(path).unwrap(), &systemd);
    }

    #[test]
    fn a_life_over_an_abstract_socket() {
        let name = format!("rookery-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let systemd = UnixDatagram::bind_addr(&address).unwrap();
        a_life(Notifier::to(format!("@{name}").into()).unwrap(), &systemd);
    }

    #[tokio::test]
    async fn nobody_listening_is_no_failure() {
        let dir = tempfile::tempdir().unwrap();
        let notifier = Notifier::to(dir.path().join("nobody")).unwrap();
        let shutdown = Shutdown::new();
        shutdown.begin();
        notifier.follow(&Readiness::new(), &shutdown).await;
    }
}

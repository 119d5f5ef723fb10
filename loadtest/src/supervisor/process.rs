//! One supervised process: start, wait until ready, signal, restart, end on drop. Owned by the test that started it.
//!
//! Trap: a stopped process (SIGSTOP) does not act on SIGTERM. [`Process::terminate`] and the drop wake it first.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use super::{SupervisorError, http_get};

/// How to tell that a process serves.
#[derive(Debug, Clone)]
pub enum Ready {
    /// `GET PATH` answers 200.
    Http(SocketAddr, &'static str),
    /// A TCP connection is accepted.
    Tcp(SocketAddr),
    /// A Redis that has loaded its data: PING answers PONG.
    Redis(SocketAddr),
    /// As soon as it runs.
    AtOnce,
}

impl Ready {
    /// One of our servers, by its admin port.
    pub fn admin(address: SocketAddr) -> Ready {
        Ready::Http(address, "/readyz")
    }

    fn ask(&self) -> Result<(), String> {
        match self {
            Ready::AtOnce => Ok(()),
            Ready::Tcp(address) => TcpStream::connect_timeout(address, ASK_MAX)
                .map(drop)
                .map_err(|error| format!("connect to {address}: {error}")),
            Ready::Redis(address) => match redis_ping(*address) {
                Ok(answer) if answer.starts_with("+PONG") => Ok(()),
                Ok(answer) => Err(format!("redis at {address} says {}", answer.trim())),
                Err(error) => Err(format!("redis at {address}: {error}")),
            },
            Ready::Http(address, path) => match http_get(*address, path, ASK_MAX) {
                Ok(answer) if answer.status == 200 => Ok(()),
                Ok(answer) => {
                    Err(format!("http://{address}{path} says {} {}", answer.status, answer.body.trim()))
                }
                Err(error) => Err(format!("http://{address}{path}: {error}")),
            },
        }
    }
}

fn redis_ping(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, ASK_MAX)?;
    stream.set_read_timeout(Some(ASK_MAX))?;
    stream.write_all(b"PING\r\n")?;
    let mut answer = [0; 128];
    let got = stream.read(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..got]).into_owned())
}

/// What to run. Kept, so that a restart is the same.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Its name in errors and of its log file.
    pub label: String,
    /// The executable.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// When it serves.
    pub ready: Ready,
    /// Its output goes to `LABEL.log` in here.
    pub folder: PathBuf,
}

/// A running (or ended) child process.
#[derive(Debug)]
pub struct Process {
    spec: Spec,
    /// Beside what it inherits.
    env: Vec<(String, String)>,
    /// That it runs as; none: ours.
    group: Option<u32>,
    child: Option<Child>,
    /// Of this start: so that a restart which fails shows its own output only.
    log_from: u64,
}

impl Process {
    /// Starts it and waits until it is ready.
    pub fn start(spec: Spec) -> Result<Process, SupervisorError> {
        Process::start_with_env(spec, Vec::new())
    }

    /// As [`Process::start`], with further environment variables.
    pub fn start_with_env(spec: Spec, env: Vec<(String, String)>) -> Result<Process, SupervisorError> {
        let mut process = Process { spec, env, group: None, child: None, log_from: 0 };
        process.restart()?;
        Ok(process)
    }

    /// Starts it without waiting. [`Process::wait_ready`] then waits.
    pub fn spawn(spec: Spec) -> Result<Process, SupervisorError> {
        let mut process = Process { spec, env: Vec::new(), group: None, child: None, log_from: 0 };
        process.spawn_again()?;
        Ok(process)
    }

    /// Of its next start: environment variables beside what it inherits.
    pub fn set_env(&mut self, env: Vec<(String, String)>) {
        self.env = env;
    }

    /// Of its next start: the group that it runs as, by which a packet filter can tell what it sends; none: ours. Only root may set one.
    pub fn set_group(&mut self, group: Option<u32>) {
        self.group = group;
    }

    /// Of its next start: the arguments; what is added last wins in all our servers and in Redis.
    pub fn args_mut(&mut self) -> &mut Vec<String> {
        &mut self.spec.args
    }

    /// Its name.
    pub fn label(&self) -> &str {
        &self.spec.label
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Result<u32, SupervisorError> {
        self.child.as_ref().map(Child::id).ok_or_else(|| self.not_running())
    }

    /// Whether it runs (a stopped one does).
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// How it ended, if it did and nobody here ended it. From then on it counts as not running.
    pub fn ended_by_itself(&mut self) -> Option<ExitStatus> {
        let status = self.child.as_mut()?.try_wait().ok().flatten()?;
        self.child = None;
        Some(status)
    }

    /// SIGKILL, and its end awaited. Of one that has ended before, that is the error.
    pub fn kill(&mut self) -> Result<(), SupervisorError> {
        if let Some(status) = self.ended_by_itself() {
            return Err(self.ended_early(&status.to_string()));
        }
        let mut child = self.child.take().ok_or_else(|| self.not_running())?;
        let what = format!("cannot kill {}", self.spec.label);
        child.kill().and_then(|()| child.wait()).map(drop).map_err(SupervisorError::io(what))
    }

    /// SIGTERM, and its end awaited for at most 30 s.
    pub fn terminate(&mut self) -> Result<ExitStatus, SupervisorError> {
        self.signal(Signal::SIGTERM)?;
        self.signal(Signal::SIGCONT)?;
        self.wait_end("SIGTERM", END_MAX)
    }

    /// SIGSTOP: it hangs, its sockets stay.
    pub fn pause(&self) -> Result<(), SupervisorError> {
        self.signal(Signal::SIGSTOP)
    }

    /// SIGCONT.
    pub fn resume(&self) -> Result<(), SupervisorError> {
        self.signal(Signal::SIGCONT)
    }

    /// Any signal.
    pub fn signal(&self, signal: Signal) -> Result<(), SupervisorError> {
        let pid = Pid::from_raw(self.pid()? as i32);
        // A process that has ended takes signals as long as nobody has asked for its end.
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        if let Ok(ended @ (WaitStatus::Exited(..) | WaitStatus::Signaled(..))) = waitid(Id::Pid(pid), look) {
            return Err(self.ended_early(&format!("{ended:?}")));
        }
        nix::sys::signal::kill(pid, signal).map_err(|error| SupervisorError::Io {
            what: format!("cannot send {signal} to {}", self.spec.label),
            error: error.into(),
        })
    }

    /// Waits until it ends by itself.
    pub fn wait_end(&mut self, after: &'static str, wait: Duration) -> Result<ExitStatus, SupervisorError> {
        let label = self.spec.label.clone();
        let child =
            self.child.as_mut().ok_or_else(|| SupervisorError::NotRunning { label: label.clone() })?;
        let deadline = Instant::now() + wait;
        loop {
            if let Some(status) =
                child.try_wait().map_err(SupervisorError::io(format!("cannot await {label}")))?
            {
                self.child = None;
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(SupervisorError::StillRunning { label, signal: after, waited: wait });
            }
            std::thread::sleep(POLL_EVERY);
        }
    }

    /// Kills it if it runs, starts it with the same arguments, and waits until it is ready.
    pub fn restart(&mut self) -> Result<(), SupervisorError> {
        self.spawn_again()?;
        self.wait_ready(READY_MAX)
    }

    /// As [`Process::restart`], without waiting until it is ready.
    pub fn spawn_again(&mut self) -> Result<(), SupervisorError> {
        if self.is_running() {
            self.kill()?;
        }
        let path = self.log_path();
        let log = OpenOptions::new().create(true).append(true).open(&path);
        let log = log.map_err(SupervisorError::io(format!("cannot open {path:?}")))?;
        self.log_from = log.metadata().map_or(0, |meta| meta.len());
        self.child = Some(self.command(log).map_err(|error| SupervisorError::Spawn {
            label: self.spec.label.clone(),
            program: self.spec.program.display().to_string(),
            error,
        })?);
        Ok(())
    }

    fn command(&self, log: File) -> std::io::Result<Child> {
        let mut command = Command::new(&self.spec.program);
        // What the developer's shell configures must not decide a test.
        for (key, _) in std::env::vars_os() {
            if key.to_string_lossy().starts_with("ROOKERY_") {
                command.env_remove(key);
            }
        }
        command
            .args(&self.spec.args)
            .envs(self.env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log));
        if let Some(group) = self.group {
            command.gid(group);
        }
        command.spawn()
    }

    /// Polls readiness until it is there, the process ended, or `wait` is over.
    pub fn wait_ready(&mut self, wait: Duration) -> Result<(), SupervisorError> {
        let deadline = Instant::now() + wait;
        loop {
            let label = self.spec.label.clone();
            let child = self.child.as_mut().ok_or_else(|| SupervisorError::NotRunning { label })?;
            if let Ok(Some(status)) = child.try_wait() {
                self.child = None;
                return Err(self.ended_early(&status.to_string()));
            }
            let why = match self.spec.ready.ask() {
                Ok(()) => return Ok(()),
                Err(why) => why,
            };
            if Instant::now() > deadline {
                let (label, output) = (self.spec.label.clone(), self.output());
                return Err(SupervisorError::NotReady { label, waited: wait, why, output });
            }
            std::thread::sleep(POLL_EVERY);
        }
    }

    /// Where its output goes, over all restarts.
    pub fn log_path(&self) -> PathBuf {
        self.spec.folder.join(format!("{}.log", self.spec.label))
    }

    /// What it printed since its last start: the last 16 KiB of it.
    pub fn output(&self) -> String {
        let all = std::fs::read(self.log_path()).unwrap_or_default();
        let from = (self.log_from as usize).max(all.len().saturating_sub(OUTPUT_BYTES_MAX)).min(all.len());
        String::from_utf8_lossy(&all[from..]).into_owned()
    }

    fn ended_early(&self, status: &str) -> SupervisorError {
        let (label, output) = (self.spec.label.clone(), self.output());
        SupervisorError::EndedEarly { label, status: status.to_owned(), output }
    }

    fn not_running(&self) -> SupervisorError {
        SupervisorError::NotRunning { label: self.spec.label.clone() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // SIGKILL also ends a stopped process. Nothing can be done about an error here.
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("---- output of {} ----\n{}", self.spec.label, self.output());
        }
    }
}

/// One of our binaries, with a temp dir of its own for its output.
#[derive(Debug)]
pub struct Server {
    /// The process; ends with this value.
    pub process: Process,
    _folder: tempfile::TempDir,
}

impl Server {
    /// Starts `name` (`gateway`, `state`, ...) and waits until it is ready.
    pub fn start<A: Into<String>>(
        name: &str,
        args: impl IntoIterator<Item = A>,
        ready: Ready,
    ) -> Result<Server, SupervisorError> {
        let folder = temp_folder()?;
        let spec = Spec {
            label: name.to_owned(),
            program: binary(name)?,
            args: args.into_iter().map(Into::into).collect(),
            ready,
            folder: folder.path().to_owned(),
        };
        Ok(Server { process: Process::start(spec)?, _folder: folder })
    }
}

/// The path of one of our binaries: in the folder that ROOKERY_BIN_DIR names, else built beside the current executable
/// (`target/debug`, or `target/release`; in a package `rookery-NAME`).
pub fn binary(name: &str) -> Result<PathBuf, SupervisorError> {
    if let Some(folder) = std::env::var_os("ROOKERY_BIN_DIR").filter(|folder| !folder.is_empty()) {
        return binary_in(Path::new(&folder), name);
    }
    let here = std::env::current_exe().map_err(SupervisorError::io("cannot find the current executable"))?;
    let folder = here.parent().unwrap_or(Path::new("."));
    // Test executables live in target/PROFILE/deps or examples.
    let folders = [folder, folder.parent().unwrap_or(folder)];
    folders
        .iter()
        .flat_map(|folder| [folder.join(name), folder.join(format!("rookery-{name}"))])
        .find(|path| path.is_file())
        .ok_or_else(|| SupervisorError::NotBuilt { name: name.to_owned(), looked_in: folders[1].to_owned() })
}

/// The path of one of our binaries in a folder.
pub(super) fn binary_in(folder: &Path, name: &str) -> Result<PathBuf, SupervisorError> {
    [folder.join(name), folder.join(format!("rookery-{name}"))]
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| SupervisorError::NotBuilt { name: name.to_owned(), looked_in: folder.to_owned() })
}

/// A temp dir that goes with its value.
pub(super) fn temp_folder() -> Result<tempfile::TempDir, SupervisorError> {
    tempfile::Builder::new()
        .prefix("rookery-")
        .tempdir()
        .map_err(SupervisorError::io("cannot make a temp dir"))
}

const POLL_EVERY: Duration = Duration::from_millis(10);
const ASK_MAX: Duration = Duration::from_secs(1);
/// Generous: CI machines start several servers on two cores.
const READY_MAX: Duration = Duration::from_secs(30);
const END_MAX: Duration = Duration::from_secs(30);
const OUTPUT_BYTES_MAX: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, folder: &Path, ready: Ready) -> Spec {
        Spec {
            label: "shell".into(),
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            ready,
            folder: folder.to_owned(),
        }
    }

    #[test]
    fn a_process_that_ends_early_shows_its_output() {
        let folder = temp_folder().unwrap();
        let nowhere = super::super::PortLease::take().unwrap();
        let spec = shell("echo no such key >&2; exit 64", folder.path(), Ready::admin(nowhere.address()));
        let error = Process::start(spec).unwrap_err().to_string();
        assert!(error.contains("no such key") && error.contains("64"), "{error}");
    }

    #[test]
    fn stop_terminate_restart() {
        let folder = temp_folder().unwrap();
        let mut process = Process::start(shell("exec sleep 60", folder.path(), Ready::AtOnce)).unwrap();
        let first = process.pid().unwrap();
        process.pause().unwrap();
        process.terminate().unwrap();
        assert!(!process.is_running());
        assert!(process.pid().is_err());
        process.restart().unwrap();
        assert_ne!(process.pid().unwrap(), first);
        process.kill().unwrap();
        assert!(matches!(process.kill(), Err(SupervisorError::NotRunning { .. })));
    }

    #[test]
    fn a_missing_binary_says_what_to_do() {
        let error = binary("no-such-server").unwrap_err().to_string();
        assert!(error.contains("cargo build --bins"), "{error}");
    }
}

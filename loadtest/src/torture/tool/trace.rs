//! System calls of a running process that are slow, fail, or are written down, by strace. Detached on drop.
//!
//! Trap: a traced process stops twice at every traced call and is slower by it. A figure taken meanwhile is strace's.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{ToolError, wait_until};

/// What is done to the calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inject {
    /// Every sync returns so much later, its work done.
    SlowSync(Duration),
    /// Every sync from the n-th on (1: the next) fails with EIO, its work not done.
    FailSync(u32),
    /// Writes and syncs are written down, and every sync begins so much later.
    NoteSync(Duration),
}

/// strace at work.
#[derive(Debug)]
pub struct Trace {
    child: Child,
    log: PathBuf,
}

impl Trace {
    /// Attaches to all threads of a process; `log` is where strace writes.
    pub fn attach(pid: u32, inject: &Inject, log: &Path) -> Result<Trace, ToolError> {
        let what = || format!("cannot trace process {pid}");
        let complaints = log.with_extension("complaints");
        let stderr = File::create(&complaints).map_err(ToolError::io(what()))?;
        let spawned = Command::new("strace")
            .args(["-f", "-y", "-s", "0", "-o"])
            .arg(log)
            .args(arguments(inject))
            .args(["-p", &pid.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn();
        let child = match spawned {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(ToolError::Missing("needs strace, of the package strace".into()));
            }
            other => other.map_err(ToolError::io(what()))?,
        };
        let mut trace = Trace { child, log: log.to_owned() };
        let mut ended = false;
        let attached = wait_until(ATTACH_MAX, || {
            ended = !matches!(trace.child.try_wait(), Ok(None));
            ended || traced_by(pid) == Some(trace.child.id())
        });
        let said = std::fs::read_to_string(&complaints).unwrap_or_default();
        // The fault may end the process, and strace with it, before anybody has looked.
        if !attached || ended && !said.contains(" attached") {
            let why = format!("needs strace that may attach to processes: {}", said.trim());
            let is_there = Path::new(&format!("/proc/{pid}")).exists();
            return Err(if is_there { ToolError::Missing(why) } else { ToolError::Failed(why) });
        }
        Ok(trace)
    }

    /// Lets the process run on alone, and gives what was written down.
    pub fn detach(mut self) -> Result<String, ToolError> {
        self.end();
        std::fs::read_to_string(&self.log).map_err(ToolError::io("cannot read what strace wrote"))
    }

    fn end(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // On SIGTERM it detaches first. It ends by itself when the process does.
            let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
            if !wait_until(DETACH_MAX, || !matches!(self.child.try_wait(), Ok(None))) {
                // The kernel then lets the traced process go.
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.end();
    }
}

fn arguments(inject: &Inject) -> Vec<String> {
    let micros = |delay: &Duration| delay.as_micros();
    let (traced, injected) = match inject {
        Inject::SlowSync(delay) => (SYNCS.to_owned(), format!("{SYNCS}:delay_exit={}", micros(delay))),
        Inject::FailSync(from) => (SYNCS.to_owned(), format!("{SYNCS}:error=EIO:when={from}+")),
        Inject::NoteSync(delay) => {
            (format!("write,writev,pwrite64,{SYNCS}"), format!("{SYNCS}:delay_enter={}", micros(delay)))
        }
    };
    ["-e".into(), format!("trace={traced}"), "-e".into(), format!("inject={injected}")].into()
}

/// The tracer that all threads of the process have.
fn traced_by(pid: u32) -> Option<u32> {
    let mut tracers = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.map(|task| {
        let status = std::fs::read_to_string(task.ok()?.path().join("status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?.trim().parse::<u32>().ok()
    });
    let first = tracers.next()??;
    tracers.all(|other| other == Some(first)).then_some(first)
}

/// How much of a file, that had `before` bytes when the trace began, the last completed sync covers.
pub fn covered_bytes(log: &str, file: &Path, before: u64) -> u64 {
    let fd = format!("<{}>", file.display());
    let (mut written, mut covered) = (before, before);
    for line in log.lines().filter(|line| line.contains(&fd)) {
        let Some((_, result)) = line.rsplit_once(") = ") else { continue };
        let Ok(result) = result.split(' ').next().unwrap_or_default().parse::<u64>() else { continue };
        match line.contains("sync(") {
            true if result == 0 => covered = written,
            true => {}
            false => written += result,
        }
    }
    covered
}

const SYNCS: &str = "fdatasync,fsync";
const ATTACH_MAX: Duration = Duration::from_secs(10);
const DETACH_MAX: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_completed_sync_covers() {
        let log = "\
7 write(9</x/a.aof>, \"\"..., 100) = 100\n\
7 write(4<socket:[5]>, \"\"..., 50) = 50\n\
7 fdatasync(9</x/a.aof>) = 0 (DELAYED)\n\
7 write(9</x/a.aof>, \"\"..., 30) = 30\n\
7 fdatasync(9</x/a.aof>) = -1 EIO (Input/output error) (INJECTED)\n\
7 write(9</x/a.aof>, \"\"..., 7) = 7\n\
7 fdatasync(9</x/a.aof>) = ?\n\
7 +++ killed by SIGKILL +++\n";
        assert_eq!(covered_bytes(log, Path::new("/x/a.aof"), 1_000), 1_100);
        assert_eq!(covered_bytes("", Path::new("/x/a.aof"), 5), 5);
    }

    #[test]
    fn a_traced_process_is_let_go() {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let trace = Trace::attach(
            child.id(),
            &Inject::SlowSync(Duration::from_millis(5)),
            &folder.path().join("log"),
        );
        // Where tracing is forbidden the tool says so, and that is all that can be asked.
        if let Ok(trace) = trace {
            assert_eq!(traced_by(child.id()), Some(trace.child.id()));
            trace.detach().unwrap();
            assert_eq!(traced_by(child.id()), Some(0));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

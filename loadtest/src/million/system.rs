//! What is measured: Redis with `appendfsync always`, one state server, and gateways as the phases ask for them, wired by
//! a directory registry. Owned by the main thread.
//!
//! Trap: fields drop in their order here, so state ends before its store. A driver that is SIGKILLed drops nothing;
//! therefore every process that runs stands in `pids` in the folder, for the script around it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::usage;
use crate::monitor::RunError;
use crate::supervisor::{PortLease, Process, Ready, Redis, Spec, SupervisorError, binary, http_get};

/// See the head of this file.
pub struct System {
    /// `state`.
    pub state: Process,
    /// The store.
    pub redis: Redis,
    folder: PathBuf,
    _ports: [PortLease; 2],
}

/// A running gateway.
pub struct Gateway {
    /// The process.
    pub process: Process,
    /// Where clients connect.
    pub client: SocketAddr,
    admin: SocketAddr,
    _ports: [PortLease; 2],
}

impl System {
    /// Starts Redis and state, with everything under `folder`, which is emptied first.
    pub fn start(folder: &Path, sets: &[String]) -> Result<System, RunError> {
        binary("state").and(binary("gateway")).map_err(broken)?;
        for part in ["redis", "registry"] {
            let path = folder.join(part);
            // It may not be there; then there is nothing to remove.
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir_all(&path)
                .map_err(|error| RunError::Io { what: format!("cannot make {}", path.display()), error })?;
        }
        let _ = std::fs::remove_file(folder.join("pids"));
        let data = folder.join("redis").display().to_string();
        let redis = Redis::start_with(&[("dir", &data)]).map_err(broken)?;
        let ports = [PortLease::take().map_err(broken)?, PortLease::take().map_err(broken)?];
        let (rpc, admin) = (ports[0].address(), ports[1].address());
        let mut all = vec![
            "node.id=state-million".to_owned(),
            format!("store.url={}", redis.url()),
            format!("rpc.listen={rpc}"),
        ];
        all.extend_from_slice(sets);
        let state = server(folder, "state", "state", admin, &all)?;
        let system = System { state, redis, folder: folder.to_owned(), _ports: ports };
        system.note(&system.redis.process)?;
        system.note(&system.state)?;
        Ok(system)
    }

    /// One gateway more, named so.
    pub fn gateway(&self, label: &str, sets: &[String]) -> Result<Gateway, RunError> {
        let ports = [PortLease::take().map_err(broken)?, PortLease::take().map_err(broken)?];
        let (client, admin) = (ports[0].address(), ports[1].address());
        let mut all = vec![format!("node.id={label}"), format!("listen.client={client}")];
        all.extend_from_slice(sets);
        let process = server(&self.folder, "gateway", label, admin, &all)?;
        self.note(&process)?;
        Ok(Gateway { process, client, admin, _ports: ports })
    }

    /// Where Redis has its file, to measure fsync there.
    pub fn store_folder(&self) -> PathBuf {
        self.folder.join("redis")
    }

    /// Memory of the state server.
    pub fn state_bytes(&self) -> Result<u64, RunError> {
        usage::memory(self.state.pid().map_err(broken)?)
    }

    /// SIGKILL for the state server, and a new one with the same arguments at once.
    pub fn kill_state(&mut self) -> Result<(), RunError> {
        self.state.kill().and_then(|()| self.state.spawn_again()).map_err(broken)?;
        self.note(&self.state)
    }

    /// What Redis says it uses, once no rewrite of its file is under way.
    pub fn redis_bytes(&self) -> Result<u64, RunError> {
        let mut connection = self.redis.connection().map_err(broken)?;
        for _ in 0..REWRITE_POLLS_MAX {
            let info: String = redis::cmd("INFO").query(&mut connection).map_err(store)?;
            if info_field(&info, "aof_rewrite_in_progress") == Some(0) {
                return info_field(&info, "used_memory")
                    .ok_or_else(|| RunError::Unreachable("redis does not say used_memory".into()));
            }
            std::thread::sleep(REWRITE_POLL);
        }
        Err(RunError::Unreachable("redis rewrites its file without end".into()))
    }

    /// Memory of all keys that match, as Redis counts them.
    pub fn redis_family_bytes(&self, pattern: &str) -> Result<u64, RunError> {
        let mut connection = self.redis.connection().map_err(broken)?;
        let (mut cursor, mut sum) = (0u64, 0);
        loop {
            let (next, keys): (u64, Vec<String>) = redis::cmd("SCAN")
                .arg(cursor)
                .arg("MATCH")
                .arg(pattern)
                .arg("COUNT")
                .arg(2_000)
                .query(&mut connection)
                .map_err(store)?;
            let mut asked = redis::pipe();
            for key in &keys {
                asked.cmd("MEMORY").arg("USAGE").arg(key).arg("SAMPLES").arg(0);
            }
            if !keys.is_empty() {
                let sizes: Vec<Option<u64>> = asked.query(&mut connection).map_err(store)?;
                sum += sizes.iter().flatten().sum::<u64>();
            }
            cursor = next;
            if cursor == 0 {
                return Ok(sum);
            }
        }
    }

    fn note(&self, process: &Process) -> Result<(), RunError> {
        use std::io::Write;
        let pid = process.pid().map_err(broken)?;
        let path = self.folder.join("pids");
        let name = process.label().split('-').next().unwrap_or_default();
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut file| writeln!(file, "{pid} {name}"))
            .map_err(|error| RunError::Io { what: format!("cannot write {}", path.display()), error })
    }
}

/// Turns of workers.
#[derive(Debug, Default, Clone, Copy)]
pub struct Turns {
    /// All of them.
    pub all: f64,
    /// Those that took more than a millisecond of CPU.
    pub over: f64,
}

impl Turns {
    /// Both.
    pub fn and(self, more: Turns) -> Turns {
        Turns { all: self.all + more.all, over: self.over + more.over }
    }

    /// What came since.
    pub fn since(self, before: Turns) -> Turns {
        Turns { all: self.all - before.all, over: self.over - before.over }
    }

    /// How many of all took more than a millisecond, 0 to 1.
    pub fn share_over(self) -> Option<f64> {
        (self.all > 0.0).then(|| self.over / self.all)
    }
}

impl Gateway {
    /// A number from its metrics.
    pub fn metric(&self, name: &str) -> Result<f64, RunError> {
        self.find(name, &self.metrics()?)
    }

    /// Its workers' turns so far.
    pub fn turns(&self) -> Result<Turns, RunError> {
        let metrics = self.metrics()?;
        let all = self.find("turn_cpu_seconds_count", &metrics)?;
        let within = self.find("turn_cpu_seconds_bucket{le=\"0.001\"}", &metrics)?;
        Ok(Turns { all, over: all - within })
    }

    fn metrics(&self) -> Result<String, RunError> {
        let answer = http_get(self.admin, "/metrics", ASK_MAX).map_err(|error| {
            RunError::Unreachable(format!("metrics of {}: {error}", self.process.label()))
        })?;
        Ok(answer.body)
    }

    fn find(&self, name: &str, metrics: &str) -> Result<f64, RunError> {
        metric(metrics, &format!("rookery_gateway_{name}"))
            .ok_or_else(|| RunError::Unreachable(format!("{} has no metric {name}", self.process.label())))
    }

    /// Its memory.
    pub fn bytes(&self) -> Result<u64, RunError> {
        usage::memory(self.process.pid().map_err(broken)?)
    }

    /// Its CPU time so far.
    pub fn cpu(&self) -> Result<Duration, RunError> {
        usage::cpu(self.process.pid().map_err(broken)?)
    }

    /// Ends it in order, and awaits that.
    pub fn stop(mut self) -> Result<(), RunError> {
        self.process.terminate().map(drop).map_err(broken)
    }
}

fn server(
    folder: &Path,
    program: &str,
    label: &str,
    admin: SocketAddr,
    sets: &[String],
) -> Result<Process, RunError> {
    let common = [
        format!("admin.listen={admin}"),
        "registry.kind=directory".to_owned(),
        format!("registry.path={}", folder.join("registry").display()),
    ];
    let args = common.iter().chain(sets).flat_map(|set| ["--set".to_owned(), set.clone()]).collect();
    // Of earlier runs; it is made anew.
    let _ = std::fs::remove_file(folder.join(format!("{label}.log")));
    let program = binary(program).map_err(broken)?;
    let spec = Spec {
        label: label.to_owned(),
        program,
        args,
        ready: Ready::admin(admin),
        folder: folder.to_owned(),
    };
    Process::start(spec).map_err(broken)
}

/// Something that the run needs is not there.
pub fn broken(error: SupervisorError) -> RunError {
    RunError::Unreachable(error.to_string())
}

fn store(error: redis::RedisError) -> RunError {
    RunError::Unreachable(format!("redis: {error}"))
}

fn metric(text: &str, name: &str) -> Option<f64> {
    let of = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.split(' ').next()?.parse().ok();
    text.lines().find_map(of)
}

fn info_field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?.trim().parse().ok()
}

const ASK_MAX: Duration = Duration::from_secs(5);
const REWRITE_POLLS_MAX: u32 = 150;
const REWRITE_POLL: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_whole_name() {
        let text = "rookery_gateway_connections_x 9\nrookery_gateway_connections 7\n";
        assert_eq!(metric(text, "rookery_gateway_connections"), Some(7.0));
        assert_eq!(metric(text, "rookery_gateway"), None);
        let info = "used_memory_rss:5\r\nused_memory:123\r\n";
        assert_eq!(info_field(info, "used_memory"), Some(123));
    }
}

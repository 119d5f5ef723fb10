//! A whole Rookery on loopback: Redis, etcd, state servers, gateways, ipconf, wired together. Owned by the test.
//!
//! Trap: fields drop in their order here, clients of a service before the service, so that no server spends its last
//! moments logging that its store is gone.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::process::{binary_in, temp_folder};
use super::services::AOF_FOLDER;
use super::{Etcd, PortLease, Process, Ready, Redis, Spec, SupervisorError, binary};

/// What to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterOptions {
    /// How many gateways.
    pub gateways: usize,
    /// How many state servers.
    pub states: usize,
    /// On a redb file and a registry folder instead of Redis and etcd. One state server only.
    pub embedded: bool,
    /// Whether with ipconf.
    pub ipconf: bool,
    /// Whether with api.
    pub api: bool,
    /// Further `section.key=value` for every gateway.
    pub gateway_sets: Vec<String>,
    /// Further `section.key=value` for every state server.
    pub state_sets: Vec<String>,
    /// Further `section.key=value` for ipconf.
    pub ipconf_sets: Vec<String>,
    /// Further `section.key=value` for api.
    pub api_sets: Vec<String>,
    /// Further settings for Redis.
    pub redis_settings: Vec<(String, String)>,
    /// Where our binaries are, if not in the usual place.
    pub bin_dir: Option<PathBuf>,
    /// Further environment variables of every gateway.
    pub gateway_env: Vec<(String, String)>,
    /// Further environment variables of every state server.
    pub state_env: Vec<(String, String)>,
}

impl Default for ClusterOptions {
    /// One gateway, one state server, no ipconf.
    fn default() -> Self {
        ClusterOptions {
            gateways: 1,
            states: 1,
            embedded: false,
            ipconf: false,
            api: false,
            gateway_sets: Vec::new(),
            state_sets: Vec::new(),
            ipconf_sets: Vec::new(),
            api_sets: Vec::new(),
            redis_settings: Vec::new(),
            bin_dir: None,
            gateway_env: Vec::new(),
            state_env: Vec::new(),
        }
    }
}

/// A running gateway.
#[derive(Debug)]
pub struct Gateway {
    /// The process.
    pub process: Process,
    /// Where clients connect.
    pub client: SocketAddr,
    /// `/healthz`, `/readyz`, `/metrics`.
    pub admin: SocketAddr,
    _ports: [PortLease; 2],
}

/// A running state server.
#[derive(Debug)]
pub struct State {
    /// The process.
    pub process: Process,
    /// gRPC.
    pub rpc: SocketAddr,
    /// `/healthz`, `/readyz`, `/metrics`.
    pub admin: SocketAddr,
    _ports: [PortLease; 2],
}

/// A running ipconf.
#[derive(Debug)]
pub struct Ipconf {
    /// The process.
    pub process: Process,
    /// `GET /ip/list`.
    pub http: SocketAddr,
    /// `/healthz`, `/readyz`, `/metrics`.
    pub admin: SocketAddr,
    _ports: [PortLease; 2],
}

/// A running api.
#[derive(Debug)]
pub struct Api {
    /// The process.
    pub process: Process,
    /// What web services call.
    pub http: SocketAddr,
    /// `/healthz`, `/readyz`, `/metrics`.
    pub admin: SocketAddr,
    _ports: [PortLease; 2],
}

impl Ipconf {
    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.http)
    }
}

/// All of it.
#[derive(Debug)]
pub struct Cluster {
    /// Named `gateway-0`, ...
    pub gateways: Vec<Gateway>,
    /// Named `api-0`.
    pub api: Option<Api>,
    /// Named `ipconf-0`.
    pub ipconf: Option<Ipconf>,
    /// Named `state-0`, ...
    pub states: Vec<State>,
    /// The registry, unless embedded.
    pub etcd: Option<Etcd>,
    /// The store, unless embedded.
    pub redis: Option<Redis>,
    options: ClusterOptions,
    folder: tempfile::TempDir,
}

impl Cluster {
    /// Starts everything and waits until each part says that it is ready.
    pub fn start(options: ClusterOptions) -> Result<Cluster, SupervisorError> {
        // Asked first, so that "build the binaries" comes before anything was started.
        program(&options, "state").and(program(&options, "gateway"))?;
        let settings: Vec<(&str, &str)> =
            options.redis_settings.iter().map(|(setting, value)| (&**setting, &**value)).collect();
        let mut cluster = Cluster {
            gateways: Vec::new(),
            api: None,
            ipconf: None,
            states: Vec::new(),
            etcd: (!options.embedded).then(Etcd::start).transpose()?,
            redis: (!options.embedded).then(|| Redis::start_with(&settings)).transpose()?,
            options,
            folder: temp_folder()?,
        };
        for _ in 0..cluster.options.states {
            cluster.add_state()?;
        }
        for _ in 0..cluster.options.gateways {
            cluster.add_gateway()?;
        }
        if cluster.options.ipconf {
            cluster.add_ipconf()?;
        }
        if cluster.options.api {
            cluster.add_api()?;
        }
        Ok(cluster)
    }

    /// One more state server.
    pub fn add_state(&mut self) -> Result<&mut State, SupervisorError> {
        let ports = [PortLease::take()?, PortLease::take()?];
        let (rpc, admin) = (ports[0].address(), ports[1].address());
        let mut sets = vec![
            format!("node.id=state-{}", self.states.len()),
            format!("store.url={}", self.store_url()),
            format!("rpc.listen={rpc}"),
            "registry.lease_s=2".to_owned(),
        ];
        sets.extend_from_slice(&self.options.state_sets);
        let process = self.server("state", self.states.len(), admin, sets)?;
        Ok(push(&mut self.states, State { process, rpc, admin, _ports: ports }))
    }

    /// One more gateway.
    pub fn add_gateway(&mut self) -> Result<&mut Gateway, SupervisorError> {
        let ports = [PortLease::take()?, PortLease::take()?];
        let (client, admin) = (ports[0].address(), ports[1].address());
        let mut sets =
            vec![format!("node.id=gateway-{}", self.gateways.len()), format!("listen.client={client}")];
        sets.extend_from_slice(&self.options.gateway_sets);
        let process = self.server("gateway", self.gateways.len(), admin, sets)?;
        Ok(push(&mut self.gateways, Gateway { process, client, admin, _ports: ports }))
    }

    fn add_ipconf(&mut self) -> Result<(), SupervisorError> {
        let ports = [PortLease::take()?, PortLease::take()?];
        let (http, admin) = (ports[0].address(), ports[1].address());
        let mut sets = vec![format!("http.listen={http}")];
        sets.extend_from_slice(&self.options.ipconf_sets);
        let process = self.server("ipconf", 0, admin, sets)?;
        self.ipconf = Some(Ipconf { process, http, admin, _ports: ports });
        Ok(())
    }

    fn add_api(&mut self) -> Result<(), SupervisorError> {
        let ports = [PortLease::take()?, PortLease::take()?];
        let (http, admin) = (ports[0].address(), ports[1].address());
        let mut sets = vec![format!("http.listen={http}")];
        sets.extend_from_slice(&self.options.api_sets);
        let process = self.server("api", 0, admin, sets)?;
        self.api = Some(Api { process, http, admin, _ports: ports });
        Ok(())
    }

    /// Whoever holds the store dies, and comes back with an empty one.
    pub fn lose_store(&mut self) -> Result<(), SupervisorError> {
        let file = self.store_file();
        let (holder, stored) = match &mut self.redis {
            Some(redis) => {
                let folder = redis.folder().join(AOF_FOLDER);
                (&mut redis.process, folder)
            }
            None => (&mut self.states[0].process, file),
        };
        holder.kill()?;
        let removed =
            if stored.is_dir() { std::fs::remove_dir_all(&stored) } else { std::fs::remove_file(&stored) };
        removed.map_err(SupervisorError::io(format!("cannot remove {}", stored.display())))?;
        holder.restart()
    }

    fn store_file(&self) -> PathBuf {
        self.folder.path().join("store.redb")
    }

    fn store_url(&self) -> String {
        let file = || format!("redb:{}", self.store_file().display());
        self.redis.as_ref().map_or_else(file, Redis::url)
    }

    fn server(
        &self,
        name: &str,
        index: usize,
        admin: SocketAddr,
        sets: Vec<String>,
    ) -> Result<Process, SupervisorError> {
        let label = format!("{name}-{index}");
        let mut common = vec![format!("admin.listen={admin}")];
        match &self.etcd {
            Some(etcd) => common.push(format!("registry.endpoints=[\"{}\"]", etcd.endpoint())),
            None => common.extend([
                "registry.kind=directory".to_owned(),
                format!("registry.path={}", self.folder.path().join("registry").display()),
            ]),
        }
        // The options' own settings come last, because the last one wins.
        let args = common.into_iter().chain(sets).flat_map(|set| ["--set".to_owned(), set]).collect();
        let folder = self.folder.path().to_owned();
        let env = match name {
            "gateway" => self.options.gateway_env.clone(),
            "state" => self.options.state_env.clone(),
            _ => Vec::new(),
        };
        let program = program(&self.options, name)?;
        Process::start_with_env(Spec { label, program, args, ready: Ready::admin(admin), folder }, env)
    }
}

fn program(options: &ClusterOptions, name: &str) -> Result<PathBuf, SupervisorError> {
    options.bin_dir.as_deref().map_or_else(|| binary(name), |folder| binary_in(folder, name))
}

fn push<T>(all: &mut Vec<T>, one: T) -> &mut T {
    all.push(one);
    let last = all.len() - 1;
    &mut all[last]
}

/// Each story, an `async fn(embedded: bool)` of the file that names it, as two tests: on Redis and etcd, and on the embedded store.
#[macro_export]
macro_rules! on_both {
    ($($story:ident)*) => {
        mod on_services {
            $(#[tokio::test]
            async fn $story() {
                super::$story(false).await;
            })*
        }
        mod embedded {
            $(#[tokio::test]
            async fn $story() {
                super::$story(true).await;
            })*
        }
    };
}

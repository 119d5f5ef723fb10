//! The Compose files, run: every service's command as a plain process, with its environment, on free ports. The files are
//! right when each part becomes ready, tells systemd's socket so, and the test container's command ends with 0.
//!
//! Trap: names and ports of the Compose network are replaced as text (`redis:6379` → `127.0.0.1:NNNNN`), in the order of
//! the services; a service whose name ends another one's (`x-redis`) would be replaced twice.

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

use loadtest::supervisor::{PortLease, Process, Ready, Spec, binary, http_get};

use crate::compose::{Service, services};
use crate::workspace::{command, said};

/// Longest that anything here may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);

struct Composed {
    /// The last started is the first to go.
    processes: Vec<Process>,
    services: Vec<Service>,
    ports: BTreeMap<(String, u16), PortLease>,
    folder: tempfile::TempDir,
}

impl Composed {
    /// Starts everything that serves, each after what it depends on.
    fn start(file: &str) -> Composed {
        let services = services(file);
        let mut ports = BTreeMap::new();
        for service in &services {
            for address in service.listeners().values() {
                ports.insert((service.name.clone(), address.port()), PortLease::take().unwrap());
            }
        }
        let folder = tempfile::Builder::new().prefix("rookery-").tempdir().unwrap();
        let mut composed = Composed { processes: Vec::new(), services, ports, folder };
        let mut waiting: Vec<usize> = (0..composed.services.len()).collect();
        let mut started = Vec::new();
        while !waiting.is_empty() {
            let free =
                |at: &usize| composed.services[*at].depends_on.iter().all(|name| started.contains(name));
            let next =
                waiting.iter().position(free).unwrap_or_else(|| panic!("{file}: a circle of depends_on"));
            let at = waiting.remove(next);
            started.push(composed.services[at].name.clone());
            if !composed.services[at].listeners().is_empty() {
                composed.launch(at);
            }
        }
        composed
    }

    fn launch(&mut self, at: usize) {
        let service = &self.services[at];
        let folder = self.folder.path().join(&service.name);
        std::fs::create_dir(&folder).unwrap();
        match service.rookery() {
            Some(server) => self.launch_server(at, server.to_owned(), &folder),
            None => self.launch_service(at, &folder),
        }
        let service = &self.services[at];
        if let Some((port, path)) = &service.health {
            let address = self.ports[&(service.name.clone(), *port)].address();
            let deadline = Instant::now() + PATIENCE;
            loop {
                let answer = http_get(address, path, PATIENCE).unwrap();
                // The one that asks for the list waits until there is somebody on it.
                if answer.status == 200 && (path != "/ip/list" || answer.body.contains("addr")) {
                    break;
                }
                assert!(Instant::now() < deadline, "{} {path}: {answer:?}", service.name);
                std::thread::sleep(Duration::from_millis(20)); // the pace of asking
            }
        }
    }

    /// One of ours: `--check` first, then for good, until /readyz and systemd's socket both say so.
    fn launch_server(&mut self, at: usize, server: String, folder: &Path) {
        let service = &self.services[at];
        let mut environment: Vec<(String, String)> = service
            .environment
            .iter()
            .map(|(key, value)| (key.clone(), self.rewired(service, value)))
            .collect();
        // Also those that stand at their default.
        for (key, address) in service.listeners() {
            let variable = format!("ROOKERY_{}_{}", server, key.replace('.', "_")).to_uppercase();
            let here = self.ports[&(service.name.clone(), address.port())].address().to_string();
            environment.retain(|(known, _)| *known != variable);
            environment.push((variable, here));
        }
        let mut check = command(&server);
        check
            .args(&service.command[1..])
            .arg("--check")
            .envs(environment.iter().cloned())
            .current_dir(folder);
        let output = check.output().unwrap();
        assert!(output.status.success(), "{} --check: {}", service.name, said(&output));

        let notify = folder.join("notify");
        let systemd = UnixDatagram::bind(&notify).unwrap();
        systemd.set_read_timeout(Some(PATIENCE)).unwrap();
        environment.push(("NOTIFY_SOCKET".into(), notify.display().to_string()));
        let admin = service.listeners()["admin.listen"].port();
        let admin = self.ports[&(service.name.clone(), admin)].address();
        // env(1) sets the variables, because a Spec has none.
        let mut args: Vec<String> = environment.iter().map(|(key, value)| format!("{key}={value}")).collect();
        args.push(binary(&server).unwrap().display().to_string());
        args.extend_from_slice(&service.command[1..]);
        let spec = Spec {
            label: service.name.clone(),
            program: "env".into(),
            args,
            ready: Ready::admin(admin),
            folder: folder.to_owned(),
        };
        self.processes.insert(0, Process::start(spec).unwrap());
        let mut buffer = [0; 1024];
        loop {
            let length = systemd.recv(&mut buffer).unwrap();
            if buffer[..length].starts_with(b"READY=1\n") {
                break;
            }
        }
    }

    /// Redis or etcd, with the arguments of the file.
    fn launch_service(&mut self, at: usize, folder: &Path) {
        let service = &self.services[at];
        let program = Path::new(&service.command[0]).file_name().unwrap();
        let mut args: Vec<String> =
            service.command[1..].iter().map(|arg| self.rewired(service, arg)).collect();
        let (_, client) = service.listeners().pop_first().unwrap();
        let client = &self.ports[&(service.name.clone(), client.port())];
        let data = folder.display().to_string();
        let ready = if service.name == "redis" {
            let here = ["--bind", "127.0.0.1", "--port", &client.port().to_string(), "--dir", &data]
                .map(str::to_owned);
            args.extend(here);
            Ready::Redis(client.address())
        } else {
            args.iter_mut().for_each(|arg| *arg = arg.replace("/etcd-data", &format!("{data}/etcd")));
            Ready::Http(client.address(), "/health")
        };
        let label = service.name.clone();
        let spec = Spec { label, program: program.into(), args, ready, folder: folder.to_owned() };
        self.processes.insert(0, Process::start(spec).unwrap());
    }

    /// What `text` of this service means outside of the Compose network.
    fn rewired(&self, service: &Service, text: &str) -> String {
        let mut text = text.to_owned();
        for ((name, port), lease) in &self.ports {
            let here = lease.address().to_string();
            text = text.replace(&format!("{name}:{port}"), &here);
            if *name == service.name {
                text = text.replace(&format!("0.0.0.0:{port}"), &here);
                let own = service.rookery().is_none().then_some(*port);
                let published =
                    service.published.iter().find(|(_, container)| container == port).map(|(host, _)| *host);
                for port in own.into_iter().chain(published) {
                    text = text.replace(&format!("127.0.0.1:{port}"), &here);
                }
            }
        }
        text
    }

    fn address(&self, service: &str, port: u16) -> std::net::SocketAddr {
        self.ports[&(service.to_owned(), port)].address()
    }

    fn is_strict(&self, state: &str) {
        let body = http_get(self.address(state, 7101), "/readyz", PATIENCE).unwrap().body;
        assert!(body.contains(r#""durability":"strict""#), "{state}: {body}");
    }
}

#[test]
fn the_whole_system_runs_as_composed() {
    let mut composed = Composed::start("docker-compose.yml");
    composed.is_strict("state-1");
    composed.is_strict("state-2");
    // What clients on this machine are told is the published port.
    let listed = || http_get(composed.address("ipconf", 6789), "/ip/list", PATIENCE).unwrap().body;
    let deadline = Instant::now() + PATIENCE;
    let published = composed.address("gateway", 7000).to_string();
    while !listed().contains(&published) {
        assert!(Instant::now() < deadline, "{published} is not in {}", listed());
        std::thread::sleep(Duration::from_millis(20)); // the pace of asking
    }
    // All of ours end by themselves when they are asked to. (etcd dies of its SIGTERM.)
    for process in &mut composed.processes {
        let ours = composed.services.iter().any(|s| s.name == process.label() && s.rookery().is_some());
        if ours {
            let status = process.terminate().unwrap();
            assert!(status.success(), "{}: {status}", process.label());
        }
    }
}

#[test]
fn the_test_container_decides() {
    let composed = Composed::start("docker-compose.test.yml");
    composed.is_strict("state");
    let judges: Vec<_> = composed.services.iter().filter(|service| service.listeners().is_empty()).collect();
    let [test] = judges[..] else { panic!("one service decides, not {}", judges.len()) };
    let args: Vec<String> = test.command[1..].iter().map(|arg| composed.rewired(test, arg)).collect();
    let output =
        command(test.rookery().unwrap()).args(&args).current_dir(composed.folder.path()).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", said(&output));
}

//! The Compose files as data, and what must hold between their lines.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use serde_json::Value;

use crate::workspace::{binaries, example_table, is_coming, path, read};

/// The files.
pub const FILES: [&str; 2] = ["docker-compose.yml", "docker-compose.test.yml"];

/// One service.
pub struct Service {
    /// As other services call it.
    pub name: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Its environment.
    pub environment: Vec<(String, String)>,
    /// What must be there before it.
    pub depends_on: Vec<String>,
    /// `HOST:CONTAINER` of `127.0.0.1:HOST:CONTAINER`.
    pub published: Vec<(u16, u16)>,
    /// The URL that its health check asks for.
    pub health: Option<(u16, String)>,
    value: Value,
}

impl Service {
    fn read(name: &str, value: &Value) -> Service {
        let words = |key: &str| -> Vec<String> {
            let list = value[key].as_array().into_iter().flatten();
            list.map(|word| word.as_str().unwrap_or_else(|| panic!("{name}: {key} {word}")).to_owned())
                .collect()
        };
        let pairs = |key: &str| value[key].as_object().into_iter().flatten();
        let environment = pairs("environment").map(|(key, value)| {
            let value = value.as_str().unwrap_or_else(|| panic!("{name}: {key}: quote the value"));
            (key.clone(), value.to_owned())
        });
        let published = words("ports").into_iter().map(|port| {
            let local = port.strip_prefix("127.0.0.1:");
            let (host, container) = local.and_then(|ports| ports.split_once(':')).unwrap_or_else(|| {
                panic!("{name}: {port} is not 127.0.0.1:PORT:PORT, and there is no login yet")
            });
            (host.parse().unwrap(), container.parse().unwrap())
        });
        let check = value["healthcheck"]["test"].to_string();
        let health = check.split_once("http://127.0.0.1:").map(|(_, url)| {
            let (port, path) = url.split([' ', '"']).next().unwrap().split_once('/').unwrap();
            (port.parse().unwrap(), format!("/{path}"))
        });
        Service {
            name: name.to_owned(),
            command: words("command"),
            environment: environment.collect(),
            depends_on: pairs("depends_on").map(|(name, _)| name.clone()).collect(),
            published: published.collect(),
            health,
            value: value.clone(),
        }
    }

    /// NAME of a program `rookery-NAME`.
    pub fn rookery(&self) -> Option<&str> {
        self.command[0].strip_prefix("rookery-")
    }

    /// Where it listens, by key of its configuration; for what is not ours, by a word.
    pub fn listeners(&self) -> BTreeMap<String, SocketAddr> {
        let all = |ports: &[(&str, u16)]| {
            ports
                .iter()
                .map(|(key, port)| ((*key).to_owned(), SocketAddr::from(([0, 0, 0, 0], *port))))
                .collect()
        };
        match (self.rookery(), self.name.as_str()) {
            (Some("loadtest" | "client"), _) => BTreeMap::new(),
            (Some(server), _) => listeners(server, &self.environment),
            (None, "redis") => all(&[("client", 6379)]),
            (None, "etcd") => all(&[("client", 2379), ("peer", 2380)]),
            (None, name) => panic!("{name}: where does it listen?"),
        }
    }
}

/// `section.key` of a variable of this server.
pub fn key_of(server: &str, variable: &str) -> Option<String> {
    let rest = variable.strip_prefix(&format!("ROOKERY_{}_", server.to_uppercase()))?;
    let (section, key) = rest.split_once('_')?;
    Some(format!("{section}.{key}").to_lowercase())
}

/// The addresses that a server listens on: the defaults of its example, and over them its environment.
pub fn listeners(server: &str, environment: &[(String, String)]) -> BTreeMap<String, SocketAddr> {
    let mut values = BTreeMap::new();
    for (section, keys) in example_table(server) {
        for (key, value) in keys.as_table().unwrap() {
            values.insert(format!("{section}.{key}"), value.as_str().unwrap_or_default().to_owned());
        }
    }
    for (variable, value) in environment {
        let key = key_of(server, variable);
        values.insert(key.unwrap_or_else(|| panic!("{variable} is no variable of {server}")), value.clone());
    }
    values
        .into_iter()
        .filter(|(key, _)| !key.ends_with(".advertise"))
        .filter_map(|(key, value)| Some((key, value.parse().ok()?)))
        .collect()
}

/// The services of a file, those that cannot be there yet left out.
pub fn services(file: &str) -> Vec<Service> {
    let compose = parse(file);
    let all = compose["services"].as_object().unwrap().iter();
    let mut services: Vec<Service> = all.map(|(name, value)| Service::read(name, value)).collect();
    let coming = |service: &Service| service.rookery().is_some_and(is_coming);
    let left_out: Vec<String> = services.iter().filter(|s| coming(s)).map(|s| s.name.clone()).collect();
    services.retain(|service| !left_out.contains(&service.name));
    services.iter_mut().for_each(|service| service.depends_on.retain(|name| !left_out.contains(name)));
    services
}

fn parse(file: &str) -> Value {
    serde_saphyr::from_str(&read(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

#[test]
fn names_in_the_files_exist() {
    for file in FILES {
        let (compose, services) = (parse(file), services(file));
        for service in &services {
            let at = format!("{file}: {}", service.name);
            for (name, dependency) in service.value["depends_on"].as_object().into_iter().flatten() {
                let there = &compose["services"][name];
                assert!(there.is_object(), "{at} depends on {name}, which is not there");
                if dependency["condition"] == "service_healthy" {
                    assert!(there["healthcheck"]["test"].is_array(), "{at}: {name} has no health check");
                }
            }
            for volume in service.value["volumes"].as_array().into_iter().flatten() {
                let (name, _) = volume.as_str().unwrap().split_once(':').unwrap();
                assert!(compose["volumes"].as_object().unwrap().contains_key(name), "{at}: volume {name}");
            }
            let Some(program) = service.rookery() else { continue };
            assert!(binaries().contains(program), "{at}: there is no binary {program}");
            assert_eq!(
                (&service.value["image"], &service.value["build"]),
                (&"rookery".into(), &".".into()),
                "{at}"
            );
            let options = service.value["security_opt"].to_string();
            assert!(options.contains("no-new-privileges:true"), "{at}");
            if program == "gateway" {
                assert!(options.contains("seccomp=./scripts/docker/seccomp.json"), "{at}");
                assert!(path("scripts/docker/seccomp.json").exists());
            }
        }
    }
}

#[test]
fn ports_are_those_that_the_servers_listen_on() {
    for file in FILES {
        let services = services(file);
        let mut published = BTreeSet::new();
        for service in &services {
            let (at, listeners) = (format!("{file}: {}", service.name), service.listeners());
            for (host, container) in &service.published {
                assert!(published.insert(*host), "{at}: port {host} is published twice");
                let open = listeners.values().any(|a| a.port() == *container && a.ip().is_unspecified());
                assert!(open, "{at}: nothing listens on 0.0.0.0:{container}");
            }
            if let Some((port, path)) = &service.health {
                let key = if path == "/readyz" { "admin.listen" } else { "http.listen" };
                assert_eq!(listeners[key].port(), *port, "{at}: health check");
            }
            // Whoever is named with a port listens there, and not on the loopback of its container.
            for (key, value) in &service.environment {
                for other in &services {
                    let Some((_, rest)) = value.split_once(&format!("{}:", other.name)) else { continue };
                    let Ok(port) =
                        rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse::<u16>()
                    else {
                        continue;
                    };
                    let open =
                        other.listeners().values().any(|a| a.port() == port && a.ip().is_unspecified());
                    assert!(open, "{at}: {key}={value}, but {} does not listen on {port}", other.name);
                }
            }
        }
    }
}

/// No keys for tokens are set there, so this must stand where it is set.
#[test]
fn insecure_logins_are_said_loudly() {
    for file in FILES {
        let text = read(file);
        let lines: Vec<&str> = text.lines().collect();
        let at =
            lines.iter().position(|line| line.trim() == "ROOKERY_STATE_AUTH_INSECURE: \"true\"").unwrap();
        assert!(lines[at - 1].trim().starts_with("# !!"), "{file}");
    }
}

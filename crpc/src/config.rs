//! Configuration: a TOML file, then the environment, then `--set`; later wins, unknown keys are refused. Main thread, at
//! start.
//!
//! Trap: each source is judged on its own right after it was merged, so that an error names the source that caused it.
//! A section's name holds no underscore, because the environment separates section and key by the first one.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::{Table, Value};

pub use crate::config_sections::{
    AdminConfig, LogConfig, LogFormat, NodeConfig, RegistryConfig, ShutdownConfig,
};
use crate::process::{Fatal, ServerArgs};

/// What is wrong with the configuration, in one line that names the source.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {error}; give another file with --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The file is no TOML, or holds a key or value that this server does not take.
    #[error("{} line {line}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A key or value from the environment or `--set` is not taken.
    #[error("{source_name} ({key}): {message}")]
    Key {
        /// The variable or argument as given.
        source_name: String,
        /// The key that it stands for.
        key: String,
        /// What is wrong.
        message: String,
    },
}

impl From<ConfigError> for Fatal {
    fn from(error: ConfigError) -> Self {
        Fatal::config(error.to_string())
    }
}

/// The configuration of server `name` from its three sources. Missing keys have the values of `C::default()`; `C` and its
/// sections must `deny_unknown_fields` and take defaults for missing fields.
pub fn load<C: DeserializeOwned + Default>(name: &str, args: &ServerArgs) -> Result<C, ConfigError> {
    let fallback = PathBuf::from(format!("/etc/rookery/{name}.toml"));
    // One that is there and cannot be read, or leads nowhere, is an error and not the defaults.
    let is_there = |path: &PathBuf| !matches!(std::fs::symlink_metadata(path), Err(error) if error.kind() == std::io::ErrorKind::NotFound);
    let file = args.config.clone().or_else(|| Some(fallback).filter(is_there));
    let env = std::env::vars_os()
        .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)));
    load_from(name, file.as_deref(), env, &args.set)
}

/// What contradicts in the sections that gateway and state have, which register, without asking anybody. For `--check`, and
/// before a port is opened.
pub fn check_shared(id: &str, registry: &RegistryConfig, log: &LogConfig) -> Result<(), Fatal> {
    crate::log::filter(log)?;
    crate::registry::check(registry)?;
    crate::registry::check_name("node.id", id)?;
    Ok(())
}

/// [`load`] with every source given.
fn load_from<C: DeserializeOwned + Default>(
    name: &str,
    file: Option<&Path>,
    env: impl Iterator<Item = (String, String)>,
    sets: &[String],
) -> Result<C, ConfigError> {
    let mut table = Table::new();
    let mut config = C::default();
    if let Some(path) = file {
        (table, config) = read_file(path)?;
    }
    let prefix = format!("ROOKERY_{}_", name.to_uppercase());
    let mut variables: Vec<_> = env.filter(|(variable, _)| variable.starts_with(&prefix)).collect();
    variables.sort();
    for (variable, value) in variables {
        let path = variable[prefix.len()..].to_lowercase();
        let key = path.split_once('_').map_or(path.clone(), |(section, key)| format!("{section}.{key}"));
        config = apply(&mut table, &key, &value, || format!("environment variable {variable}"))?;
    }
    for set in sets {
        let source = || format!("--set {set}");
        let Some((key, value)) = set.split_once('=') else {
            let message = "write SECTION.KEY=VALUE".to_owned();
            return Err(ConfigError::Key { source_name: source(), key: set.clone(), message });
        };
        config = apply(&mut table, key.trim(), value.trim(), source)?;
    }
    Ok(config)
}

fn read_file<C: DeserializeOwned>(path: &Path) -> Result<(Table, C), ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.to_owned(), error })?;
    let refuse = |error: toml::de::Error| {
        let at = error.span().map_or(0, |span| span.start.min(text.len()));
        let line = 1 + text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count();
        ConfigError::File { path: path.to_owned(), line, message: error.message().to_owned() }
    };
    let table: Table = toml::from_str(&text).map_err(refuse)?;
    let config = toml::from_str(&text).map_err(refuse)?;
    Ok((table, config))
}

/// Puts one key into `table` and reads the whole anew. A value that is TOML is taken as that, unless only the plain
/// string fits: `--set id=7` names a gateway "7".
fn apply<C: DeserializeOwned>(
    table: &mut Table,
    key: &str,
    text: &str,
    source: impl Fn() -> String,
) -> Result<C, ConfigError> {
    let refuse = |message: String| ConfigError::Key { source_name: source(), key: key.to_owned(), message };
    let plain = Value::String(text.to_owned());
    let typed = text.parse::<Value>().unwrap_or_else(|_| plain.clone());
    let mut first_error = None;
    for value in [typed, plain] {
        let mut tried = table.clone();
        insert(&mut tried, key, value).map_err(refuse)?;
        match tried.clone().try_into::<C>() {
            Ok(config) => {
                *table = tried;
                return Ok(config);
            }
            Err(error) => drop(first_error.get_or_insert_with(|| error.message().trim().to_owned())),
        }
    }
    Err(refuse(first_error.unwrap_or_default()))
}

fn insert(table: &mut Table, key: &str, value: Value) -> Result<(), String> {
    let Some((section, key)) = key.split_once('.') else {
        table.insert(key.to_owned(), value);
        return Ok(());
    };
    match table.entry(section).or_insert_with(|| Value::Table(Table::new())) {
        Value::Table(section) => drop(section.insert(key.to_owned(), value)),
        _ => return Err(format!("`{section}` is a key, not a section")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, Default, PartialEq)]
    #[serde(default, deny_unknown_fields)]
    struct Config {
        id: String,
        log: LogConfig,
        limits: Limits,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(default, deny_unknown_fields)]
    struct Limits {
        frame_bytes_max: u64,
        names: Vec<String>,
    }

    impl Default for Limits {
        fn default() -> Self {
            Self { frame_bytes_max: 65_536, names: vec![] }
        }
    }

    fn load(file: Option<&str>, env: &[(&str, &str)], sets: &[&str]) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        if let Some(text) = file {
            std::fs::write(&path, text).unwrap();
        }
        let env = env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        load_from("gateway", file.map(|_| path.as_path()), env, &sets)
            .map_err(|error| error.to_string().replace(dir.path().to_str().unwrap(), "DIR"))
    }

    #[test]
    fn later_sources_win() {
        let file = "[limits]\nframe_bytes_max = 1\nnames = ['a']\n[log]\nlevel = 'debug'\n";
        let env =
            [("ROOKERY_GATEWAY_LIMITS_FRAME_BYTES_MAX", "2"), ("ROOKERY_GATEWAY_ID", "7"), ("PATH", "x")];
        let config = load(Some(file), &env, &["limits.frame_bytes_max=3", "limits.names=[\"b\"]"]).unwrap();
        assert_eq!((config.limits.frame_bytes_max, &*config.id, &*config.log.level), (3, "7", "debug"));
        assert_eq!(config.limits.names, ["b"]);
        assert_eq!(load(None, &env, &[]).unwrap().limits.frame_bytes_max, 2);
        assert_eq!(load(None, &[], &[]).unwrap(), Config::default());
    }

    #[test]
    fn every_source_refuses_what_it_does_not_know_and_is_named() {
        let error = load(Some("[limits]\n\nframe_bytes = 1\n"), &[], &[]).unwrap_err();
        assert!(error.starts_with("DIR/c.toml line 3: unknown field `frame_bytes`, expected"), "{error}");
        let error = load(Some("[limits\n"), &[], &[]).unwrap_err();
        assert!(error.starts_with("DIR/c.toml line 1: "), "{error}");
        let error = load(None, &[("ROOKERY_GATEWAY_LIMTS_X", "1")], &[]).unwrap_err();
        assert!(
            error.starts_with("environment variable ROOKERY_GATEWAY_LIMTS_X (limts.x): unknown field"),
            "{error}"
        );
        let error = load(None, &[], &["limits.x=1"]).unwrap_err();
        assert!(error.starts_with("--set limits.x=1 (limits.x): unknown field `x`"), "{error}");
        let error = load(None, &[], &["limits.frame_bytes_max=lots"]).unwrap_err();
        assert!(error.contains("invalid type: string \"lots\", expected u64"), "{error}");
        assert!(load(None, &[], &["limits"]).unwrap_err().contains("write SECTION.KEY=VALUE"));
        for line in [error, load(None, &[], &["id.x=1"]).unwrap_err()] {
            assert!(!line.contains('\n'), "{line:?} is one line");
        }
    }

    #[test]
    fn a_value_cannot_smuggle_in_keys() {
        let config = load(None, &[("ROOKERY_GATEWAY_ID", "1\nlog.level = 'x'")], &[]).unwrap();
        assert_eq!(config.id, "1\nlog.level = 'x'");
    }
}

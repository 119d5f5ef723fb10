//! The gateway binary: arguments, configuration, `--check`, run.

use std::process::ExitCode;

use clap::Parser;
use crpc::{Fatal, ServerArgs};
use gateway::config::Config;

/// Terminates client connections and carries their frames to and from state servers.
///
/// Configuration: --config FILE (TOML; else /etc/rookery/gateway.toml if present), then environment variables
/// ROOKERY_GATEWAY_SECTION_KEY, then --set section.key=value; later wins. Main keys: listen.client (127.0.0.1:7000),
/// listen.advertise, admin.listen (127.0.0.1:7001), registry.kind (etcd or directory),
/// registry.endpoints, registry.path, limits.connections_max, node.id, node.zone.
#[derive(Parser)]
#[command(name = "gateway", version, verbatim_doc_comment)]
struct Args {
    #[command(flatten)]
    server: ServerArgs,
}

fn main() -> ExitCode {
    let args: Args = match crpc::process::parse() {
        Ok(args) => args,
        Err(code) => return code,
    };
    crpc::process::run("gateway", || start(&args.server))
}

fn start(args: &ServerArgs) -> Result<(), Fatal> {
    let config: Config = crpc::config::load("gateway", args)?;
    if args.check {
        let plan = gateway::server::check(&config)?;
        println!(
            "ok: {} workers with a private fd table each, at most {} connections per worker, limits.connections_max = {}",
            plan.workers, plan.connections_per_worker_max, config.limits.connections_max
        );
        return Ok(());
    }
    gateway::server::run(config)
}

//! The gateway binary: arguments, configuration, `--check`, run.

use std::process::ExitCode;

use clap::Parser;
use crpc::{Fatal, ServerArgs};
use gateway::config::Config;
use gateway::machine::{self, Verdict};

/// Configured when it is built, by `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

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
    crpc::config::check_shared(&config.id(), &config.registry, &config.log)?;
    if args.check {
        let checked = gateway::server::check(&config)?;
        let summary = machine::summary(&checked.wanted, &checked.findings);
        println!("{summary}\n\n{}", machine::table(&checked.findings).trim_end());
        return match checked.findings.iter().any(|row| row.verdict == Verdict::Refused) {
            true => Err(Fatal::unavailable(summary)),
            false => Ok(()),
        };
    }
    crpc::heap::warn_unless(crpc::heap_is_ours!(), "gateway");
    crpc::heap::tell(crpc::heap_in_use!());
    gateway::server::run(config)
}

#[cfg(test)]
mod tests {
    crpc::heap_tests!();
}

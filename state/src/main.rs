//! The state server binary: arguments, configuration, `--check`, run; and what else it does, of `state::ctl`.

use std::process::ExitCode;

use clap::Parser;
use crpc::{Fatal, ServerArgs};
use state::config::Config;
use state::ctl::Task;

/// Gives back what a busy second needed, where glibc's kept it. Configured when it is built, by `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Keeps users, chats and messages, and is the only part that says "accepted".
///
/// Configuration: --config FILE (TOML; else /etc/rookery/state.toml if present), then environment variables
/// ROOKERY_STATE_SECTION_KEY, then --set section.key=value; later wins. Main keys: rpc.listen (127.0.0.1:7100),
/// rpc.advertise, admin.listen (127.0.0.1:7101), store.url (redis://… or redb:PATH), registry.kind (etcd or
/// directory), registry.endpoints, registry.path, node.id, limits.message_bytes_max, auth.keys (without any, a login is a
/// name and proves nothing).
#[derive(Parser)]
#[command(name = "state", version, verbatim_doc_comment)]
struct Args {
    #[command(flatten)]
    server: ServerArgs,
    #[command(subcommand)]
    task: Option<Task>,
}

fn main() -> ExitCode {
    let args: Args = match crpc::process::parse() {
        Ok(args) => args,
        Err(code) => return code,
    };
    crpc::process::run("state", || match &args.task {
        Some(task) => state::ctl::run(task, &args.server),
        None => start(&args.server),
    })
}

fn start(args: &ServerArgs) -> Result<(), Fatal> {
    let config: Config = crpc::config::load("state", args)?;
    config.check().map_err(Fatal::config)?;
    crpc::config::check_shared(&config.id(), &config.registry, &config.log)?;
    if args.check {
        config.auth.verifier().map_err(Fatal::config)?;
        println!(
            "ok: state would listen on {} and keep its data at {}",
            config.rpc.listen,
            config.store.shown()
        );
        return Ok(());
    }
    // Everything but HTTP runs on this thread.
    let is_cached = crpc::heap_cached!();
    crpc::heap::warn_unless(crpc::heap_is_ours!() && is_cached, "state");
    crpc::heap::tell(crpc::heap_in_use!());
    state::server::run(config)
}

#[cfg(test)]
mod tests {
    crpc::heap_tests!();
}

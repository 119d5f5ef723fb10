//! The program `api`: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser;
use crpc::ServerArgs;

/// The HTTP door for web services: POST /api/send, GET /api/pull, GET /ping; GET /openapi.json says it all.
///
/// Keys of the configuration, with defaults: http.listen=127.0.0.1:8080, http.body_bytes_max=262144,
/// http.request_ms_max=10000, http.connections_max=8192, http.connection_s_max=60, http.pull_limit_default=20,
/// http.pull_limit_max=100, auth.insecure=false (true: listen also where others than this machine can call),
/// state.call_ms_max=5000, admin.listen=127.0.0.1:8081,
/// registry.kind=etcd, registry.endpoints=["http://127.0.0.1:2379"] (or registry.kind=directory, registry.path=DIR),
/// log.level=info. From a file, then environment variables such as ROOKERY_API_HTTP_LISTEN, then --set; later wins.
///
/// Exit codes: 0 ok, 64 bad configuration or usage, 69 registry unreachable or port in use, 70 internal error.
#[derive(Parser)]
#[command(name = "api", version)]
struct Args {
    #[command(flatten)]
    server: ServerArgs,
}

fn main() -> ExitCode {
    match crpc::process::parse::<Args>() {
        Ok(args) => crpc::process::run("api", || api::run::run(&args.server)),
        Err(code) => code,
    }
}

//! The program `ipconf`: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser;
use crpc::ServerArgs;

/// Tells clients which Rookery gateways to use, best first: GET /ip/list[?n=K]
///
/// Keys of the configuration, with defaults: http.listen=127.0.0.1:6789, admin.listen=127.0.0.1:6790,
/// registry.kind=etcd, registry.endpoints=["http://127.0.0.1:2379"] (or registry.kind=directory, registry.path=DIR), list.n_default=5, list.n_max=50, rank.report_s_max=10,
/// rank.window_reports=5, rank.tie_share=0.05, log.level=info. From a file, then environment variables such as
/// ROOKERY_IPCONF_HTTP_LISTEN, then --set; later wins.
///
/// Exit codes: 0 ok, 64 bad configuration or usage, 69 registry unreachable or port in use, 70 internal error.
#[derive(Parser)]
#[command(name = "ipconf", version)]
struct Args {
    #[command(flatten)]
    server: ServerArgs,
}

fn main() -> ExitCode {
    match crpc::process::parse::<Args>() {
        Ok(args) => crpc::process::run("ipconf", || ipconf::run::run(&args.server)),
        Err(code) => code,
    }
}

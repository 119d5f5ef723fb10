//! The chat client: for the terminal (`client`), and for scripts (`client send`, `client listen`).
//!
//! Trap: stdout belongs to scripts. Everything that is not a result goes to stderr.

mod command_group;
mod command_listen;
mod command_send;
mod command_settings;
mod tui;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use client::{ConnectError, Ended, Keep, Options, Target, Token};
use tracing_subscriber::EnvFilter;

/// Rookery's client: a chat for the terminal, and subcommands for scripts.
///
/// Without a subcommand it is a chat that fills the terminal; /help in it shows its keys. It is the device `chat`, shows
/// messages from where that device was, and keeps the last of them for its next start.
///
/// State (message ids, unanswered messages, cursors) is kept under $XDG_STATE_HOME/rookery/USER/DEVICE, or
/// ~/.local/state/rookery/USER/DEVICE; one program at a time may use a user and device. Logs go to stderr; RUST_LOG=info
/// shows them.
#[derive(Debug, Parser)]
#[command(name = "client", version, after_help = EXAMPLES, override_usage = USAGE)]
struct Arguments {
    /// Who chats (behind a subcommand: who sends or listens)
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Base URL of ipconf, which is asked for a gateway
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "ROOKERY_IPCONF",
        default_value = "http://127.0.0.1:6789"
    )]
    ipconf: String,
    /// Connect to this gateway and do not ask ipconf; may be given several times
    #[arg(long, global = true, value_name = "HOST:PORT")]
    gateway: Vec<String>,
    /// Name of this device [default: `chat` for the chat; for a subcommand its name and a random number: such a device
    /// is forgotten at the end]
    #[arg(long, global = true, value_name = "NAME")]
    device: Option<String>,
    /// Log in with the token in this file, which is read again at each login [default: none, a development login]
    #[arg(long, global = true, value_name = "FILE", env = "ROOKERY_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Subcommands>,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    Send(command_send::Arguments),
    Listen(command_listen::Arguments),
    Group(command_group::Arguments),
    Settings(command_settings::Arguments),
}

const USAGE: &str = "\
client [OPTIONS] --user NAME
       client [OPTIONS] send --user NAME --to NAME TEXT
       client [OPTIONS] listen --user NAME
       client [OPTIONS] group --user NAME create|add|remove|rename|role|leave|delete|members …
       client [OPTIONS] settings --user NAME [--hide-presence on|off] [--hide-typing on|off]";

const EXAMPLES: &str = "\
Examples:
  client --user alice
  client listen --user bob --json
  client send --user alice --to bob 'hello, bob'
  client group --user alice create 'Chess club' bob carol:admin
  client send --user bob --to '#17' 'hello, all'
  seq 1000 | client send --user alice --to bob --stdin
  client --gateway 127.0.0.1:7000 listen --user bob --device phone --count 10 --timeout 60

Exit codes: 0 done, 3 listen timed out, 64 wrong usage or refused, 69 no answer (a message sent may have been stored or
not), 70 anything else.";

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    // A line of log would tear the chat's screen.
    if arguments.command.is_some() || !std::io::stderr().is_terminal() {
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::new(error).context("cannot start")),
    };
    let result = runtime.block_on(run(arguments));
    // A thread may still stand in a read of stdin.
    runtime.shutdown_background();
    result.unwrap_or_else(|error| fail(&error))
}

async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { user, ipconf, gateway, device, token_file, command } = arguments;
    let target = if gateway.is_empty() { Target::Ipconf(ipconf) } else { Target::Gateway(gateway) };
    let token = token_file.map_or_else(Token::none, Token::file);
    if let Err(error) = token.get().await {
        return Ok(usage(&error.to_string()));
    }
    match command {
        Some(_) if user.is_some() => Ok(usage("--user goes behind the subcommand")),
        Some(Subcommands::Send(arguments)) => {
            let options = options(&arguments.user, "send", device, target, token);
            command_send::run(arguments, options).await
        }
        Some(Subcommands::Group(arguments)) => {
            let options = options(&arguments.user, "group", device, target, token);
            command_group::run(arguments, options).await
        }
        Some(Subcommands::Settings(arguments)) => {
            let options = options(&arguments.user, "settings", device, target, token);
            command_settings::run(arguments, options).await
        }
        Some(Subcommands::Listen(arguments)) => {
            let options = options(&arguments.user, "listen", device, target, token);
            command_listen::run(arguments, options).await
        }
        None => {
            let Some(user) = user else {
                return Ok(usage("who chats? --user NAME, or a subcommand"));
            };
            if !tui::has_terminal() {
                return Ok(usage("the chat needs a terminal; for scripts there are `send` and `listen`"));
            }
            let device = device.unwrap_or_else(|| "chat".to_owned());
            tui::run(Options { token, ..Options::new(user, device, target) }).await
        }
    }
}

/// What was done stays done, also where nobody reads it.
fn print_line(line: &impl std::fmt::Display) -> std::io::Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

fn usage(problem: &str) -> ExitCode {
    eprintln!("client: {problem}; see client --help");
    ExitCode::from(EXIT_USAGE)
}

fn options(user: &str, subcommand: &str, device: Option<String>, target: Target, token: Token) -> Options {
    let throw_away = device.is_none();
    // Process ids are not enough: in a container they are the same each time, and the second would end the first.
    let device = device.unwrap_or_else(|| format!("{subcommand}-{:08x}", rand::random::<u32>()));
    Options { throw_away, keep: Keep::Default, token, ..Options::new(user, device, target) }
}

/// One line on stderr, and the exit code that says whose fault it is.
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("client: {error:#}");
    let ended = match error.downcast_ref::<ConnectError>() {
        Some(ConnectError::Name { .. }) => return ExitCode::from(EXIT_USAGE),
        Some(ConnectError::Store(client::store::StoreError::Locked(_))) => return ExitCode::from(EXIT_USAGE),
        Some(ConnectError::Ended(ended)) => Some(ended),
        _ => error.downcast_ref::<Ended>(),
    };
    ExitCode::from(match ended {
        Some(Ended::LoginRefused { .. }) => EXIT_USAGE,
        Some(Ended::Kicked { .. }) => EXIT_UNREACHABLE,
        _ => EXIT_INTERNAL,
    })
}

const EXIT_TIMEOUT: u8 = 3;
const EXIT_USAGE: u8 = 64;
const EXIT_UNREACHABLE: u8 = 69;
const EXIT_INTERNAL: u8 = 70;

//! The subcommands of the `state` binary beside the server: what an operator asks of a running one (`ctl`), and tokens for
//! development (`token`). Main thread.
//!
//! Trap: a token is printed to stdout and nowhere else, a key never.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use crpc::client::{ChannelOptions, connect_lazy};
use crpc::token::{KeyAlgorithm, KeyConfig, NewToken, Signer};
use crpc::{Fatal, ServerArgs};
use proto::state::state_client::StateClient;
use proto::state::{DeleteReply, DeleteRequest, EndReply, EndRequest};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::config::Config;
use crate::end;

/// What the binary does instead of serving.
#[derive(Debug, Subcommand)]
pub enum Task {
    /// Ask something of a running state server
    #[command(subcommand)]
    Ctl(Ask),
    /// Print a token for development
    ///
    /// Signed with --key, else with the first HS256 key of auth.keys in the configuration, which also has the issuer and audience.
    Token(TokenArgs),
}

/// What may be asked.
#[derive(Debug, Subcommand)]
pub enum Ask {
    /// End the connections of a user or device; their tokens stay good
    Kick(Whom),
    /// Refuse all tokens that a user or device has by now, and end the connections
    ///
    /// A token that names no device can log in as any device: revoke those without --device.
    Revoke(Whom),
    /// What can be done with a user
    #[command(subcommand)]
    User(OfUser),
}

/// What may be asked of a user.
#[derive(Debug, Subcommand)]
pub enum OfUser {
    /// Delete a user: connections, tokens, number, cursors, membership of groups
    ///
    /// Messages stay, for those who have them. Whoever takes the name next is a new user and finds nothing of it. Takes some seconds;
    /// given again, it finishes what was begun.
    Delete(Doomed),
}

/// Who is deleted.
#[derive(Debug, Args)]
pub struct Doomed {
    /// Name of the user
    #[arg(long, value_name = "NAME")]
    user: String,
    /// A state server; any one will do
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7100")]
    target: String,
}

/// Whose connections.
#[derive(Debug, Args)]
pub struct Whom {
    /// Name of the user
    #[arg(long, value_name = "NAME")]
    user: String,
    /// Only this device [default: all]
    #[arg(long, value_name = "NAME", default_value = "")]
    device: String,
    /// A state server; any one will do
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7100")]
    target: String,
}

/// What a token is to say.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// Whom it proves
    #[arg(long, value_name = "NAME")]
    user: String,
    /// The only device that it is good for [default: any]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// How long it is good: 90s, 30m, 12h, 7d
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    ttl: Duration,
    /// Sign with the key in this file: a secret, or with --eddsa a private key in PEM
    #[arg(long, value_name = "FILE", requires = "kid")]
    key: Option<PathBuf>,
    /// What the server calls that key
    #[arg(long, value_name = "KID", requires = "key")]
    kid: Option<String>,
    /// The key is an Ed25519 key
    #[arg(long, requires = "key")]
    eddsa: bool,
}

/// Does it.
pub fn run(task: &Task, server: &ServerArgs) -> Result<(), Fatal> {
    match task {
        Task::Ctl(Ask::Kick(whom)) => end_connections(whom, false),
        Task::Ctl(Ask::Revoke(whom)) => end_connections(whom, true),
        Task::Ctl(Ask::User(OfUser::Delete(whom))) => delete(whom),
        Task::Token(args) => {
            println!("{}", token(args, &crpc::config::load("state", server)?)?);
            Ok(())
        }
    }
}

/// Asks a state server, and waits for so long.
fn ask<T>(
    target: &str,
    answer_max: Duration,
    ask: impl AsyncFnOnce(StateClient<Channel>) -> Result<Response<T>, Status>,
) -> Result<T, Fatal> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fatal::internal(format!("no runtime: {error}")))?;
    let answered = runtime.block_on(async {
        let channel = connect_lazy(target, &ChannelOptions::default())?;
        let late = || Status::deadline_exceeded(format!("no answer within {answer_max:?}"));
        tokio::time::timeout(answer_max, ask(StateClient::new(channel))).await.map_err(|_| late())?
    });
    answered.map(Response::into_inner).map_err(|status| {
        let text = format!("{target}: {}", status.message());
        if matches!(status.code(), Code::InvalidArgument | Code::NotFound) {
            Fatal::config(text)
        } else {
            Fatal::unavailable(text)
        }
    })
}

fn end_connections(whom: &Whom, revoke: bool) -> Result<(), Fatal> {
    let request = EndRequest { user: whom.user.clone(), device: whom.device.clone(), revoke, relayed: false };
    let end = async |mut state: StateClient<Channel>| state.end(request).await;
    let EndReply { ended, left } = ask(&whom.target, ANSWER_MAX, end)?;
    println!("ended {ended}");
    if left > 0 {
        let revoked = if revoke { "the tokens are revoked, but " } else { "" };
        return Err(Fatal::unavailable(format!(
            "{revoked}of {left} connections it is not known that they are closed: their gateway is dead, or out of reach of \
             every state server"
        )));
    }
    Ok(())
}

fn delete(whom: &Doomed) -> Result<(), Fatal> {
    let request = DeleteRequest { user: whom.user.clone(), forget: 0 };
    let delete = async |mut state: StateClient<Channel>| state.delete(request).await;
    let DeleteReply { ended, left, groups, chats } = ask(&whom.target, DELETED_MAX, delete)?;
    println!("deleted, ended {ended}, left {groups} groups, {chats} chats");
    if left > 0 {
        eprintln!(
            "of {left} connections it is not known that they are closed; whatever they send is refused"
        );
    }
    Ok(())
}

fn token(args: &TokenArgs, config: &Config) -> Result<String, Fatal> {
    for (what, text) in [("user", Some(&args.user)), ("device", args.device.as_ref())] {
        if let Some(Err(error)) = text.map(|text| proto::name::check(text)) {
            return Err(Fatal::config(format!("--{what}: {error}")));
        }
    }
    let key = match (&args.key, &args.kid) {
        (Some(file), Some(kid)) => {
            let algorithm = if args.eddsa { KeyAlgorithm::EdDSA } else { KeyAlgorithm::HS256 };
            KeyConfig { kid: kid.clone(), algorithm, file: file.clone() }
        }
        _ => {
            let secret = config.auth.keys.iter().find(|key| key.algorithm == KeyAlgorithm::HS256);
            secret.cloned().ok_or_else(|| {
                Fatal::config(
                    "auth.keys of the configuration has no HS256 key: give one with --key and --kid",
                )
            })?
        }
    };
    let issued_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let token = NewToken {
        user: &args.user,
        device: args.device.as_deref(),
        issuer: &config.auth.issuer,
        audience: &config.auth.audience,
        issued_s,
        expires_s: issued_s.saturating_add(args.ttl.as_secs()),
    };
    Signer::open(&key).and_then(|signer| signer.sign(&token)).map_err(Fatal::config)
}

/// A number and a unit.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time: write 90s, 30m, 12h or 7d");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let unit_s: u64 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let count: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    count.checked_mul(unit_s).filter(|s| *s > 0).map(Duration::from_secs).ok_or_else(wrong)
}

/// Beyond what the server takes at most.
const ANSWER_MAX: Duration = Duration::from_secs(2 * end::WAIT_MAX.as_secs());

/// The walk through a user's chats, too: thousands of them a second.
const DELETED_MAX: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("7d"), Ok(Duration::from_secs(7 * 86_400)));
        for wrong in ["", "7", "d", "0d", "-1d", "1w", "1é", "99999999999999999999d", "999999999999999999d"]
        {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}

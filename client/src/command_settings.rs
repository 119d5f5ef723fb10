//! `client settings`: what others are not told of a user.

use std::process::ExitCode;
use std::time::Duration;

use client::{AskError, Client, ConnectError, Options, Settings};

use crate::{EXIT_UNREACHABLE, EXIT_USAGE};

/// Show or change what others are told of a user
///
/// Prints {"hide_presence":false,"hide_typing":false}, as it holds then for all devices of the user.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Whose settings
    #[arg(long)]
    pub user: String,
    /// Whether others are not told if this user is there
    #[arg(long, value_name = "on|off", value_parser = on_or_off)]
    hide_presence: Option<bool>,
    /// Whether others are not told that this user is writing
    #[arg(long, value_name = "on|off", value_parser = on_or_off)]
    hide_typing: Option<bool>,
    /// Give up when there was no answer for so long
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = crate::command_listen::seconds)]
    timeout: f64,
}

pub async fn run(arguments: Arguments, options: Options) -> anyhow::Result<ExitCode> {
    let (client, _events) = Client::start(Options { receive: false, ..options })?;
    let within = Duration::from_secs_f64(arguments.timeout);
    let code = match tokio::time::timeout(within, settle(&client, &arguments)).await {
        Ok(Ok(settings)) => {
            let Settings { hide_presence, hide_typing } = settings;
            crate::print_line(
                &serde_json::json!({ "hide_presence": hide_presence, "hide_typing": hide_typing }),
            )?;
            ExitCode::SUCCESS
        }
        Ok(Err(AskError::Over)) => match client.online().await {
            Err(ended) => return Err(anyhow::Error::new(ConnectError::Ended(ended))),
            Ok(()) => ExitCode::from(EXIT_UNREACHABLE),
        },
        Ok(Err(error)) => {
            eprintln!("client: {error}");
            ExitCode::from(EXIT_USAGE)
        }
        Err(_) => {
            eprintln!("client: no answer within {} s; a change may have been made or not", arguments.timeout);
            ExitCode::from(EXIT_UNREACHABLE)
        }
    };
    client.close().await;
    Ok(code)
}

async fn settle(client: &Client, arguments: &Arguments) -> Result<Settings, AskError> {
    let now = client.settings().await?;
    let hide_presence = arguments.hide_presence.unwrap_or(now.hide_presence);
    let wanted = Settings { hide_presence, hide_typing: arguments.hide_typing.unwrap_or(now.hide_typing) };
    if wanted == now { Ok(now) } else { client.change_settings(wanted).await }
}

fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off".to_owned()),
    }
}

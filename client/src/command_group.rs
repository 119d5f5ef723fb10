//! `client group`: makes, changes and lists groups, one thing a run.
//!
//! Trap: a change is a message. Without an answer it may have been stored or not, as with `client send`.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use client::{AskError, Client, ConnectError, Options, SendError, Sent, Status, change};
use proto::wire::{GroupAction, Role};

use crate::{EXIT_UNREACHABLE, EXIT_USAGE};

/// Make, change or list a group
///
/// Prints {"chat":"#17","seq":1} once the change is durable; `members` prints {"user":"bob","role":"admin","joined":1,
/// "delivered":9,"read":7} a line: the seqs from which on a member is in it, has everything up to, and has read up to. Exits 64
/// when it is refused for good, 69 when no answer came in time: then it may have been done or not.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Who asks
    #[arg(long)]
    pub user: String,
    /// Give up when there was no answer for so long
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = crate::command_listen::seconds)]
    timeout: f64,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Make a group; its name, such as #17, is in the answer
    Create {
        /// What people call it
        title: String,
        /// Who is in it: names; an admin is written NAME:admin
        members: Vec<String>,
    },
    /// Bring people in
    Add {
        /// The group
        group: String,
        /// Names; an admin is written NAME:admin
        #[arg(required = true)]
        members: Vec<String>,
    },
    /// Take people out
    Remove {
        /// The group
        group: String,
        /// Names
        #[arg(required = true)]
        members: Vec<String>,
    },
    /// Give it another title
    Rename {
        /// The group
        group: String,
        /// What people call it
        title: String,
    },
    /// Make somebody a member, an admin or the owner
    Role {
        /// The group
        group: String,
        /// NAME:member, NAME:admin or NAME:owner
        member: String,
    },
    /// Leave it
    Leave {
        /// The group
        group: String,
    },
    /// End it for everybody
    Delete {
        /// The group
        group: String,
    },
    /// List who is in it
    Members {
        /// The group
        group: String,
    },
}

pub async fn run(arguments: Arguments, options: Options) -> anyhow::Result<ExitCode> {
    let Some(action) = Ask::of(&arguments.action) else {
        return Ok(crate::usage("a member is NAME, NAME:member, NAME:admin or NAME:owner"));
    };
    let options = Options { receive: false, ..options };
    let (client, _events) = Client::start(options)?;
    let timeout = Duration::from_secs_f64(arguments.timeout);
    let result = match tokio::time::timeout(timeout, action.done(&client)).await {
        Ok(done) => done,
        Err(_) => {
            let problem = match client.status() {
                Status::Connecting { problem: Some(problem) } => format!(" ({problem})"),
                _ => String::new(),
            };
            eprintln!("client: unknown: no answer for {timeout:?}{problem}; it may have been done or not");
            Ok(ExitCode::from(EXIT_UNREACHABLE))
        }
    };
    client.close().await;
    result
}

/// What is to be done, in the library's words.
enum Ask<'a> {
    Create(&'a str, Vec<(&'a str, Role)>),
    Change(&'a str, GroupAction, &'a str, Vec<(&'a str, Role)>),
    Members(&'a str),
}

impl Ask<'_> {
    /// `None`: a member is not written as one.
    fn of(action: &Action) -> Option<Ask<'_>> {
        Some(match action {
            Action::Create { title, members } => Ask::Create(title, all(members)?),
            Action::Add { group, members } => {
                let members = all(members)?;
                Ask::Change(group, GroupAction::GroupAdd, "", members)
            }
            Action::Remove { group, members } => {
                let members = all(members)?;
                Ask::Change(group, GroupAction::GroupRemove, "", members)
            }
            Action::Rename { group, title } => {
                Ask::Change(group, GroupAction::GroupRename, title, Vec::new())
            }
            Action::Role { group, member: one } => {
                Ask::Change(group, GroupAction::GroupRole, "", vec![member(one)?])
            }
            Action::Leave { group } => Ask::Change(group, GroupAction::GroupLeave, "", Vec::new()),
            Action::Delete { group } => Ask::Change(group, GroupAction::GroupDelete, "", Vec::new()),
            Action::Members { group } => Ask::Members(group),
        })
    }

    async fn done(&self, client: &Client) -> anyhow::Result<ExitCode> {
        match self {
            Ask::Create(title, members) => report(client, client.create_group(title, members).await),
            Ask::Change(group, action, title, members) => {
                report(client, client.change_group(group, &change(*action, title, members)).await)
            }
            Ask::Members(group) => match client.group(group).await {
                Ok(group) => {
                    let mut out = std::io::stdout().lock();
                    for member in &group.members {
                        let role = match member.role() {
                            Role::Member => "member",
                            Role::Admin => "admin",
                            Role::Owner => "owner",
                        };
                        let line = serde_json::json!({
                            "user": member.user, "role": role, "joined": member.joined,
                            "delivered": member.delivered, "read": member.read,
                        });
                        writeln!(out, "{line}")?;
                    }
                    Ok(ExitCode::SUCCESS)
                }
                Err(error @ (AskError::Refused { .. } | AskError::Name(_))) => {
                    eprintln!("client: {error}");
                    Ok(ExitCode::from(EXIT_USAGE))
                }
                Err(error @ AskError::Over) => over(client, error.into()),
            },
        }
    }
}

fn report(client: &Client, answer: Result<Sent, SendError>) -> anyhow::Result<ExitCode> {
    match answer {
        Ok(sent) => {
            crate::print_line(&serde_json::json!({ "chat": &*sent.chat, "seq": sent.seq }))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(error @ (SendError::Refused { .. } | SendError::Name(_))) => {
            eprintln!("client: {error}");
            Ok(ExitCode::from(EXIT_USAGE))
        }
        Err(error) => over(client, error.into()),
    }
}

/// The session is over: why, if it says so.
fn over(client: &Client, error: anyhow::Error) -> anyhow::Result<ExitCode> {
    eprintln!("client: {error}");
    match client.status() {
        Status::Ended(ended) => Err(anyhow::Error::new(ConnectError::Ended(ended))),
        _ => Ok(ExitCode::from(EXIT_UNREACHABLE)),
    }
}

fn all(members: &[String]) -> Option<Vec<(&str, Role)>> {
    members.iter().map(|text| member(text)).collect()
}

/// `bob`, `bob:admin`.
fn member(text: &str) -> Option<(&str, Role)> {
    match text.split_once(':') {
        None | Some((_, "member")) => Some((text.trim_end_matches(":member"), Role::Member)),
        Some((name, "admin")) => Some((name, Role::Admin)),
        Some((name, "owner")) => Some((name, Role::Owner)),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_a_name_with_or_without_a_role() {
        assert_eq!(member("bob"), Some(("bob", Role::Member)));
        assert_eq!(member("bob:member"), Some(("bob", Role::Member)));
        assert_eq!(member("bob:admin"), Some(("bob", Role::Admin)));
        assert_eq!(member("bob:owner"), Some(("bob", Role::Owner)));
        assert_eq!(member("bob:king"), None);
    }
}

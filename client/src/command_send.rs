//! `client send`: one message, or a message per line of stdin, each answered by a JSON line once it is durable.
//!
//! Trap: no answer is not a failure. The exit code for it, and the word on stderr, is "unknown".

use std::collections::VecDeque;
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::time::Duration;

use client::{Client, ConnectError, Options, Pending, SendError, Sent, Status};
use tokio::sync::mpsc;

use crate::{EXIT_UNREACHABLE, EXIT_USAGE};

/// Send a message; exits 0 only after the server has it durably
///
/// Prints {"chat":"alice:bob","seq":1} per message, with --stdin also its "line", from 1; of a line that is refused, stderr
/// says which. Exits 64 when a message is refused for good, 69 when no answer came
/// in time: then it may have been stored or not.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Who sends
    #[arg(long)]
    pub user: String,
    /// To whom: a user (bob), a chat (alice:bob) or a group (#17)
    #[arg(long)]
    to: String,
    /// Give up when there was no answer for so long
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = crate::command_listen::seconds)]
    timeout: f64,
    /// Send every line of stdin as a message, in order, many at a time
    #[arg(long, conflicts_with = "text", required_unless_present = "text")]
    stdin: bool,
    /// The message
    text: Option<String>,
}

pub async fn run(arguments: Arguments, options: Options) -> anyhow::Result<ExitCode> {
    let options = Options { receive: false, ..options };
    // The events say nothing that the answers do not.
    let (client, _events) = Client::start(options)?;
    let lines = match arguments.text {
        Some(text) => one(text),
        None => read_stdin(),
    };
    let timeout = Duration::from_secs_f64(arguments.timeout);
    let result = send_all(&client, &arguments.to, lines, arguments.stdin, timeout).await;
    client.close().await;
    result
}

/// Keeps many messages on their way and prints the answers in order.
async fn send_all(
    client: &Client,
    to: &str,
    mut lines: mpsc::Receiver<std::io::Result<String>>,
    many: bool,
    timeout: Duration,
) -> anyhow::Result<ExitCode> {
    // With the number of its line.
    let mut pending: VecDeque<(u64, Pending)> = VecDeque::new();
    let mut number = 0;
    let mut broken = None;
    let mut refused = false;
    let mut open = true;
    let mut give_up = tokio::time::Instant::now() + timeout;
    while open || !pending.is_empty() {
        tokio::select! {
            biased;
            answer = async { pending.front_mut().map(|(_, answer)| answer)?.await.into() }, if !pending.is_empty() => {
                let Some(answer) = answer else { continue };
                let line = pending.pop_front().map(|(line, _)| line).filter(|_| many);
                give_up = tokio::time::Instant::now() + timeout;
                match report(client, line, answer)? {
                    Answer::Sent => {}
                    Answer::Refused => refused = true,
                    Answer::Over(code) => return Ok(code),
                }
            }
            line = lines.recv(), if open && pending.len() < PENDING_MAX => match line {
                None => open = false,
                // What was read before gets its answers first.
                Some(Err(error)) => (open, broken) = (false, Some(error)),
                Some(Ok(line)) => {
                    if pending.is_empty() {
                        give_up = tokio::time::Instant::now() + timeout;
                    }
                    number += 1;
                    match client.try_enqueue(to, line) {
                        Ok(answer) => pending.push_back((number, answer)),
                        // In its order: the answers in front are printed first only when they come first.
                        Err(error) => match report(client, Some(number).filter(|_| many), Err(error))? {
                            Answer::Over(code) => return Ok(code),
                            _ => refused = true,
                        },
                    }
                }
            },
            () = tokio::time::sleep_until(give_up), if !pending.is_empty() => {
                let problem = match client.status() {
                    Status::Connecting { problem: Some(problem) } => format!(" ({problem})"),
                    Status::Connecting { problem: None } => " (not connected)".to_owned(),
                    _ => String::new(),
                };
                eprintln!(
                    "client: unknown: no answer for {timeout:?}{problem}; {} message(s) may have been stored or not",
                    pending.len()
                );
                return Ok(ExitCode::from(EXIT_UNREACHABLE));
            }
        }
    }
    if let Some(error) = broken {
        return Err(anyhow::Error::new(error).context(format!("line {} of stdin", number + 1)));
    }
    Ok(if refused { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS })
}

enum Answer {
    Sent,
    Refused,
    Over(ExitCode),
}

/// `line`: of stdin, from 1.
fn report(client: &Client, line: Option<u64>, answer: Result<Sent, SendError>) -> anyhow::Result<Answer> {
    let of = line.map(|line| format!("line {line}: ")).unwrap_or_default();
    match answer {
        Ok(sent) => {
            let mut object = serde_json::json!({ "chat": &*sent.chat, "seq": sent.seq });
            if let Some(line) = line {
                object["line"] = line.into();
            }
            let mut out = std::io::stdout().lock();
            writeln!(out, "{object}").and_then(|()| out.flush())?;
            Ok(Answer::Sent)
        }
        Err(error @ (SendError::Refused { .. } | SendError::Name(_))) => {
            eprintln!("client: {of}{error}");
            Ok(Answer::Refused)
        }
        // It may have been stored, whatever ended the session.
        Err(error @ SendError::Unknown) => {
            eprintln!("client: {of}{error}");
            Ok(Answer::Over(ExitCode::from(EXIT_UNREACHABLE)))
        }
        Err(error) => match client.status() {
            Status::Ended(ended) => {
                eprintln!("client: {error}");
                Err(anyhow::Error::new(ConnectError::Ended(ended)))
            }
            _ => {
                eprintln!("client: {error}");
                Ok(Answer::Over(ExitCode::from(EXIT_UNREACHABLE)))
            }
        },
    }
}

fn one(text: String) -> mpsc::Receiver<std::io::Result<String>> {
    let (sender, lines) = mpsc::channel(1);
    let _ = sender.try_send(Ok(text));
    lines
}

/// Lines of stdin, read on a thread of their own: a read of a terminal cannot be cancelled.
fn read_stdin() -> mpsc::Receiver<std::io::Result<String>> {
    let (sender, lines) = mpsc::channel(LINES_AHEAD_MAX);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// Messages on their way; 32 of them without an answer, the rest close behind.
const PENDING_MAX: usize = 128;
const LINES_AHEAD_MAX: usize = 128;

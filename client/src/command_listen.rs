//! `client listen`: every message of a user, a line each, confirmed once the line is flushed.
//!
//! Trap: whoever kills us between flush and confirm gets that line again next time. (chat, history, seq) tells.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use client::{Client, ConnectError, Content, Ended, Event, Message, Options, Status};
use tokio::signal::unix::{SignalKind, signal};

use crate::EXIT_TIMEOUT;

/// Print the messages that a user receives
///
/// With --device NAME it goes on where that device was; a new device starts with what is undelivered to the user, then
/// what comes. Exits 0 after --count messages or on Ctrl-C, 3 when --timeout has passed before.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Whose messages
    #[arg(long)]
    pub user: String,
    /// One JSON object a line: {"chat","seq","sender","text","send_time_us","history"}, and "kind" of what is no text. Seqs begin
    /// anew when the server has lost history, with another number of it: {"history_lost","history","from_seq"}. What is not
    /// there any more: {"gap","history","from","to"}; what the user hides: {"hidden","history","seq"}. Their first value is the chat
    #[arg(long)]
    json: bool,
    /// Print also how far others have the messages, and what was read: with --json {"receipt","chat","user","seq"} where
    /// receipt is delivered or read, and {"receipt":"unread","chat","seq","unread"}
    #[arg(long)]
    receipts: bool,
    /// Print also whether this user is there, each time that changes; may be given several times. With --json
    /// {"presence","user","last_seen_s"} where presence is online or offline and last_seen_s 0 when it is not known
    #[arg(long, value_name = "NAME")]
    watch: Vec<String>,
    /// Print also who is writing: with --json {"typing","user","stopped"} where typing is the chat
    #[arg(long)]
    typing: bool,
    /// Exit 0 after so many messages
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Exit 3 after so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<f64>,
}

pub async fn run(arguments: Arguments, options: Options) -> anyhow::Result<ExitCode> {
    let options = Options { receipts: arguments.receipts, ..options };
    let (client, mut events) = Client::start(options)?;
    if let Err(error) = client.watch(arguments.watch.iter().map(String::as_str)) {
        client.close().await;
        return Ok(crate::usage(&format!("--watch: {error}")));
    }
    let mut status = client.status();
    let mut is_told = false;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut left = arguments.count.unwrap_or(u64::MAX);
    let deadline =
        arguments.timeout.map(|timeout| tokio::time::Instant::now() + Duration::from_secs_f64(timeout));
    let timer = async {
        match deadline {
            Some(deadline) => tokio::time::sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(timer);
    let result = loop {
        if left == 0 {
            break Ok(ExitCode::SUCCESS);
        }
        let event = tokio::select! {
            event = events.next() => event.unwrap_or(Event::Ended(Ended::Closed)),
            now = client.status_changed(&status) => {
                // Once for each time that there is none: whoever waits for nothing wants to know why.
                if let Status::Connecting { problem: Some(problem) } = &now
                    && !std::mem::replace(&mut is_told, true)
                {
                    eprintln!("client: not connected: {}; trying again", printable(problem));
                }
                is_told &= now != Status::Online;
                status = now;
                continue;
            }
            () = &mut timer => break Ok(ExitCode::from(EXIT_TIMEOUT)),
            _ = interrupt.recv() => break Ok(ExitCode::SUCCESS),
            _ = terminate.recv() => break Ok(ExitCode::SUCCESS),
        };
        let printed = match &event {
            Event::Message(message) => print(message, arguments.json),
            Event::Typing { .. } if !arguments.typing => Ok(()),
            event => print_news(event, arguments.json),
        };
        match printed {
            // Whoever read our lines has enough of them.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break Ok(ExitCode::SUCCESS),
            Err(error) => break Err(error.into()),
            Ok(()) => {}
        }
        match &event {
            Event::Message(message) => {
                events.confirm(message);
                left -= 1;
            }
            Event::Gap { chat, from, to, .. } => {
                eprintln!("client: {chat}: messages {from} to {to} are not there any more");
                events.confirm_event(&event);
            }
            Event::Hidden { .. } => events.confirm_event(&event),
            Event::HistoryLost { chat, from_seq, .. } => {
                eprintln!(
                    "client: {chat}: the server lost history; messages from {from_seq} on are shown anew"
                );
                events.confirm_event(&event);
            }
            Event::EarlierFailed { chat, error, .. } => {
                eprintln!("client: {chat}: a message of an earlier run: {error}");
            }
            Event::Trouble { chat, text } => {
                let (chat, text) = (printable(chat), printable(text));
                eprintln!("client: {chat}: the server has a fault ({text}); trying again");
            }
            Event::Ended(ended) => break Err(anyhow::Error::new(ConnectError::Ended(ended.clone()))),
            Event::Disconnected { reason } => tracing::warn!(reason, "disconnected"),
            Event::WatchRefused { text, .. } => eprintln!("client: --watch was refused: {text}"),
            Event::Delivered { .. }
            | Event::Read { .. }
            | Event::Unread { .. }
            | Event::Presence { .. }
            | Event::Typing { .. }
            | Event::Connected { .. }
            | Event::Synced => {}
        }
    };
    client.close().await;
    result
}

#[derive(serde::Serialize)]
struct Line<'a> {
    chat: &'a str,
    seq: u64,
    sender: &'a str,
    text: &'a str,
    send_time_us: u64,
    history: u64,
    /// Missing for text.
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
}

fn print(message: &Message, json: bool) -> io::Result<()> {
    let text = message.body.describe();
    let mut out = io::stdout().lock();
    if json {
        let line = Line {
            chat: &message.chat,
            seq: message.seq,
            sender: &message.sender,
            text: &text,
            send_time_us: message.time_us,
            history: message.history,
            kind: match message.body.content() {
                Content::Text(_) => None,
                Content::Group(_) => Some("group"),
                Content::Edit { .. } => Some("edit"),
                Content::Recall { .. } => Some("recall"),
                Content::Payload(_) => Some("payload"),
                Content::Hide { .. } => Some("hide"),
                Content::Unknown => Some("unknown"),
            },
        };
        let line = serde_json::to_string(&line)?;
        writeln!(out, "{line}")?;
    } else {
        let (chat, sender) = (printable(&message.chat), printable(&message.sender));
        writeln!(out, "[{chat} {}] {sender}: {}", message.seq, printable(&text))?;
    }
    out.flush()
}

/// Receipts, who is there and writing, and as JSON what is missing, of which people are told elsewhere; of other events nothing.
fn print_news(event: &Event, json: bool) -> io::Result<()> {
    let (object, line) = match event {
        Event::Gap { chat, history, from, to } if json => {
            (serde_json::json!({ "gap": &**chat, "history": history, "from": from, "to": to }), String::new())
        }
        Event::HistoryLost { chat, history, from_seq } if json => (
            serde_json::json!({ "history_lost": &**chat, "history": history, "from_seq": from_seq }),
            String::new(),
        ),
        Event::Hidden { chat, history, seq } if json => {
            (serde_json::json!({ "hidden": &**chat, "history": history, "seq": seq }), String::new())
        }
        Event::Delivered { chat, user, seq, .. } => (
            serde_json::json!({ "receipt": "delivered", "chat": &**chat, "user": user, "seq": seq }),
            format!("[{chat} {seq}] delivered to {user}"),
        ),
        Event::Read { chat, user, seq, .. } => (
            serde_json::json!({ "receipt": "read", "chat": &**chat, "user": user, "seq": seq }),
            format!("[{chat} {seq}] read by {user}"),
        ),
        Event::Unread { chat, read, unread, .. } => (
            serde_json::json!({ "receipt": "unread", "chat": &**chat, "seq": read, "unread": unread }),
            format!("[{chat} {read}] {unread} unread"),
        ),
        Event::Presence { user, online, last_seen_s } => {
            let presence = if *online { "online" } else { "offline" };
            (
                serde_json::json!({ "presence": presence, "user": user, "last_seen_s": last_seen_s }),
                format!("{} is {presence}", printable(user)),
            )
        }
        Event::Typing { chat, user, stopped } => {
            let does = if *stopped { "has stopped writing" } else { "is writing" };
            (
                serde_json::json!({ "typing": &**chat, "user": user, "stopped": stopped }),
                format!("[{}] {} {does}", printable(chat), printable(user)),
            )
        }
        _ => return Ok(()),
    };
    let mut out = io::stdout().lock();
    if json { writeln!(out, "{object}") } else { writeln!(out, "{line}") }?;
    out.flush()
}

/// A stranger's text must not steer our terminal.
fn printable(text: &str) -> String {
    let steers = |c: char| crate::tui::steers(c) && c != '\t';
    text.chars().map(|c| if steers(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Seconds, with a fraction if need be.
pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= SECONDS_MAX => Ok(seconds),
        _ => Err(format!("a number of seconds above 0, up to {SECONDS_MAX}")),
    }
}

/// About 30 years: what a timer can hold.
const SECONDS_MAX: f64 = 1e9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\tc\nd\u{202e}"), "a\u{fffd}[2Jb\tc\u{fffd}d\u{fffd}");
        assert_eq!(printable("ali\u{ad}ce\u{3164}\u{e0061}"), "ali\u{fffd}ce\u{fffd}\u{fffd}");
        assert_eq!(
            printable("👩\u{200d}🚀 ❤\u{fe0f} می\u{200c}خواهم"),
            "👩\u{200d}🚀 ❤\u{fe0f} می\u{200c}خواهم"
        );
    }

    #[test]
    fn seconds_are_positive_and_finite() {
        assert_eq!(seconds("0.5"), Ok(0.5));
        for bad in ["0", "-1", "NaN", "inf", "1e99", "x"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}

//! A receiving program that can be killed: it keeps what it is shown in a file of its own, and confirms. A process of its
//! own (`loadtest torture-client`, hidden); one thread.
//!
//! A line of the file is `HISTORY SEQ CHAT BODY`. What stands there already is not written again: this is how an application
//! makes "at least once until confirmed" into "once".
//!
//! Trap: a kill may leave half a line. It was never confirmed, so it comes again, and the half is cut off at the next start.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use client::{Client, Event, Keep, Options, Target};

use super::TortureError;
use super::history::Place;
use crate::monitor::RunError;

/// The options of `loadtest torture-client`.
#[derive(Debug, Clone, Args)]
pub struct ChildArgs {
    /// HOST:PORT of gateways
    #[arg(long, value_delimiter = ',')]
    gateways: Vec<String>,
    /// Who
    #[arg(long)]
    user: String,
    /// Where the library keeps its state
    #[arg(long)]
    folder: PathBuf,
    /// Where the application keeps its messages
    #[arg(long)]
    messages: PathBuf,
}

/// Receives until it is killed.
pub fn run(args: &ChildArgs) -> Result<Vec<String>, RunError> {
    let failed = |error| RunError::Io { what: "the receiving program".into(), error };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(receive(args)).map_err(failed)?;
    Ok(Vec::new())
}

async fn receive(args: &ChildArgs) -> std::io::Result<()> {
    let (mut file, mut have) = open(&args.messages)?;
    let options = Options {
        keep: Keep::Under(args.folder.clone()),
        ..Options::new(&*args.user, "phone", Target::Gateway(args.gateways.clone()))
    };
    let (_client, mut events) = Client::start(options).map_err(std::io::Error::other)?;
    while let Some(event) = events.next().await {
        let Event::Message(message) = event else { continue };
        let place = Place { chat: message.chat.clone(), history: message.history, seq: message.seq };
        // Time in which a kill may come, before and behind the write.
        linger().await;
        if !have.contains(&place) {
            let body = String::from_utf8_lossy(&message.body).into_owned();
            writeln!(file, "{} {} {} {body}", place.history, place.seq, place.chat)?;
            file.sync_data()?;
            have.insert(place);
        }
        linger().await;
        events.confirm(&message);
    }
    Ok(())
}

async fn linger() {
    tokio::time::sleep(Duration::from_micros(rand::random_range(0..1_500))).await;
}

/// The file, cut behind its last whole line, and what stands in it.
fn open(path: &Path) -> std::io::Result<(File, HashSet<Place>)> {
    let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let whole = text.rfind('\n').map_or(0, |at| at + 1);
    file.set_len(whole as u64)?;
    file.seek(SeekFrom::End(0))?;
    Ok((file, text[..whole].lines().filter_map(line).map(|(place, _)| place).collect()))
}

/// What the application has, in its order: places and bodies.
pub(super) fn read(path: &Path) -> Result<Vec<(Place, String)>, TortureError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(TortureError::io("cannot read what the application has", error)),
    };
    let whole = text.rfind('\n').map_or(0, |at| at + 1);
    Ok(text[..whole].lines().filter_map(line).collect())
}

fn line(line: &str) -> Option<(Place, String)> {
    let mut words = line.splitn(4, ' ');
    let (history, seq) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let chat = words.next()?.into();
    Some((Place { chat, history, seq }, words.next()?.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_line_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("messages");
        std::fs::write(&path, "7 1 a:b one\n7 2 a:b two\n7 3 a:").unwrap();
        assert_eq!(read(&path).unwrap().len(), 2);
        let (mut file, have) = open(&path).unwrap();
        assert_eq!(have.len(), 2);
        writeln!(file, "7 3 a:b three").unwrap();
        let all = read(&path).unwrap();
        assert_eq!((all[2].0.seq, &*all[2].1), (3, "three"));
    }
}

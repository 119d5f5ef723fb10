//! What a line means: a command, or a message. Pure.

use proto::wire::{GroupAction, Role};

/// A line that was entered.
#[derive(Debug, PartialEq, Eq)]
pub enum Command<'a> {
    /// To be sent.
    Text(&'a str),
    /// Open the chat with this user, or of this name.
    Chat(&'a str),
    /// Make a group of this title.
    Group(&'a str),
    /// Change the group that is open: with this title, or these members.
    Change(GroupAction, &'a str, Vec<(&'a str, Role)>),
    /// Hide the message that stands so far from the end from oneself; 1 is the newest.
    Hide(usize),
    /// Show what there is.
    Help,
    /// Leave.
    Quit,
    /// Panic, so that a test can see what becomes of the terminal.
    #[cfg(debug_assertions)]
    Panic,
    /// None of these.
    Unknown(&'a str),
}

/// A line that starts with `/` is a command; `//` sends a line that starts with `/`.
pub fn parse(line: &str) -> Command<'_> {
    let Some(rest) = line.strip_prefix('/') else { return Command::Text(line) };
    if rest.starts_with('/') {
        return Command::Text(rest);
    }
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    match (word, rest.trim()) {
        ("/chat", name) if !name.is_empty() => Command::Chat(name),
        ("/group", title) if !title.is_empty() => Command::Group(title),
        ("/rename", title) if !title.is_empty() => {
            Command::Change(GroupAction::GroupRename, title, Vec::new())
        }
        ("/add", name) if !name.is_empty() => Command::Change(GroupAction::GroupAdd, "", one(name)),
        ("/remove", name) if !name.is_empty() => Command::Change(GroupAction::GroupRemove, "", one(name)),
        ("/leave", _) => Command::Change(GroupAction::GroupLeave, "", Vec::new()),
        ("/hide", "") => Command::Hide(1),
        ("/hide", place) => place
            .parse()
            .ok()
            .filter(|place| *place > 0)
            .map_or(Command::Unknown("/hide without a number"), Command::Hide),
        ("/help", _) => Command::Help,
        ("/quit", _) => Command::Quit,
        #[cfg(debug_assertions)]
        ("/panic", _) => Command::Panic,
        (word, _) => Command::Unknown(if word == "/chat" { "/chat without a name" } else { word }),
    }
}

/// Names may hold spaces, so one a line.
fn one(name: &str) -> Vec<(&str, Role)> {
    vec![(name, Role::Member)]
}

/// What `/help` shows: keys and commands, and what they do.
pub const HELP: &[(&str, &str)] = &[
    ("Enter", "send the line"),
    ("Tab, Ctrl-N", "next chat (Shift-Tab, Ctrl-P: the one before)"),
    ("PgUp, PgDn", "scroll; at the top older messages are fetched"),
    ("Up, Down", "lines entered before"),
    ("Ctrl-U, Ctrl-W", "delete to the start, delete a word"),
    ("Ctrl-L", "draw the screen anew"),
    ("Ctrl-C", "leave"),
    ("/chat NAME", "open the chat with a user"),
    ("/group TITLE", "make a group, and open it"),
    ("/add NAME", "bring somebody into the group (/remove NAME: take out)"),
    ("/leave", "leave the group (/rename TITLE: give it another title)"),
    ("/hide", "hide the newest message from yourself (/hide 3: the third)"),
    ("/help", "this page"),
    ("/quit", "leave"),
    ("//text", "send a line that starts with /"),
    ("… ✗ ?", "sending, refused, nobody knows"),
    ("✓ ✓✓ ●✓", "sent, delivered, read"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slash_makes_a_command() {
        assert_eq!(parse("hello /quit"), Command::Text("hello /quit"));
        assert_eq!(parse("//quit"), Command::Text("/quit"));
        assert_eq!(parse("/chat  bob smith "), Command::Chat("bob smith"));
        assert_eq!(parse("/chat"), Command::Unknown("/chat without a name"));
        assert_eq!((parse("/help"), parse("/quit now")), (Command::Help, Command::Quit));
        assert_eq!(parse("/group Chess club"), Command::Group("Chess club"));
        let add = Command::Change(GroupAction::GroupAdd, "", vec![("bob smith", Role::Member)]);
        assert_eq!(parse("/add bob smith"), add);
        assert_eq!(parse("/add"), Command::Unknown("/add"));
        assert_eq!((parse("/hide"), parse("/hide 3")), (Command::Hide(1), Command::Hide(3)));
        assert_eq!(parse("/hide 0"), Command::Unknown("/hide without a number"));
        assert_eq!(parse("/nonsense x"), Command::Unknown("/nonsense"));
        assert_eq!(parse("/"), Command::Unknown("/"));
    }
}

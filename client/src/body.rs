//! What a message says: bytes, and what they are. Plain data.
//!
//! Trap: the kind travels with the bytes into the device's log, or a resend would say something else than the first copy.

use std::borrow::Cow;
use std::ops::Deref;

use bytes::Bytes;
use proto::wire::{self, GroupAction, Kind, Role};

/// The body of a message, with its kind: text unless one of the functions here made it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Body {
    /// As in [`Kind`].
    pub kind: i32,
    /// What is sent.
    pub bytes: Bytes,
}

/// A body, read by its kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// The application's own bytes.
    Text(Bytes),
    /// The group changes.
    Group(wire::GroupChange),
    /// Another body for an earlier message of this sender.
    Edit {
        /// The seq meant.
        seq: u64,
        /// What it says now.
        body: Bytes,
    },
    /// An earlier message of this sender is not to be shown any more.
    Recall {
        /// The seq meant.
        seq: u64,
    },
    /// Something with a type.
    Payload(wire::Payload),
    /// A message is not to be shown to this user any more, whatever shows it. Only in the chat with oneself.
    Hide {
        /// The chat of the message meant.
        chat: String,
        /// Its history.
        history: u64,
        /// The seq meant.
        seq: u64,
    },
    /// Of a kind that this version does not know, or not readable.
    Unknown,
}

impl<T: Into<Bytes>> From<T> for Body {
    fn from(bytes: T) -> Self {
        Body { kind: Kind::Text as i32, bytes: bytes.into() }
    }
}

impl Deref for Body {
    type Target = Bytes;

    fn deref(&self) -> &Bytes {
        &self.bytes
    }
}

/// Text that says the same.
impl PartialEq<&str> for Body {
    fn eq(&self, other: &&str) -> bool {
        self.kind == Kind::Text as i32 && self.bytes == *other
    }
}

/// Text that says the same.
impl PartialEq<String> for Body {
    fn eq(&self, other: &String) -> bool {
        *self == other.as_str()
    }
}

impl Body {
    /// Another text for an earlier message of one's own.
    pub fn edit(seq: u64, body: impl Into<Bytes>) -> Self {
        Body::of(Kind::Edit, &wire::Edit { seq, body: body.into() })
    }

    /// Takes an earlier message of one's own back.
    pub fn recall(seq: u64) -> Self {
        Body::of(Kind::Recall, &wire::Edit { seq, body: Bytes::new() })
    }

    /// Something with a type, and who is meant by it.
    pub fn payload(payload: &wire::Payload) -> Self {
        Body::of(Kind::Payload, payload)
    }

    /// Hides a message from its own user; to be sent to the chat with oneself. [`Client::hide`](crate::Client::hide) does so.
    pub fn hide(chat: &str, history: u64, seq: u64) -> Self {
        Body::of(Kind::Hide, &wire::Hide { chat: chat.to_owned(), history, seq })
    }

    /// A change of a group.
    pub fn group(change: &wire::GroupChange) -> Self {
        Body::of(Kind::Group, change)
    }

    /// The message that it has become.
    pub fn into_message(self, seq: u64, sender: String, time_us: u64) -> wire::Message {
        wire::Message { seq, sender, time_us, body: self.bytes, kind: self.kind }
    }

    /// What it says.
    pub fn content(&self) -> Content {
        let bytes = || self.bytes.clone();
        match Kind::try_from(self.kind) {
            Ok(Kind::Text) => Content::Text(bytes()),
            Ok(Kind::Group) => read(bytes()).map_or(Content::Unknown, Content::Group),
            Ok(Kind::Edit) => {
                let edit = |wire::Edit { seq, body }| Content::Edit { seq, body };
                read(bytes()).map_or(Content::Unknown, edit)
            }
            Ok(Kind::Recall) => {
                read(bytes()).map_or(Content::Unknown, |wire::Edit { seq, .. }| Content::Recall { seq })
            }
            Ok(Kind::Payload) => read(bytes()).map_or(Content::Unknown, Content::Payload),
            Ok(Kind::Hide) => {
                let hide = |wire::Hide { chat, history, seq }| Content::Hide { chat, history, seq };
                read(bytes()).map_or(Content::Unknown, hide)
            }
            Err(_) => Content::Unknown,
        }
    }

    /// What it says, for people: text as it is, everything else in brackets.
    pub fn describe(&self) -> Cow<'_, str> {
        match self.content() {
            Content::Text(_) => String::from_utf8_lossy(&self.bytes),
            Content::Group(change) => format!("[{}]", describe(&change)).into(),
            Content::Edit { seq, body } => format!("[edits {seq}] {}", String::from_utf8_lossy(&body)).into(),
            Content::Recall { seq } => format!("[takes {seq} back]").into(),
            Content::Payload(payload) => {
                let mentions: String =
                    payload.mentions.iter().map(|mention| format!(" @{}", mention.user)).collect();
                format!("[{}, {} bytes]{mentions}", payload.content_type, payload.data.len()).into()
            }
            Content::Hide { chat, seq, .. } => format!("[hides {seq} of {chat}]").into(),
            Content::Unknown => "[something that this version cannot show]".into(),
        }
    }

    fn of(kind: Kind, message: &impl prost::Message) -> Self {
        Body { kind: kind as i32, bytes: message.encode_to_vec().into() }
    }
}

fn describe(change: &wire::GroupChange) -> String {
    let member = |member: &wire::Member| match member.role() {
        Role::Member => member.user.clone(),
        Role::Admin => format!("{} (admin)", member.user),
        Role::Owner => format!("{} (owner)", member.user),
    };
    let members = change.members.iter().map(member).collect::<Vec<_>>().join(", ");
    match change.action() {
        GroupAction::GroupCreate if members.is_empty() => format!("makes the group {}", change.title),
        GroupAction::GroupCreate => format!("makes the group {} with {members}", change.title),
        GroupAction::GroupRename => format!("calls the group {}", change.title),
        GroupAction::GroupAdd => format!("brings in {members}"),
        GroupAction::GroupRemove => format!("takes out {members}"),
        GroupAction::GroupLeave => "leaves".to_owned(),
        GroupAction::GroupRole => format!("makes {members} what that says"),
        GroupAction::GroupDelete => "ends the group".to_owned(),
        GroupAction::GroupUnspecified => "changes the group".to_owned(),
    }
}

fn read<M: prost::Message + Default>(bytes: Bytes) -> Option<M> {
    M::decode(bytes).ok()
}

/// A change of a group, in the words of its members.
pub fn change(action: GroupAction, title: &str, members: &[(&str, Role)]) -> wire::GroupChange {
    let member = |(user, role): &(&str, Role)| wire::Member {
        user: (*user).to_owned(),
        role: *role as i32,
        ..Default::default()
    };
    wire::GroupChange {
        action: action as i32,
        title: title.to_owned(),
        members: members.iter().map(member).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_says_what_it_was_made_of() {
        assert_eq!(Body::from("hi").content(), Content::Text("hi".into()));
        assert_eq!(Body::from("hi").describe(), "hi");
        let edit = Body::edit(7, "ho");
        assert_eq!(edit.content(), Content::Edit { seq: 7, body: "ho".into() });
        assert_eq!(edit.describe(), "[edits 7] ho");
        assert_eq!(Body::recall(7).content(), Content::Recall { seq: 7 });
        let made = change(GroupAction::GroupCreate, "Rooks", &[("bob", Role::Admin), ("cy", Role::Member)]);
        assert_eq!(Body::group(&made).describe(), "[makes the group Rooks with bob (admin), cy]");
        assert_eq!(Body::group(&made).content(), Content::Group(made));
        let hide = Body::hide("alice:bob", 9, 7);
        assert_eq!(hide.content(), Content::Hide { chat: "alice:bob".into(), history: 9, seq: 7 });
        assert_eq!(hide.describe(), "[hides 7 of alice:bob]");
        let mentions = vec![wire::Mention { user: "bob".into() }];
        let data = vec![1, 2, 3].into();
        let image = wire::Payload { content_type: "image/png".into(), data, mentions, reply_to: 0 };
        assert_eq!(Body::payload(&image).describe(), "[image/png, 3 bytes] @bob");
        assert_eq!(Body { kind: 99, bytes: "x".into() }.content(), Content::Unknown);
        assert_eq!(Body { kind: 1, bytes: vec![0xff].into() }.content(), Content::Unknown);
        let (text, typed) = (Body::from("hi"), Body { kind: 4, ..Body::from("hi") });
        assert!(text == "hi" && typed != "hi");
    }
}

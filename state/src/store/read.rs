//! Reads an outcome as the kind that its operation gives. Pure.

use super::{
    Answer, Appended, Bound, Head, Marks, Moved, Outcome, Page, Recent, Roster, Route, Seen, Standing,
    StoreError,
};

macro_rules! expect {
    ($($(#[$doc:meta])* $name:ident: $variant:ident -> $kind:ty;)*) => {$(
        $(#[$doc])*
        pub fn $name(outcome: Outcome) -> Result<$kind, StoreError> {
            match outcome? {
                Answer::$variant(value) => Ok(value),
                other => Err(StoreError::Corrupt(format!("answered {other:?}"))),
            }
        }
    )*};
}

expect! {
    /// Of `Incarnate`.
    incarnation: Incarnation -> u32;
    /// Of `UserNumbers`.
    user_numbers: UserNumbers -> u64;
    /// Of `Register` and `User`.
    user: User -> Option<u64>;
    /// Of `Name`.
    name: Name -> Option<String>;
    /// Of `Bind`.
    bound: Bound -> Bound;
    /// Of `IsRevoked`.
    revoked: Revoked -> bool;
    /// Of `Routes`.
    routes: Routes -> Vec<Route>;
    /// Of `Seen`.
    seen: Seen -> Seen;
    /// Of `Chats`.
    chats: Chats -> Vec<String>;
    /// Of `Append`.
    appended: Appended -> Appended;
    /// Of `Member`.
    standing: Standing -> Standing;
    /// Of `Members`.
    roster: Roster -> Roster;
    /// Of `Head`.
    head: Head -> Head;
    /// Of `Pull`.
    page: Messages -> Page;
    /// Of `Mark`.
    marks: Marks -> Marks;
    /// Of `Delivered`.
    moved: Moved -> Moved;
    /// Of `Recent`.
    recent: Recent -> Vec<Recent>;
}

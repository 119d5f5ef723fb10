//! Where things are on the screen. Pure: drawing and scrolling must agree on the size of a page.

use ratatui::layout::{Constraint, Layout, Rect};

/// See the head of this file. A pane without room is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Panes {
    /// The chats, with its border.
    pub chats: Rect,
    /// The title of the open chat.
    pub title: Rect,
    /// Its messages.
    pub messages: Rect,
    /// The line that is typed.
    pub input: Rect,
    /// Connection and durability, or the last remark.
    pub status: Rect,
}

/// Divides a screen.
pub fn panes(screen: Rect) -> Panes {
    let rows = [Constraint::Fill(1), Constraint::Length(1), Constraint::Length(1)];
    let [main, status, input] = Layout::vertical(rows).areas(screen);
    let list = if screen.width >= WIDE { (screen.width / 4).clamp(16, 28) } else { 0 };
    let columns = [Constraint::Length(list), Constraint::Length(list.min(1)), Constraint::Fill(1)];
    let [chats, _, open] = Layout::horizontal(columns).areas(main);
    let [title, messages] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(open);
    Panes { chats, title, messages, input, status }
}

/// A screen narrower than this shows the open chat only.
const WIDE: u16 = 50;

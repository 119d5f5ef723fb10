//! What part of the open chat is seen.

use jiff::tz::TimeZone;
use ratatui::layout::Rect;

use super::Model;
use crate::tui::chat::Chat;
use crate::tui::{layout, rows};

impl Model {
    /// Moves the view up by so many rows; clamps it in any case. At the top older messages are asked for.
    pub(super) fn scroll(&mut self, up: isize) {
        let Rect { width, height, .. } = self.messages_pane();
        let Some(name) = self.open.clone() else { return };
        let zone = self.zone.clone();
        let Some(chat) = self.chats.iter_mut().find(|chat| chat.name == name) else { return };
        if chat.below == 0 && up <= 0 {
            return;
        }
        let most = rows::count(chat, width.into(), &zone).saturating_sub(height.into());
        let at_top = chat.below >= most;
        chat.below = chat.below.saturating_add_signed(up).min(most);
        if up > 0 && at_top {
            self.want_older(&name);
        }
    }

    pub(super) fn page(&self) -> isize {
        (self.messages_pane().height as isize - 1).max(1)
    }

    pub(super) fn columns(&self) -> usize {
        self.messages_pane().width.into()
    }

    fn messages_pane(&self) -> Rect {
        layout::panes(Rect::from(self.size)).messages
    }
}

/// Whoever has scrolled up goes on seeing what he sees.
pub(super) fn keep_view<T>(
    chat: &mut Chat,
    columns: usize,
    zone: &TimeZone,
    change: impl FnOnce(&mut Chat) -> T,
) -> T {
    if chat.below == 0 {
        return change(chat);
    }
    let before = rows::count(chat, columns, zone);
    let changed = change(chat);
    if chat.below > 0 {
        chat.below += rows::count(chat, columns, zone).saturating_sub(before);
    }
    changed
}

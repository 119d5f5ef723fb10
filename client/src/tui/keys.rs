//! Which key asks for what. Pure.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::editor::Edit;
use super::model::Action;

/// What this key asks for, if anything.
pub fn action(key: KeyEvent) -> Option<Action> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    let alt = key.modifiers.contains(KeyModifiers::ALT);
    Some(match key.code {
        KeyCode::Char(c) if control => match c.to_ascii_lowercase() {
            'a' => Action::Edit(Edit::Home),
            'c' => Action::Quit,
            'e' => Action::Edit(Edit::End),
            'h' => Action::Edit(Edit::Backspace),
            'l' => Action::Redraw,
            'n' => Action::NextChat,
            'p' => Action::PreviousChat,
            'u' => Action::Edit(Edit::DeleteToStart),
            'w' => Action::Edit(Edit::DeleteWord),
            _ => return None,
        },
        KeyCode::Char(_) if alt => return None,
        KeyCode::Char(c) => Action::Insert(c.to_string()),
        KeyCode::Enter => Action::Enter,
        KeyCode::Tab => Action::NextChat,
        KeyCode::BackTab => Action::PreviousChat,
        KeyCode::Up => Action::OlderLine,
        KeyCode::Down => Action::NewerLine,
        KeyCode::PageUp => Action::PageUp,
        KeyCode::PageDown => Action::PageDown,
        KeyCode::Left => Action::Edit(Edit::Left),
        KeyCode::Right => Action::Edit(Edit::Right),
        KeyCode::Home => Action::Edit(Edit::Home),
        KeyCode::End => Action::Edit(Edit::End),
        KeyCode::Backspace if alt => Action::Edit(Edit::DeleteWord),
        KeyCode::Backspace => Action::Edit(Edit::Backspace),
        KeyCode::Delete => Action::Edit(Edit::Delete),
        KeyCode::Esc => Action::Escape,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_ask_for_what_the_help_says() {
        let plain = |code| action(KeyEvent::new(code, KeyModifiers::NONE));
        let control = |c| action(KeyEvent::new(KeyCode::Char(c), KeyModifiers::CONTROL));
        assert_eq!(plain(KeyCode::Char('é')), Some(Action::Insert("é".to_owned())));
        assert_eq!((plain(KeyCode::Tab), control('n')), (Some(Action::NextChat), Some(Action::NextChat)));
        assert_eq!((control('c'), control('z')), (Some(Action::Quit), None));
        assert_eq!(control('w'), Some(Action::Edit(Edit::DeleteWord)));
        let released = KeyEvent { kind: KeyEventKind::Release, ..KeyEvent::from(KeyCode::Enter) };
        assert_eq!(action(released), None);
    }
}

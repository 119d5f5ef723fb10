//! The terminal while the chat has it: raw, on its other screen, with pastes marked; given back whatever happens.
//!
//! Trap: a panic on any thread gives it back before its message is printed, so that the message is to be read.

use std::io::{self, stdout};
use std::sync::atomic::{AtomicBool, Ordering};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{DisableBracketedPaste, EnableBracketedPaste};
use ratatui::crossterm::execute;

use super::draw;
use super::model::Model;

/// See the head of this file. One at a time.
#[derive(Debug)]
pub struct Screen {
    terminal: DefaultTerminal,
}

/// The terminal is ours.
static TAKEN: AtomicBool = AtomicBool::new(false);

impl Screen {
    /// Takes the terminal.
    pub fn take() -> io::Result<Screen> {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            give_back();
            hook(info);
        }));
        TAKEN.store(true, Ordering::SeqCst);
        let taken = ratatui::try_init().and_then(|terminal| {
            execute!(stdout(), EnableBracketedPaste)?;
            Ok(Screen { terminal })
        });
        taken.inspect_err(|_| give_back())
    }

    /// Its size now.
    pub fn size(&self) -> io::Result<ratatui::layout::Size> {
        self.terminal.size()
    }

    /// Draws the differences to what was drawn before.
    pub fn draw(&mut self, model: &Model) -> io::Result<()> {
        self.terminal.draw(|frame| draw::draw(frame, model)).map(drop)
    }

    /// What the terminal shows is not what was drawn: the next picture is drawn as a whole. Not by `Terminal::clear`, which
    /// asks the terminal where its cursor is, while another thread reads what the terminal answers.
    pub fn clear(&mut self) -> io::Result<()> {
        let size = self.terminal.size()?;
        self.terminal.resize(size.into())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

fn give_back() {
    if TAKEN.swap(false, Ordering::SeqCst) {
        // Whoever hung up does not see it anyway.
        let _ = execute!(stdout(), DisableBracketedPaste);
        let _ = ratatui::try_restore();
        let _ = execute!(stdout(), ratatui::crossterm::cursor::Show);
    }
}

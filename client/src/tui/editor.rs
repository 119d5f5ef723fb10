//! The line that is being typed, and the lines typed before. Pure.
//!
//! Trap: the cursor is a byte index and always stands between two graphemes; what a user sees as one character is moved
//! over and deleted as one.

use std::collections::VecDeque;

use unicode_segmentation::UnicodeSegmentation;

use super::text::columns_of;

/// One line of input.
#[derive(Debug, Default, Clone)]
pub struct Editor {
    text: String,
    cursor: usize,
}

/// What can be done to the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Edit {
    Left,
    Right,
    Home,
    End,
    Backspace,
    Delete,
    /// Everything before the cursor.
    DeleteToStart,
    /// The word before the cursor.
    DeleteWord,
}

impl Editor {
    /// What was typed.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Puts a text at the cursor: typed or pasted. False: the line would exceed what a message may hold.
    pub fn insert(&mut self, text: &str) -> bool {
        let text: String = text
            .replace("\r\n", "\n")
            .replace('\r', "\n")
            .chars()
            .filter(|c| *c == '\n' || !c.is_control())
            .collect();
        if self.text.len() + text.len() > proto::MESSAGE_BYTES_MAX {
            return false;
        }
        self.text.insert_str(self.cursor, &text);
        self.cursor = self.boundary_from(self.cursor + text.len());
        true
    }

    /// Moves or deletes.
    pub fn edit(&mut self, edit: Edit) {
        match edit {
            Edit::Left => self.cursor = self.before(),
            Edit::Right => self.cursor = self.behind(),
            Edit::Home => self.cursor = 0,
            Edit::End => self.cursor = self.text.len(),
            Edit::Backspace => self.delete(self.before(), self.cursor),
            Edit::Delete => self.delete(self.cursor, self.behind()),
            Edit::DeleteToStart => self.delete(0, self.cursor),
            Edit::DeleteWord => {
                let head = self.text[..self.cursor].trim_end();
                let start = head.char_indices().rev().find(|(_, c)| c.is_whitespace());
                self.delete(start.map_or(0, |(at, c)| at + c.len_utf8()), self.cursor);
            }
        }
    }

    /// Empties the line and returns what stood in it.
    pub fn take(&mut self) -> String {
        self.cursor = 0;
        std::mem::take(&mut self.text)
    }

    /// Another line, cursor at its end.
    pub fn set(&mut self, text: String) {
        self.cursor = text.len();
        self.text = text;
    }

    /// The part of the line that fits into `columns` with the cursor in it, and the cursor's column there.
    pub fn view(&self, columns: usize) -> (String, usize) {
        let columns = columns.max(1);
        let shown = |grapheme: &str| match grapheme {
            "\n" => "⏎".to_owned(),
            // An invisible character must be seen where it is edited.
            other if columns_of(other) == 0 => "·".to_owned(),
            other => other.to_owned(),
        };
        let cells: Vec<(usize, String)> =
            self.text.grapheme_indices(true).map(|(at, grapheme)| (at, shown(grapheme))).collect();
        let cursor_cell = cells.iter().position(|(at, _)| *at >= self.cursor).unwrap_or(cells.len());
        // The cursor itself takes a column, also behind the last character.
        let (mut first, mut before) = (cursor_cell, 0);
        while first > 0 && before + columns_of(&cells[first - 1].1) < columns {
            first -= 1;
            before += columns_of(&cells[first].1);
        }
        let mut view = String::new();
        let mut used = 0;
        for (_, cell) in &cells[first..] {
            used += columns_of(cell);
            if used > columns {
                break;
            }
            view.push_str(cell);
        }
        (view, before)
    }

    fn before(&self) -> usize {
        self.text[..self.cursor].grapheme_indices(true).next_back().map_or(0, |(at, _)| at)
    }

    fn behind(&self) -> usize {
        self.text[self.cursor..].graphemes(true).next().map_or(self.cursor, |next| self.cursor + next.len())
    }

    fn delete(&mut self, from: usize, to: usize) {
        self.text.replace_range(from..to, "");
        // What stood on both sides may have become one grapheme.
        self.cursor = self.boundary_from(from);
    }

    /// The first boundary between graphemes at or behind `at`.
    fn boundary_from(&self, at: usize) -> usize {
        self.text
            .grapheme_indices(true)
            .map(|(start, _)| start)
            .find(|start| *start >= at)
            .unwrap_or(self.text.len())
    }
}

/// Lines that were entered, to be called back with up and down.
#[derive(Debug, Default)]
pub struct Recall {
    lines: VecDeque<String>,
    /// The line called back, and what was being typed before.
    at: Option<(usize, String)>,
}

impl Recall {
    /// A line was entered.
    pub fn push(&mut self, line: String) {
        self.at = None;
        if self.lines.back() == Some(&line) {
            return;
        }
        if self.lines.len() == LINES_MAX {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// The line before.
    pub fn older(&mut self, editor: &mut Editor) {
        let at = match &self.at {
            Some((at, _)) => at.checked_sub(1),
            None => self.lines.len().checked_sub(1),
        };
        let Some(at) = at else { return };
        let draft = self.at.take().map_or_else(|| editor.text.clone(), |(_, draft)| draft);
        self.at = Some((at, draft));
        editor.set(self.lines[at].clone());
    }

    /// The line behind; behind the last what was being typed.
    pub fn newer(&mut self, editor: &mut Editor) {
        let Some((at, draft)) = self.at.take() else { return };
        match self.lines.get(at + 1) {
            Some(line) => {
                editor.set(line.clone());
                self.at = Some((at + 1, draft));
            }
            None => editor.set(draft),
        }
    }

    /// Another line is edited now; this one gets back what was being typed.
    pub fn leave(&mut self, editor: &mut Editor) {
        if let Some((_, draft)) = self.at.take() {
            editor.set(draft);
        }
    }
}

const LINES_MAX: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn typed(text: &str, edits: &[Edit]) -> Editor {
        let mut editor = Editor::default();
        assert!(editor.insert(text));
        edits.iter().for_each(|edit| editor.edit(*edit));
        editor
    }

    #[test]
    fn what_looks_like_one_character_is_one() {
        for one in ["é", "e\u{301}", "日", "👩‍👩‍👧", "🇩🇪"] {
            let text = format!("a{one}b");
            assert_eq!(typed(&text, &[Edit::Left, Edit::Backspace]).text(), "ab", "{one}");
            assert_eq!(typed(&text, &[Edit::Home, Edit::Right, Edit::Delete]).text(), "ab", "{one}");
        }
    }

    #[test]
    fn words_and_lines_are_deleted_before_the_cursor() {
        assert_eq!(typed("one two  ", &[Edit::DeleteWord]).text(), "one ");
        assert_eq!(typed("日本 語", &[Edit::DeleteWord, Edit::DeleteWord]).text(), "");
        assert_eq!(typed("one two", &[Edit::Left, Edit::DeleteToStart]).text(), "o");
        assert_eq!(typed("", &[Edit::DeleteWord, Edit::Backspace, Edit::Delete, Edit::Left]).text(), "");
    }

    #[test]
    fn a_paste_keeps_its_lines_and_loses_its_controls() {
        assert_eq!(typed("a\r\nb\u{1b}[2J\rc", &[]).text(), "a\nb[2J\nc");
        let mut editor = Editor::default();
        assert!(!editor.insert(&"x".repeat(proto::MESSAGE_BYTES_MAX + 1)));
        assert_eq!(editor.text(), "");
    }

    #[test]
    fn the_view_follows_the_cursor() {
        let mut editor = typed("abcdef", &[]);
        assert_eq!(editor.view(10), ("abcdef".to_owned(), 6));
        assert_eq!(editor.view(4), ("def".to_owned(), 3));
        editor.edit(Edit::Home);
        assert_eq!(editor.view(4), ("abcd".to_owned(), 0));
        assert_eq!(typed("日本語", &[]).view(5), ("本語".to_owned(), 4));
        assert_eq!(typed("a\nb", &[Edit::Left]).view(9), ("a⏎b".to_owned(), 2));
    }

    #[test]
    fn entered_lines_come_back_and_the_draft_too() {
        let (mut recall, mut editor) = (Recall::default(), Editor::default());
        ["one", "two", "two"].iter().for_each(|line| recall.push((*line).to_owned()));
        editor.set("draft".to_owned());
        let mut seen = Vec::new();
        for _ in 0..3 {
            recall.older(&mut editor);
            seen.push(editor.text().to_owned());
        }
        for _ in 0..3 {
            recall.newer(&mut editor);
            seen.push(editor.text().to_owned());
        }
        assert_eq!(seen, ["two", "one", "one", "two", "draft", "draft"]);
    }

    proptest! {
        #[test]
        fn any_edits_leave_the_cursor_between_graphemes(
            steps in proptest::collection::vec((0usize..9, "[ab\u{301}日🇩👩\u{200d} ]{0,4}"), 0..40),
            columns in 0usize..9,
        ) {
            let edits = [Edit::Left, Edit::Right, Edit::Home, Edit::End, Edit::Backspace, Edit::Delete,
                Edit::DeleteToStart, Edit::DeleteWord];
            let mut editor = Editor::default();
            for (step, text) in steps {
                match edits.get(step) {
                    Some(edit) => editor.edit(*edit),
                    None => assert!(editor.insert(&text)),
                }
                let ends = editor.text.grapheme_indices(true).map(|(at, _)| at).chain([editor.text.len()]);
                prop_assert!(ends.into_iter().any(|at| at == editor.cursor));
                let (view, cursor) = editor.view(columns);
                prop_assert!(cursor < columns.max(1) && super::super::text::width(&view) <= columns.max(1));
            }
        }
    }
}

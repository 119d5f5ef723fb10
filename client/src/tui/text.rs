//! Text of strangers made fit for a terminal, and cut into rows of so many columns. Pure.
//!
//! Trap: everything that is drawn and was written by somebody else goes through [`harmless`] or [`harmless_line`] first. A
//! control character that reaches the terminal steers it.

use ratatui::buffer::CellWidth;
use unicode_segmentation::UnicodeSegmentation;
use unicode_width::UnicodeWidthChar;

/// A message: line breaks stay, tabs become blanks, whatever else steers a terminal becomes U+FFFD.
pub fn harmless(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    let mut marks = 0;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        marks = if c.width() == Some(0) { marks + 1 } else { 0 };
        match c {
            '\n' => safe.push('\n'),
            '\r' if chars.peek() == Some(&'\n') => {}
            '\t' => safe.push_str(TAB),
            c if steers(c) => safe.push(char::REPLACEMENT_CHARACTER),
            _ if marks > MARKS_MAX => {}
            c => safe.push(c),
        }
    }
    safe
}

/// A name, a reason: as [`harmless`], on one line.
pub fn harmless_line(text: &str) -> String {
    harmless(text).replace('\n', " ")
}

/// Controls, what reorders or hides the text around it, and what is not seen itself, so that two names that differ look alike
/// (Unicode's Default_Ignorable_Code_Point, but for what joins letters and picks the form of one).
pub fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{00ad}' | '\u{034f}' | '\u{061c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180e}' | '\u{200b}'
            | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e00ff}')
}

/// Columns that a text takes.
pub fn width(text: &str) -> usize {
    text.graphemes(true).map(columns_of).sum()
}

/// Columns that one grapheme takes, as the drawing library counts them.
pub fn columns_of(grapheme: &str) -> usize {
    grapheme.cell_width().into()
}

/// As much of the front as fits into `columns`, with an ellipsis when something is missing.
pub fn shorten(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let mut short = String::new();
    let mut used = 1;
    for grapheme in text.graphemes(true) {
        used += columns_of(grapheme);
        if used > columns {
            break;
        }
        short.push_str(grapheme);
    }
    if columns > 0 {
        short.push('…');
    }
    short
}

/// Rows of at most `columns`, broken at blanks where there are any. A grapheme wider than that gets a row of its own.
pub fn wrap(text: &str, columns: usize) -> Vec<&str> {
    let mut rows = Vec::new();
    for line in text.split('\n') {
        wrap_line(line, columns.max(1), &mut rows);
    }
    rows
}

fn wrap_line<'a>(line: &'a str, columns: usize, rows: &mut Vec<&'a str>) {
    let (mut start, mut used) = (0, 0);
    // Of the last blank: where it stands, and the columns up to and with it.
    let mut blank: Option<(usize, usize)> = None;
    for (at, grapheme) in line.grapheme_indices(true) {
        let wide = columns_of(grapheme);
        if grapheme == " " && used >= columns {
            // The blank at which the row breaks takes no place.
            rows.push(&line[start..at]);
            (start, used, blank) = (at + 1, 0, None);
            continue;
        }
        while used + wide > columns && at > start {
            match blank.take() {
                Some((end, before)) => {
                    rows.push(&line[start..end]);
                    (start, used) = (end + 1, used - before);
                }
                None => {
                    rows.push(&line[start..at]);
                    (start, used) = (at, 0);
                }
            }
        }
        used += wide;
        if grapheme == " " {
            blank = Some((at, used));
        }
    }
    rows.push(&line[start..]);
}

const TAB: &str = "    ";
/// Marks on one character; a stack of hundreds is an attack on the terminal, not writing.
const MARKS_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_that_steers_a_terminal_gets_through() {
        assert_eq!(harmless("a\u{1b}[2Jb\tc\r\nd\re"), "a\u{fffd}[2Jb    c\nd\u{fffd}e");
        assert_eq!(harmless("\u{9b}31m \u{202e}x\u{200b}"), "\u{fffd}31m \u{fffd}x\u{fffd}");
        assert_eq!(harmless("👩‍👩‍👧 é e\u{301}"), "👩‍👩‍👧 é e\u{301}", "writing stays as it is");
        assert_eq!(harmless(&format!("e{}", "\u{301}".repeat(500))).chars().count(), 1 + MARKS_MAX);
        assert_eq!(harmless_line("a\nb"), "a b");
    }

    #[test]
    fn rows_break_at_blanks() {
        assert_eq!(wrap("the quick brown fox", 10), ["the quick", "brown fox"]);
        assert_eq!(wrap("abcdefghij klm", 4), ["abcd", "efgh", "ij", "klm"]);
        assert_eq!(wrap("a\n\nb", 5), ["a", "", "b"]);
        assert_eq!(wrap("日本語の文", 4), ["日本", "語の", "文"]);
        assert_eq!(wrap("日本", 1), ["日", "本"]);
        assert_eq!(wrap("", 5), [""]);
    }

    #[test]
    fn what_is_too_long_is_shortened_by_columns() {
        assert_eq!(shorten("hello", 5), "hello");
        assert_eq!(shorten("hello", 4), "hel…");
        assert_eq!(shorten("日本語", 4), "日…");
        assert_eq!(shorten("hello", 0), "");
    }

    proptest! {
        #[test]
        fn wrapping_loses_nothing_and_fits(text in "[a-c 日é\n]{0,60}", columns in 2usize..12) {
            let rows = wrap(&text, columns);
            let squeeze = |text: &str| text.replace([' ', '\n'], "");
            prop_assert_eq!(squeeze(&rows.concat()), squeeze(&text));
            for row in rows {
                prop_assert!(width(row) <= columns, "{:?}", row);
            }
        }

        #[test]
        fn any_text_is_harmless(text in any::<String>()) {
            prop_assert!(harmless(&text).chars().all(|c| c == '\n' || !steers(c)));
        }
    }
}

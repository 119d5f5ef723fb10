//! The screen as a function of the model.
//!
//! Trap: any size may come, also one by one. What has no room is left out; nothing here may panic.

use jiff::Timestamp;
use proto::wire::Durability;
use ratatui::Frame;
use ratatui::layout::{Position, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Block, Borders, Clear, Paragraph};

use super::chat::Chat;
use super::command::HELP;
use super::layout::panes;
use super::model::{Link, Model};
use super::rows::{count, last_rows};
use super::text::{shorten, width};

/// Draws everything.
pub fn draw(frame: &mut Frame<'_>, model: &Model) {
    let panes = panes(frame.area());
    chats(frame, panes.chats, model);
    match model.open_chat() {
        Some(chat) => open_chat(frame, panes.title, panes.messages, chat, model),
        None => frame.render_widget(Paragraph::new(Text::from_iter(WELCOME.iter().copied())), panes.messages),
    }
    status(frame, panes.status, model);
    if model.help() {
        help(frame, frame.area());
    } else {
        input(frame, panes.input, model);
    }
}

fn chats(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let block = Block::new().borders(Borders::RIGHT).border_style(DIM);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let columns = usize::from(inner.width);
    let heading = Line::styled(shorten(&format!(" {}", model.me()), columns), BOLD);
    let height = usize::from(inner.height).saturating_sub(1);
    let open = model.open_chat().map(|chat| &chat.name);
    // The open chat is always to be seen.
    let at = model.chats().iter().position(|chat| Some(&chat.name) == open).unwrap_or(0);
    let first = (at + 1).saturating_sub(height);
    let rows = model.chats().iter().skip(first).take(height).map(|chat| {
        let is_open = Some(&chat.name) == open;
        let unread = if chat.unread > 0 { format!(" {} ", chat.unread) } else { String::new() };
        let title_columns = columns.saturating_sub(2 + width(&unread));
        let title = shorten(&chat.title, title_columns);
        let blank = " ".repeat(title_columns.saturating_sub(width(&title)));
        let style = match (is_open, chat.unread > 0) {
            (true, _) => BOLD,
            (false, true) => Style::new().fg(Color::Yellow),
            (false, false) => Style::new(),
        };
        let is_there = model.there(&chat.name).is_some_and(|(online, _)| online);
        let mark = match (is_open, is_there) {
            (true, _) => "› ",
            (false, true) => "• ",
            (false, false) => "  ",
        };
        Line::from(vec![Span::styled(format!("{mark}{title}{blank}"), style), Span::styled(unread, REVERSED)])
    });
    frame.render_widget(Paragraph::new(Text::from_iter(std::iter::once(heading).chain(rows))), inner);
}

fn open_chat(frame: &mut Frame<'_>, title: Rect, area: Rect, chat: &Chat, model: &Model) {
    let (columns, height) = (usize::from(area.width), usize::from(area.height));
    let mut below = chat.below;
    if below > 0 {
        // The window may have grown since.
        below = below.min(count(chat, columns, model.zone()).saturating_sub(height));
    }
    let mut heading = vec![Span::styled(shorten(&chat.title, columns), BOLD)];
    let about = about(chat, model);
    let room = columns.saturating_sub(width(&chat.title) + 2);
    if !about.is_empty() && room > 0 {
        heading.push(Span::styled(format!("  {}", shorten(&about, room)), DIM));
    }
    if below > 0 {
        heading
            .push(Span::styled(format!("  {below} more rows below, PgDn"), Style::new().fg(Color::Yellow)));
    }
    frame.render_widget(Line::from(heading), title);
    let rows = last_rows(chat, columns, height + below, model.zone());
    let end = rows.len().saturating_sub(below);
    let shown = rows[end.saturating_sub(height)..end].to_vec();
    frame.render_widget(Paragraph::new(shown), area);
}

/// The number of a group, how the other user is, and who is writing.
fn about(chat: &Chat, model: &Model) -> String {
    let news = news(chat, model);
    match chat.title != *chat.name && chat.is_group() {
        true if news.is_empty() => chat.name.to_string(),
        true => format!("{}  {news}", chat.name),
        false => news,
    }
}

fn news(chat: &Chat, model: &Model) -> String {
    let writing: Vec<String> = model.writing().map(super::text::harmless_line).collect();
    match (writing.as_slice(), model.there(&chat.name)) {
        ([one], _) if chat.title == *one => "is writing …".to_owned(),
        ([one], _) => format!("{one} is writing …"),
        ([_, ..], _) => format!("{} are writing …", writing.join(", ")),
        ([], Some((true, _))) => "online".to_owned(),
        ([], Some((false, last_seen_s))) if last_seen_s > 0 => {
            let at = i64::try_from(last_seen_s).ok().and_then(|at| Timestamp::from_second(at).ok());
            let shown = |at: Timestamp| {
                at.to_zoned(model.zone().clone()).strftime("last seen %a %-d %b %H:%M").to_string()
            };
            at.map_or_else(String::new, shown)
        }
        ([], _) => String::new(),
    }
}

fn status(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let columns = usize::from(area.width);
    let (mut left, style) = match model.link() {
        Link::Connecting { problem: None } => ("connecting …".to_owned(), Style::new().fg(Color::Yellow)),
        Link::Connecting { problem: Some(problem) } => {
            (format!("offline, connecting …: {problem}"), Style::new().fg(Color::Red))
        }
        Link::Online { address, durability } => match durability {
            Durability::Strict => {
                (format!("online {address}, durability strict"), Style::new().fg(Color::Green))
            }
            Durability::Weak => {
                (format!("online {address}, durability weak"), Style::new().fg(Color::Yellow))
            }
            Durability::Unknown => (format!("online {address}"), Style::new().fg(Color::Yellow)),
        },
    };
    if model.unanswered() > 0 {
        left = format!("{left}, {} sending", model.unanswered());
    }
    let (left, style) = match model.remark() {
        Some(remark) => (remark.to_owned(), Style::new().fg(Color::Yellow)),
        None => (left, style),
    };
    let left = shorten(&left, columns);
    let right = format!("{}  /help", super::text::harmless_line(model.device()));
    let mut spans = vec![Span::styled(left.clone(), style)];
    let room = columns.saturating_sub(width(&left) + 2);
    if width(&right) <= room {
        spans.push(Span::raw(" ".repeat(room + 2 - width(&right))));
        spans.push(Span::styled(right, DIM));
    }
    frame.render_widget(Line::from(spans), area);
}

fn input(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    const PROMPT: &str = "> ";
    let columns = usize::from(area.width).saturating_sub(PROMPT.len());
    let (view, cursor) = model.editor().view(columns);
    frame.render_widget(Line::from(vec![Span::styled(PROMPT, BOLD), Span::raw(view)]), area);
    let x = area.x.saturating_add((PROMPT.len() + cursor) as u16);
    if area.height > 0 && x < area.right() {
        frame.set_cursor_position(Position::new(x, area.y));
    }
}

fn help(frame: &mut Frame<'_>, screen: Rect) {
    let keys = HELP.iter().map(|(key, _)| width(key)).max().unwrap_or(0);
    let rows: Vec<Line<'_>> = HELP
        .iter()
        .map(|(key, does)| {
            let blank = " ".repeat(keys - width(key) + 2);
            Line::from(vec![Span::styled(*key, BOLD), Span::raw(blank), Span::raw(*does)])
        })
        .collect();
    let columns = rows.iter().map(Line::width).max().unwrap_or(0) as u16 + 4;
    let (width, height) = (columns.min(screen.width), (rows.len() as u16 + 2).min(screen.height));
    let area = Rect {
        x: screen.x + (screen.width - width) / 2,
        y: screen.y + (screen.height - height) / 2,
        width,
        height,
    };
    let block = Block::bordered().title(" help ").title_bottom(" any key closes it ");
    frame.render_widget(Clear, area);
    frame.render_widget(Paragraph::new(rows).block(block), area);
}

const WELCOME: &[&str] =
    &["Nobody has written yet.", "", "/chat NAME  opens a chat", "/help       shows what there is"];
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const REVERSED: Style = Style::new().add_modifier(Modifier::REVERSED);

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::model::tests::{enter, message, model};
    use super::*;

    /// Draws and reads the screen, blanks at the ends of rows cut off.
    fn shown(model: &Model, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model)).unwrap();
        let text = terminal.backend().to_string();
        let row = |row: &str| {
            let row = row.split("\" Hidden by multi-width").next().unwrap_or(row);
            row.trim_matches('"').trim_end().to_owned()
        };
        text.lines().map(row).collect()
    }

    fn conversation() -> Model {
        let mut model = model();
        model.connected("127.0.0.1:7000".to_owned(), Durability::Strict);
        model.message(&message("alice:bob", 1, "bob", "hi alice"));
        model.message(&message("alice:bob", 2, "alice", "hi bob, 日本 and é"));
        model.message(&message("alice:carol", 3, "carol", "lunch?"));
        enter(&mut model, "on its way");
        model.act(super::super::model::Action::Insert("typing".to_owned()), 1);
        model
    }

    #[test]
    fn the_screen_of_a_conversation() {
        let expected = [
            " alice         │ bob",
            "  carol      1 │ What this device holds of the chat begins",
            "› bob          │ here.",
            "               │ ── Thu 1 Jan 1970 ──",
            "               │ 00:01    bob: hi alice",
            "               │ 00:02  ✓ alice: hi bob, 日本 and é",
            "               │ 00:00  … alice: on its way",
            "               │",
            "online 127.0.0.1:7000, durability strict, 1 sending",
            "> typing",
        ];
        assert_eq!(shown(&conversation(), 60, 10), expected);
    }

    #[test]
    fn who_is_there_and_who_is_writing_stands_beside_the_name() {
        let mut model = conversation();
        model.presence("bob", true, 0);
        model.presence("carol", true, 0);
        let rows = shown(&model, 60, 10);
        assert_eq!(
            (&*rows[0], &*rows[1]),
            (" alice         │ bob  online", "• carol      1 │ What this device holds of the chat begins")
        );
        model.presence("bob", false, 1_764_000_000);
        assert!(
            shown(&model, 80, 10)[0].ends_with("│ bob  last seen Mon 24 Nov 16:00"),
            "{:?}",
            shown(&model, 80, 10)
        );
        model.typing(&"alice:bob".into(), "bob", false, 1_000_000);
        model.typing(&"alice:carol".into(), "carol", false, 1_000_000);
        assert!(shown(&model, 60, 10)[0].ends_with("│ bob  is writing …"));
        assert_eq!(model.writing_until_us(2_000_000), Some(7_000_000));
        assert_eq!(model.writing_until_us(7_000_000), None);
        assert!(shown(&model, 80, 10)[0].ends_with("16:00"));
        model.typing(&"alice:bob".into(), "bob", false, 8_000_000);
        model.message(&message("alice:bob", 9, "bob", "there"));
        assert!(shown(&model, 80, 10)[0].ends_with("16:00"), "the message is written");
        model.disconnected("gone");
        assert!(shown(&model, 80, 10)[0].ends_with("│ bob"), "nobody knows");
    }

    #[test]
    fn a_group_is_called_by_its_title() {
        let mut model = model();
        let made = client::change(proto::wire::GroupAction::GroupCreate, "Chess\u{1b} club", &[]);
        let body = client::Body::group(&made);
        model.message(&client::Message { body, ..message("#17", 1, "bob", "") });
        let rows = shown(&model, 80, 10);
        assert!(rows[0].ends_with("│ Chess\u{fffd} club  #17"), "{rows:?}");
        assert!(rows[1].starts_with("› Chess\u{fffd} club"), "{rows:?}");
        let made = client::change(proto::wire::GroupAction::GroupRename, "Rooks", &[]);
        let body = client::Body::group(&made);
        model.message(&client::Message { body, ..message("#17", 2, "bob", "") });
        model.typing(&"#17".into(), "bob", false, 1);
        assert!(shown(&model, 80, 10)[0].ends_with("│ Rooks  #17  bob is writing …"));
    }

    #[test]
    fn the_screen_before_anything() {
        let mut model = model();
        model.problem("127.0.0.1:7000: Connection refused");
        let rows = shown(&model, 70, 6);
        assert!(rows[1].ends_with("│ Nobody has written yet."), "{rows:?}");
        assert_eq!(rows[4], "offline, connecting …: 127.0.0.1:7000: Connection refused  chat  /help");
    }

    #[test]
    fn a_narrow_screen_shows_the_open_chat() {
        let rows = shown(&conversation(), 30, 6);
        assert_eq!(rows[0], "bob");
        assert_eq!(rows[3], "00:00  … alice: on its way");
        assert_eq!(rows[5], "> typing");
    }

    #[test]
    fn scrolled_up_it_says_so() {
        let mut model = model();
        (1..=50).for_each(|seq| model.message(&message("alice:bob", seq, "bob", &format!("line {seq}"))));
        model.act(super::super::model::Action::PageUp, 1);
        let rows = shown(&model, 80, 20);
        assert!(rows[0].ends_with("│ bob  16 more rows below, PgDn"), "{rows:?}");
        assert!(rows[17].ends_with("bob: line 34"), "{rows:?}");
    }

    #[test]
    fn the_help_lists_keys_and_commands_and_fits_a_small_terminal() {
        let mut model = model();
        enter(&mut model, "/help");
        let rows = shown(&model, 80, 20).join("\n");
        assert!(HELP.iter().all(|(key, does)| rows.contains(key) && rows.contains(does)), "{rows}");
    }

    #[test]
    fn no_text_of_a_stranger_reaches_the_terminal_as_it_is() {
        let mut model = model();
        model.message(&message("alice:b\u{202e}ob", 1, "b\u{202e}ob", "\u{1b}]0;title\u{7}\u{9b}2J"));
        model.disconnected("\u{1b}[2J");
        let rows = shown(&model, 80, 8).concat();
        assert!(
            rows.contains('\u{fffd}') && !rows.contains(['\u{1b}', '\u{7}', '\u{9b}', '\u{202e}']),
            "{rows}"
        );
    }
}
